"""``gst:PIPELINE``: what a GStreamer pipeline gives, for example a Jetson's CSI camera.

`gst-launch-1.0` runs it, as a process of its own, and writes into a pipe that PyAV reads: neither OpenCV's wheels nor a virtual
environment have GStreamer, while the program is on every Jetson. The pipeline ends before its sink:

    gst:nvarguscamerasrc sensor-id=0 ! video/x-raw(memory:NVMM),width=1280,height=720,framerate=30/1 ! nvvidconv ! video/x-raw

Raw pictures in Matroska: each has its size and its time with it, and a change of size is refused rather than written on
(``y4menc`` goes on under its first header, so that pictures would be made of parts of two).
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edgekit.children import end_with_parent

from .options import CameraOptions
from .slots import Pixels
from .trouble import Trouble, trouble_of

if TYPE_CHECKING:
    from .decode import Item

__all__ = ["GST_LAUNCH", "gstreamer_pictures"]

GST_LAUNCH = "gst-launch-1.0"
_PACKAGES = "apt-get install gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good"
# FFmpeg takes YUV of an unknown matrix for BT.601.
_SINK = "! videoconvert ! video/x-raw,format=I420,colorimetry=bt601 ! matroskamux streamable=true ! fdsink fd=1 sync=false"
_ELEMENT = re.compile(r"^from element \S*:(\S+): ")


def gstreamer_pictures(pipeline: str, options: CameraOptions) -> Iterator[Item]:
    """Until the pipeline ends, which is a `Trouble` too: it is there to go on."""
    program = shutil.which(GST_LAUNCH)
    if program is None:
        raise Trouble(f"{GST_LAUNCH} is not installed: {_PACKAGES}")
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(  # noqa: S603  the pipeline is the user's own
            [program, "-q", *shlex.split(pipeline), *shlex.split(_SINK)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            preexec_fn=end_with_parent,
        )
        assert process.stdout is not None
        try:
            yield from _pictures(process.stdout.fileno(), options)
            process.wait()  # it is about to end, and says why
        except Trouble as trouble:
            raise Trouble(_error(said) or trouble.reason, trouble.final) from None
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        raise Trouble(_error(said) or "the pipeline ended")


def _pictures(pipe: int, options: CameraOptions) -> Iterator[Item]:
    import av

    from .decode import Picture, check_size, rgb_rows

    try:
        container = av.open(f"pipe:{pipe}", format="matroska", options={"analyzeduration": "0", "probesize": "32"})
        with container:
            stream = container.streams.video[0]
            context = stream.codec_context
            width, height = context.width, context.height
            check_size(width, height, options)
            if context.pix_fmt != "yuv420p":
                raise Trouble(f"the pipeline gives {context.pix_fmt}, not I420")
            frame = av.VideoFrame(width, height, "yuv420p")
            for packet in container.demux(stream):
                now = time.monotonic()
                if packet.size:
                    data: Any = packet
                    _fill(frame, np.frombuffer(data, np.uint8))
                    yield Picture(rgb_rows(frame), now, None if packet.pts is None else float(packet.pts * packet.time_base))
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        raise trouble_of(error, "") from None


def _fill(frame: Any, data: Pixels) -> None:
    """An I420 picture as GStreamer has it in memory: rows are padded to 4 bytes, their number to an even one."""
    across, down = (frame.width + 1) // 2, (frame.height + 1) // 2
    sizes = [(rows, (columns + 3) // 4 * 4) for rows, columns in ((2 * down, frame.width), (down, across), (down, across))]
    if data.size != sum(rows * stride for rows, stride in sizes):
        raise Trouble(f"a picture of {data.size} bytes came, which is none of {frame.width} x {frame.height}")
    start = 0
    for plane, (rows, stride) in zip(frame.planes, sizes, strict=True):
        there = data[start : start + rows * stride].reshape(rows, stride)
        here: Pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        height, width = min(rows, plane.height), min(stride, plane.width)
        here[:height, :width] = there[:height, :width]
        start += rows * stride


def _error(said: IO[bytes]) -> str:
    """The first line that says what went wrong, with what the system said to it; and what to do."""
    said.seek(0)
    lines = [line.strip() for line in said.read(65536).decode("utf-8", "replace").splitlines()]
    first = next((line for line in lines if line.startswith(("ERROR", "WARNING: erroneous"))), "")
    if not first:
        return ""
    if any("Caps changes are not supported" in line for line in lines):
        return "its pictures changed their size"
    words = _ELEMENT.sub(r"\1: ", first.removeprefix("ERROR: ").removeprefix("WARNING: "))
    why = next((line for line in lines if line.startswith(("system error:", "No such file"))), "")
    words = words.rstrip(".") + (f" ({why.removeprefix('system error: ')})" if why else "")
    cure = f"is its plugin installed? {_PACKAGES}" if "no element" in words else f"try it: {GST_LAUNCH} PIPELINE ! fakesink"
    return f"{words[:200]}; {cure}"

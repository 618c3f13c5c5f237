"""``gst:PIPELINE``: what a GStreamer pipeline gives, for example a Jetson's CSI camera.

`gst-launch-1.0` runs it, as a process of its own, and writes YUV4MPEG into a pipe that PyAV reads: neither OpenCV's wheels nor
a virtual environment have GStreamer, while the program is on every Jetson. The pipeline ends before its sink:

    gst:nvarguscamerasrc sensor-id=0 ! video/x-raw(memory:NVMM),width=1280,height=720,framerate=30/1 ! nvvidconv ! video/x-raw
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from .options import CameraOptions
from .trouble import Trouble

if TYPE_CHECKING:
    from .decode import Item

__all__ = ["GST_LAUNCH", "gstreamer_pictures"]

GST_LAUNCH = "gst-launch-1.0"
_SINK = "! videoconvert ! video/x-raw,format=I420 ! y4menc ! fdsink fd=1 sync=false"


def gstreamer_pictures(pipeline: str, options: CameraOptions) -> Iterator[Item]:
    from .child import end_with_parent
    from .decode import stream_pictures

    program = shutil.which(GST_LAUNCH)
    if program is None:
        raise Trouble(f"{GST_LAUNCH} is not installed: apt-get install gstreamer1.0-tools gstreamer1.0-plugins-good")
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
            yield from stream_pictures(f"pipe:{process.stdout.fileno()}", options, {}, "yuv4mpegpipe")
        except Trouble as trouble:
            raise Trouble(_error(said) or trouble.reason) from None
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        raise Trouble(_error(said) or "the pipeline ended")


def _error(said: IO[bytes]) -> str:
    """The last line that says what went wrong."""
    said.seek(0)
    lines = said.read(65536).decode("utf-8", "replace").splitlines()
    about = [line.strip() for line in lines if line.startswith(("ERROR", "WARNING: erroneous"))]
    return about[-1].removeprefix("ERROR: ").removeprefix("WARNING: ")[:300] if about else ""

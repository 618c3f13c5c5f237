"""Pictures out of files, streams and cameras; runs in a camera's own process (`child`)."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .address import PATTERN, kind_of
from .options import CameraOptions
from .slots import Pixels
from .tls import tls_options, tls_trouble
from .trouble import Trouble, trouble_of

__all__ = ["Item", "Picture", "Refused", "check_size", "pictures", "rgb_rows"]

#: Packets in a row without a picture, after which a stream is taken for no video.
HOPELESS = 300
_BEAT_S = 0.25
_INTRA = 1  # AV_PICTURE_TYPE_I: in H.264 it need not be a key frame


class Picture(NamedTuple):
    """``rows``: uint8 (H, W * 3) RGB, valid until the next one is asked for; ``monotonic``: when its data was there.

    ``at``: the source's own time of it in seconds, where it tells one.
    """

    rows: Pixels
    monotonic: float
    at: float | None = None


class Refused(NamedTuple):
    """Packets that the decoder or the container's reader could make nothing of: how many pictures they were nobody knows."""

    packets: int


#: A picture; how many pictures came damaged (0: a pause is kept); refused packets; or None: data came, but no picture yet.
Item = Picture | Refused | int | None


def pictures(spec: str, options: CameraOptions) -> Iterator[Item]:
    """Until the source ends. Raises `Trouble`."""
    kind = kind_of(spec)
    if kind == "pattern":
        return _pattern(spec, options)
    if kind in ("camera", "v4l2"):
        from .opencv import camera_pictures

        return camera_pictures(spec, options)
    if kind == "gst":
        from .gstreamer import gstreamer_pictures

        return gstreamer_pictures(spec.partition(":")[2], options)
    return _file(spec, options) if kind == "video" else stream_pictures(spec, options, _stream_options(kind, options))


def _stream_options(kind: str, options: CameraOptions) -> dict[str, str]:
    found = {"analyzeduration": "1000000", **tls_options(kind, options.certificate)}  # us; the default of 5 s is long
    if kind in ("rtsp", "rtsps"):
        found["rtsp_transport"] = options.transport
    return found


def _file(path: str, options: CameraOptions) -> Iterator[Item]:
    while True:
        came = False
        for item in stream_pictures(path, options, {}):
            came = came or isinstance(item, Picture)
            yield item
        if not options.loop or not came:
            return


def stream_pictures(address: str, options: CameraOptions, asked: dict[str, str]) -> Iterator[Item]:
    """What PyAV reads at ``address``. Raises `Trouble`."""
    import av

    av.logging.set_level(av.logging.PANIC)
    try:
        container = av.open(address, options=asked, timeout=(options.open_s, None))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        words = tls_trouble(address, options.certificate) if getattr(error, "errno", 0) == errno.EIO else ""
        raise Trouble(words) if words else trouble_of(error, address) from None
    with container:
        if not container.streams.video:
            raise Trouble("there is no video in it", final=True)
        stream = container.streams.video[0]
        context = stream.codec_context
        check_size(context.width, context.height, options)
        context.options = {"max_pixels": str(options.max_pixels)}
        if options.damaged == "drop":
            context.options = {**context.options, "err_detect": "explode"}
        yield from _paced(_decoded(container, stream, options, address), options)


def _decoded(container: Any, stream: Any, options: CameraOptions, address: str) -> Iterator[Item]:
    import av

    # Formats without times of their own get them from a frame rate that FFmpeg assumes: a pause does not show in them.
    timed = kind_of(address) == "video" or not container.format.flags & av.format.Flags.no_timestamps.value
    whole = _Whole(options, _may_lose(kind_of(address), options))
    packets, barren, unread = container.demux(stream), 0, False
    while barren < HOPELESS:
        packet = None
        try:
            packet = next(packets, None)
            if packet is None:
                return
            now = time.monotonic()
            whole.missed(packet.is_corrupt)
            frames = packet.decode()
        except (av.error.EOFError, StopIteration):
            return
        except (av.error.FFmpegError, OSError, ValueError) as error:
            # Whatever a packet that came does to its decoder is damage: a wrong header asks for what FFmpeg lacks. Before it
            # has come, the line may be cut.
            damage = (av.error.InvalidDataError, av.error.ExternalError, av.error.UnknownError)
            if packet is None and not isinstance(error, damage):
                raise trouble_of(error, address) from None
            again, unread = unread and packet is None, packet is None
            packets, barren = container.demux(stream), barren + 1  # the iterator ends with what it raises
            whole.missed(True)
            yield None if again else Refused(1)
            continue
        barren, unread = 0 if frames else barren + 1, False
        if not frames:
            yield None
        for frame in frames:
            check_size(frame.width, frame.height, options)
            yield Picture(rgb_rows(frame), now, frame.time if timed else None) if whole.is_true(frame) else 1
    raise Trouble("data comes, but no pictures")


def _may_lose(kind: str, options: CameraOptions) -> bool:
    """Whether packets may be lost on the way without FFmpeg's word: it passes over holes in RTP's numbers."""
    return kind == "rtp" or (kind in ("rtsp", "rtsps") and options.transport == "udp")


class _Whole:
    """Which pictures are what the camera saw: those in which the decoder found no error and, where others are built on the ones
    before, none since the last that stands by itself. A stream without such ones is taken as it comes after `HOPELESS` of them.

    With ``may_lose`` a step in the pictures' own times that is half as long again as the steady ones before is a loss too.
    """

    _STEADY = 5

    def __init__(self, options: CameraOptions, may_lose: bool) -> None:
        self._drop, self._may_lose = options.damaged == "drop", may_lose
        self._broken = self._drop  # a stream that is joined in its midst
        self._waited = self._steady = 0
        self._step = self._at = 0.0

    def missed(self, something: bool) -> None:
        if something and self._drop:
            self._broken, self._waited = True, 0

    def is_true(self, frame: Any) -> bool:
        self.missed(self._may_lose and frame.time is not None and self._skips(frame.time))
        if frame.is_corrupt:
            self.missed(True)
            return not self._drop
        self._waited += 1
        if frame.key_frame or frame.pict_type == _INTRA or self._waited > HOPELESS:
            self._broken = False
        return not self._broken

    def _skips(self, at: float) -> bool:
        step, self._at = at - self._at, at
        if self._steady >= self._STEADY and step > 1.5 * self._step:
            return True
        if abs(step - self._step) <= 0.2 * self._step:
            self._steady += 1
        else:
            self._step, self._steady = step, 0
        return False


def rgb_rows(frame: Any) -> Pixels:
    rgb = frame.reformat(format="rgb24")
    plane = rgb.planes[0]
    rows: Pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width * 3]
    quarters = round(getattr(frame, "rotation", 0) / 90) % 4
    if quarters:  # as a phone was held
        turned = np.rot90(rows.reshape(frame.height, frame.width, 3), quarters)
        rows = np.ascontiguousarray(turned).reshape(turned.shape[0], -1)
    return rows


def check_size(width: int, height: int, options: CameraOptions) -> None:
    if width * height > options.max_pixels:
        raise Trouble(f"its pictures of {width} x {height} exceed max_pixels = {options.max_pixels}", final=True)


def _paced(items: Iterator[Item], options: CameraOptions) -> Iterator[Item]:
    start: float | None = None
    for item in items:
        if options.paced and isinstance(item, Picture) and item.at is not None:
            start = time.monotonic() - item.at if start is None else start
            yield from _until(start + item.at)
            item = item._replace(monotonic=time.monotonic())
        yield item


def _until(due: float) -> Iterator[int]:
    """Sleep, with signs of life."""
    while (left := due - time.monotonic()) > 0:
        time.sleep(min(left, _BEAT_S))
        if left > _BEAT_S:
            yield 0


def _pattern(spec: str, options: CameraOptions) -> Iterator[Item]:
    """A test picture that moves; the first 8 bytes are its number, little-endian, where it is wide enough."""
    found = PATTERN.match(spec)
    if not found:
        raise Trouble("write pattern:WIDTHxHEIGHT@FPS or pattern:WIDTHxHEIGHT@FPS,FRAMES", final=True)
    width, height, fps = int(found[1]), int(found[2]), float(found[3])
    check_size(width, height, options)
    down, across = (np.arange(length).astype(np.uint8) for length in (height, width + 256))
    ramp = down[:, None, None] + across[None, :, None] + np.array([0, 85, 170], np.uint8)
    start = time.monotonic()
    for number in itertools.count() if not found[4] else range(int(found[4])):
        rows = ramp[:, number % 256 : number % 256 + width].copy().reshape(height, width * 3)
        stamp = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        rows[0, : stamp.size] = stamp[: rows.shape[1]]
        if fps:
            yield from _until(start + number / fps)
        yield Picture(rows, time.monotonic(), number / fps if fps else None)

"""`CameraOptions`: what a camera, stream or video file can be told beside its address."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgekit.errors import UsageError
from edgekit.preprocess import MAX_PIXELS

__all__ = ["CameraOptions"]


class CameraOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Raises `UsageError` for a value out of its range.

    ``queue``: ``newest`` drops the oldest waiting frame where ``depth`` wait already (what live sources do if nothing is
    said), ``wait`` lets the source wait (video files). ``stall_s``: without a picture or data for so long the camera counts as
    down and its process is ended. ``open_s``: how long connecting may take. ``retry_s`` and ``retry_most_s``: the first and
    the longest pause before it is tried again, doubled each time, with jitter. ``loop``: a video file starts again at its end;
    ``paced``: it comes at its own rate, not as fast as it is read. ``transport``: of RTSP. ``certificate``: of https:// and
    rtsps://, a PEM file with the camera's own or its authority's, "" for the system's authorities; "any": who answers is not
    checked. ``width``, ``height``, ``fps`` and
    ``format`` (four letters, for example ``MJPG``): what a local camera is asked for, 0 and "" for its own choice.
    ``max_pixels``: larger pictures are refused, before they are decoded where the stream tells their size; of images too.
    ``damaged``: pictures that the decoder found errors in, and those that are built on them, up to the next key frame, are
    dropped, or kept with what it made up in the place of the lost parts.
    """

    queue: Literal["", "newest", "wait"] = ""
    depth: int = 4
    stall_s: float = 2.0
    open_s: float = 10.0
    retry_s: float = 0.5
    retry_most_s: float = 30.0
    loop: bool = False
    paced: bool = False
    transport: Literal["tcp", "udp"] = "tcp"
    certificate: str = ""
    width: int = 0
    height: int = 0
    fps: float = 0.0
    format: str = ""
    max_pixels: int = MAX_PIXELS
    damaged: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:  # a NaN is in no range
                raise UsageError(f"{name} is {value:g}", f"give {low:g} to {high:g}")
        if self.retry_most_s < self.retry_s:
            raise UsageError(
                f"retry_most_s {self.retry_most_s:g} is below retry_s {self.retry_s:g}", "make it as long, or longer"
            )
        if bool(self.width) != bool(self.height):
            raise UsageError("width and height come together", "give both, or neither")


_RANGES = (
    ("depth", 1, 64),
    ("stall_s", 0.2, 3600),
    ("open_s", 0.5, 3600),
    ("retry_s", 0.01, 3600),
    ("retry_most_s", 0.01, 86400),
    ("width", 0, 65536),
    ("height", 0, 65536),
    ("fps", 0, 1000),
    ("max_pixels", 1, 1_000_000_000),
)

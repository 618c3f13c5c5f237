"""Sources: where frames come from. Each is an iterable of `Captured`; one file a kind, named in `SOURCES`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edgekit.errors import UsageError
from edgekit.preprocess import Frame
from edgekit.scanner.stop import Stop

from .address import LIVE, kind_of, shown

if TYPE_CHECKING:
    from .options import CameraOptions

__all__ = ["SOURCES", "Captured", "Counting", "Notice", "open_source", "open_sources"]


class Captured(NamedTuple):
    """One frame as it came: uint8 (H, W) or (H, W, 3) RGB, or None and the ``error`` that says why there is none.

    ``source`` is the file, camera or URL; ``seq`` counts from 0; ``time`` is the wall clock in seconds since the epoch,
    ``monotonic`` `time.monotonic` of the same moment: what milliseconds are counted by.
    """

    frame: Frame | None
    source: str
    seq: int
    time: float
    error: str = ""
    monotonic: float = 0.0


class Notice(NamedTuple):
    """What a source says beside its frames, an event of its own: ``kind`` is its ``event``, ``details`` its other fields.

    ``camera``: its state changed (``state``: up, down; ``reason``). ``gap``: frames are missing between two that came.
    """

    kind: str
    source: str
    time: float
    monotonic: float
    details: dict[str, Any]


class Counting(Protocol):
    """What a source that captures by itself has beside its iterator; asked from the scanning thread."""

    def counts(self) -> list[dict[str, Any]]:
        """A row a camera: at least ``source``, ``captured``, ``dropped`` (a dict reason -> count, of frames that were never
        given out), ``in_flight``; captured = given out + dropped + in flight, at any moment."""
        ...

    def more(self, count: int) -> list[Captured]:
        """Up to ``count`` frames that are there already."""
        ...


#: kind of address -> (module, function ``(target, watch, stop) -> Iterator[Captured | Notice | None]``); "" is a path.
SOURCES: dict[str, tuple[str, str]] = {
    "": ("edgekit.scanner.sources.files", "open_files"),
    **dict.fromkeys(("video", "pattern", *sorted(LIVE)), ("edgekit.scanner.sources.cameras", "open_camera")),
}
_KNOWN = "give an image, a video file, a folder of images, camera:N, v4l2:/dev/videoN, rtsp://..., http://... or gst:PIPELINE"


def open_source(
    spec: str, *, watch: bool = False, stop: Stop | None = None, options: CameraOptions | None = None
) -> Iterator[Captured | Notice | None]:
    """The frames of a source. ``watch`` keeps waiting for new files in a folder until ``stop`` is set.

    Raises `UsageError` for a kind that does not exist, `DataError` where there is nothing at ``spec``, `MissingExtra` where
    what decodes it is not installed.
    """
    kind = _kind(spec)
    module, function = SOURCES[kind]
    more = () if options is None else (options,)
    opened: Iterator[Captured | Notice | None] = getattr(importlib.import_module(module), function)(
        spec, watch, stop or Stop(), *more
    )
    return opened


def open_sources(
    specs: Sequence[str] | Mapping[str, str],
    options: CameraOptions | Mapping[str, CameraOptions] | None = None,
    stop: Stop | None = None,
) -> Iterator[Captured | Notice | None]:
    """Several cameras, streams and video files as one source (`cameras.Cameras`); ``specs`` may name them.

    Raises as `open_source` does; `UsageError` where an image or a folder is among several.
    """
    from .cameras import Cameras

    addresses = list(specs.values() if isinstance(specs, Mapping) else specs)
    kinds = [_kind(spec) for spec in addresses]
    if kinds == [""]:
        return open_source(addresses[0], stop=stop)
    for spec, kind in zip(addresses, kinds, strict=True):
        if not kind:
            raise UsageError(f"{shown(spec)} cannot be one of several sources", "scan images and folders on their own")
    return Cameras(specs, options, stop)


def _kind(spec: str) -> str:
    if not spec:
        raise UsageError("the source is empty", _KNOWN)
    kind = kind_of(spec)
    if kind not in SOURCES:
        raise UsageError(f"there is no source {kind}:", _KNOWN)
    return kind

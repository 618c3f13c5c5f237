"""Sources: where frames come from. Each is an iterable of `Captured`; one file a kind, named in `SOURCES`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from edgekit.errors import UsageError
from edgekit.preprocess import Frame
from edgekit.scanner.stop import Stop

__all__ = ["SOURCES", "Captured", "Counting", "Notice", "open_source"]


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


#: scheme -> (module, function ``(target, watch, stop) -> Iterator[Captured | Notice | None]``); "" is a path.
SOURCES: dict[str, tuple[str, str]] = {
    "": ("edgekit.scanner.sources.files", "open_files"),
}
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]+):")
_KNOWN = "give an image file or a folder of images; camera:, rtsp:, v4l2:, gst: and video are not there in this version"


def open_source(spec: str, *, watch: bool = False, stop: Stop | None = None) -> Iterator[Captured | Notice | None]:
    """The frames of a source. ``watch`` keeps waiting for new files in a folder until ``stop`` is set.

    Raises `UsageError` for a kind that does not exist, `DataError` where there is nothing at ``spec``.
    """
    found = _SCHEME.match(spec)
    scheme = found.group(1).lower() if found and not Path(spec).exists() else ""
    if scheme not in SOURCES:
        raise UsageError(f"there is no source {scheme}: in this version", _KNOWN)
    if not spec:
        raise UsageError("the source is empty", _KNOWN)
    module, function = SOURCES[scheme]
    opened: Iterator[Captured | Notice | None] = getattr(importlib.import_module(module), function)(spec, watch, stop or Stop())
    return opened

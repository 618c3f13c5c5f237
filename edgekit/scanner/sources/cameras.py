"""`Cameras`: several cameras, streams and video files at once, as one source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgekit.errors import UsageError
from edgekit.scanner.stop import Stop

from . import Captured, Notice
from .address import shown
from .options import CameraOptions

__all__ = ["Cameras", "open_camera"]


def open_camera(target: str, watch: bool, stop: Stop, options: CameraOptions | None = None) -> Cameras:
    """One camera, stream or video file. Raises `UsageError`, `DataError`, `MissingExtra`."""
    if watch:
        raise UsageError(f"--watch wants a folder, not {shown(target)}", "leave --watch out")
    return Cameras([target], options, stop)


class Cameras:
    """``specs``: addresses, or name -> address; ``options`` for all of them, or name -> options.

    An iterator of `Captured`, `Notice` and, at least four times a second, None. Cameras take turns. It ends once all of them
    have (video files do), or ``stop`` is set; with ``stay`` only then.
    """

    def __init__(
        self,
        specs: Sequence[str] | Mapping[str, str],
        options: CameraOptions | Mapping[str, CameraOptions] | None = None,
        stop: Stop | None = None,
        *,
        stay: bool = False,
    ) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Captured | Notice | None]:
        raise NotImplementedError

    def add(self, spec: str, name: str = "", options: CameraOptions | None = None) -> str:
        """From any thread; returns the camera's name. Raises `UsageError`, `DataError`, `MissingExtra`."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """From any thread; its waiting frames are dropped, reason ``removed``. Raises `UsageError` for an unknown name."""
        raise NotImplementedError

    def more(self, count: int) -> list[Captured]:
        """Up to ``count`` frames that wait already."""
        raise NotImplementedError

    def counts(self) -> list[dict[str, Any]]:
        """As `Counting.counts`, a row a camera, those removed and ended too."""
        raise NotImplementedError

    def close(self) -> None:
        """End every camera's process; waiting frames are dropped, reason ``stopped``."""
        raise NotImplementedError

    def __next__(self) -> Captured | Notice | None:
        raise NotImplementedError

"""The notice board between the scanning thread and those who ask how it is: figures on demand, and a sign of life."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["HANG_S", "Board"]

#: A loop that has not gone round for so long hangs: sources give a sign four times a second.
HANG_S = 10.0


class Board:
    """Figures are made by the scanning thread, between two frames, and only when somebody asked: the accounting is exact, and
    a scan that nobody watches pays nothing. Asking is safe from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._make: Callable[[], dict[str, Any]] | None = None
        self._asked = False
        self._answered = threading.Event()
        self._asking = threading.Lock()
        self._figures: dict[str, Any] = {}
        self._beat = clock()
        #: ``starting`` (models and sources open), ``running``, ``stopping``.
        self.state = "starting"

    def start(self, make: Callable[[], dict[str, Any]]) -> None:
        self._make = make
        self._beat, self.state = self._clock(), "running"

    def round(self, monotonic: float) -> None:
        """Called by the scanning thread each time that its loop went round."""
        self._beat = monotonic
        if self._asked and self._make is not None:
            self._asked = False
            self._figures = self._make()
            self._answered.set()

    def stop(self, well: bool = True) -> None:
        """The last figures stand; where the scan did not end ``well``, those of before."""
        if self._make is not None and well:
            self._figures = self._make()
        self.state = "stopping"
        self._answered.set()

    def silent_s(self) -> float:
        """Seconds since the loop last went round; 0 before it started."""
        return self._clock() - self._beat if self.state == "running" else 0.0

    def figures(self, patience_s: float = 1.0) -> dict[str, Any]:
        """The figures of now; those of the last time where the loop does not answer within ``patience_s``; {} before."""
        with self._asking:
            if self.state == "running":
                self._answered.clear()
                self._asked = True
                self._answered.wait(patience_s)
            return self._figures

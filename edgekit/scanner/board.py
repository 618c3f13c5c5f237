"""The notice board between the scanning thread and those who ask how it is: figures on demand, and a sign of life."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from edgekit.progress import say

__all__ = ["HANG_S", "Board"]

#: A loop that has not gone round for so long hangs: sources give a sign four times a second.
HANG_S = 10.0
WATCH_S = 1.0


class Board:
    """Figures are made by the scanning thread, between two frames, and only when somebody asked: the accounting is exact, and
    a scan that nobody watches pays nothing. Asking is safe from any thread, the scanning one too."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._make: Callable[[], dict[str, Any]] | None = None
        self._reasons: Callable[[dict[str, Any]], list[str]] = lambda figures: []
        self._asked = self._resting = self._finishing = False
        self._made = self._thread = 0
        self._news = threading.Condition()
        self._figures: dict[str, Any] = {}
        self._beat = clock()
        #: ``starting`` (models and sources open), ``running``, ``stopping``.
        self.state = "starting"

    def start(self, make: Callable[[], dict[str, Any]], reasons: Callable[[dict[str, Any]], list[str]]) -> None:
        """``make`` gives the figures, ``reasons`` says of them why the scan is not well."""
        self._make, self._reasons, self._thread = make, reasons, threading.get_ident()
        self._beat, self.state = self._clock(), "running"

    def round(self, monotonic: float) -> None:
        """Called by the scanning thread each time that its loop went round."""
        self._beat = monotonic
        if self._asked:
            self._asked = False
            self._renew()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """In the block the scanning thread is out of the scan, with whoever takes its events: who asks makes the figures."""
        self._resting = True
        try:
            yield
        finally:
            with self._news:  # figures that are being made are of a scan that stands still
                self._resting = False

    def finish(self) -> None:
        """No frames come any more; sinks are waited for as long as they take something."""
        self._finishing = True

    def stop(self, well: bool = True) -> None:
        """The last figures stand; where the scan did not end ``well``, those of before."""
        if well:
            self._renew()
        with self._news:
            self.state = "stopping"
            self._news.notify_all()

    def silent_s(self) -> float:
        """Seconds since the loop last went round; 0 before it started."""
        return self._clock() - self._beat if self.state == "running" else 0.0

    def figures(self, patience_s: float = 1.0) -> dict[str, Any]:
        """The figures of now; those of the last time where the loop does not answer within ``patience_s``; {} before.

        A loop that hangs is not waited for: a page and a scrape must still hear of it.
        """
        with self._news:
            if self._resting or (self.state == "running" and threading.get_ident() == self._thread):
                self._renewed()
            elif self.state == "running":
                made, self._asked = self._made, True
                patience = patience_s if self.silent_s() <= HANG_S else 0.0
                self._news.wait_for(lambda: self._made > made or self.state != "running", patience)
            return self._figures

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """In the block a thread says where the loop hangs, and where it goes round again."""
        ended = threading.Event()

        def watch() -> None:
            hangs = False
            while not ended.wait(WATCH_S):
                why = self.health()
                if why and not hangs:
                    where = "the application holds an event" if self._resting else "a frame or a sink hangs"
                    say(f"{why[0]}: {where}", "error", silent_s=round(self.silent_s(), 1))
                elif hangs and not why:
                    say("the scanning thread goes round again", "warning")
                hangs = bool(why)

        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(1.0)

    def health(self) -> list[str]:
        """Why the scan is not alive; empty where it is."""
        silent = 0.0 if self._finishing else self.silent_s()
        return [f"the scanning thread has been busy for {silent:.0f} s"] if silent > HANG_S else []

    def readiness(self, figures: dict[str, Any]) -> list[str]:
        """Why the scan is not ready, by ``figures`` that were asked for now; empty where it is."""
        if self.state != "running":
            return [f"the scan is {self.state}"]
        return [*self.health(), *(self._reasons(figures) if figures else ["the scan has not gone round yet"])]

    def _renew(self) -> None:
        with self._news:
            self._renewed()
            self._news.notify_all()

    def _renewed(self) -> None:
        if self._make is not None:
            self._figures = self._make()
            self._made += 1

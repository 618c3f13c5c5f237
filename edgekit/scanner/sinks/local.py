"""Sinks on this machine's disk: what a full disk does not take waits in memory, in order; beyond `MOST_HELD` the newest are
dropped, and counted."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from pathlib import Path
from typing import Any

from edgekit.scanner.database import FULL
from edgekit.scanner.events import Event, encode
from edgekit.scanner.outage import MOST_HELD, MOST_HELD_BYTES, Outage, drop_reason

from . import FLUSH_S

__all__ = ["LocalSink"]

FULL_S = 1.0


class LocalSink(ABC):
    """Kinds write one event in `_write`, wholly or not at all. Events leave in the order in which they came."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path
        self._sent = self._bytes = 0  # bytes: of events that could not be written
        self._held: deque[Event] = deque()
        self._dropped: Counter[str] = Counter()
        self._outage = Outage(path)

    def send(self, event: Event) -> None:
        """Raises `OSError` for what no freed space mends; a full disk is said once and waited for."""
        self._held.append(event)
        try:
            problem = self._outage.locked() or self._drain()
        except OSError:
            self._held.pop()
            raise
        self._sent += 1
        if problem:
            self._outage.failed(problem)
            self._hold(problem)

    def flush(self, patience_s: float = FLUSH_S) -> None:
        """Raises `OSError` where the disk has no room after ``patience_s`` seconds, `FULL_S` at most."""
        end = time.monotonic() + min(patience_s, FULL_S)
        while problem := self._drain():
            if time.monotonic() >= end:
                raise OSError(problem.errno, f"{problem.strerror}; {len(self._held)} events are lost", str(self._path))
            time.sleep(0.05)

    def status(self) -> dict[str, Any]:
        """``sent`` = written + ``unsaved`` (they wait in memory for room on the disk) + what was ``dropped`` for that (``disk
        full``, ``file locked``)."""
        return {"sink": self.name, "sent": self._sent, "unsaved": len(self._held), "dropped": dict(self._dropped)}

    @abstractmethod
    def _write(self, event: Event) -> None: ...

    def _waits(self, error: OSError) -> bool:
        """Whether freed space would mend it."""
        return error.errno in FULL

    def _drain(self) -> OSError | None:
        """Write what waits; returns what a full disk says."""
        while self._held:
            try:
                self._write(self._held[0])
            except OSError as error:
                if not self._waits(error):
                    raise
                return error
            written = self._held.popleft()
            if self._bytes:
                self._bytes -= len(encode(written))
        self._outage.over()
        return None

    def _hold(self, problem: OSError) -> None:
        self._outage.waits(problem)
        self._bytes += (size := len(encode(self._held[-1])))
        if len(self._held) > MOST_HELD or self._bytes > MOST_HELD_BYTES:
            self._held.pop()
            self._bytes -= size
            self._dropped[drop_reason(problem)] += 1
            self._outage.drops()

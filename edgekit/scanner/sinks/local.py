"""Sinks on this machine's disk: what a full disk does not take waits in memory, bounded, in order."""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from pathlib import Path
from typing import Any

from edgekit.progress import say
from edgekit.scanner.database import FULL
from edgekit.scanner.events import Event, encode

from . import FLUSH_S

__all__ = ["LocalSink"]

#: Events, and bytes of them, that wait in memory for a full disk; beyond that the newest are dropped, and counted.
MOST_HELD = 1000
MOST_HELD_BYTES = 16 << 20
FULL_S = 1.0
RETRY_S = 0.25  # after a lock of another program: each attempt holds the scan up


class LocalSink(ABC):
    """Kinds write one event in `_write`, wholly or not at all. Events leave in the order in which they came."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path
        self._sent = self._bytes = 0
        self._held: deque[Event] = deque()
        self._dropped: Counter[str] = Counter()
        self._full, self._lost = False, 0  # in this outage
        self._problem: OSError | None = None
        self._retry_at = 0.0

    def send(self, event: Event) -> None:
        """Raises `OSError` for what no freed space mends; a full disk is said once and waited for."""
        self._held.append(event)
        try:  # each attempt at a file that another program has locked takes its time
            problem = self._problem if time.monotonic() < self._retry_at else self._drain()
        except OSError:
            self._held.pop()
            raise
        self._sent += 1
        self._problem = problem
        if problem:
            if problem.errno == errno.EBUSY and time.monotonic() >= self._retry_at:
                self._retry_at = time.monotonic() + RETRY_S
            self._hold(problem)

    def flush(self, patience_s: float = FLUSH_S) -> None:
        """Raises `OSError` where the disk has no room after ``patience_s`` seconds, `FULL_S` at most."""
        end = time.monotonic() + min(patience_s, FULL_S)
        while problem := self._drain():
            if time.monotonic() >= end:
                raise OSError(problem.errno, f"{problem.strerror}; {len(self._held)} events are lost", str(self._path))
            time.sleep(0.05)

    def status(self) -> dict[str, Any]:
        """``sent`` = written + ``unsaved`` (they wait in memory for room on the disk) + ``dropped["disk full"]``."""
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
            if self._full:
                self._bytes -= len(encode(written))
        if self._full:
            self._full, self._bytes = False, 0
            lost = f"; {self._lost} events were dropped" if self._lost else ""
            self._lost = 0
            say(f"there is room again for {self._path}{lost}")
        return None

    def _hold(self, problem: OSError) -> None:
        if not self._full:
            self._full = True
            words = f"new events wait in memory, at most {MOST_HELD}, and a crash loses them"
            say(f"{self._path}: {problem.strerror}; {words}", "warning")
        self._bytes += (size := len(encode(self._held[-1])))
        if len(self._held) > MOST_HELD or self._bytes > MOST_HELD_BYTES:
            self._held.pop()
            self._bytes -= size
            self._dropped["disk full"] += 1
            if not self._lost:
                say(f"{self._path}: no more events fit into memory; new ones are dropped, and counted", "warning")
            self._lost += 1

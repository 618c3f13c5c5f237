"""A file that takes nothing for now, for a full disk or a lock of another program: when it is tried again, what is said."""

from __future__ import annotations

import errno
import time
from pathlib import Path

from edgekit.progress import say

__all__ = ["MOST_HELD", "MOST_HELD_BYTES", "Outage", "drop_reason"]

#: Events, and bytes of them, that wait in memory meanwhile.
MOST_HELD = 1000
MOST_HELD_BYTES = 16 << 20
#: A disk at its brink would say it at every event: so long there must be room before it is said that there is.
QUIET_S = 10.0
RETRY_S = 0.25  # after a lock of another program: each attempt holds the scan up


class Outage:
    """Of one file. What waits in memory, and what is dropped when that is full, is its sink's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0.0  # when the file took nothing, on the monotonic clock; 0: no outage
        self._locked: OSError | None = None
        self._retry = 0.0  # when the lock is tried again, on the monotonic clock
        self._lost = 0  # events that found no room in memory either, in this outage

    def locked(self) -> OSError | None:
        """What a lock said, while it is too early to try again."""
        return self._locked.with_traceback(None) if self._locked and time.monotonic() < self._retry else None

    def failed(self, problem: OSError) -> None:
        """The file refused something."""
        if problem is not self._locked:
            self._locked = problem if problem.errno == errno.EBUSY else None
            self._retry = time.monotonic() + RETRY_S

    def waits(self, problem: OSError) -> None:
        """An event waits in memory for that."""
        if not self._last:
            words = f"new events wait in memory, at most {MOST_HELD}, and a power cut loses them"
            say(f"{self._path}: {problem.strerror}; {words}", "warning")
        self._last = time.monotonic()

    def drops(self) -> None:
        """There is no room in memory for one."""
        if not self._lost:
            say(f"{self._path}: no more events fit into memory; they are dropped, and counted", "warning")
        self._lost += 1

    def over(self) -> None:
        """All that waited is written."""
        self._locked = None
        if self._last and time.monotonic() - self._last > QUIET_S:
            self._last = 0.0
            lost, self._lost = f"; {self._lost} events were dropped" if self._lost else "", 0
            say(f"there is room again for {self._path}{lost}")


def drop_reason(problem: OSError) -> str:
    """Under which word it is counted that an event was dropped meanwhile."""
    return "file locked" if problem.errno == errno.EBUSY else "disk full"

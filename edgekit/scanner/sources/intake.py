"""A camera's frames between its process and the scan: the queue, and what became of every frame."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from . import Notice

__all__ = ["MOST_NOTICES", "Intake", "Waiting"]

#: Notices that nobody takes do not fill the memory: beyond so many the oldest goes, and is counted.
MOST_NOTICES = 256


class Waiting(NamedTuple):
    """A frame that is there: ``take`` copies it out of shared memory, ``leave`` gives its place back."""

    seq: int
    time: float
    monotonic: float
    take: Callable[[], Any]
    leave: Callable[[], None]


class Intake:
    """captured = given out + dropped + in flight, at any moment; used from the camera's thread and the scan's.

    With ``depth`` frames waiting, the next one drops the oldest (``queue full``); a source that waits never gets so far.
    ``came`` is called when something can be taken.
    """

    def __init__(self, depth: int, came: Callable[[], None]) -> None:
        self._depth, self._came = depth, came
        self._lock = threading.Lock()
        self._items: deque[Waiting | Notice] = deque()
        self._frames = self._notices = 0
        self._captured = self._given = self._notices_dropped = 0
        self._dropped: dict[str, int] = {}
        self._closed = ""

    def put(self, frame: Waiting) -> None:
        late: Waiting | None = None
        with self._lock:
            self._captured += 1
            if self._closed:
                self._drop(self._closed, 1)
                late = frame
            else:
                if self._frames == self._depth:
                    late = self._oldest()
                    self._drop("queue full", 1)
                self._items.append(frame)
                self._frames += 1
        if late is not None:
            late.leave()
        self._came()

    def lost(self, reason: str, count: int) -> None:
        """Frames that the camera's process captured and did not hand on."""
        with self._lock:
            self._captured += count
            self._drop(reason, count)

    def say(self, notice: Notice) -> None:
        """In its place among the frames."""
        with self._lock:
            if self._closed:
                return
            if self._notices == MOST_NOTICES:
                self._items.remove(next(item for item in self._items if isinstance(item, Notice)))
                self._notices_dropped += 1
            else:
                self._notices += 1
            self._items.append(notice)
        self._came()

    def take(self, frames_only: bool = False) -> Waiting | Notice | None:
        """The next item, given out; None where nothing waits, or with ``frames_only`` a notice comes first."""
        with self._lock:
            if not self._items or (frames_only and isinstance(self._items[0], Notice)):
                return None
            item = self._items.popleft()
            if isinstance(item, Notice):
                self._notices -= 1
            else:
                self._frames -= 1
                self._given += 1
            return item

    def waits(self) -> bool:
        return bool(self._items)

    def close(self, reason: str) -> None:
        """What waits is dropped with ``reason``, and so is whatever still comes."""
        with self._lock:
            self._closed = self._closed or reason
            left = [item for item in self._items if isinstance(item, Waiting)]
            self._drop(self._closed, len(left))
            self._items.clear()
            self._frames = self._notices = 0
        for item in left:
            item.leave()

    def counts(self) -> dict[str, Any]:
        with self._lock:
            return {
                "captured": self._captured,
                "given": self._given,
                "dropped": dict(self._dropped),
                "in_flight": self._frames,
                "notices_dropped": self._notices_dropped,
            }

    def _oldest(self) -> Waiting:
        item = next(item for item in self._items if isinstance(item, Waiting))
        self._items.remove(item)
        self._frames -= 1
        return item

    def _drop(self, reason: str, count: int) -> None:
        if count:
            self._dropped[reason] = self._dropped.get(reason, 0) + count

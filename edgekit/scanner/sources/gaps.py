"""By the clock: when to try a camera again, and when frames are missing. No sleeping here; the wall clock plays no part."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Backoff", "GapWatch"]


class Backoff:
    """Pauses in seconds: ``first``, doubled each time, at most ``most``; each shortened by chance to as little as its half.

    ``chance`` gives 0..1. A camera that was up for a while starts anew; one that flaps does not.
    """

    SETTLED_S = 10.0

    def __init__(self, first: float, most: float, chance: Callable[[], float]) -> None:
        self._first, self._most, self._chance = first, most, chance
        self._next = first
        self._up_since: float | None = None

    def up(self, monotonic: float) -> None:
        self._up_since = monotonic

    def pause(self, monotonic: float) -> float:
        """How long to wait now that it went down."""
        if self._up_since is not None and monotonic - self._up_since >= self.SETTLED_S:
            self._next = self._first
        self._up_since = None
        pause = min(self._next, self._most)
        self._next = min(pause * 2, self._most)
        return pause * (0.5 + 0.5 * self._chance())


class GapWatch:
    """The interval of a camera's pictures, and the moment that one is missing.

    A gap is four usual intervals, and at least `SHORTEST_S`, by our clock and by the source's own where it has one: pictures
    that only came late are all there.
    """

    SHORTEST_S = 0.5
    _LEARN = 5

    def __init__(self) -> None:
        #: Monotonic time of the last picture, None before the first.
        self.last: float | None = None
        self._at: float | None = None
        self._usual = 0.0
        self._known = 0
        self._skip = False

    @property
    def rate(self) -> float:
        """Pictures a second as they come, 0 where not known yet."""
        return 1 / self._usual if self._usual > 0 and self._known >= self._LEARN else 0.0

    def seen(self, monotonic: float, at: float | None, waits: bool) -> float:
        """Seconds without a picture before this one, 0 where none is missing; sources that wait for us are not judged."""
        before, self.last = self.last, monotonic
        at_before, self._at = self._at, at
        skip, self._skip = self._skip, False
        if before is None or skip:
            return 0.0
        passed = monotonic - before
        usual = self._usual
        judged = passed if at is None or at_before is None else min(passed, at - at_before)
        if not waits and self._known >= self._LEARN and judged > max(4 * usual, self.SHORTEST_S):
            return passed
        self._usual = passed if not self._known else usual + (passed - usual) / min(self._known + 1, 10)
        self._known += 1
        return 0.0

    def skipped(self) -> None:
        """Pictures before the next one are accounted for elsewhere."""
        self._skip = True

    def restart(self) -> None:
        """The next picture is the first of another connection."""
        self._skip, self._at = True, None

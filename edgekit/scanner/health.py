"""A scan on an installed bundle (ROOT/current) says that it starts, and that it works: what an install's trial waits for."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from edgekit.bundle import Bundle
from edgekit.errors import EdgekitError
from edgekit.files import printable
from edgekit.installed import Start, current_slot, read_state, root_of, starting
from edgekit.progress import say
from edgekit.runtime.golden import Golden

from .assembly import Parts
from .config import ScanConfig
from .events import Event, rfc3339
from .reading import Answer
from .sources import Captured
from .stop import Stop

__all__ = ["ALIVE_S", "ANSWERS", "Health"]

#: So many frames answered, or so many seconds in the loop (a belt may stand still): then the bundle works.
ANSWERS = 20
ALIVE_S = 60.0
#: A start that is ended by force, and is no older, was ended by somebody; one that has hung for longer has failed.
YOUNG_S = 120.0
#: Between two looks at where ``current`` leads.
LOOK_S = 10.0


class Health:
    """In the block a scan runs; entered before anything of a bundle is loaded.

    Where a bundle is on trial its start is noted on disk, its golden outputs are checked with the scan's own model, and it is
    confirmed after `ANSWERS` frames, after `ALIVE_S` seconds, or at the end of a source that gave a frame, unless the model
    refused more of them than it answered. What ends in order before (SIGTERM, a loop that is left) counts for nothing, and so
    does a start ended by force within `YOUNG_S`; an error counts as a failed start, as does a model that hangs while it loads,
    and all that leaves no time for words. What has proved itself and cannot be noted (a disk that is full for a while) is noted
    as soon as it can be, at the latest when the scan ends.
    """

    name = "install"

    def __init__(self, config: ScanConfig, stop: Stop) -> None:
        named = [options.bundle for options in (config.model, config.text) if options is not None]
        self._roots: dict[Path, Start | None] = {root: None for bundle in named if (root := root_of(bundle))}
        self._stop = stop
        self._starts: list[Start] = []
        self._answered = self._refused = 0
        self._begun = time.monotonic()
        self._since: float | None = None
        self._look = self._again = 0.0
        self._proved = False
        self._said: set[Path] = set()
        self.told: list[Start] = []  #: Starts that went back, until their events are sent.

    def __enter__(self) -> Health:
        for root in self._roots:
            self._begin(starting(root))
        self._stop.at_force.append(self._forced)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._proved:
            self._confirm()
        elif isinstance(error, Exception):
            self._fail(getattr(error, "message", "") or str(error) or type(error).__name__)
        elif error is None and not self._stop.is_set() and self._answered and self._works():
            self._confirm()
        else:
            self._withdraw()
        with contextlib.suppress(ValueError):  # not before: an end by force waits for what is being written
            self._stop.at_force.remove(self._forced)
        self._starts = []

    def _begin(self, start: Start) -> None:
        if start.returned:
            self.told.append(start)
            left = start.returned.left
            say(
                f"back to the bundle before {left.name} ({left.digest[:12]}): {start.returned.reason}",
                level="warning",
                root=printable(start.root),
            )
        if start.trial:
            trial = start.trial
            number = trial.failed + 1
            say(f"{printable(start.root)} is on trial: start {number} of {trial.allowed}", root=printable(start.root))
        if start.doubt:
            say(f"the trial of {printable(start.root)}: {start.doubt}; the scan runs", level="warning")
        self._starts.append(start)
        self._roots[start.root] = start

    def loaded(self, parts: Parts) -> None:
        """The models are open: those of a root on trial are tested. Raises `GoldenError`, `BundleError`."""
        reading = parts.reading
        models: list[Any] = [model for model in (reading.model, reading.text) if model is not None] if reading else []
        kept: list[Start] = []
        for start in self._starts:
            place = start.bundle.resolve()
            model = next((model for model in models if model.bundle.path.resolve() == place), None)
            if model is None:  # one that was promoted runs, or an install came in between: nothing is learnt of this one
                start.withdraw()
                continue
            if start.trial:
                Golden.of(model.runner).check(model.runner)
            kept.append(start)
        self._starts = kept

    def hear(self, answer: Answer | None) -> None:
        """Each captured frame's answer."""
        if answer is not None:
            self._refused += bool(answer.reason)
            self._answered += not answer.reason

    def round(self, monotonic: float) -> None:
        """The loop went round."""
        if self._since is None:
            self._since = monotonic
        heard = self._answered >= ANSWERS or monotonic >= self._since + ALIVE_S
        if heard and self._starts and not self._stop.is_set() and monotonic >= self._again:
            if self._proved or self._works():
                self._proved, self._again = True, monotonic + LOOK_S
                self._confirm()
            elif self._refused >= ANSWERS and monotonic >= self._since + ALIVE_S:
                reason = f"the model refused {self._refused} of {self._refused + self._answered} frames"
                say(f"{reason}: this start counts as failed", level="warning")
                self._fail(reason)
        if self._roots and monotonic >= self._look:
            self._look = monotonic + LOOK_S
            self._notice()

    def _works(self) -> bool:
        return self._answered >= self._refused

    def _confirm(self) -> None:
        for start in self._starts:
            if not start.confirm():
                self._doubtful(start, "is healthy")
            elif start.trial:
                say(f"{printable(start.root)} is healthy: the trial is over", root=printable(start.root))
        self._starts = [start for start in self._starts if start.open]

    def _doubtful(self, start: Start, what: str) -> None:
        if start.root not in self._said:
            say(f"{printable(start.root)} {what}, which cannot be noted: {start.doubt}", level="warning")
        self._said.add(start.root)

    def _fail(self, reason: str) -> None:
        for start in self._starts:
            if not start.fail(reason):
                self._doubtful(start, "did not work")
        self._starts = []

    def _withdraw(self) -> None:
        for start in self._starts:
            if not start.withdraw():
                self._doubtful(start, "was stopped in order")

    def _forced(self) -> None:
        """In a thread of its own, while the scan hangs. An older start is left open: the next one counts it as failed."""
        if time.monotonic() < self._begun + YOUNG_S:
            self._withdraw()

    def _notice(self) -> None:
        """Said once: another bundle was switched to, which this process does not take by itself."""
        for root, start in list(self._roots.items()):
            slot = current_slot(root)
            if start is None or slot is None or not _replaced(start, slot):
                continue
            say(f"{printable(root)} leads to another bundle now than the one that runs: a restart takes it", level="warning")
            del self._roots[root]

    # A step of the scan, for the one event that it may have to tell.

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        told, self.told = self.told, []
        return [
            {
                "event": "model",
                "source": str(start.root / "current"),
                "time": rfc3339(wall),
                "state": "returned",
                "digest": running,
                "before": start.returned.left.digest,
                "reason": start.returned.reason,
            }
            for start in told
            if start.returned and (running := _digest(start))
        ]

    def status(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def _replaced(start: Start, slot: str) -> bool:
    """Whether another install is ``current`` by now; while one is on trial the next lies in the same slot."""
    if slot != start.bundle.name or start.sequence is None:
        return slot != start.bundle.name
    try:
        record = read_state(start.root).slots.get(slot)  # type: ignore[call-overload]
    except (OSError, EdgekitError):
        return False
    return record is not None and record.sequence != start.sequence


def _digest(start: Start) -> str:
    try:
        return Bundle.open(start.bundle, verify=False).digest
    except EdgekitError:
        return ""

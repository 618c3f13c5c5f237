"""The outbox's figures by chance: sent = delivered + waiting + refused + dropped at every moment, and the order holds."""

from __future__ import annotations

import contextlib
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgekit.errors import DataError
from edgekit.scanner import Outbox, OutboxOptions

SINKS = ("a", "b")
SOME = st.integers(0, 40)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Figures(RuleBasedStateMachine):
    """Two sinks over one outbox, with limits that are met; a sink's events are numbered as they are sent."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("edgekit.scanner.outbox.MOST_HELD", 30)
        self.folder = Path(tempfile.mkdtemp())
        self.lives = 0
        self.sent = dict.fromkeys(SINKS, 0)
        self.delivered: dict[str, list[int]] = {sink: [] for sink in SINKS}
        self.unsettled = dict.fromkeys(SINKS, False)  # delivered on a full disk, and perhaps not removed
        self.lost: Counter[str] = Counter()  # in memory, on a full disk, when the process died: said at a close, no figure

    @initialize(policy=st.sampled_from(["drop oldest", "drop newest", "stop"]), megabytes=st.sampled_from([0.03, 1.0]))
    def begin(self, policy: Any, megabytes: float) -> None:
        self.options = OutboxOptions(most_events=100, most_megabytes=megabytes, policy=policy)
        self.outbox = Outbox(self.folder / "0.sqlite", self.options)

    def append(self, sink: str, size: int) -> None:
        number = self.sent[sink]
        try:
            self.outbox.append(sink, f"{sink}-{number}", b"x" * size)
        except (DataError, OSError):
            assert self.options.policy == "stop"
            return
        self.sent[sink] += 1

    @rule(sink=st.sampled_from(SINKS), count=st.integers(1, 60), size=st.integers(0, 600))
    def put(self, sink: str, count: int, size: int) -> None:
        for _ in range(count):
            self.append(sink, size)

    @rule(sink=st.sampled_from(SINKS), count=st.integers(1, 60))
    def put_on_a_full_disk(self, sink: str, count: int) -> None:
        with full_disk():
            for _ in range(count):
                self.append(sink, 50)

    @precondition(lambda self: self.options.policy != "stop")
    @rule(sink=st.sampled_from(SINKS))
    def put_the_same_again(self, sink: str) -> None:
        waiting = self.outbox.head(sink, 1)
        if waiting and waiting[0].position > 0:
            self.outbox.append(sink, waiting[0].id, waiting[0].event)

    @rule(
        sink=st.sampled_from(SINKS),
        taken=st.integers(0, 40),
        done=st.integers(0, 40),
        put=st.integers(0, 20),
        full=st.booleans(),
    )
    def deliver(self, sink: str, taken: int, done: int, put: int, full: bool) -> None:
        """Some of what was taken arrives; meanwhile others are sent, perhaps on a full disk."""
        waiting = self.outbox.head(sink, taken)
        with full_disk() if full else contextlib.nullcontext():
            for _ in range(put):
                self.append(sink, 20)
            arrived = waiting[:done]
            self.delivered[sink] += [int(each.id[2:]) for each in arrived]
            if arrived:
                self.outbox.delivered(sink, [each.position for each in arrived])
                self.unsettled[sink] = self.unsettled[sink] or full

    @rule(sink=st.sampled_from(SINKS))
    def refuse(self, sink: str) -> None:
        for each in self.outbox.head(sink, 2)[:1]:
            self.outbox.refuse(sink, each.position, "no")

    @rule()
    def settle(self) -> None:
        self.outbox.settle()

    @rule()
    def reopen(self) -> None:
        self.outbox.close()
        self.outbox = Outbox(self.outbox.path, self.options)

    @rule()
    def kill(self) -> None:
        """What the next process finds: the files as they are."""
        for sink in SINKS:
            self.lost[sink] += self.outbox.unsaved(sink)
        self.lives += 1
        before, path = self.outbox, self.folder / f"{self.lives}.sqlite"
        for part in ("", "-wal"):
            if Path(f"{before.path}{part}").exists():
                shutil.copyfile(f"{before.path}{part}", f"{path}{part}")
        self.outbox = Outbox(path, self.options)
        for sink in SINKS:
            # Counted in memory only, for want of room: drops are lost with it, deliveries come again.
            self.lost[sink] += sum(before.dropped(sink).values()) - sum(self.outbox.dropped(sink).values())
            again = {int(each.id[2:]) for each in self.outbox.head(sink, 10**6)} & set(self.delivered[sink])
            assert not again or self.unsettled[sink]
            self.delivered[sink] = [number for number in self.delivered[sink] if number not in again]
        before.close()
        self.unsettled = dict.fromkeys(SINKS, False)

    @invariant()
    def nothing_is_missing(self) -> None:
        for sink in SINKS if hasattr(self, "outbox") else ():
            box = self.outbox
            waiting = [int(each.id[2:]) for each in box.head(sink, 10**6)]
            box.head(sink, 0)
            assert len(waiting) == box.count(sink)
            assert waiting == sorted(set(waiting))
            assert self.delivered[sink] == sorted(set(self.delivered[sink]))
            figures = (box.count(sink, refused=True), sum(box.dropped(sink).values()), self.lost[sink])
            assert self.sent[sink] == len(self.delivered[sink]) + len(waiting) + sum(figures), (sink, figures)
            assert box.count(sink) - box.unsaved(sink) + figures[0] <= self.options.most_events

    def teardown(self) -> None:
        if hasattr(self, "outbox"):
            self.outbox.close()
        self.patch.undo()
        shutil.rmtree(self.folder)


Figures.TestCase.settings = settings(
    max_examples=8,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
TestFigures = Figures.TestCase

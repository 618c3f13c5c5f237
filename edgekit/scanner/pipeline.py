"""`Pipeline`: frames in, events out, every frame accounted for."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from array import array
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .events import SCHEMA, Event, rfc3339
from .kpis import kpi_line
from .reading import Answer, FrameModel, Reading
from .sinks import FLUSH_S, Sink
from .sources import Captured, Notice
from .steps import Step
from .stop import Stop

__all__ = ["BUCKETS_MS", "Pipeline", "Summary"]

#: Latency percentiles are over this many latest frames: memory stays constant however long the scan runs.
LATENCIES = 65536
#: Upper bounds of the latency histogram; one more bucket takes what is above.
BUCKETS_MS = (0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0)
#: A stopped scan must be out within 2 s, whatever its sinks do.
STOPPED_FLUSH_S = 0.5


@dataclass(frozen=True)
class Summary:
    """``captured = inferred + sum(dropped.values()) + in_flight``. ``codes`` counts codes, ``events`` all events sent.

    ``in_flight``: captured by a camera and not yet read, 0 once a scan has ended. ``sinks``, ``steps`` and ``sources``:
    each one's `status`. ``latency_ms``: p50 and p99 over the last 65,536 inferred frames, None without any. ``model``: the
    bundle, its digest, the backend, and the ``batch`` that measured fastest; empty without one. ``kpis``: `Tally.figures`.
    ``complete``: the source was read to its own end.
    """

    captured: int
    inferred: int
    codes: int
    dropped: dict[str, int]
    events: int
    in_flight: int
    sinks: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    sources: list[dict[str, Any]]
    latency_ms: dict[str, float | None]
    model: dict[str, Any] = field(default_factory=dict)
    kpis: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    def figures(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """The figures in one line."""
        text = f"{self.captured} captured, {self.inferred} read, {self.codes} codes"
        if self.dropped:
            text += "; " + ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        for sink in self.sinks:
            before = sink.get("before", {})
            lost, lost_before = (each.get("dropped", {}) for each in (sink, before))
            gone = sum(lost.values()) - sum(lost_before.values()) - lost.get("rotated away", 0)  # that was asked for
            refused = sink.get("refused", 0) - before.get("refused", 0)
            found = [f"{count} {how}" for count, how in ((gone, "dropped"), (refused, "refused")) if count > 0]
            text += f"; of the events for {sink['sink']} {' and '.join(found)}" if found else ""
        if self.latency_ms["p50"] is not None:
            text += f"; latency p50 {self.latency_ms['p50']:.3g} ms, p99 {self.latency_ms['p99']:.3g} ms"
        return "; ".join(each for each in (text, kpi_line(self.kpis)) if each)


@dataclass
class _Counts:
    captured: int = 0
    inferred: int = 0
    codes: int = 0
    events: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


class Pipeline:
    """Reads the frames of ``source`` with ``model``, ``codes`` or both (or a ``reading``); sends their events to every sink.

    Without ``steps`` each captured frame is one event. The source gives `Captured`, `Notice` (sent as an event) or None
    (nothing came for a while). One that drops frames itself says so in ``counts()`` (`sources.Counting`), one that has more at
    hand gives it in ``more(n)``; up to ``batch`` frames are read in one go. The source is closed here, the sinks by the caller.
    Use it from one thread; ``stop`` may be set from any. ``on_round`` hears the monotonic clock each time that the loop went
    round, ``on_answer`` each captured frame with its answer (None where it was not read), ``on_last`` that no more come; all
    must be quick. Raises `UsageError` where there is nothing to read with, or the model takes no pictures.
    """

    def __init__(
        self,
        *,
        source: Iterable[Captured | Notice | None],
        model: FrameModel | None = None,
        codes: Callable[[Any], Sequence[Any]] | None = None,
        reading: Reading | None = None,
        steps: Sequence[Step] = (),
        sinks: Sequence[Sink] = (),
        batch: int = 1,
        stop: Stop | None = None,
        run_id: str | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_round: Callable[[float], None] | None = None,
        on_answer: Callable[[Captured, Answer | None], None] | None = None,
        on_last: Callable[[], None] | None = None,
    ) -> None:
        self.reading = reading or Reading(model, codes)
        self._source, self._steps, self._sinks = source, tuple(steps), tuple(sinks)
        self._batch = batch
        self._stop = stop or Stop()
        self.run_id = run_id or uuid.uuid4().hex
        self._on_event, self._on_round, self._on_answer, self._on_last = on_event, on_round, on_answer, on_last
        self._counts = _Counts()
        self._complete = self._ending = False
        self._latencies = array("d")
        self._latency_ms = 0.0  # of all
        self._buckets = array("Q", bytes(8 * (len(BUCKETS_MS) + 1)))

    def run(self) -> Summary:
        """Scan until the source ends or ``stop`` is set, then flush the sinks.

        Raises `OSError` or `EdgekitError` where a sink cannot take an event: it would be lost.
        """
        for _ in self.stream():
            pass
        return self.summary()

    def stream(self) -> Generator[Event, None, None]:
        """`run`, an event at a time, each when every sink has taken it. Closing the iterator stops the scan in order."""
        try:
            try:
                for item in self._source:
                    yield from self._sent(self.events(item))
                    if self._on_round:
                        self._on_round(time.monotonic())
                    if self._stop.is_set():
                        break
                self._complete = not self._stop.is_set()
                yield from self._sent(self._due(math.inf))  # before a camera is waited for that does not go
            finally:
                if close := getattr(self._source, "close", None):
                    close()
            yield from self._last()
        except GeneratorExit:
            self._stop.set()
            for _ in self._last():
                pass
            raise
        except Exception:
            if not self._ending:
                with contextlib.suppress(Exception):  # the first is the one that counts; the other sinks still have theirs
                    self._flush(STOPPED_FLUSH_S)
            raise
        finally:
            for step in self._steps:
                step.close()

    def _last(self) -> Generator[Event, None, None]:
        """What the steps still have is sent first of all; then sinks may take their time, and say what came of it."""
        if self._on_last:
            self._on_last()
        yield from self._sent(self._due(math.inf))
        self._ending = True
        self._flush()
        if late := self._due(math.inf):
            yield from self._sent(late)
            self._flush()

    def events(self, item: Captured | Notice | None) -> list[Event]:
        """What one item of the source, and what is at hand with it, gives to send; numbered."""
        if isinstance(item, Captured):
            more = getattr(self._source, "more", None)
            taken = [item, *(more(self._batch - 1) if more and self._batch > 1 else ())]
            made = self._read(taken)
        elif isinstance(item, Notice):
            about = {"source": item.source, "time": rfc3339(item.time), "event": item.kind, **item.details}
            made = self._through([(Captured(None, item.source, -1, item.time, item.kind, item.monotonic), about)])
        else:
            made = []
        return [self._numbered(event) for event in made] + self._due(time.monotonic())

    def process(self, captured: Captured) -> Event:
        """One frame -> its event, counted and numbered, without the steps."""
        return self._numbered(self._event(captured, self._wanted(captured)))

    def summary(self) -> Summary:
        """The figures so far."""
        counts, dropped = self._counts, dict(self._counts.dropped)
        captured, in_flight = counts.captured, 0
        own = getattr(self._source, "counts", None)
        sources: list[dict[str, Any]] = own() if own else []
        for each in sources:
            in_flight += each["in_flight"]
            captured += each["in_flight"] + sum(each["dropped"].values())
            for reason, count in each["dropped"].items():
                dropped[reason] = dropped.get(reason, 0) + count
        p50, p99 = np.percentile(self._latencies, [50, 99]).round(3).tolist() if self._latencies else (None, None)
        return Summary(
            captured=captured,
            inferred=counts.inferred,
            codes=counts.codes,
            dropped=dropped,
            events=counts.events,
            in_flight=in_flight,
            sinks=[sink.status() for sink in self._sinks],
            steps=[{"step": step.name, **step.status()} for step in self._steps],
            sources=sources,
            latency_ms={"p50": p50, "p99": p99},
            complete=self._complete,
        )

    def latencies(self) -> dict[str, Any]:
        """``count``, ``total_ms``, and ``buckets``: frames up to each of `BUCKETS_MS`, and above (not cumulated)."""
        return {"count": self._counts.inferred, "total_ms": self._latency_ms, "buckets": list(self._buckets)}

    def _sent(self, events: list[Event]) -> list[Event]:
        for event in events:
            for sink in self._sinks:
                sink.send(event)
            if self._on_event:
                self._on_event(event)
        return events

    def _flush(self, together_s: float = 0.0) -> None:
        """``together_s``: for all sinks; 0: each has its own time, until the scan is stopped."""
        end, failed = math.inf, None
        for number, sink in enumerate(self._sinks):
            if end == math.inf and (together_s or self._stop.is_set()):
                end = time.monotonic() + (together_s or STOPPED_FLUSH_S)
            left = max(0.0, end - time.monotonic()) / (len(self._sinks) - number)
            try:
                sink.flush(min(left, FLUSH_S))
            except Exception as error:  # noqa: BLE001  the others still have theirs
                failed = failed or error
        if failed is not None:
            raise failed

    def _numbered(self, event: Event) -> Event:
        """With what every event has, first: the schema and an id of its own."""
        number = self._counts.events
        self._counts.events += 1
        return {"schema": SCHEMA, "id": f"{self.run_id}-{number}", **event}

    def _read(self, taken: list[Captured]) -> list[Event]:
        """The frames' events, as far as the steps let them through."""
        reasons = [next((reason for step in self._steps if (reason := step.wants(each))), "") for each in taken]
        wanted = [i for i, reason in enumerate(reasons) if not reason and taken[i].frame is not None]
        answers: dict[int, Answer] = {}
        if len(wanted) > 1:
            found = self.reading.answers([frame for i in wanted if (frame := taken[i].frame) is not None])
            answers = dict(zip(wanted, found, strict=True))
        made: list[Event] = []
        for i, captured in enumerate(taken):
            if reasons[i]:
                self._counts.captured += 1
                self._drop(reasons[i])
                if self._on_answer:
                    self._on_answer(captured, None)
                continue
            event = self._event(captured, answers.get(i) or self._wanted(captured))
            made += self._through([(captured, event)])
        return made

    def _through(self, going: list[tuple[Captured, Event]], first: int = 0) -> list[Event]:
        """Events through the steps from the ``first`` on."""
        for step in self._steps[first:]:
            going = [(captured, event) for captured, each in going for event in step.frame(captured, each)]
        return [event for _, event in going]

    def _due(self, monotonic: float) -> list[Event]:
        """What steps send by the clock, through the steps behind them."""
        wall = time.time()
        made: list[Event] = []
        for index, step in enumerate(self._steps):
            for event in step.due(monotonic, wall):
                about = Captured(None, str(event.get("source", "")), -1, wall, str(event.get("event", "")), monotonic)
                made += self._through([(about, event)], index + 1)
        return [self._numbered(event) for event in made]

    def _wanted(self, captured: Captured) -> Answer | None:
        return None if captured.frame is None else self.reading.answer(captured.frame)

    def _event(self, captured: Captured, answer: Answer | None) -> Event:
        """A frame's event, counted. One that cannot be read gives an event that says why, without an answer."""
        counts = self._counts
        counts.captured += 1
        if self._on_answer:
            self._on_answer(captured, answer)
        event: Event = {"source": captured.source, "seq": captured.seq, "time": rfc3339(captured.time)}
        if answer is None or answer.reason:
            reason, why = (answer.reason, answer.why) if answer else ("damaged", captured.error)
            self._drop(reason)
            return {**event, "event": reason, "reason": why}
        counts.inferred += 1
        counts.codes += len(answer.fields.get("codes", ()))
        if len(self._latencies) < LATENCIES:
            self._latencies.append(answer.latency_ms)
        else:
            self._latencies[counts.inferred % LATENCIES] = answer.latency_ms
        self._latency_ms += answer.latency_ms
        self._buckets[bisect_left(BUCKETS_MS, answer.latency_ms)] += 1
        return {**event, **answer.fields, "latency_ms": round(answer.latency_ms, 3)}

    def _drop(self, reason: str) -> None:
        self._counts.dropped[reason] = self._counts.dropped.get(reason, 0) + 1

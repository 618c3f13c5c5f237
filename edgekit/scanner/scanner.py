"""`Scanner`: one frame in, one event out, every frame accounted for."""

from __future__ import annotations

import math
import uuid
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter_ns
from typing import Any

import numpy as np

from edgekit.errors import BackendError, InputError, UsageError
from edgekit.manifest import ImagePreprocessing, TextPreprocessing
from edgekit.runtime import Model

from .codes import CodeReader
from .events import SCHEMA, Event, rfc3339
from .sinks import FLUSH_S, Sink
from .sources import Captured
from .stop import Stop

__all__ = ["Scanner", "Summary"]

#: Latency percentiles are over this many latest frames: memory stays constant however long the scan runs.
LATENCIES = 65536
#: A stopped scan must be out within 2 s, whatever its sinks do.
STOPPED_FLUSH_S = 0.5


@dataclass(frozen=True)
class Summary:
    """``captured = inferred + sum(dropped.values())``. ``codes`` counts codes, ``events`` events, one a captured frame.

    ``sinks``: each sink's `status`. ``latency_ms``: p50 and p99 over the last 65,536 inferred frames, None without any.
    """

    captured: int
    inferred: int
    codes: int
    dropped: dict[str, int]
    events: int
    sinks: list[dict[str, Any]]
    latency_ms: dict[str, float | None]

    def figures(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Counts:
    captured: int = 0
    inferred: int = 0
    codes: int = 0
    events: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


class Scanner:
    """Reads frames from ``source`` with ``model``, ``codes`` or both, and sends an event a frame to every sink.

    ``model`` is open (entered); ``codes`` is a `CodeReader` or any function frame -> list of `Code`. The caller closes
    the sinks. Use it from one thread; ``stop`` may be set from any. Raises `UsageError` where there is nothing to read
    with, or the model takes raw tensors.
    """

    def __init__(
        self,
        *,
        source: Iterable[Captured],
        model: Model | None = None,
        codes: CodeReader | Callable[[Any], Sequence[Any]] | None = None,
        sinks: Sequence[Sink] = (),
        stop: Stop | None = None,
    ) -> None:
        if model is None and codes is None:
            raise UsageError("there is nothing to read with", "name a bundle, or add --codes")
        if model is not None and not isinstance(spec := model.bundle.manifest.preprocessing, ImagePreprocessing):
            what = "raw tensors" if spec is None else "text" if isinstance(spec, TextPreprocessing) else "series"
            raise UsageError(
                f"{model.bundle.path} takes {what}, not frames", "scan with a bundle trained on pictures, or run it with Model"
            )
        self._source, self._model, self._codes = source, model, codes
        self._sinks = tuple(sinks)
        self._stop = stop or Stop()
        self._run_id = uuid.uuid4().hex
        self._counts = _Counts()
        self._latencies = array("d")

    def run(self) -> Summary:
        """Scan until the source ends or ``stop`` is set, then flush the sinks.

        Raises `OSError` or `EdgekitError` where a sink cannot take an event: it would be lost.
        """
        for captured in self._source:
            event = self.process(captured)
            for sink in self._sinks:
                sink.send(event)
            if self._stop.is_set():
                break
        for sink in self._sinks:
            sink.flush(STOPPED_FLUSH_S / len(self._sinks) if self._stop.is_set() else FLUSH_S)
        return self.summary()

    def process(self, captured: Captured) -> Event:
        """One frame -> its event, counted. A frame that cannot be read gives an event that says why, without an answer."""
        counts = self._counts
        event: Event = {
            "schema": SCHEMA,
            "id": f"{self._run_id}-{counts.events}",
            "source": captured.source,
            "seq": captured.seq,
            "time": rfc3339(captured.time),
        }
        counts.captured += 1
        counts.events += 1
        if captured.frame is None:
            return self._dropped(event, "damaged", captured.error)
        start = perf_counter_ns()
        try:
            answer = self._answer(captured.frame)
        except InputError as error:
            return self._dropped(event, "unfit", error.message)
        except BackendError as error:
            return self._dropped(event, "failed", error.message)
        latency_ms = (perf_counter_ns() - start) / 1e6
        counts.inferred += 1
        counts.codes += len(answer.get("codes", ()))
        if len(self._latencies) < LATENCIES:
            self._latencies.append(latency_ms)
        else:
            self._latencies[counts.inferred % LATENCIES] = latency_ms
        event.update(answer)
        event["latency_ms"] = round(latency_ms, 3)
        return event

    def summary(self) -> Summary:
        """The figures so far."""
        counts = self._counts
        p50, p99 = np.percentile(self._latencies, [50, 99]).round(3).tolist() if self._latencies else (None, None)
        return Summary(
            captured=counts.captured,
            inferred=counts.inferred,
            codes=counts.codes,
            dropped=dict(counts.dropped),
            events=counts.events,
            sinks=[sink.status() for sink in self._sinks],
            latency_ms={"p50": p50, "p99": p99},
        )

    def _answer(self, frame: Any) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        if self._model is not None:
            prediction = self._model(frame)
            if not math.isfinite(prediction.score):
                raise BackendError("the model's scores are not finite", "compare the bundle: edgekit compare B")
            if prediction.label is not None:
                answer["label"] = prediction.label
            answer["score"] = round(prediction.score, 6)
            if prediction.text is not None:
                answer["text"] = prediction.text
        if self._codes is not None:
            answer["codes"] = [code.figures() for code in self._codes(frame)]
        return answer

    def _dropped(self, event: Event, reason: str, why: str) -> Event:
        self._counts.dropped[reason] = self._counts.dropped.get(reason, 0) + 1
        event["event"], event["reason"] = reason, why
        return event

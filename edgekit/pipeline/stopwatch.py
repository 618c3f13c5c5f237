"""Latencies that compare although they are taken hours apart: each graph in turns with one reference graph."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import Bundle
from edgekit.errors import UsageError
from edgekit.files import atomic_write
from edgekit.runtime.golden import load_golden
from edgekit.runtime.graph_file import read_graph
from edgekit.runtime.onnxruntime import session

__all__ = ["Stopwatch"]

BURST_NS = 20_000_000  # long against the clock's steps, short against a machine's moods
CALLS = 50  # in a burst, at most
ROUNDS, LEAST, SECONDS = 31, 7, 6.0
WARMUP = 3  # rounds that fill caches and wake the clock

_Run = Callable[[], Any]


class _Graph(NamedTuple):
    """An ONNX file and one real sample for it, the batch axis in front."""

    onnx: bytes
    sample: NDArray[Any]

    def runner(self) -> _Run:
        run = session(self.onnx)
        feeds = {run.get_inputs()[0].name: self.sample}
        return lambda: run.run(None, feeds)


class Stopwatch:
    """Measures with the reference in ``file``; the first graph that is measured becomes it.

    Call it from one process at a time: two that measure at once disturb each other.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def measure(self, bundle: Bundle) -> dict[str, float]:
        """``latency_ms`` of one inference of the graph that the bundle ships: ONNX Runtime, one thread, a batch of one.

        It is ``reference_ms``, what the reference took when it was chosen, times ``ratio``, the median over rounds in which
        both run in turns: whatever slows the machine now slows both.
        """
        graph = _Graph(read_graph(bundle, bundle.graph), next(iter(load_golden(bundle)[0].values()))[:1])
        run = graph.runner()
        if not self.file.exists():
            reference_ms = float(np.median(_bursts([run])[0]))
            self._write(graph, reference_ms)
        reference, reference_ms = self._read()
        own, other = _bursts([run, reference.runner()])
        ratio = float(np.median(own / other))
        return {"latency_ms": reference_ms * ratio, "ratio": ratio, "reference_ms": reference_ms}

    def _write(self, graph: _Graph, milliseconds: float) -> None:
        data = io.BytesIO()
        np.savez(data, onnx=np.frombuffer(graph.onnx, np.uint8), sample=graph.sample, ms=milliseconds)
        atomic_write(self.file, data.getvalue())

    def _read(self) -> tuple[_Graph, float]:
        try:
            with self.file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                return _Graph(stored["onnx"].tobytes(), stored["sample"]), float(stored["ms"])
        except Exception as error:  # noqa: BLE001  numpy and zipfile raise many types on damaged files
            raise UsageError(f"the reference {self.file} cannot be read: {error}", "begin another --study") from None


def _bursts(runs: list[_Run]) -> NDArray[np.float64]:
    """Milliseconds a call, (runs, rounds): each round a burst of every run, each burst the median of its calls."""
    calls = []
    for run in runs:
        run()
        begin = perf_counter_ns()
        run()
        calls.append(min(max(BURST_NS // max(perf_counter_ns() - begin, 1), 1), CALLS))
    rounds: list[list[float]] = []
    end = perf_counter() + SECONDS
    while len(rounds) < WARMUP + ROUNDS and (len(rounds) < WARMUP + LEAST or perf_counter() < end):
        rounds.append([_burst(run, count) for run, count in zip(runs, calls, strict=True)])
    return np.array(rounds[WARMUP:]).T


def _burst(run: _Run, calls: int) -> float:
    run()  # what the other graph left in the caches is not this one's to pay for
    times = []
    for _ in range(calls):
        begin = perf_counter_ns()
        run()
        times.append(perf_counter_ns() - begin)
    return float(np.median(times)) / 1e6

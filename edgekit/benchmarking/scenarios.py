"""How inferences arrive while the clock runs: MLPerf Inference's scenarios (Reddi et al. 2020, arXiv:1911.02549).

``single-stream``: the next starts when the last is done; its figure is p90. ``multi-stream``: a query of several samples, one
of each camera, and the next when all are answered; p99 of a query. ``offline``: everything is there, run in the batch that is
fastest; throughput. ``server``: one at a time at Poisson arrivals, and what comes while another runs waits; p99.
Times are `time.perf_counter_ns` around a call that blocks until its outputs are in host memory.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UsageError
from edgekit.progress import say, track

from .statistics import coefficient_of_variation, percentiles

__all__ = [
    "KEY",
    "SCENARIOS",
    "Run",
    "WarmUp",
    "multi_stream",
    "no_collector",
    "offline",
    "server",
    "single_stream",
    "stretch",
    "warm_up",
]

Call = Callable[[], Any]
#: Scenario -> the figure that MLPerf compares: a percentile, or samples a second.
KEY = {"single-stream": "p90", "multi-stream": "p99", "offline": "throughput", "server": "p99"}
SCENARIOS = tuple(KEY)
WINDOWS = 20
MIN_ITERATIONS = 100
#: A run that is short of `MIN_ITERATIONS` may go on for this many times the seconds asked for.
PATIENCE = 5
FEWEST_ARRIVALS = 10
#: Left to itself, ``server`` offers this share of what the model could serve: busy, but with a queue that empties.
SERVER_LOAD = 0.7
_SPIN_S = 0.0005  # sleeping overshoots by up to this, so the last stretch before an arrival is spun


class WarmUp(NamedTuple):
    """``steady``: the medians of the last windows lay within 2% (CV) of each other before the time ran out."""

    iterations: int
    seconds: float
    steady: bool


@dataclass(frozen=True)
class Run:
    """``samples_ms`` float64 (N,): latency of each call, in order. ``windows_ms`` (W,): medians of W equal stretches."""

    samples_ms: NDArray[np.float64]
    windows_ms: NDArray[np.float64]
    seconds: float
    throughput: float  # inferences a second
    extra: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Python's cycle collector off, as in `timeit`: its pauses belong to the harness, not to the model."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stretch(call: Call, seconds: float, least: int, patience: float = PATIENCE) -> list[int]:
    """Call until ``seconds`` and ``least`` calls are reached, or ``patience`` times the seconds; ns of each call."""
    samples: list[int] = []
    start = perf_counter_ns()
    enough, late = start + int(seconds * 1e9), start + int(seconds * patience * 1e9)
    now = start
    while now < enough or (len(samples) < least and now < late):
        before = perf_counter_ns()
        call()
        now = perf_counter_ns()
        samples.append(now - before)
    return samples


def warm_up(call: Call, limit_s: float = 2.0, least_s: float = 0.2) -> WarmUp:
    """Call until the medians of four windows in a row agree within 2% and ``least_s`` is over, at most ``limit_s``."""
    begin = time.perf_counter()
    medians: list[float] = []
    iterations = 0
    while True:
        samples = stretch(call, 0.025, 3, patience=1)
        iterations += len(samples)
        medians.append(float(np.median(samples)))
        seconds = time.perf_counter() - begin
        steady = len(medians) >= 4 and coefficient_of_variation(np.array(medians[-4:])) <= 0.02
        if (steady and seconds >= least_s) or seconds >= limit_s:
            return WarmUp(iterations, seconds, steady)


def single_stream(call: Call, seconds: float, label: str = "single-stream") -> Run:
    """One inference after the other; `WINDOWS` stretches, with the progress bar drawn between them."""
    return _measure(call, seconds, label, per_call=1)


def multi_stream(call: Call, streams: int, seconds: float) -> Run:
    """``call`` runs one sample of each of ``streams`` cameras; the latency is that of all of them together."""
    return _measure(call, seconds, f"multi-stream, {streams} samples a query", per_call=streams)


def offline(call_for: Callable[[int], Call], batches: list[int], seconds: float) -> Run:
    """Throughput in the fastest of ``batches`` (tried for a moment each); latencies are those of whole batches.

    ``call_for(n)`` gives a call that runs n inferences. ``extra``: ``batch``, and ``tried`` as batch -> inferences/s.
    """
    tried: dict[int, float] = {}
    for batch in batches:
        call = call_for(batch)
        stretch(call, 0.02, 2)
        samples = stretch(call, 0.1, 3)
        tried[batch] = batch * 1e9 / float(np.median(samples))
    best = max(tried, key=lambda batch: tried[batch])
    call = call_for(best)
    warm_up(call, limit_s=1.0)
    run = _measure(call, seconds, f"offline, batch {best}", per_call=best)
    extra = {"batch": best, "tried": {str(batch): rate for batch, rate in tried.items()}}
    return Run(run.samples_ms, run.windows_ms, run.seconds, run.throughput, extra)


def _measure(call: Call, seconds: float, label: str, per_call: int) -> Run:
    samples: list[int] = []
    medians: list[float] = []
    spent = 0.0
    with no_collector():
        for _ in track(range(WINDOWS), label):
            begin = time.perf_counter()
            window = stretch(call, seconds / WINDOWS, -(-MIN_ITERATIONS // WINDOWS))
            spent += time.perf_counter() - begin
            samples += window
            medians.append(float(np.median(window)))
    array = np.array(samples, np.float64) / 1e6
    return Run(array, np.array(medians) / 1e6, spent, len(samples) * per_call / spent)


def server(call: Call, seconds: float, rate: float | None = None) -> Run:
    """Poisson arrivals at ``rate`` a second (default: `SERVER_LOAD` of what the model serves), first come first served.

    Latency runs from arrival to answer. ``extra``: ``rate`` offered, ``utilisation``, ``service_ms`` and ``queue``
    (``wait_ms`` percentiles, ``longest``: most that still waited when another came). The schedule is seeded: two runs at one
    rate see the same arrivals. Raises `UsageError` where so few come that there is nothing to measure.
    """
    service_s = float(np.mean(stretch(call, 0.2, 10))) / 1e9
    rate = rate or SERVER_LOAD / service_s
    count = max(MIN_ITERATIONS, int(rate * seconds))
    gaps = np.random.default_rng(0).exponential(1e9 / rate, count)
    schedule = np.cumsum(gaps).astype(np.int64).tolist()
    started, finished = np.empty(count, np.int64), np.empty(count, np.int64)
    limit = int(seconds * PATIENCE * 1e9)
    if schedule[FEWEST_ARRIVALS - 1] > limit:
        raise UsageError(
            f"{rate:.4g} arrivals a second are under {FEWEST_ARRIVALS} even in {PATIENCE} times the {seconds:g} s",
            "raise --rate or --seconds",
        )
    say(f"server, {rate:.4g} arrivals a second, {seconds:g} s")
    with no_collector():
        begin = perf_counter_ns()
        for i, arrival in enumerate(schedule):
            if arrival > limit:  # a low rate: `MIN_ITERATIONS` would take too long
                count = i
                break
            now = perf_counter_ns() - begin
            while now < arrival:
                if arrival - now > 2e9 * _SPIN_S:
                    time.sleep((arrival - now) / 1e9 - _SPIN_S)
                now = perf_counter_ns() - begin
            started[i] = now
            call()
            finished[i] = perf_counter_ns() - begin
            if finished[i] > limit:  # overloaded: the queue only grows
                count = i + 1
                break
    arrivals, started, finished = np.array(schedule[:count]), started[:count], finished[:count]
    latency, waits, service = (finished - arrivals) / 1e6, (started - arrivals) / 1e6, (finished - started) / 1e6
    spent = float(finished[-1]) / 1e9
    waiting = np.arange(count) - np.searchsorted(started, arrivals, side="right")  # earlier ones, not begun
    extra = {
        "rate": rate,
        "utilisation": float(service.sum() / 1e3 / spent),
        "service_ms": percentiles(service),
        "queue": {"wait_ms": percentiles(waits), "longest": int(max(waiting.max(), 0))},
    }
    windows = np.array([np.median(part) for part in np.array_split(service, min(WINDOWS, count))])
    return Run(latency, windows, spent, count / spent, extra)

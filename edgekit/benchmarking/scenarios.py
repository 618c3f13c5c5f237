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
from dataclasses import dataclass, field, replace
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UsageError
from edgekit.progress import say, short, track

from .statistics import coefficient_of_variation, percentiles
from .yardstick import STRETCH_S, Between

__all__ = [
    "KEY",
    "MAX_ARRIVALS",
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
Times = NDArray[np.int64]
#: Scenario -> the figure that MLPerf compares: a percentile, or samples a second.
KEY = {"single-stream": "p90", "multi-stream": "p99", "offline": "throughput", "server": "p99"}
SCENARIOS = tuple(KEY)
WINDOWS = 20
MIN_ITERATIONS = 100
#: A run that is short of `MIN_ITERATIONS` may go on for this many times the seconds asked for.
PATIENCE = 5
FEWEST_ARRIVALS, MAX_ARRIVALS = 10, 10_000_000
#: Left to itself, ``server`` offers this share of what the model could serve: busy, but with a queue that empties.
SERVER_LOAD = 0.7
_SETTLING = 4  # windows of a warm-up that must agree
_SPIN_S = 0.0005  # sleeping overshoots by up to this, so the last stretch before an arrival is spun


class WarmUp(NamedTuple):
    """``steady``: the medians of the last windows lay within 2% (CV) of each other before the time ran out."""

    iterations: int
    seconds: float
    steady: bool


@dataclass(frozen=True)
class Run:
    """``samples_ms`` float64 (N,): latency of each call, in order. ``windows_ms`` (W,): medians of W equal stretches.

    ``warm_up``: of the call that was measured, where the scenario chose it. ``yardstick``: see `yardstick.Between.record`.
    """

    samples_ms: NDArray[np.float64]
    windows_ms: NDArray[np.float64]
    seconds: float
    throughput: float  # inferences a second
    extra: dict[str, Any] = field(default_factory=dict)
    warm_up: WarmUp | None = None
    yardstick: dict[str, Any] | None = None


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


def stretch(call: Call, seconds: float, least: int) -> list[int]:
    """Call until ``seconds`` and ``least`` calls are reached, or `PATIENCE` times the seconds; ns of each call."""
    samples: list[int] = []
    start = perf_counter_ns()
    enough, late = start + int(seconds * 1e9), start + int(seconds * PATIENCE * 1e9)
    now = start
    while now < enough or (len(samples) < least and now < late):
        before = perf_counter_ns()
        call()
        now = perf_counter_ns()
        samples.append(now - before)
    return samples


def warm_up(call: Call, limit_s: float = 2.0, least_s: float = 0.2) -> WarmUp:
    """Call until the medians of four windows in a row agree within 2% and ``least_s`` is over.

    At most ``limit_s``, but four windows at least: of a slow model each is one call.
    """
    begin = time.perf_counter()
    medians: list[float] = []
    iterations = 0
    while True:
        samples = stretch(call, 0.025, 1)
        iterations += len(samples)
        medians.append(float(np.median(samples)))
        seconds = time.perf_counter() - begin
        steady = len(medians) >= _SETTLING and coefficient_of_variation(np.array(medians[-_SETTLING:])) <= 0.02
        if (steady and seconds >= least_s) or (seconds >= limit_s and len(medians) >= _SETTLING):
            return WarmUp(iterations, seconds, steady)


def single_stream(call: Call, seconds: float, label: str = "single-stream", yardstick: bool = False) -> Run:
    """One inference after the other; `WINDOWS` stretches, with the progress bar drawn between them.

    ``yardstick``: time one in between, of this call on the CPU.
    """
    return _measure(call, seconds, label, 1, yardstick)


def multi_stream(call: Call, streams: int, seconds: float, yardstick: bool = False) -> Run:
    """``call`` runs one sample of each of ``streams`` cameras; the latency is that of all of them together."""
    warm = warm_up(call, limit_s=1.0)
    return replace(_measure(call, seconds, f"multi-stream, {streams} samples a query", streams, yardstick), warm_up=warm)


def offline(call_for: Callable[[int], Call], batches: list[int], seconds: float, yardstick: bool = False) -> Run:
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
    warm = warm_up(call, limit_s=1.0)
    run = _measure(call, seconds, f"offline, batch {best}", best, yardstick)
    return replace(run, warm_up=warm, extra={"batch": best, "tried": {str(batch): rate for batch, rate in tried.items()}})


def _measure(call: Call, seconds: float, label: str, per_call: int, yardstick: bool) -> Run:
    samples: list[int] = []
    medians: list[float] = []
    spent = 0.0
    between = Between() if yardstick else None
    with no_collector():
        if between:
            between.measure()
        for _ in track(range(WINDOWS), label):
            if between is None:
                begin = time.perf_counter()
                window = stretch(call, seconds / WINDOWS, -(-MIN_ITERATIONS // WINDOWS))
                spent += time.perf_counter() - begin
            else:
                window, taken = _in_turns(call, between, seconds / WINDOWS, -(-MIN_ITERATIONS // WINDOWS))
                spent += taken
            samples += window
            medians.append(float(np.median(window)))
    array = np.array(samples, np.float64) / 1e6
    record = between.record() if between else None
    return Run(array, np.array(medians) / 1e6, spent, len(samples) * per_call / spent, yardstick=record)


def _in_turns(call: Call, between: Between, seconds: float, least: int) -> tuple[list[int], float]:
    """One window of short stretches, the yardstick timed between them: ns of each call, and the seconds of the calls alone."""
    samples: list[int] = []
    spent = 0.0
    while spent < seconds or (len(samples) < least and spent < seconds * PATIENCE):
        between.settle(call)
        begin = time.perf_counter()
        part = stretch(call, min(STRETCH_S, seconds), 1)
        spent += time.perf_counter() - begin
        samples += part
        between.measure(float(np.median(part)))
    return samples, spent


def server(call: Call, seconds: float, rate: float | None = None) -> Run:
    """Poisson arrivals at ``rate`` a second (default: `SERVER_LOAD` of what the model serves), first come first served.

    Latency runs from arrival to answer. ``extra``: ``rate`` offered, ``utilisation``, ``service_ms`` and ``queue``
    (``wait_ms`` percentiles, ``longest``: most that still waited when another came, ``unserved``: how many had come when the
    time was over and are in no figure, ``first_fifth_ms`` and ``last_fifth_ms``:
    median wait, ``behind_ms``: by how much the last answer came later than its arrival). The schedule is seeded: two runs at
    one rate see the same arrivals. ``windows_ms``: latencies of stretches, without what the queue of these arrivals explains.
    Raises `UsageError` where so few or so many come that there is nothing to measure.
    """
    service_s = float(np.mean(stretch(call, 0.2, 10))) / 1e9
    rate = rate or SERVER_LOAD / service_s
    if rate * seconds > MAX_ARRIVALS:
        many = f"{short(rate)} arrivals a second for {seconds:g} s are over {MAX_ARRIVALS:,}"
        raise UsageError(many, "lower --seconds or --rate")
    count = max(MIN_ITERATIONS, int(rate * seconds))
    gaps = np.random.default_rng(0).exponential(1e9 / rate, count)
    schedule = np.cumsum(gaps).astype(np.int64).tolist()
    started, finished = np.empty(count, np.int64), np.empty(count, np.int64)
    limit = int(seconds * PATIENCE * 1e9)
    if schedule[FEWEST_ARRIVALS - 1] > limit:
        raise UsageError(
            f"{short(rate)} arrivals a second are under {FEWEST_ARRIVALS} even in {PATIENCE} times the {seconds:g} s",
            "raise --rate or --seconds",
        )
    say(f"server, {short(rate)} arrivals a second, {seconds:g} s")
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
    return _served(rate, np.array(schedule), started[:count], finished[:count])


def _served(rate: float, schedule: Times, started: Times, finished: Times) -> Run:
    """The run of a server: when all came, ns (M,), and when the first N of them were begun and answered."""
    count = len(started)
    arrivals = schedule[:count]
    latency, waits, service = (finished - arrivals) / 1e6, (started - arrivals) / 1e6, (finished - started) / 1e6
    spent = float(finished[-1]) / 1e9
    waiting = np.searchsorted(schedule, started, side="right") - np.arange(count) - 1  # before the last that came
    fifth = max(count // 5, 1)
    extra = {
        "rate": rate,
        "utilisation": float(service.sum() / 1e3 / spent),
        "service_ms": percentiles(service),
        "queue": {
            "wait_ms": percentiles(waits),
            "longest": int(max(waiting.max(), 0)),
            "unserved": max(int(np.searchsorted(schedule, finished[-1], side="right")) - count, 0),
            "first_fifth_ms": float(np.median(waits[:fifth])),
            "last_fifth_ms": float(np.median(waits[-fifth:])),
            "behind_ms": float(latency[-1]),
        },
    }
    ideal = _queued(arrivals, float(np.median(finished - started)), _pause(started, finished, waits)) / 1e6
    parts = [np.array_split(values, min(WINDOWS, count)) for values in (latency, ideal)]
    factors = np.array([np.median(found) / np.median(expected) for found, expected in zip(*parts, strict=True)])
    return Run(latency, factors * float(np.median(latency)), spent, count / spent, extra)


def _pause(started: Times, finished: Times, waits: NDArray[np.float64]) -> float:
    """ns from one answer to the next start, where one was waiting: the loop's own cost."""
    pauses = (started[1:] - finished[:-1])[waits[1:] > 0]
    return float(np.median(pauses)) if len(pauses) else 0.0


def _queued(arrivals: Times, service: float, pause: float) -> NDArray[np.float64]:
    """ns from arrival to answer, were each served in the same time (Lindley's recursion)."""
    turns, step = np.arange(len(arrivals)), service + pause
    starts: NDArray[np.float64] = np.maximum.accumulate(arrivals - step * turns) + step * turns
    return starts - arrivals + service

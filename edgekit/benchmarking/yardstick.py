"""A fixed piece of work that is timed between the stretches of a run, so that runs of different days can be compared.

On a machine that others use too, the pace of the cores changes by tens of percent from one run to the next, for minutes. It
changes alike for the model and for work of the same kind beside it. So a run on the CPU keeps how long each of its stretches
took *relative to* the yardstick, and a gate compares those.

The work: products of a row with a matrix, as layers make them, and additions as wide as an activation; NumPy alone, in one
thread, about 240 kB, which stays in a core's own cache. It must never change: a change takes another `NAME`.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import numpy as np

from .statistics import thin

__all__ = ["BETWEEN", "NAME", "Between", "work"]

NAME = "products-192"
BURST_S = 0.0015  # at each measuring point
STRETCH_S = 0.005  # of the model, from one to the next
#: Standard deviation of the logarithm of a run's median relative to the yardstick, between runs of one thing in processes of
#: their own, beyond what the stretches of one run show (`benchmarks/bench_harness.py`, two virtual cores: 5.0% of runs that can
#: be trusted, 4.0% of others). For runs of which no other process was measured.
BETWEEN = 0.05
_WARM = 20
_SETTLED = 4  # a stretch of at least so many calls has the first two untimed: the yardstick has had the caches


def work() -> Callable[[], Any]:
    """One unit of the work, about 50 microseconds."""
    matrix, row = np.eye(192, dtype=np.float32), np.ones((1, 192), np.float32)
    wide, one, kept = np.ones(8192, np.float32), np.ones(8192, np.float32), np.empty(8192, np.float32)

    def unit() -> Any:
        value = row
        for _ in range(6):
            value = value @ matrix
            np.multiply(wide, one, out=kept)
        return value

    return unit


class Between:
    """Times the yardstick between stretches: `measure` before the first and after each, handing in what the stretch took."""

    def __init__(self) -> None:
        self._work = work()
        for _ in range(_WARM):
            self._work()
        self._bursts: list[float] = []  # median ns
        self._stretches: list[float] = []

    def measure(self, stretch_ns: float | None = None) -> None:
        """Time a burst; ``stretch_ns``: the median latency of the stretch that has just ended."""
        if stretch_ns is not None:
            self._stretches.append(stretch_ns)
        taken = []
        end = perf_counter_ns() + int(BURST_S * 1e9)
        now = 0
        while now < end:
            before = perf_counter_ns()
            self._work()
            now = perf_counter_ns()
            taken.append(now - before)
        self._bursts.append(float(np.median(taken[1:] or taken)))  # the first finds the caches cold

    def settle(self, call: Callable[[], Any]) -> None:
        """Two untimed calls, where a stretch has so many that they cost little."""
        if self._stretches and self._stretches[-1] * _SETTLED <= STRETCH_S * 1e9:
            call()
            call()

    def record(self) -> dict[str, Any]:
        """``name``, ``ms`` (median of one unit) and ``relative`` (of each stretch, or 512 evenly spread over the run)."""
        bursts = np.array(self._bursts)
        beside = (bursts[1:] + bursts[:-1]) / 2
        relative = thin(np.array(self._stretches) / beside)
        return {"name": NAME, "ms": float(np.median(bursts)) / 1e6, "relative": [round(float(v), 6) for v in relative]}

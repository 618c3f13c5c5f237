"""Latency of two graphs against each other, in turn, at the machine's undisturbed pace."""

from __future__ import annotations

import time
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.runtime.onnxruntime import session

__all__ = ["paired_latency", "paired_times"]

CALLS, LEAST = 8, 40  # calls of a burst; bursts, at least
SECONDS = 3.0  # in all, so that disturbed and quiet moments occur
PAUSE_S = 0.002  # between bursts, so that they fall on more moments
UNDISTURBED = 0.01  # share of the calls that are quicker than what is given


def paired_latency(before: bytes, after: bytes, sample: NDArray[Any]) -> tuple[float, float]:
    """Milliseconds of one inference of ``before`` and of ``after``: ONNX Runtime, one thread, batch of ``sample``.

    The 1% quantile of the calls in alternating bursts. Who shares the core slows a call by half, and a small graph by more than
    a large one, but not in each millisecond: the ratio of these quantiles repeats to 1% where that of medians is off by up to
    20% (two virtual cores, digits and groceries nets).
    """
    old, new = (float(np.quantile(taken, UNDISTURBED)) for taken in paired_times(before, after, sample, SECONDS))
    return old, new


def paired_times(
    before: bytes, after: bytes, sample: NDArray[Any], seconds: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Milliseconds of each call of ``before`` and of ``after``, in bursts of `CALLS` that alternate for ``seconds``."""
    runs, feeds = [session(graph) for graph in (before, after)], {"x": sample}
    times: list[list[int]] = [[], []]
    for run in runs:
        for _ in range(3 * CALLS):  # warms caches and clocks
            run.run(None, feeds)
    started, bursts = time.perf_counter(), 0
    while bursts < LEAST or time.perf_counter() - started < seconds:
        for run, taken in zip(runs, times, strict=True):
            for _ in range(CALLS):
                start = perf_counter_ns()
                run.run(None, feeds)
                taken.append(perf_counter_ns() - start)
        bursts += 1
        time.sleep(PAUSE_S)
    old, new = (np.array(taken) / 1e6 for taken in times)
    return old, new

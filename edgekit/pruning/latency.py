"""Latency of two graphs against each other, in turn, so that a noisy machine slows both."""

from __future__ import annotations

from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.runtime.onnxruntime import session

__all__ = ["paired_latency"]


def paired_latency(before: bytes, after: bytes, sample: NDArray[Any], rounds: int = 30, calls: int = 20) -> tuple[float, float]:
    """Median milliseconds of one inference of ``before`` and of ``after``: ONNX Runtime, one thread, batch of ``sample``.

    The two run in alternating bursts of ``calls``; each burst counts as its median.
    """
    runs = [session(before), session(after)]
    medians: list[list[float]] = [[], []]
    for index in range(rounds + 3):
        for which, run in enumerate(runs):
            times = []
            for _ in range(calls):
                start = perf_counter_ns()
                run.run(None, {"x": sample})
                times.append(perf_counter_ns() - start)
            if index >= 3:  # the first bursts warm caches and clocks
                medians[which].append(float(np.median(times)) / 1e6)
    return float(np.median(medians[0])), float(np.median(medians[1]))

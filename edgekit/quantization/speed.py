"""Whether the quantized graph is faster than the float one, on a backend that is here to be measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from edgekit.runtime.onnxruntime import session

from .simulate import Feeds

__all__ = ["BACKENDS", "MARGIN", "faster", "latencies"]

#: What can be timed here. GPU backends join when the runtime has them.
BACKENDS = ("onnxruntime",)
SECONDS = 0.6
LEAST, MOST_SECONDS = 15, 6.0
MARGIN = 0.03  # above what the same graph differs by, measured twice


def latencies(graphs: Sequence[bytes], feeds: Feeds) -> list[float]:
    """Median milliseconds a run of each graph, one thread, interleaved, so that the machine's mood hits all alike.

    Each timed run follows an untimed one of its own, so that no graph pays for what another left in the caches; the order
    turns around every round; and the slower half of the rounds is left out: where the clock has two speeds, medians over
    all of them fall between, for each graph elsewhere.
    """
    runs = [session(graph) for graph in graphs]
    for run in runs:
        run.run(None, dict(feeds))
    times: list[list[int]] = [[] for _ in runs]
    order = list(zip(runs, times, strict=True))
    begin = time.perf_counter()
    while len(times[0]) < LEAST or time.perf_counter() < begin + SECONDS * len(runs):
        if times[0] and time.perf_counter() > begin + MOST_SECONDS:
            break
        for run, seen in order:
            run.run(None, dict(feeds))
            start = time.perf_counter_ns()
            run.run(None, dict(feeds))
            seen.append(time.perf_counter_ns() - start)
        order.reverse()
    taken = np.array(times)  # (graphs, rounds)
    rounds = taken.sum(0)
    calm = taken[:, rounds <= np.median(rounds)]
    return [round(float(median) / 1e6, 4) for median in np.median(calm, axis=1)]


def faster(int8_ms: float, float_ms: float) -> bool:
    """Whether a latency is below another by more than the noise of `latencies`."""
    return int8_ms <= (1 - MARGIN) * float_ms

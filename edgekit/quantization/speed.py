"""Whether the quantized graph is faster than the float one, on a backend that is here to be measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from edgekit.runtime.onnxruntime import session

from .simulate import Feeds

__all__ = ["BACKENDS", "latencies"]

#: What can be timed here. GPU backends join when the runtime has them.
BACKENDS = ("onnxruntime",)
SECONDS = 0.6
LEAST, MOST_SECONDS = 15, 6.0


def latencies(graphs: Sequence[bytes], feeds: Feeds) -> list[float]:
    """Median milliseconds a run of each graph, one thread, interleaved, so that the machine's mood hits all alike."""
    runs = [session(graph) for graph in graphs]
    for run in runs:
        run.run(None, dict(feeds))
    times: list[list[int]] = [[] for _ in runs]
    begin = time.perf_counter()
    while len(times[0]) < LEAST or time.perf_counter() < begin + SECONDS * len(runs):
        if times[0] and time.perf_counter() > begin + MOST_SECONDS:
            break
        for run, seen in zip(runs, times, strict=True):
            start = time.perf_counter_ns()
            run.run(None, dict(feeds))
            seen.append(time.perf_counter_ns() - start)
    return [round(float(np.median(seen)) / 1e6, 4) for seen in times]

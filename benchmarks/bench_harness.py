"""Whether `bench` can be believed: its own cost, how it repeats, how often its gates are wrong. bench_harness.py [--pairs 100]

A chain of small matrix products, about 0.1 ms, in ONNX Runtime with one thread. All in turns, on one machine:

- ``overhead``: p50 as `bench` takes it over p50 of a loop that holds nothing but the call and two clock readings.
- ``repeat``: p50 of two runs of `bench`, one after the other; and whether a run that was off by more said so.
- ``false_alarms``: share of comparisons of the graph with itself that are called slower or faster, by runs one after the
  other (``--against``) and in turns (``bench A B``).
- ``found``: share of comparisons with the same graph, 5% slower by a wait, that are called slower.

Targets: overhead 2% or 5 us; 3% or flagged; 1 in 100; 95 in 100. Writes ``results/bench_harness.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from time import perf_counter_ns
from typing import Any

import numpy as np
from _machine import save
from onnx import TensorProto, helper, numpy_helper

from edgekit.benchmarking.harness import MAX_DRIFT
from edgekit.benchmarking.pairs import in_turns
from edgekit.benchmarking.scenarios import no_collector, single_stream
from edgekit.benchmarking.statistics import coefficient_of_variation, median_ratio, paired_ratio, thin
from edgekit.runtime.onnxruntime import session

SLOWER = 1.05
Call = Callable[[], Any]


def model(products: int = 12, width: int = 192) -> Call:
    weight = numpy_helper.from_array(np.eye(width, dtype=np.float32), "w")
    names = ["x", *(f"t{i}" for i in range(products - 1)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    run, feeds = session(made.SerializeToString()), {"x": np.ones((1, width), np.float32)}
    return lambda: run.run(None, feeds)


def slower(call: Call, share: float) -> Call:
    """The same, longer by a share of its median: a wait, spun."""
    taken = bare(call, 0.3)
    wait = int(np.median(taken) * 1e6 * (share - 1))

    def waiting() -> None:
        call()
        until = perf_counter_ns() + wait
        while perf_counter_ns() < until:
            pass

    return waiting


def bare(call: Call, seconds: float) -> np.ndarray[Any, Any]:
    """ms of each call; nothing else is in the loop."""
    taken, clock, until = [], perf_counter_ns, perf_counter_ns() + int(seconds * 1e9)
    with no_collector():
        while clock() < until:
            start = clock()
            call()
            taken.append(clock() - start)
    return np.array(taken) / 1e6


def overhead(call: Call, rounds: int = 30) -> dict[str, float]:
    pairs = []
    for number in range(rounds):
        both = [lambda: float(np.median(bare(call, 0.2))), lambda: float(np.median(single_stream(call, 0.2).samples_ms))]
        found = [both[0](), both[1]()] if number % 2 else [both[1](), both[0]()][::-1]
        pairs.append(found)
    loop, harness = np.median(np.array(pairs), 0)
    ratio = float(np.median([b / a for a, b in pairs]))
    return {"bare_p50_ms": float(loop), "bench_p50_ms": float(harness), "ratio": ratio, "us": 1e3 * float(loop) * (ratio - 1)}


def repeat(call: Call, runs: int) -> dict[str, float]:
    """Of pairs of runs: the share within 3% at p50, and of the others the share where one said that it drifted."""
    inside, flagged = 0, 0
    for _ in range(runs):
        pair = [single_stream(call, 1.0) for _ in range(2)]
        first, second = (float(np.median(run.samples_ms)) for run in pair)
        if abs(second / first - 1) <= 0.03:
            inside += 1
        elif any(coefficient_of_variation(run.windows_ms) > MAX_DRIFT for run in pair):
            flagged += 1
    return {
        "pairs": runs,
        "within_3_percent": inside / runs,
        "flagged": flagged / runs,
        "neither": 1 - (inside + flagged) / runs,
    }


def gates(call: Call, other: Call, pairs: int) -> dict[str, dict[str, float]]:
    """Share of verdicts by kind, of runs one after the other and of runs in turns."""
    verdicts: dict[str, list[str]] = {"against": [], "in turns": []}
    for _ in range(pairs):
        first, second = (single_stream(one, 0.5).samples_ms for one in (call, other))
        rounds = in_turns([call, other], 0.5)[1]
        for kind, interval in (
            ("against", median_ratio(thin(first), thin(second))),
            ("in turns", paired_ratio(rounds[0], rounds[1])),
        ):
            verdicts[kind].append(interval.verdict)
    return {
        kind: {word: found.count(word) / pairs for word in ("slower", "faster", "same")} for kind, found in verdicts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="Comparisons of each kind.")
    options = parser.parse_args()
    call = model()
    for _ in range(2000):
        call()
    figures: dict[str, Any] = {"overhead": overhead(call), "repeat": repeat(call, max(options.pairs // 5, 5))}
    figures["same"] = gates(call, call, options.pairs)
    figures["slower_by_5_percent"] = gates(call, slower(call, SLOWER), options.pairs)
    figures["pairs"] = options.pairs
    for name, found in figures.items():
        print(name, found)
    save("bench_harness", figures)


if __name__ == "__main__":
    main()

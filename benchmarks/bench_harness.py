"""Whether `bench` can be believed: its own cost, how it repeats, how often its gates are wrong. bench_harness.py [--pairs 100]

A chain of small matrix products, about 0.1 ms, in ONNX Runtime with one thread. All in turns, on one machine:

- ``overhead``: p50 as `bench` takes it, the yardstick timed in between, over p50 of a loop that holds nothing but the call and
  two clock readings.
- ``repeat``: p50 of two runs of `bench`, one after the other; and whether a run that was off by more said so.
- ``false_alarms``: share of comparisons of the graph with itself that are called slower or faster: by five processes and the
  five after them (``against``; each process belongs to several comparisons), and in turns (``bench A B``).
- ``found``: share of comparisons with the same graph, 5% slower by an empty loop, that are called slower; ``ratio``: the
  median that they found.
- ``gate``: the same with ``--fail-over 2.5%``.
- ``between_runs``: how much processes differ (standard deviation of the logarithm of their medians): in ms, relative to the
  yardstick, and beyond what their stretches show (``between``).

Targets: overhead 2% or 5 us; 3% or flagged; 1 in 100; 95 in 100. Writes ``results/bench_harness.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
from _machine import save
from onnx import TensorProto, helper, numpy_helper

from edgekit.benchmarking.cold import MEASURED_S
from edgekit.benchmarking.device import Sensors
from edgekit.benchmarking.doubts import doubts
from edgekit.benchmarking.pairs import in_turns
from edgekit.benchmarking.scenarios import Run, no_collector, single_stream, warm_up
from edgekit.benchmarking.statistics import Interval, log_median, paired_ratio, runs_ratio
from edgekit.benchmarking.yardstick import BETWEEN
from edgekit.runtime.onnxruntime import session

SLOWER = 1.05
SECONDS = 2.0  # what the command measures
PROCESSES = 5  # that it measures in: its own and four more
LIMIT = 0.025  # of the gate
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


def slower(call: Call, turns: int) -> Call:
    """The same, longer by so many empty turns of a loop, whose pace changes with that of the machine, as a wait's would not."""

    def longer() -> None:
        call()
        for _ in range(turns):
            pass

    return longer


def turns_for(call: Call, share: float) -> int:
    """The turns that make `slower` slower by just this share: found in turns, what the loop itself costs included."""
    turns = 100
    for _ in range(4):
        found = float(np.median(np.divide(*in_turns([call, slower(call, turns)], SECONDS)[1][::-1]))) - 1
        turns = max(round(turns * (share - 1) / max(found, 0.001)), 1)
    return turns


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
        both = [lambda: float(np.median(bare(call, 0.2))), lambda: float(np.median(measured(call, 0.2).samples_ms))]
        found = [both[0](), both[1]()] if number % 2 else [both[1](), both[0]()][::-1]
        pairs.append(found)
    loop, harness = np.median(np.array(pairs), 0)
    ratio = float(np.median([b / a for a, b in pairs]))
    return {"bare_p50_ms": float(loop), "bench_p50_ms": float(harness), "ratio": ratio, "us": 1e3 * float(loop) * (ratio - 1)}


def measured(call: Call, seconds: float = SECONDS) -> Run:
    """As `bench` does it on a CPU."""
    return single_stream(call, seconds, yardstick=True)


def repeat(call: Call, runs: int) -> dict[str, float]:
    """Of pairs of runs: the share within 3% at p50, and of the others the share where one said that it is not to be trusted."""
    inside, flagged = 0, 0
    for _ in range(runs):
        pair = [judged(call) for _ in range(2)]
        first, second = (float(np.median(run.samples_ms)) for run, _ in pair)
        if abs(second / first - 1) <= 0.03:
            inside += 1
        elif not all(trusted for _, trusted in pair):
            flagged += 1
    return {
        "pairs": runs,
        "within_3_percent": inside / runs,
        "flagged": flagged / runs,
        "neither": 1 - (inside + flagged) / runs,
    }


def judged(call: Call) -> tuple[Run, bool]:
    """A run, and whether it is to be trusted."""
    warm = warm_up(call)
    before = Sensors()
    run = measured(call)
    load = Sensors().since(before).reasons(len(os.sched_getaffinity(0)), 1)
    return run, not [*doubts(run, warm, "single-stream"), *load]


class Process(NamedTuple):
    """A run's median, its stretches relative to the yardstick."""

    p50_ms: float
    relative: np.ndarray[Any, Any]


def process(turns: int) -> Process:
    """A run in a process of its own, as long as those that `bench` starts."""
    command = [sys.executable, __file__, "--child", str(turns)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    p50_ms, relative = json.loads(done.stdout)
    return Process(p50_ms, np.array(relative))


def child(turns: int) -> None:
    call = model()
    call = slower(call, turns) if turns else call
    warm_up(call, limit_s=0.5)
    run = measured(call, MEASURED_S)
    assert run.yardstick
    print(json.dumps([float(np.median(run.samples_ms)), run.yardstick["relative"]]))


def against(turns: int, count: int) -> tuple[list[Interval], list[Interval], list[Process]]:
    """Comparisons by five processes each: of the graph with itself, with the slower one; and the processes of the graph."""
    runs: dict[int, list[Process]] = {0: [], turns: []}
    for _ in range(count + 2 * PROCESSES - 1):
        for kind, found in runs.items():
            found.append(process(kind))
    same, other = (np.array([np.median(each.relative) for each in runs[kind]]) for kind in (0, turns))
    parts = [(slice(i, i + PROCESSES), slice(i + PROCESSES, i + 2 * PROCESSES)) for i in range(count)]
    pairs = [[runs_ratio(same[a], after[b]) for a, b in parts] for after in (same, other)]
    return pairs[0], pairs[1], runs[0]


def turned(turns: int, count: int) -> list[Interval]:
    """Comparisons in turns, with the graph that is slower by so many ``turns``."""
    call = model()
    other = slower(call, turns) if turns else call
    for each in (call, other):
        warm_up(each)
    return [paired_ratio(*in_turns([call, other], SECONDS)[1]) for _ in range(count)]


def share(found: list[Interval], verdicts: tuple[str, ...], limit: float = 0.0) -> float:
    """Of comparisons, the share with one of the verdicts and a ratio off by more than ``limit``."""
    return sum(each.verdict in verdicts and abs(each.ratio - 1) > limit for each in found) / len(found)


def between(runs: list[Process]) -> dict[str, float]:
    """What processes of one thing differ by, and what of it their stretches do not show."""
    medians, errors = np.array([log_median(run.relative) for run in runs]).T
    within = float(np.sqrt(np.mean(errors**2)))
    spread = float(np.std(medians, ddof=1))
    return {
        "processes": len(runs),
        "assumed": BETWEEN,
        "ms": float(np.std(np.log([run.p50_ms for run in runs]), ddof=1)),
        "relative": spread,
        "within": within,
        "between": float(np.sqrt(max(spread**2 - within**2, 0))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="Comparisons of each kind.")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child)
        return
    call = model()
    warm_up(call)
    figures: dict[str, Any] = {"overhead": overhead(call), "repeat": repeat(call, max(options.pairs // 5, 5))}
    turns = turns_for(call, SLOWER)
    by_processes = against(turns, options.pairs)
    same = {"against": by_processes[0], "in turns": turned(0, options.pairs)}
    other = {"against": by_processes[1], "in turns": turned(turns, options.pairs)}
    figures["false_alarms"] = {kind: share(found, ("slower", "faster")) for kind, found in same.items()}
    figures["found"] = {kind: share(found, ("slower",)) for kind, found in other.items()}
    alarms, hits = ({kind: share(found, ("slower",), LIMIT) for kind, found in each.items()} for each in (same, other))
    figures["gate"] = {"limit": LIMIT, "false_alarms": alarms, "found": hits}
    figures["ratio"] = {kind: float(np.median([each.ratio for each in found])) for kind, found in other.items()}
    figures["half_width"] = {k: float(np.median([each.high / each.ratio - 1 for each in found])) for k, found in same.items()}
    figures["between_runs"] = between(by_processes[2])
    figures["pairs"] = options.pairs
    for name, found in figures.items():
        print(name, found)
    save("bench_harness", figures)


if __name__ == "__main__":
    main()

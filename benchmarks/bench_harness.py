"""Whether `bench` can be believed: its own cost, how it repeats, how often its gates are wrong. bench_harness.py [--pairs 100]

A chain of small matrix products, about 0.1 ms, in ONNX Runtime with one thread. All in turns, on one machine:

- ``overhead``: p50 as `bench` takes it, the yardstick timed in between, over p50 of a loop that holds nothing but the call and
  two clock readings.
- ``repeat``: p50 of two runs of `bench`, one after the other; and whether a run that was off by more said so.
- ``false_alarms``: share of comparisons of the graph with itself that are called slower or faster, by runs one after the
  other, each in a process of its own (``against``), and in turns (``bench A B``).
- ``found``: share of comparisons with the same graph, 5% slower by an empty loop, that are called slower; ``ratio``: the
  median that they found.
- ``gate``: the same with ``--fail-over 2.5%``.
- ``between_runs``: how much runs of one thing differ by the yardstick (standard deviation of the logarithm), and how much of
  that their stretches do not show.

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

from edgekit.benchmarking.device import Sensors
from edgekit.benchmarking.doubts import doubts
from edgekit.benchmarking.pairs import in_turns
from edgekit.benchmarking.scenarios import Run, no_collector, single_stream, warm_up
from edgekit.benchmarking.statistics import Interval, log_median, median_ratio, paired_ratio
from edgekit.benchmarking.yardstick import BETWEEN
from edgekit.runtime.onnxruntime import session

SLOWER = 1.05
SECONDS = 2.0  # what the command measures
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


class Stretches(NamedTuple):
    """Of a run, relative to the yardstick."""

    relative: np.ndarray[Any, Any]
    trusted: bool


def process(turns: int) -> Stretches:
    """A run in a process of its own, as runs of different days are."""
    command = [sys.executable, __file__, "--child", str(turns)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    relative, trusted = json.loads(done.stdout)
    return Stretches(np.array(relative), trusted)


def child(turns: int) -> None:
    call = model()
    run, trusted = judged(slower(call, turns) if turns else call)
    assert run.yardstick
    print(json.dumps([run.yardstick["relative"], trusted]))


class Gates(NamedTuple):
    """Intervals by kind, and the runs that those of ``against`` are of."""

    intervals: dict[str, list[Interval]]
    runs: list[Stretches]

    def share(self, verdicts: tuple[str, ...], limit: float = 0.0) -> dict[str, float]:
        """Of each kind, the share with one of the verdicts and a ratio off by more than ``limit``."""
        return {
            kind: sum(each.verdict in verdicts and abs(each.ratio - 1) > limit for each in found) / len(found)
            for kind, found in self.intervals.items()
        }


def gates(turns: int, pairs: int) -> Gates:
    """Comparisons of runs one after the other, each in its own process, and of runs in turns in this one."""
    found = Gates({"against": [], "in turns": []}, [])
    call = model()
    other = slower(call, turns) if turns else call
    for each in (call, other):
        warm_up(each)
    for _ in range(pairs):
        first, second = process(0), process(turns)
        found.runs.extend((first, second))
        spread = float(np.hypot(BETWEEN[first.trusted], BETWEEN[second.trusted]))
        found.intervals["against"].append(median_ratio(first.relative, second.relative, spread))
        found.intervals["in turns"].append(paired_ratio(*in_turns([call, other], SECONDS)[1]))
    return found


def between(runs: list[Stretches]) -> dict[str, Any]:
    """What runs of one thing differ by beyond what their stretches show, by whether they are trusted (`yardstick.BETWEEN`)."""
    found: dict[str, Any] = {}
    for name, trusted in (("trusted", True), ("not trusted", False)):
        each = [log_median(run.relative) for run in runs if run.trusted is trusted]
        found[name] = {"runs": len(each), "assumed": BETWEEN[trusted]}
        if len(each) > 2:
            medians, errors = np.array(each).T
            spread, within = float(np.std(medians, ddof=1)), float(np.sqrt(np.mean(errors**2)))
            beyond = float(np.sqrt(max(spread**2 - within**2, 0)))
            found[name] |= {"all": spread, "within": within, "between": beyond}
    return found


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
    same, other = gates(0, options.pairs), gates(turns, options.pairs)
    figures["false_alarms"] = same.share(("slower", "faster"))
    figures["found"] = other.share(("slower",))
    figures["gate"] = {"limit": LIMIT, "false_alarms": same.share(("slower",), LIMIT), "found": other.share(("slower",), LIMIT)}
    figures["ratio"] = {kind: float(np.median([each.ratio for each in found])) for kind, found in other.intervals.items()}
    figures["between_runs"] = between(same.runs)
    figures["pairs"] = options.pairs
    for name, found in figures.items():
        print(name, found)
    save("bench_harness", figures)


if __name__ == "__main__":
    main()

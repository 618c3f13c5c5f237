"""Pruning to a wanted speedup beside its peers: the same nets, the same fine-tuning, latency measured in the same run.

    python benchmarks/pruning.py [--rows groceries-residual-3x ...] [--tools edgekit tp-uniform-16 ...] [--seeds 0 1 2]
                                 [--epochs N] [--bases FOLDER] [--groceries FOLDER] [--resplit] [--out runs/pruning]
                                 [--again | --judge] [--results FILE] [--merge FILE ...] [--prediction digits-depthwise ...]

A row is a trained net and a speedup on ONNX Runtime, one thread, batch 1. Each tool makes a bundle; all are judged alike: on
the held-out split by the runtime, in latency by bursts in turn with the unpruned graph, at the undisturbed pace and beside it
by the ratio of medians. All are fine-tuned by edgekit's own
`Recovery`: its rate, its augmentation, its teacher (the base). Peers (`_pruning_peers.py`):

- ``tp-uniform``, ``tp-global``: Torch-Pruning, L1, the same ratio in each layer or one ranking over all; ``-8``, ``-16``:
  widths rounded to such multiples. Its ratio is the smallest one whose measured speedup is the wanted one, or the one that
  is fastest where none gets there (``fast_enough`` false in ``summary``).
- ``scratch``: the preset with smaller widths, trained from fresh weights for as many epochs with the base as its teacher;
  ``scratch-long``: for the base's epochs more.

``drop``: points of top-1 (readers: of the character error rate) lost; below zero: won. Seeds fine-tune one base anew, so the
standard error is that of fine-tuning; the split's own is in ``split_error``. Runs that are done are kept in the result
file unless their base has changed; ``--again`` makes the named ones anew, ``--judge`` only times and judges their bundles in
``--out`` again, for what was made beside other work. ``--prediction``: predicted against measured latency of nets narrowed
at random.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from _groceries import resplit
from _machine import RESULTS, machine
from _pruning_peers import TOLERANCE, Case, Unreached, make

import edgekit
from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import BudgetNotMet, EdgekitError
from edgekit.files import atomic_write
from edgekit.pruning.latency import paired_latency, paired_times
from edgekit.runtime.golden import load_golden

TOOLS = ("edgekit", "tp-uniform", "tp-uniform-8", "tp-uniform-16", "tp-global-16", "scratch", "scratch-long")
#: What is trained where the folder of bases holds no NAME.edge: data, options of train.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "digits-depthwise": ("digits", {}),
    "digits-textbook": ("digits", {"model": "textbook"}),
    "groceries-depthwise-m": ("folder:{groceries}", {}),
    "groceries-residual": ("folder:{groceries}", {"model": "residual", "epochs": 80}),
    "digits-vit": ("digits", {"model": "vit"}),
    "spam-lstm": ("spam", {"model": "lstm-text"}),
    "labels-crnn": ("labels", {"epochs": 5}),
}


@dataclass(frozen=True)
class Row:
    """``most``: points that may be lost at ``speedup``, None: shown, not judged; ``epochs`` of fine-tuning."""

    base: str
    speedup: float
    most: float | None
    epochs: int = 40
    peers: tuple[str, ...] = ()


_SCRATCH, _PEERS = ("scratch", "scratch-long"), TOOLS[1:]
ROWS = {
    "digits-depthwise-2.5x": Row("digits-depthwise", 2.5, 0.3, peers=_PEERS),
    "digits-textbook-2.5x": Row("digits-textbook", 2.5, None, peers=_PEERS[:-2]),
    "groceries-depthwise-m-2x": Row("groceries-depthwise-m", 2.0, 0.7, epochs=60, peers=_SCRATCH),
    "groceries-residual-2x": Row("groceries-residual", 2.0, 0.7, epochs=60, peers=_PEERS),
    "groceries-residual-3x": Row("groceries-residual", 3.0, 1.2, epochs=60, peers=_PEERS),
    "digits-vit-1.8x": Row("digits-vit", 1.8, 0.5),
    "spam-lstm-1.8x": Row("spam-lstm", 1.8, 0.3, epochs=12),
    "labels-crnn-1.8x": Row("labels-crnn", 1.8, 0.3, epochs=4),
}
Run = dict[str, Any]


@dataclass
class Results:
    """The result file: ``bases``, ``rows`` of runs, ``summary``, ``prediction``."""

    path: Path
    bases: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[Run]] = field(default_factory=dict)
    prediction: dict[str, Any] = field(default_factory=dict)

    def take(self, path: Path) -> None:
        """The runs of another file, beside those of this one."""
        found = json.loads(path.read_text())
        self.bases = {**found["bases"], **self.bases}
        self.prediction = {**found["prediction"], **self.prediction}
        for row, runs in found["rows"].items():
            own = self.rows.setdefault(row, [])
            own += [run for run in runs if _key(run) not in {_key(one) for one in own}]

    def know(self, name: str, base: Run) -> None:
        """Runs of another base than this one do not stand beside it."""
        self.bases[name] = base
        for row, runs in self.rows.items():
            if ROWS[row].base == name:
                self.rows[row] = [run for run in runs if run["base"] == base["digest"]]
        if name in self.prediction and self.prediction[name]["base"] != base["digest"]:
            del self.prediction[name]

    def add(self, row: str, run: Run) -> None:
        self.rows[row] = [one for one in self.rows.get(row, []) if _key(one) != _key(run)] + [run]
        self.save()

    def save(self) -> None:
        rows = {row: sorted(self.rows[row], key=_key) for row in ROWS if self.rows.get(row)}
        figures = {
            "summary": {row: summary(ROWS[row], runs) for row, runs in rows.items()},
            "bases": self.bases,
            "rows": rows,
            "prediction": self.prediction,
            "machine": machine(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, json.dumps(figures, indent=1, allow_nan=False).encode() + b"\n")


def _key(run: Run) -> tuple[Any, ...]:
    return TOOLS.index(run["tool"]), run["epochs"], run["seed"], run["base"]


def summary(row: Row, runs: list[Run]) -> dict[str, Any]:
    """Mean and standard error over the seeds, a tool and number of epochs at a time; whether the target is met."""
    found: dict[str, Any] = {"speedup": row.speedup, "most": row.most}
    for tool, epochs in dict.fromkeys((run["tool"], run["epochs"]) for run in runs):
        same = [run for run in runs if (run["tool"], run["epochs"]) == (tool, epochs)]
        done = [run for run in same if "error" not in run]
        name = f"{tool}, {epochs} epochs"
        if not done:
            found[name] = {"error": same[0]["error"]}
            continue
        drops, speedup = [run["drop"] for run in done], mean(run["speedup"] for run in done)
        found[name] = {
            "seeds": len(done),
            "drop": round(mean(drops), 3),
            "drop_error": round(stdev(drops) / math.sqrt(len(drops)), 3) if len(drops) > 1 else None,
            "speedup": round(speedup, 3),
            "macs_share": round(mean(run["macs_share"] for run in done), 4),
            "fast_enough": speedup >= row.speedup * TOLERANCE,
            "met": None if row.most is None else speedup >= row.speedup * TOLERANCE and mean(drops) <= row.most + 1e-9,
        }
        if tool != "edgekit" and (ours := found.get(f"edgekit, {epochs} epochs")) and "drop" in ours:
            found[name]["behind_edgekit"] = round(found[name]["drop"] - ours["drop"], 3)  # points; each at its own speedup
    return found


@dataclass(frozen=True)
class Base:
    """A trained bundle, its data, and what it reaches."""

    path: Path
    data: str
    figures: Run

    @property
    def key(self) -> str:
        return "cer" if "cer" in self.figures else "top1"


def base_of(name: str, options: argparse.Namespace) -> Base:
    """The base called ``name``; trained if it is not there."""
    data, arguments = BASES[name]
    groceries = resplit(options.groceries, options.bases / "groceries") if options.resplit else options.groceries
    data = data.format(groceries=groceries)
    path = options.bases / f"{name}.edge"
    if not path.exists():
        print(f"training {name}", file=sys.stderr)
        edgekit.train(data=data, out=path, seed=7, **arguments)
    bundle = Bundle.open(path)
    judged = edgekit.evaluate(path, data, precision="float")
    entry = bundle.last("train")
    assert entry is not None
    key = "cer" if "cer" in judged else "top1"
    figures = {
        key: judged[key],
        "samples": judged["samples"],
        "split_error": 100 * math.sqrt(judged["top1"] * (1 - judged["top1"]) / judged["samples"]),
        **{name: entry.figures[name] for name in ("parameters", "macs")},
        "epochs": entry.config["epochs"],
        "digest": bundle.digest[:16],
    }
    return Base(path, data, figures)


def by_edgekit(base: Base, row: Row, epochs: int, seed: int, target: Path) -> Run:
    """`edgekit.prune`, and what its history says. A missed budget is a figure here, not an error."""
    try:
        edgekit.prune(base.path, out=target, speedup=row.speedup, epochs=epochs, seed=seed, data=base.data)
    except BudgetNotMet as missed:
        print(f"  {missed.message}", file=sys.stderr)
    entry = Bundle.open(target).manifest.history[-1]
    own = ("macs", "macs_share", "parameters", "latency_predicted_ms", "seconds")
    found = {"lr": entry.config.get("lr"), **{name: entry.figures[name] for name in own if name in entry.figures}}
    # What the prediction was for: the machine is busier or idler by the time that all are judged.
    return {**found, "latency_by_prune_ms": [entry.figures["latency_before_ms"], entry.figures["latency_ms"]]}


def judged(base: Base, target: Path) -> Run:
    """Of any tool's bundle: the key figure on the held-out split, what it lost, and the latency beside the base's."""
    found = edgekit.evaluate(target, base.data, precision="float")
    before, after = Bundle.open(base.path), Bundle.open(target)
    sample = load_golden(before)[0]["x"][:1]
    graphs = [bundle.file(FLOAT_GRAPH).read_bytes() for bundle in (before, after)]
    pairs = [paired_latency(*graphs, sample) for _ in range(3)]
    speedups = [old / new for old, new in pairs]
    medians = [float(np.median(taken)) for taken in paired_times(*graphs, sample, 9.0)]
    lost = found[base.key] - base.figures[base.key]
    return {
        base.key: found[base.key],
        "drop": 100 * (lost if base.key == "cer" else -lost),
        "speedup": median(speedups),
        "speedup_range": [min(speedups), max(speedups)],
        "latency_before_ms": median(old for old, _ in pairs),
        "latency_ms": median(new for _, new in pairs),
        "speedup_of_medians": medians[0] / medians[1],
        "size_bytes": after.file(FLOAT_GRAPH).stat().st_size,
    }


class Bench:
    """Makes and judges the runs that are asked for and not yet there."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self.options, self.results = options, results
        self.bases: dict[str, Base] = {}
        self.cases: dict[str, Case] = {}
        self.knobs: dict[tuple[str, str], Any] = {}

    def base(self, name: str) -> Base:
        if name not in self.bases:
            self.bases[name] = base_of(name, self.options)
            self.results.know(name, self.bases[name].figures)
        return self.bases[name]

    def case(self, name: str) -> Case:
        if name not in self.cases:
            base = self.base(name)
            self.cases = {name: Case(base.path, base.data)}  # one at a time: pictures fill the memory
        return self.cases[name]

    def run(self, name: str, tool: str, seed: int) -> None:
        row = ROWS[name]
        base, epochs = self.base(row.base), self.options.epochs or row.epochs
        run: Run = {"tool": tool, "seed": seed, "epochs": epochs, "base": base.figures["digest"]}
        same = [r for r in self.results.rows.get(name, []) if (r["tool"], r["base"]) == (tool, run["base"])]
        done = next((r for r in same if _key(r) == _key(run) and "error" not in r), None)
        target = self.options.out / f"{name}-{tool}-{epochs}-{seed}.edge"
        judge_only = self.options.judge and done and target.exists()
        if done and not self.options.again and not judge_only:
            return
        if not judge_only:
            shutil.rmtree(target, ignore_errors=True)
        try:
            if judge_only:
                run |= done
            elif tool == "edgekit":
                run |= by_edgekit(base, row, epochs, seed, target)
            else:
                kept = [] if self.options.again else [r["knob"] for r in same if "knob" in r]
                knob = self.knobs.get((name, tool), kept[0] if kept else None)
                run |= make(self.case(row.base), tool, row.speedup, epochs, seed, target, knob)
                self.knobs[name, tool] = run["knob"]
            run |= judged(base, target)
        except (Unreached, EdgekitError) as error:
            run["error"] = str(error)
        about = machine()
        stamp = {"edgekit": edgekit.__version__, "date": about["date"], "load": about["load_1min"]}
        run |= {"judged": stamp} if judge_only else stamp  # who made the cut is not who times it again
        self.results.add(name, run)
        said = run.get("error") or f"{base.key} {run[base.key]:.2%}, {run['drop']:+.2f} points lost, {run['speedup']:.2f}x"
        print(f"{name}, {tool}, seed {seed}: {said}", flush=True)


def table(results: Results) -> None:
    for name, rows in results.rows.items():
        for tool, found in summary(ROWS[name], rows).items():
            if not isinstance(found, dict):
                continue
            if "error" in found:
                print(f"{name:26} {tool:26} {found['error']}")
                continue
            error = "" if found["drop_error"] is None else f" +- {found['drop_error']:.2f}"
            met = {None: "", True: "  met", False: "  missed"}[found["met"]]
            print(f"{name:26} {tool:26} {found['speedup']:.2f}x {found['drop']:+.2f}{error} ({found['seeds']} seeds){met}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--tools", nargs="+", default=["edgekit"], choices=TOOLS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="Of fine-tuning, for all tools. Default: the row's.")
    parser.add_argument("--bases", type=Path, default=Path("runs/bases"), help="Folder of NAME.edge; trained where absent.")
    parser.add_argument("--groceries", type=Path, default="../shared/data/groceries", help="Folder with train/ and val/.")
    parser.add_argument("--resplit", action="store_true", help="A third of all groceries is held out, not their own val/.")
    parser.add_argument("--out", type=Path, default=Path("runs/pruning"))
    anew = parser.add_mutually_exclusive_group()
    anew.add_argument("--again", action="store_true", help="Make runs anew that are in the result file.")
    anew.add_argument("--judge", action="store_true", help="Time and judge the bundles of such runs again.")
    parser.add_argument("--results", type=Path, default=RESULTS / "pruning.json")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="Result files whose runs are taken over.")
    parser.add_argument("--prediction", nargs="*", default=[], choices=list(BASES), help="Bases to narrow at random.")
    parser.add_argument("--nets", type=int, default=24, help="Random nets a base, for --prediction.")
    return parser.parse_args()


def main() -> None:
    options = parse()
    results = Results(options.results)
    for path in [options.results, *options.merge]:
        if path.exists():
            results.take(path)
    bench = Bench(options, results)
    for name in options.rows:
        for tool in options.tools:
            if tool == "edgekit" or tool in ROWS[name].peers:
                for seed in options.seeds:
                    bench.run(name, tool, seed)
    for name in options.prediction:
        from _pruning_prediction import prediction

        base = bench.base(name)
        results.prediction[name] = {"base": base.figures["digest"], **prediction(base.path, options.nets)}
        results.save()
    results.save()
    table(results)


if __name__ == "__main__":
    main()

"""Post-training int8 beside its peers: the same float graph, the same samples, ONNX Runtime at the end.

    python benchmarks/quantization.py [--models ocr-det eeg] [--tools edgekit nncf] [--samples 64] [--pictures FOLDER]
                                      [--bundle B ...] [--train digits-depthwise ...] [--out runs/quantization] [--env FOLDER]

Peers, each in an environment of its own that the script makes: onnxruntime's static quantizer, NNCF, NVIDIA ModelOpt; several
configurations of each, so that the best of them counts. A candidate is made by a child process with a time and a memory
limit; what fails is listed with its error. Rows that were measured before are kept: name tools or models to measure again.

``snr_db``: at the worst float output, on samples that nobody calibrated with, with Q and DQ computed as written.
``share``: the part of the multiply-accumulates of Conv, ConvTranspose, MatMul and Gemm with int8 at both inputs.
``peak_mb``: resident memory above a child that loads the same tool and runs the float graph over the same samples.
edgekit takes a fifth of the calibration samples for its own held-out figures, so it calibrates with fewer than its peers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _quantization_measure as measure
import numpy as np
import onnx
from _machine import RESULTS, machine
from _quantization_models import MODELS, Context, from_bundle
from _quantization_peers import CONFIGS, PACKAGES

from edgekit.errors import EdgekitError
from edgekit.files import atomic_write

FILE = RESULTS / "quantization.json"
HELPER = Path(__file__).with_name("_quantization_peers.py")
JUDGED, LABELLED, MANY = 64, 1000, 1024
FULL = 0.99
TRAIN = {
    "digits-depthwise": ["--data", "digits", "--epochs", "8"],
    "digits-vit": ["--data", "digits", "--model", "vit", "--epochs", "8"],
    "labels-crnn": ["--data", "labels:lines,2000", "--epochs", "4"],
    "spam-lstm": ["--data", "spam", "--model", "lstm-text", "--epochs", "3"],
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model ready to be quantized: its bundle, the folders of samples, classes where there are any."""

    name: str
    bundle: Path
    calib: Path
    judge: Path
    data: str

    @property
    def float(self) -> Path:
        return self.bundle / "model.onnx"

    def labels(self) -> Any:
        return np.load(self.judge / "labels.npy") if (self.judge / "labels.npy").exists() else None

    def digest(self) -> str:
        """What figures of one model must agree on to stand side by side: the graph and what it is judged on."""
        files = [self.float, *sorted(self.judge.glob("*.npz"))]
        return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def write(folder: Path, feeds: list[dict[str, Any]]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, sample in enumerate(feeds):
        np.savez(folder / f"{i:05d}.npz", **sample)


def foreign(name: str, context: Context, samples: int, out: Path) -> Case:
    """Fetch, import, draw the samples: those that judge are drawn first, so that more calibration changes none of them."""
    model, folder = MODELS[name], out / name
    case = Case(name, folder / "float.edge", folder / f"calib-{samples}", folder / "judge", model.data)
    source = folder / "source.onnx"
    if not case.bundle.exists():
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(model.fetch(context), source)
        shapes = [part for shape in model.shapes for part in ("--shape", shape)]
        run_edgekit(["import", str(source), "--out", str(case.bundle), *shapes])
    if not case.calib.exists() or not case.judge.exists():
        feeds = list(model.draw(context, case.float, JUDGED + samples))
        write(case.judge, feeds[:JUDGED])
        write(case.calib, feeds[JUDGED:])
    return case


def own(path: Path, samples: int, out: Path) -> Case:
    """A bundle that edgekit trained, on the data that its history names."""
    name = path.name.removesuffix(".edge")
    case = Case(name, path, out / name / f"calib-{samples}", out / name / "judge", "training and test split of its data")
    calib, judge, labels = from_bundle(path, samples, LABELLED)
    write(case.calib, calib)
    write(case.judge, judge)
    if labels is not None:
        np.save(case.judge / "labels.npy", labels)
    return case


def run_edgekit(arguments: list[str]) -> None:
    """Raises RuntimeError with the command's own words."""
    ran = subprocess.run([sys.executable, "-m", "edgekit", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        answer = json.loads(ran.stdout or "{}")
        raise RuntimeError(f"edgekit {arguments[0]}: {answer.get('error', ran.returncode)}")


def environment(tool: str, folder: Path) -> Path:
    """The tool's Python, made and filled if need be; edgekit's is this one."""
    if tool == "edgekit":
        return Path(sys.executable)
    python = folder / tool / "bin" / "python"
    if not (folder / tool / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / tool)], check=True)
        for packages in PACKAGES[tool]:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages.split()], check=True, stdout=sys.stderr)
        (folder / tool / "ready").write_text("")
    return python


class Bench:
    """Makes and measures candidates of one case."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        self.case, self.options = case, options
        self.samples = len(list(case.calib.glob("*.npz")))
        self.judged = measure.read(case.judge)
        self.macs = measure.macs(case.float, self.judged[0])
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._idle: dict[str, float] = {}

    def model(self) -> Row:
        labels = self.case.labels()
        return {
            "data": self.case.data,
            "digest": self.case.digest(),
            "macs": self.macs.total,
            "macs_recurrent": self.macs.recurrent,
            "size_bytes": self.case.float.stat().st_size,
            **({} if labels is None else {"top1": measure.top1(self.case.float, self.judged, labels)}),
        }

    def _child(self, command: list[str | Path], ok: tuple[int, ...] = (0,)) -> measure.Ran:
        return measure.child(command, limit_s=self.options.limit_s, limit_mb=self.options.limit_mb, env=self.env, ok=ok)

    def idle_mb(self, tool: str, python: Path) -> float:
        if tool not in self._idle:
            self._idle[tool] = self._child([python, HELPER, tool, "float", self.case.float, self.case.calib]).peak_mb
        return self._idle[tool]

    def row(self, tool: str, config: str, extra: list[str] | None = None) -> Row:
        """One candidate. ``extra``: options of `edgekit quantize`."""
        row: Row = {"model": self.case.name, "tool": tool, "config": config, "samples": self.samples}
        row["digest"] = self.case.digest()
        try:
            python = environment(tool, self.options.env)
        except subprocess.CalledProcessError as error:
            return {**row, "error": f"cannot be installed: {error}"}
        folder = self.options.out / self.case.name / f"{tool}-{config}-{self.samples}".replace(" ", "-").replace(",", "")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if tool == "edgekit":
            made = folder / "int8.edge" / "model.int8.onnx"
            calib = ["--calib", self.case.calib, "--samples", str(self.samples)]
            command = [python, "-m", "edgekit", "quantize", self.case.bundle, "--out", made.parent, *calib, *(extra or [])]
            ran = self._child([*command, "--json"], ok=(0, 3))
        else:
            made = folder / "model.onnx"
            ran = self._child([python, HELPER, tool, config, self.case.float, self.case.calib, made])
        row |= {"seconds": ran.seconds, "peak_mb": round(max(0.0, ran.peak_mb - self.idle_mb(tool, python)), 1)}
        return row | (self._figures(made) if ran.error is None else {"error": ran.error})

    def _figures(self, made: Path) -> Row:
        try:
            counted = measure.macs(made, self.judged[0])
            found: Row = {
                "snr_db": measure.decibel(self.case.float, made, self.judged),
                "share": round(counted.int8 / max(self.macs.total, counted.total, 1), 4),
                "symmetric": measure.symmetric(made),
                "size_bytes": made.stat().st_size,
            }
            labels = self.case.labels()
            return found if labels is None else {**found, "top1": measure.top1(made, self.judged, labels)}
        except Exception as error:  # noqa: BLE001  a graph that does not run is a result
            return {"error": f"the graph does not run: {(str(error).strip().splitlines() or ['?'])[0]}"[:300]}


def best(rows: list[Row]) -> Row | None:
    return max(rows, key=lambda row: row["snr_db"], default=None)


def summary(rows: list[Row]) -> Row:
    """edgekit's dB less the best peer's, for symmetric int8, which TensorRT takes, and for all. Positive: edgekit leads."""
    ours = [row for row in rows if row["tool"] == "edgekit" and "snr_db" in row]
    found: Row = {}
    for kind in ("symmetric", "any"):
        peers = [r for r in rows if r["tool"] != "edgekit" and r.get("share", 0) > 0 and (kind == "any" or r["symmetric"])]
        for name, least in (("at_its_share", 0.0), ("everything", FULL)):
            peer = best([row for row in peers if row["share"] >= least])
            mine = peer and best([row for row in ours if row["share"] >= (least or peer["share"] - 1e-3)])
            found[f"{kind}_{name}"] = peer and {
                "peer": f"{peer['tool']} {peer['config']}",
                "peer_snr_db": peer["snr_db"],
                "peer_share": peer["share"],
                "edgekit": mine and mine["config"],
                "edgekit_share": mine and mine["share"],
                "lead_db": mine and round(mine["snr_db"] - peer["snr_db"], 2),
            }
    return found


def table(name: str, model: Row, rows: list[Row]) -> Iterator[str]:
    facts = f"{model['macs'] / 1e6:.1f} M multiply-accumulates"
    recurrent = f", {model['macs_recurrent'] / 1e6:.1f} M more in LSTM or GRU" if model["macs_recurrent"] else ""
    top1 = f", top-1 {model['top1']:.1%}" if "top1" in model else ""
    yield f"\n{name}: {facts}{recurrent}, {model['size_bytes'] / 1e6:.2f} MB{top1}; {model['data']}"
    head = f"  {'tool':<12}{'configuration':<30}{'n':>5}{'SNR dB':>8}{'share':>7}{'sym':>5}"
    yield f"{head}{'top-1':>7}{'MB up':>7}{'s':>7}{'size MB':>9}"
    for row in sorted(rows, key=lambda r: (r["samples"], -r.get("snr_db", -999))):
        head = f"  {row['tool']:<12}{row['config']:<30}{row['samples']:>5}"
        if "error" in row:
            yield f"{head}  {row['error'][:110]}"
            continue
        score = f"{row['top1']:.1%}" if "top1" in row else ""
        shape = f"{row['share']:>7.3f}{'yes' if row['symmetric'] else 'no':>5}{score:>7}"
        cost = f"{row['peak_mb']:>7.0f}{row['seconds']:>7.1f}{row['size_bytes'] / 1e6:>9.2f}"
        stale = "  (other graph or samples)" if row["digest"] != model["digest"] else ""
        yield f"{head}{row['snr_db']:>8.2f}{shape}{cost}{stale}"


class Results:
    """The result file: rows of one (model, tool, configuration, samples) replace each other, all else is kept."""

    def __init__(self) -> None:
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        self.models: dict[str, Row] = known.get("models", {})
        self.rows: list[Row] = known.get("rows", [])

    def of(self, model: str, samples: int) -> list[Row]:
        digest = self.models[model]["digest"]
        return [r for r in self.rows if r["model"] == model and r["samples"] == samples and r["digest"] == digest]

    def add(self, row: Row) -> None:
        key = ("model", "tool", "config", "samples")
        self.rows = [r for r in self.rows if any(r[k] != row[k] for k in key)] + [row]
        self.rows.sort(key=lambda r: [r[k] for k in key])

    def drop(self, model: str, tool: str, samples: int) -> None:
        self.rows = [r for r in self.rows if (r["model"], r["tool"], r["samples"]) != (model, tool, samples)]

    def save(self, samples: int) -> Row:
        leads = {name: summary(self.of(name, samples)) for name in self.models}
        tables = {name: list(table(name, m, [r for r in self.rows if r["model"] == name])) for name, m in self.models.items()}
        figures = {"summary": leads, "models": self.models, "rows": self.rows, "tables": tables, "machine": machine()}
        atomic_write(FILE, json.dumps(figures, indent=1, allow_nan=False).encode() + b"\n")
        return leads


def measure_case(case: Case, options: argparse.Namespace, results: Results) -> None:
    """edgekit by default, everything where the default is less, and ``matched``: the share of the best peer."""
    bench = Bench(case, options)
    results.models[case.name] = bench.model()
    for tool in [tool for tool in options.tools if tool != "edgekit"]:
        for config in [config for config in CONFIGS[tool] if not options.configs or config in options.configs]:
            tell(bench.row(tool, config), results, options.samples)
    if "edgekit" not in options.tools:
        return
    results.drop(case.name, "edgekit", options.samples)  # of an edgekit that is no more
    mine = bench.row("edgekit", "default")
    tell(mine, results, options.samples)
    if mine.get("share", 0) < FULL:
        tell(bench.row("edgekit", "share 1", ["--share", "1"]), results, options.samples)
    peer = summary(results.of(case.name, options.samples))["symmetric_at_its_share"]
    if peer and peer["peer_share"] < FULL:
        share = f"{max(0.0, peer['peer_share'] - 1e-4):.4f}"
        tell(bench.row("edgekit", "matched", ["--share", share]), results, options.samples)


def tell(row: Row, results: Results, samples: int) -> None:
    results.add(row)
    results.save(samples)
    said = row.get("error") or f"{row['snr_db']:.2f} dB at {row['share']:.3f}"
    print(f"{row['model']}, {row['tool']} {row['config']}: {said}", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tools", nargs="+", default=["edgekit", *CONFIGS], choices=["edgekit", *CONFIGS])
    parser.add_argument("--configs", nargs="+", help="Only these configurations of the peers.")
    parser.add_argument("--samples", type=int, default=64, help="Calibration samples.")
    parser.add_argument("--pictures", type=Path, help="Folder of photos, at any depth.")
    parser.add_argument("--bundle", type=Path, nargs="+", default=[], help="Bundles that edgekit trained.")
    parser.add_argument("--train", nargs="+", default=[], choices=list(TRAIN), help="Train these first, briefly.")
    parser.add_argument("--memory", nargs="*", default=[], choices=list(MODELS), help=f"Also edgekit with {MANY} samples.")
    parser.add_argument("--out", type=Path, default=Path("runs/quantization"))
    parser.add_argument("--env", type=Path, help="Where the peers' environments are or go. Default: in --out.")
    parser.add_argument("--limit-s", type=float, default=600)
    parser.add_argument("--limit-mb", type=float, default=8000)
    options = parser.parse_args()
    options.env = (options.env or options.out / "environments").absolute()
    return options


def main() -> None:
    options = parse()
    results, context = Results(), Context(options.pictures, options.out / "wheels")
    bundles = list(options.bundle)
    for name in options.train:
        bundles.append(options.out / "trained" / f"{name}.edge")
        if not bundles[-1].exists():
            run_edgekit(["train", *TRAIN[name], "--out", str(bundles[-1])])
    makers = [lambda name=name: foreign(name, context, options.samples, options.out) for name in options.models]
    makers += [lambda path=path: own(path, options.samples, options.out) for path in bundles]
    for make in makers:
        try:
            case = make()
        except (RuntimeError, EdgekitError, subprocess.CalledProcessError) as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        measure_case(case, options, results)
    for name in options.memory:
        case = foreign(name, context, MANY, options.out)
        tell(Bench(case, options).row("edgekit", "default"), results, options.samples)
    leads = results.save(options.samples)
    for name, model in results.models.items():
        print("\n".join(table(name, model, [row for row in results.rows if row["model"] == name])))
        for kind, lead in leads[name].items():
            if lead:
                led = "no row of edgekit at that share" if lead["lead_db"] is None else f"edgekit {lead['lead_db']:+.2f} dB"
                print(f"  {kind}: {led}; {lead['peer']} has {lead['peer_snr_db']:.2f} at {lead['peer_share']:.3f}")


if __name__ == "__main__":
    main()

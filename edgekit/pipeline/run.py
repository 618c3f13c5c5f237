"""Runs a recipe, and knows what is done already: each stage has a key, the digest of its options and of its inputs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import edgekit
from edgekit.bundle import Bundle
from edgekit.data import load
from edgekit.data.samples import write_samples
from edgekit.errors import BudgetNotMet, BundleError, EdgekitError, OutputExists
from edgekit.files import atomic_write, locked
from edgekit.progress import say
from edgekit.version import __version__

from .recipe import Bench, Build, Eval, Explain, Prune, Quantize, Recipe, Report, Samples, Scan, Stage, Train, read_recipe

__all__ = ["pipeline"]

STATE = "pipeline.json"
EVENTS = "scan.jsonl"


class Done(msgspec.Struct, frozen=True):
    """A finished stage: its key, what it wrote, what it answered; ``missed`` names a budget that was not met."""

    key: str
    outputs: dict[str, str] = {}  # path in the output folder -> digest
    figures: dict[str, Any] = {}
    missed: str = ""


def pipeline(
    recipe: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    on_event: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe (default: the built-in digits recipe) into the folder ``out`` (default: ``runs/NAME``).

    Finished stages are not run again while their options, inputs and outputs are unchanged. ``on_event`` hears each
    scan event, a line of JSON. Returns ``out``, ``stages`` (run or kept, seconds), ``table``, ``report``, ``engines``,
    ``kits``, ``events``. Raises what the stages raise; what was finished before stays finished.
    """
    loaded = read_recipe(recipe)
    folder = Path(out or loaded.out or Path("runs") / loaded.name)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False):
        run = _Run(loaded, folder, on_event)
        for number, stage in enumerate(loaded.stage, 1):
            run.stage(number, stage)
        return run.answer()


class _Run:
    def __init__(self, recipe: Recipe, folder: Path, on_event: Callable[[str], None] | None) -> None:
        self.recipe, self.folder, self.on_event = recipe, folder, on_event
        self.state = _read_state(folder / STATE)
        self.finished: dict[str, Done] = {}
        self.report: list[dict[str, Any]] = []
        self.data_digests: dict[str, str] = {}

    def stage(self, number: int, stage: Stage) -> None:
        """Run a stage, or keep what it made before."""
        label = _label(stage)
        key = self._key(stage)
        before = self.state.get(label)
        head = f"[{number}/{len(self.recipe.stage)}] {label}"
        if before and before.key == key and self._intact(before) and not isinstance(stage, Scan):
            say(f"{head}: nothing changed, kept")
            self._record(label, before, "kept", 0.0)
            if before.missed:
                raise BudgetNotMet(before.missed, "change the recipe; the earlier result was kept", before.figures)
            return
        self._clear(stage, before)
        self._claim(label, stage)
        say(f"{head} ...")
        started = time.perf_counter()
        missed: BudgetNotMet | None = None
        try:
            outputs, figures = self._do(stage)
        except BudgetNotMet as error:
            missed, figures = error, error.result
            outputs = [stage.out] if isinstance(stage, Prune | Quantize) else []
        seconds = time.perf_counter() - started
        digests = {name: self._output_digest(name) for name in outputs}
        self._record(label, Done(key, digests, figures, missed.message if missed else ""), "run", seconds)
        if missed:
            raise missed

    def answer(self) -> dict[str, Any]:
        builds = [done.figures for label, done in self.finished.items() if label.startswith("build")]
        reports = [self.folder / s.out for s in self.recipe.stage if isinstance(s, Report)]
        return {
            "out": str(self.folder),
            "stages": self.report,
            "table": self._table(),
            "report": str(reports[-1]) if reports else None,
            "engines": [figures["engine"] for figures in builds if figures.get("engine")],
            "kits": [figures["kit"] for figures in builds if figures.get("kit")],
            "events": str(self.folder / EVENTS) if any(isinstance(s, Scan) for s in self.recipe.stage) else None,
        }

    def _bundle(self, name: str) -> Path:
        return self.folder / f"{name}.edge"

    def _data(self, stage: Any) -> str:
        return str(stage.data or self.recipe.data)

    def _key(self, stage: Stage) -> str:
        """Digest of everything that decides the stage's result."""
        inputs: dict[str, str] = {}
        names = getattr(stage, "bundles", None) or [n for n in [getattr(stage, "bundle", None)] if n]
        for name in names:
            inputs[name] = Bundle.open(self._bundle(name)).digest
            if isinstance(stage, Report):  # shows derived files as well: all of them count
                files = Bundle.open(self._bundle(name)).manifest.files
                inputs[f"{name} files"] = hashlib.sha256(msgspec.json.encode(files, order="sorted")).hexdigest()
        if isinstance(stage, Train | Eval | Samples | Prune):
            spec = stage.data or self.recipe.data
            if spec:
                inputs["data"] = self.data_digests.setdefault(spec, load(spec).digest)
        if isinstance(stage, Explain) and (self.folder / stage.images).is_dir():
            inputs["images"] = _folder_digest(self.folder / stage.images)
        if isinstance(stage, Report) and stage.explanations:
            inputs["explanations"] = _folder_digest(self.folder / stage.explanations)
        decides = {"edgekit": __version__, "stage": stage, "inputs": inputs, "seed": self.recipe.seed, "data": self.recipe.data}
        return hashlib.sha256(msgspec.json.encode(decides, order="sorted")).hexdigest()

    def _intact(self, done: Done) -> bool:
        """Whether everything the stage wrote is still there, unchanged."""
        with contextlib.suppress(EdgekitError, OSError):
            return all(self._output_digest(name) == digest for name, digest in done.outputs.items())
        return False

    def _output_digest(self, name: str) -> str:
        """Digest of an output: a bundle's identity, one of its files, a folder's or a file's content."""
        if name.count(":"):
            bundle, file = name.split(":")
            opened = Bundle.open(self._bundle(bundle))
            return hashlib.sha256(opened.file(file).read_bytes()).hexdigest()
        if self._bundle(name).is_dir():
            return Bundle.open(self._bundle(name)).digest
        path = self.folder / name
        return _folder_digest(path) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()

    def _clear(self, stage: Stage, before: Done | None) -> None:
        """Make room for a stage that runs again: only what this pipeline wrote itself is removed."""
        out = getattr(stage, "out", None)
        if out is None or isinstance(stage, Report):
            return
        path = self._bundle(out) if isinstance(stage, Train | Prune | Quantize) else self.folder / out
        if not path.exists():
            return
        if before is None or out not in before.outputs:
            raise OutputExists(path)
        shutil.rmtree(path)

    def _claim(self, label: str, stage: Stage) -> None:
        """Note what is about to be written, so that a stage cut off half way may be made again."""
        out = getattr(stage, "out", None)
        self.state[label] = Done("", {out: ""} if out else {})
        self._save()

    def _save(self) -> None:
        atomic_write(self.folder / STATE, msgspec.json.format(msgspec.json.encode(self.state)) + b"\n")

    def _record(self, label: str, done: Done, how: str, seconds: float) -> None:
        self.finished[label] = self.state[label] = done
        self.report.append({"stage": label, "how": how, "seconds": round(seconds, 2)})
        self._save()

    def _do(self, stage: Stage) -> tuple[list[str], dict[str, Any]]:
        """Run the verb; returns the outputs' names and the figures to remember."""
        if isinstance(stage, Train):
            options = {"seed": self.recipe.seed, **stage.options("out"), "data": self._data(stage)}
            made = edgekit.train(out=self._bundle(stage.out), **options)
            return [stage.out], {"top1": made.manifest.history[-1].figures["top1"]}
        if isinstance(stage, Prune):
            options = {"seed": self.recipe.seed, **stage.options("bundle", "out")}
            made = edgekit.prune(self._bundle(stage.bundle), out=self._bundle(stage.out), **options)
            return [stage.out], {"top1": made.manifest.history[-1].figures["top1"]}
        if isinstance(stage, Quantize):
            edgekit.quantize(self._bundle(stage.bundle), out=self._bundle(stage.out), **stage.options("bundle", "out"))
            return [stage.out], {}
        if isinstance(stage, Eval):
            found = {name: edgekit.evaluate(self._bundle(name), self._data(stage))["top1"] for name in stage.bundles}
            return [], found
        if isinstance(stage, Build):
            built = edgekit.build(self._bundle(stage.bundle), **stage.options("bundle"))
            file = (built.engine or built.kit or Path()).name
            return [f"{stage.bundle}:engines/{file}"], built.figures()
        if isinstance(stage, Bench):
            return self._bench(stage)
        if isinstance(stage, Samples):
            write_samples(load(self._data(stage)), self.folder / stage.out, stage.count)
            return [stage.out], {}
        if isinstance(stage, Explain):
            images = sorted(p for p in (self.folder / stage.images).iterdir() if p.is_file())
            options = stage.options("bundle", "images", "out")
            edgekit.explain(self._bundle(stage.bundle), images, out=self.folder / stage.out, **options)
            return [stage.out], {}
        if isinstance(stage, Report):
            shown = self.folder / stage.explanations if stage.explanations else None
            edgekit.report([self._bundle(n) for n in stage.bundles], out=self.folder / stage.out, explanations=shown)
            return [stage.out], {}
        assert isinstance(stage, Scan)
        return self._scan(stage)

    def _bench(self, stage: Bench) -> tuple[list[str], dict[str, Any]]:
        files, figures = [], {}
        for name in stage.bundles:
            result = edgekit.bench(self._bundle(name), **stage.options("bundles"))
            figures[name] = {key: result["latency_ms"][key] for key in ("p50", "p99")}
            newest = Bundle.open(self._bundle(name)).manifest.files
            files += [f"{name}:{file}" for file in newest if file.startswith("bench/")]
        return files, figures

    def _scan(self, stage: Scan) -> tuple[list[str], dict[str, Any]]:
        from edgekit.scanner import scan

        events = self.folder / EVENTS
        events.unlink(missing_ok=True)
        summary = scan(self._bundle(stage.bundle), source=str(self.folder / stage.source), sinks=[f"jsonl:{events}"])
        if self.on_event:
            for line in events.read_text(encoding="utf-8").splitlines():
                self.on_event(line)
        return [], {"captured": summary.captured, "inferred": summary.inferred}

    def _table(self) -> list[dict[str, Any]]:
        """One row a bundle: stage, top-1, latency, parameters, graph size, engines."""
        top1: dict[str, float] = {}
        latency: dict[str, dict[str, float]] = {}
        for label, done in self.finished.items():
            if label.startswith("eval"):
                top1 |= done.figures
            elif label.startswith("bench"):
                latency |= done.figures
        rows = []
        for stage in self.recipe.stage:
            if not isinstance(stage, Train | Prune | Quantize):
                continue
            bundle = Bundle.open(self._bundle(stage.out))
            figures = [entry.figures for entry in reversed(bundle.manifest.history)]
            engines = [Path(f).name.partition(".")[0] for f in bundle.manifest.files if f.endswith((".engine", ".kit.zip"))]
            rows.append(
                {
                    "stage": f"{type(stage).__name__.lower()} {stage.out}",
                    "top1": top1.get(stage.out, next((f["top1"] for f in figures if f.get("top1") is not None), None)),
                    "p50_ms": latency.get(stage.out, {}).get("p50"),
                    "p99_ms": latency.get(stage.out, {}).get("p99"),
                    "parameters": next((f["parameters"] for f in figures if f.get("parameters")), None),
                    "size_bytes": bundle.size_bytes(),
                    "engine": ", ".join(engines) or None,
                }
            )
        return rows


def _label(stage: Stage) -> str:
    """What a stage is called in the state file: the same stage of an edited recipe keeps its name."""
    kind = type(stage).__name__.lower()
    if isinstance(stage, Build):
        return f"build {stage.bundle} for {stage.target}"
    if isinstance(stage, Bench | Eval):
        return f"{kind} {' '.join(stage.bundles)}" + (
            f" {stage.scenario}" if isinstance(stage, Bench) and stage.scenario else ""
        )
    return f"{kind} {getattr(stage, 'out', None) or getattr(stage, 'bundle', '')}"


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _read_state(path: Path) -> dict[str, Done]:
    """What is done, by label. Raises `BundleError` where the file is damaged: guessing could remove someone's files."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Done])
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}", "remove it, or choose another --out") from None

"""Runs a recipe, and knows what is done already: each stage has a key, the digest of its options and of its inputs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import BudgetNotMet, EdgekitError, OutputExists
from edgekit.files import locked, sha256_file
from edgekit.progress import say
from edgekit.version import __version__

from .recipe import STATE, Recipe, read_recipe
from .stage import Context, Made, Stage
from .stages import Bench, Build, Eval, Explain, Making, Report, Samples, Scan
from .state import Done, State

__all__ = ["pipeline"]


def pipeline(
    recipe: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    data: str | None = None,
    on_event: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe (a file or a built-in one's name; default: digits) into the folder ``out`` (default: ``runs/NAME``).

    ``data`` takes the place of the recipe's own.
    Finished stages are not run again while their options, inputs and outputs are unchanged. ``on_event`` hears each
    scan event, a line of JSON. Returns ``out``, ``stages`` (run or kept, seconds), ``table``, ``report``, ``engines``,
    ``kits``, ``events``. Raises what the stages raise; what was finished before stays finished.
    """
    loaded = read_recipe(recipe, data)
    folder = Path(out or loaded.out or Path("runs") / loaded.name)
    if folder.exists() and not folder.is_dir():
        raise OutputExists(folder)
    refuse_inside_bundle(folder / STATE)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False):
        run = _Run(loaded, folder, on_event)
        run.check_outputs()
        for number, stage in enumerate(loaded.stage, 1):
            run.stage(number, stage)
        return run.answer()


class _Run:
    def __init__(self, recipe: Recipe, folder: Path, on_event: Callable[[str], None] | None) -> None:
        pictures = frozenset(stage.out for stage in recipe.stage if isinstance(stage, Samples | Explain))
        self.recipe, self.folder = recipe, folder
        self.state = State(folder)
        self.context = Context(folder, recipe.data, recipe.seed, on_event, pictures, self.state.claim)
        self.labels = {stage.label() for stage in recipe.stage}
        self.finished: dict[str, Done] = {}
        self.report: list[dict[str, Any]] = []

    def check_outputs(self) -> None:
        """Raise `OutputExists` for a file of somebody else's where a stage is going to write, before any work."""
        for stage in self.recipe.stage:
            for name in stage.claims():
                path = self.folder / name
                if os.path.lexists(path) and not self.state.owns(name):
                    raise OutputExists(path)
                if path.parent.exists() and not path.parent.is_dir():
                    raise OutputExists(path.parent)

    def stage(self, number: int, stage: Stage) -> None:
        """Run a stage, or keep what it made before."""
        label = stage.label()
        key = self._key(stage)
        before = self.state.done.get(label)
        head = f"[{number}/{len(self.recipe.stage)}] {label}"
        if before and before.key == key and not stage.always and self._intact(before) and stage.intact(self.context):
            say(f"{head}: nothing changed, kept")
            self._report(label, before, "kept", 0.0)
            if before.missed:
                raise BudgetNotMet(before.missed, "change the recipe; the earlier result was kept", before.figures)
            return
        say(f"{head} ...")
        started = time.perf_counter()
        missed: BudgetNotMet | None = None
        with self.state.replacing(label, stage.claims(), self.labels):
            try:
                made = stage.run(self.context)
            except BudgetNotMet as error:  # the best that was found is there all the same
                missed, made = error, Made(list(stage.claims()), error.result)
            digests = {name: self._digest(name) for name in made.outputs}
            done = Done(key, digests, made.figures, missed.message if missed else "")
            self.state.finish(label, done)
        self._report(label, done, "kept" if made.cached else "run", time.perf_counter() - started)
        if missed:
            raise missed

    def answer(self) -> dict[str, Any]:
        made = [(stage, self.finished[stage.label()].figures) for stage in self.recipe.stage]
        builds = [figures for stage, figures in made if isinstance(stage, Build)]
        return {
            "out": str(self.folder),
            "stages": self.report,
            "table": self._table(),
            "report": next((str(self.folder / stage.out) for stage, _ in made if isinstance(stage, Report)), None),
            "engines": [figures["engine"] for figures in builds if figures.get("engine")],
            "kits": [figures["kit"] for figures in builds if figures.get("kit")],
            "events": next((figures["events"] for stage, figures in made if isinstance(stage, Scan)), None),
        }

    def _key(self, stage: Stage) -> str:
        """Digest of everything that decides the stage's result."""
        bundles = {name: self.context.bundle(name).digest for name in stage.bundles_read()}
        decides = {"edgekit": __version__, "stage": stage, "bundles": bundles, "contents": stage.contents_read(self.context)}
        return hashlib.sha256(msgspec.json.encode(decides, order="sorted")).hexdigest()

    def _intact(self, done: Done) -> bool:
        """Whether everything the stage wrote is still there, unchanged."""
        with contextlib.suppress(EdgekitError, OSError):
            return all(self._digest(name) == digest for name, digest in done.outputs.items())
        return False

    def _digest(self, name: str) -> str:
        """Digest of an output: what a bundle is, or a file's content."""
        path = self.folder / name
        return self.context.bundle(path.stem).digest if path.suffix == ".edge" else sha256_file(path)

    def _report(self, label: str, done: Done, how: str, seconds: float) -> None:
        self.finished[label] = done
        self.report.append({"stage": label, "how": how, "seconds": round(seconds, 2)})

    def _table(self) -> list[dict[str, Any]]:
        """One row a bundle: stage, top-1, character error rate, latency, parameters, graph size, engines, build kits."""
        top1: dict[str, float] = {}
        latency: dict[str, dict[str, Any]] = {}
        for stage in self.recipe.stage:
            if isinstance(stage, Eval):
                top1 |= self.finished[stage.label()].figures
            elif isinstance(stage, Bench):
                latency |= self.finished[stage.label()].figures
        rows = []
        for stage in self.recipe.stage:
            if not isinstance(stage, Making):
                continue
            bundle = self.context.bundle(stage.out)
            figures = [entry.figures for entry in reversed(bundle.manifest.history)]
            engines = [Path(file).stem for file in bundle.manifest.files if file.endswith(".engine")]
            kits = [Path(file).name.removesuffix(".kit.zip") for file in bundle.manifest.files if file.endswith(".kit.zip")]
            rows.append(
                {
                    "stage": stage.label(),
                    "top1": top1.get(stage.out, next((f["top1"] for f in figures if f.get("top1") is not None), None)),
                    "cer": next((f["cer"] for f in figures if f.get("cer") is not None), None),
                    "p50_ms": latency.get(stage.out, {}).get("p50"),
                    "p99_ms": latency.get(stage.out, {}).get("p99"),
                    "trustworthy": latency.get(stage.out, {}).get("trustworthy"),
                    "parameters": next((f["parameters"] for f in figures if f.get("parameters")), None),
                    "size_bytes": bundle.size_bytes(),
                    "engine": ", ".join(engines) or None,
                    "kit": ", ".join(kits) or None,
                }
            )
        return rows

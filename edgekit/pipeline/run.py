"""Runs a recipe, and knows what is done already: each stage has a key, the digest of its options and of its inputs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from edgekit.errors import BudgetNotMet, BundleError, EdgekitError, OutputExists
from edgekit.files import atomic_write, locked, sha256_file
from edgekit.progress import say
from edgekit.version import __version__

from .recipe import STATE, Recipe, read_recipe
from .stage import Context, Made, Stage
from .stages import Bench, Build, Eval, Prune, Quantize, Report, Scan, Train

__all__ = ["pipeline"]


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
    if folder.exists() and not folder.is_dir():
        raise OutputExists(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False):
        run = _Run(loaded, Context(folder, loaded.data, loaded.seed, on_event))
        run.check_outputs()
        for number, stage in enumerate(loaded.stage, 1):
            run.stage(number, stage)
        return run.answer()


class _Run:
    def __init__(self, recipe: Recipe, context: Context) -> None:
        self.recipe, self.context, self.folder = recipe, context, context.folder
        self.state = _read_state(context.folder / STATE)
        self.finished: dict[str, Done] = {}
        self.report: list[dict[str, Any]] = []

    def check_outputs(self) -> None:
        """Raise `OutputExists` for a file of somebody else's where a stage is going to write, before any work."""
        ours = {name for done in self.state.values() for name in done.outputs}
        for name in (name for stage in self.recipe.stage for name in stage.claims()):
            if name not in ours and os.path.lexists(self.folder / name):
                raise OutputExists(self.folder / name)

    def stage(self, number: int, stage: Stage) -> None:
        """Run a stage, or keep what it made before."""
        label = stage.label()
        key = self._key(stage)
        before = self.state.get(label)
        head = f"[{number}/{len(self.recipe.stage)}] {label}"
        if before and before.key == key and not stage.always and self._intact(before) and stage.intact(self.context):
            say(f"{head}: nothing changed, kept")
            self._record(label, before, "kept", 0.0)
            if before.missed:
                raise BudgetNotMet(before.missed, "change the recipe; the earlier result was kept", before.figures)
            return
        say(f"{head} ...")
        started = time.perf_counter()
        missed: BudgetNotMet | None = None
        with self._replacing(stage):
            try:
                made = stage.run(self.context)
            except BudgetNotMet as error:  # the best that was found is there all the same
                missed, made = error, Made(list(stage.claims()), error.result)
        digests = {name: self._digest(name) for name in made.outputs}
        done = Done(key, digests, made.figures, missed.message if missed else "")
        self._record(label, done, "kept" if made.cached else "run", time.perf_counter() - started)
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

    @contextlib.contextmanager
    def _replacing(self, stage: Stage) -> Iterator[None]:
        """Make room for a stage, and give the earlier result back where it fails: it may be hours of training.

        Only what the state file lists is touched. What is about to be made is noted first, so that a stage cut off half
        way may be made again; what is somebody else's is not, and the stage will refuse to overwrite it.
        """
        label = stage.label()
        before = self._take_over(stage)
        aside: dict[Path, Path] = {}
        for name in before.outputs:
            path = self.folder / name
            if any(parent.suffix == ".edge" for parent in path.parents):
                continue  # a file in a bundle: its verb replaces it
            aside[path] = path.with_name(f".{path.name}.previous")
            if os.path.lexists(path):
                _remove(aside[path])
                path.rename(aside[path])
        claims = {name: "" for name in stage.claims() if not os.path.lexists(self.folder / name)}
        self.state[label] = Done("", claims)
        self._save()
        try:
            yield
        except BaseException:
            for path, earlier in aside.items():
                if os.path.lexists(earlier):
                    _remove(path)
                    earlier.rename(path)
            self.state[label] = before
            self._save()
            raise
        for path, earlier in aside.items():
            _remove(earlier)
            if path.parent != self.folder:
                with contextlib.suppress(OSError):
                    path.parent.rmdir()  # only where it is empty now

    def _take_over(self, stage: Stage) -> Done:
        """What this stage made before, with what it claims of stages that the recipe no longer has."""
        before = self.state.get(stage.label(), Done(""))
        labels = {other.label() for other in self.recipe.stage}
        outputs = dict(before.outputs)
        for label in self.state.keys() - labels:
            gone = self.state[label]
            outputs |= {name: gone.outputs[name] for name in stage.claims() if name in gone.outputs}
            self.state[label] = msgspec.structs.replace(
                gone, outputs={name: digest for name, digest in gone.outputs.items() if name not in outputs}
            )
        return msgspec.structs.replace(before, outputs=outputs)

    def _save(self) -> None:
        atomic_write(self.folder / STATE, msgspec.json.format(msgspec.json.encode(self.state)) + b"\n")

    def _record(self, label: str, done: Done, how: str, seconds: float) -> None:
        self.finished[label] = self.state[label] = done
        self.report.append({"stage": label, "how": how, "seconds": round(seconds, 2)})
        self._save()

    def _table(self) -> list[dict[str, Any]]:
        """One row a bundle: stage, top-1, latency, parameters, graph size, engines and build kits by target."""
        top1: dict[str, float] = {}
        latency: dict[str, dict[str, Any]] = {}
        for stage in self.recipe.stage:
            if isinstance(stage, Eval):
                top1 |= self.finished[stage.label()].figures
            elif isinstance(stage, Bench):
                latency |= self.finished[stage.label()].figures
        rows = []
        for stage in self.recipe.stage:
            if not isinstance(stage, Train | Prune | Quantize):
                continue
            bundle = self.context.bundle(stage.out)
            figures = [entry.figures for entry in reversed(bundle.manifest.history)]
            engines = [Path(file).stem for file in bundle.manifest.files if file.endswith(".engine")]
            kits = [Path(file).name.removesuffix(".kit.zip") for file in bundle.manifest.files if file.endswith(".kit.zip")]
            rows.append(
                {
                    "stage": stage.label(),
                    "top1": top1.get(stage.out, next((f["top1"] for f in figures if f.get("top1") is not None), None)),
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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_state(path: Path) -> dict[str, Done]:
    """What is done, by label. Raises `BundleError` where the file is damaged: guessing could remove someone's files."""
    try:
        state = msgspec.json.decode(path.read_bytes(), type=dict[str, Done])
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}", "remove it, or choose another --out") from None
    root = path.parent.resolve()
    for name in (name for done in state.values() for name in done.outputs):
        where = Path(os.path.normpath(root / name))
        # What is listed here may be removed: nothing outside, nothing through a link, not the folder itself.
        if where == root or not where.is_relative_to(root) or not where.parent.resolve().is_relative_to(root):
            raise BundleError(f"{path} lists {name!r}, which is not inside its folder", "do not trust this folder")
    return state

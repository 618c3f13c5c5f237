"""`pareto`: the front of accuracy against latency over width, resolution, pruning and precision, by many short trials.

The study is a journal, as that of `edgekit.training.search`: a stopped search goes on, and the same command given several
times shares the trials. Each trial goes the whole way, train, prune, quantize, and is judged as what it would ship.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from edgekit.benchmarking.device import fingerprint
from edgekit.compiler.roofline import predictable
from edgekit.errors import DataError, EdgekitError, UsageError, first_line
from edgekit.progress import say
from edgekit.reporting.figures import pareto as undominated
from edgekit.training.journal import Journal, check_study, described
from edgekit.training.plan import make_plan
from edgekit.training.train import fit_config

from .shelf import Shelf
from .stopwatch import Stopwatch
from .trial import Maker, Setting, Space

__all__ = ["pareto"]


def pareto(
    *,
    data: str,
    study: str | os.PathLike[str],
    model: str | None = None,
    trials: int = 20,
    epochs: int | None = None,
    validation: float = 0.15,
    seed: int = 0,
    size: int | None = None,
    augment: str | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    balance: bool = False,
    on: str | None = None,
) -> dict[str, Any]:
    """Try settings until ``study`` holds ``trials`` finished trials, and say which no other beats in accuracy and latency.

    Varied are the width of a preset (0.25 to 1.5 times its channels), the resolution (around ``size``, or the data set's
    own), the share of MACs that `prune` keeps (of picture classifiers) and the precision (float or int8 by `quantize`), by
    multi-objective tree-structured Parzen estimators (Ozaki et al., GECCO 2020); the first trial is of the defaults, none is
    tried twice. ``epochs`` are a training's, fine-tuning has three quarters of them. Every trial trains on the training
    split less ``validation`` of it and is judged on that share, in ONNX Runtime; the held-out split is never read.

    Latency is of one inference in ONNX Runtime, one thread, in turns with a reference graph (`Stopwatch`), so that trials
    taken under different loads compare; with ``on``, the name of a target, it is `estimate`'s prediction for that device.

    Beside the study lie the bundles on the front (``STUDY.trials/``; others are removed), the front (``STUDY.front.json``,
    which `report` draws) and its picture (``STUDY.svg``).

    Returns ``study``; the counts ``trials`` (finished) and ``failed``; ``metric``; ``latency``, where it comes from;
    ``prediction``; ``notes``; ``front``, by rising latency, and ``all``, the finished trials: ``trial``, ``accuracy`` (a
    share), ``latency_ms``, ``macs``, ``parameters``, ``size_bytes``, ``width``, ``size`` (pixels), ``keep``, ``precision``,
    ``bundle`` (a path, or None) and ``commands``, which make it anew of all training samples; ``file`` and ``picture``.
    Raises `UsageError` for a file that is no study or is one of other data or options, `DataError`, `MissingExtra`, and
    `EdgekitError` where every trial failed.
    """
    path = Path(study)
    check_study(path, trials, validation)
    shared = {"model": model, "epochs": epochs, "augment": augment, "optimizer": optimizer, "balance": balance, "seed": seed}
    search = _Search.begin(path, data, validation, size, shared, on)
    while len(search.journal.finished()) < trials and search.attempt(trials):
        pass
    return search.answer()


@dataclass(frozen=True)
class _Search:
    """A study under way; ``about`` is what its front says of it."""

    journal: Journal
    space: Space
    shelf: Shelf
    maker: Maker
    data: str
    about: Mapping[str, Any]

    @classmethod
    def begin(
        cls, path: Path, data: str, validation: float, size: int | None, shared: Mapping[str, Any], on: str | None
    ) -> _Search:
        """Everything that can be wrong with the call is found here, before a trial. ``shared``: options of `edgekit.train`."""
        target = predictable(on) if on is not None else None
        shelf = Shelf(path)
        shelf.check()
        spec = f"validation:{validation:g}:{data}"
        plan = make_plan(spec, shared["model"], size, shared["augment"])
        config = fit_config(plan, shared["epochs"], seed=shared["seed"], optimizer=shared["optimizer"])
        about = {name: shared[name] for name in ("optimizer", "balance", "seed")}
        about |= {"epochs": config.epochs, "validation": validation, "on": on}
        space = Space.around(plan, target)
        journal = Journal(path, described(plan) | about, ("maximize", "minimize"))
        journal.begin(space.params(space.default))
        shelf.folder.mkdir(exist_ok=True)
        metric = "1 - CER" if plan.dataset.task == "text-recognition" else "top-1"
        said = {"study": path.name, "data": data, "model": plan.model.name, "metric": metric}
        return cls(journal, space, shelf, Maker(spec, shared, config, on), data, said)

    def answer(self) -> dict[str, Any]:
        """What `pareto` returns. Raises `EdgekitError` where no trial has gone well."""
        self.journal.complete()
        with self.shelf.lock():
            found = self.found()
            self.shelf.update(found)
        rows = found.pop("trials")
        front = sorted((row for row in rows if row["front"]), key=lambda row: row["latency_ms"])
        counts = {key: value for key, value in self.journal.counts().items() if key != "pruned"}
        files = {"file": str(self.shelf.front), "picture": str(self.shelf.picture)}
        return {**found, "study": str(self.shelf.study), **counts, "front": front, "all": rows, **files}

    def attempt(self, trials: int) -> bool:
        """One trial, and a line about it; whether there was one left to do."""
        for number in self.shelf.bury():
            self._again(number)
        trial, setting = self._next()
        if setting is None:
            say(f"everything was tried: {len(self.journal.finished())} settings")
            return False
        label = f"trial {trial.number}: {setting.words()}"
        say(label)
        try:
            outcome = self._run(trial, setting)
        except (EdgekitError, torch.OutOfMemoryError) as error:
            if isinstance(error, UsageError | DataError):
                self._again(trial.number)
                raise
            reason = first_line(error)
            self.journal.tell(trial, "FAIL", reason=reason)
            outcome = f"failed: {reason}"
        except BaseException:
            with contextlib.suppress(Exception):  # it may be the journal that cannot be written
                self._again(trial.number)
            raise
        say(f"{label}: {outcome}; {len(self.journal.finished())} of {trials} done")
        return True

    def _run(self, trial: Any, setting: Setting) -> str:
        begun = time.perf_counter()
        with self.shelf.work(trial.number) as work:
            out = self.shelf.bundle(trial.number)
            bundle = self.maker.make(setting, work / out.name)
            accuracy, figures = self.maker.judge(bundle)
            with self.shelf.lock():
                latency = self.maker.latency(bundle, Stopwatch(self.shelf.reference))
                figures |= {**latency, "seconds": round(time.perf_counter() - begun, 1)}
                about = {**setting._asdict(), "study": self.shelf.study.name, "trial": trial.number}
                bundle.extend({}, bundle.entry("search", about, {"accuracy": accuracy, **figures}))
                bundle.path.rename(out)
                trial.set_user_attr("figures", figures)
                self.journal.tell(trial, "COMPLETE", (accuracy, latency["latency_ms"]))
                found = self.found()
                self.shelf.update(found)
        on_front = any(row["front"] and row["trial"] == trial.number for row in found["trials"])
        return f"{accuracy:.2%}, {latency['latency_ms']:.3g} ms" + (", on the front" if on_front else "")

    def _next(self) -> tuple[Any, Setting | None]:
        """A trial of what was not tried yet; Optuna proposes what is best, also where that was tried before."""
        while True:
            trial = self.journal.ask()
            setting = self.space.draw(trial)
            counted = [t for t in self.journal.trials() if t.number != trial.number and _counts(t)]
            tried = {self.space.setting(t.params) for t in counted}
            failed = {self.space.setting(t.params) for t in counted if "reason" in t.user_attrs}
            tried |= {other._replace(precision="int8") for other in failed}  # what fails in float gets no further in int8
            if setting not in tried:
                return trial, setting
            self.journal.tell(trial, "FAIL")
            left = [other for other in self.space.all() if other not in tried]
            if not left:
                return trial, None
            self.journal.study.enqueue_trial(
                self.space.params(left[np.random.default_rng(self.journal.seed(trial)).integers(len(left))])
            )

    def _again(self, number: int) -> None:
        """An interrupted trial does not count; what it tried is tried again."""
        trial = self.journal.trials()[number]
        if not trial.state.is_finished():
            self.journal.study.tell(number, state=self.journal.optuna.trial.TrialState.FAIL)
            self.journal.study.enqueue_trial(trial.params)

    def found(self) -> dict[str, Any]:
        """What is known of the study: where its figures come from, and a row a finished trial."""
        finished = self.journal.finished()
        done = {t.number: t for t in finished if t.state.name == "COMPLETE"}
        best = set(undominated((t.values[1], t.values[0]) for t in done.values()))
        rows = []
        for t in finished:
            setting = self.space.setting(t.params)
            row: dict[str, Any] = {
                "trial": t.number,
                **dict.fromkeys(("accuracy", "latency_ms", "macs", "parameters", "size_bytes")),
            }
            if t.number in done:
                row |= {"accuracy": t.values[0], **t.user_attrs["figures"]}
                front = (t.values[1], t.values[0]) in best
                best.discard((t.values[1], t.values[0]))  # of equal ones the first
            else:
                row |= {"reason": t.user_attrs["reason"]}
                front = False
            name = f"{self.shelf.study.stem}-{t.number}"
            row |= {
                **setting._asdict(),
                "front": front,
                "bundle": None,
                "commands": self.maker.commands(setting, self.data, name),
            }
            if front and (bundle := self.shelf.bundle(t.number)).is_dir():
                row["bundle"] = str(bundle)
            rows.append(row)
        return {**self.about, **_provenance(self.maker.target, rows), "trials": rows}


def _counts(trial: Any) -> bool:
    return trial.state.name in ("COMPLETE", "RUNNING") or "reason" in trial.user_attrs


def _provenance(target: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where latencies come from, and what to mind about them."""
    if target is not None:
        notes = ["a roofline prediction, a lower bound: float counts as fp16, and nothing was measured"]
        return {"latency": f"predicted for {target}", "prediction": True, "target": target, "notes": notes}
    notes = ["on a CPU int8 may well be slower than float; --on TARGET predicts a device"]
    if any(row.get("int8") == "float" for row in rows):
        notes = ["this CPU lacks VNNI: int8 is computed in float here, and slower; --on TARGET predicts a device"]
    where = f"ONNX Runtime, one thread, {fingerprint()['cpu']}"
    return {"latency": where, "prediction": False, "target": None, "notes": notes}

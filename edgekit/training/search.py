"""`search`: settings that suit a data set and a model, found by many short trainings; in one process or in many at once.

The study is a journal: one file that every process appends to. So a search that was stopped goes on from it, and the same
command given beside a running one, on this machine or on another that sees the file, takes its share of the trials.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from edgekit.data import Tensors, check_damaged
from edgekit.data.augment import Augmentation, make_augmentation, policy_named
from edgekit.errors import DataError, EdgekitError, UsageError, first_line
from edgekit.preprocess import make_preprocessor
from edgekit.progress import say

from .fit import FitConfig, Watched, fit, outputs_of
from .journal import Journal, check_study, described
from .objective import Classification, Reading, objective_for
from .plan import Plan, check_custom, class_weights, make_plan
from .train import fit_config

__all__ = ["search"]

SHOWN = 5
DECAYS = (1e-4, 0.5)
SMOOTHINGS = (0.0, 0.2)


def search(
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
) -> dict[str, Any]:
    """Train until ``study`` holds ``trials`` finished trials, and say which settings did best.

    ``study`` is the path of a journal, made or gone on with; each process that shares it may do one trial more than wanted.
    Tuned are the peak learning rate, weight decay, batch and, of a classifier, label smoothing, by tree-structured Parzen
    estimators (Bergstra et al., NIPS 2011); the first trial is of the defaults. A trial's score is what its finished model
    reaches on ``validation``, a share of the training split; the held-out split is never read. A trial that is below the
    median of the others at the same epoch is given up; one whose loss diverges, or that lacks memory, has failed. All else
    is as in `train`, which takes what was found.

    Returns ``study``; the counts ``trials`` (finished) and, of these, ``pruned`` and ``failed``; ``metric``; ``top``, the
    best trials with ``trial``, ``score`` and settings; ``best``, their first; ``command``, which trains it.
    Raises `UsageError` for a file that is no study or is one of other data or options, `DataError`, `MissingExtra`, and
    `EdgekitError` where every trial failed.
    """
    path = Path(study)
    check_study(path, trials, validation)
    plan = make_plan(data, model, size, augment)
    config = fit_config(plan, epochs, seed=seed, optimizer=optimizer)
    about = {"epochs": config.epochs, "validation": validation, "seed": seed, "optimizer": optimizer, "balance": balance}
    journal = Journal(path, described(plan) | about, warmup=config.epochs // 3)
    trainer = _Trainer.make(plan, config, validation, balance)
    space = _Space.around(config, len(trainer.data.y), smooths=isinstance(trainer.objective(config), Classification))
    journal.begin(space.defaults())
    while len(journal.finished()) < trials:
        _attempt(journal, space, trainer, trials)
    top = _top(journal, space)
    stated = {"model": model, "size": size, "augment": augment, "epochs": epochs, "seed": seed or None}
    stated |= {"optimizer": optimizer if optimizer != "adamw" else None, "balance": balance or None}
    found = {key: value for key, value in top[0].items() if key not in ("trial", "score")}
    answer = {"study": str(path), **journal.counts(), "metric": trainer.objective(config).metric}
    return {**answer, "best": top[0], "top": top, "command": _command(data, path, stated | found)}


def _command(data: str, study: Path, options: Mapping[str, Any]) -> str:
    words = ["edgekit", "train", "--data", data]
    for key, value in options.items():
        if value is not None:
            words += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join([*words, "--out", f"{study.stem}.edge"])


@dataclass(frozen=True)
class _Trainer:
    """Data that is decoded once, and the training of a fresh module on it."""

    plan: Plan
    augmentation: Augmentation
    data: Tensors
    validation: Tensors
    weights: NDArray[np.float32] | None

    @classmethod
    def make(cls, plan: Plan, config: FitConfig, validation: float, balance: bool) -> _Trainer:
        """Not by `read_splits`, which reads the held-out split too."""
        augmentation = make_augmentation(plan.augmentation, plan.preprocessing, plan.tokenizer, resizes=plan.preset.resizes)
        kept, aside = plan.dataset.train.part(validation, config.seed)
        data, judged = kept.tensors(augmentation.read), aside.tensors(make_preprocessor(plan.preprocessing, plan.tokenizer))
        check_damaged(data, judged)
        check_custom(plan.module(config.seed), plan, judged)
        if len(data.y) < 4 or not len(judged.y):
            counts = f"{len(data.y)} samples to train on and {len(judged.y)} to judge by"
            raise DataError(f"{plan.dataset.spec} has {counts}", "add samples, or change --validation")
        weights = class_weights(data.y, len(plan.dataset.labels), balance)
        say(f"{plan.model.name}: {len(data.y):,} samples to train on, {len(judged.y):,} to judge by")
        return cls(plan, augmentation, data, judged, weights)

    def objective(self, config: FitConfig) -> Classification | Reading:
        policy = policy_named(self.plan.augmentation)
        objective = objective_for(self.plan.dataset.task, len(self.plan.dataset.labels), config.smoothing, policy)
        if isinstance(objective, Classification):
            objective.weigh(self.weights)
        return objective

    def score(self, config: FitConfig, label: str, on_epoch: Callable[[int, float], None]) -> float:
        """Of the model that `train` would write, the last epoch's. The best epoch's score would be too good to be true."""
        module, objective, watched = self.plan.module(config.seed), self.objective(config), Watched(self.validation)
        options: dict[str, Any] = {"objective": objective, "augmentation": self.augmentation, "label": label}
        fit(module, self.data, watched, config, on_epoch=on_epoch, **options)
        return objective.score(outputs_of(module, self.validation.x), self.validation.y)


@dataclass(frozen=True)
class _Space:
    """What is tried around ``config``, and the way back from what was drawn to settings."""

    config: FitConfig
    batches: tuple[int, ...]
    smooths: bool

    @classmethod
    def around(cls, config: FitConfig, samples: int, smooths: bool) -> _Space:
        most = samples // 2  # two steps an epoch, at least
        batches = [batch for batch in (config.batch // 2, config.batch, 2 * config.batch) if 2 <= batch <= most]
        return cls(config, tuple(batches or [most]), smooths)

    def draw(self, trial: Any) -> dict[str, Any]:
        trial.suggest_float("lr", self.config.lr / 10, min(self.config.lr * 5, 9.9), log=True)
        trial.suggest_categorical("batch", self.batches)
        trial.suggest_float("weight_decay", *DECAYS, log=True)
        if self.smooths:
            trial.suggest_float("smoothing", *SMOOTHINGS)
        return self.settings(trial.params)

    def settings(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Floats to three digits, before training as in the command: both then do the same."""
        names = [name for name in ("lr", "batch", "weight_decay", "smoothing") if name in drawn]
        return {name: drawn[name] if name == "batch" else float(f"{drawn[name]:.3g}") for name in names}

    def defaults(self) -> dict[str, Any]:
        """What would be trained without a search."""
        config = self.config
        found = {"lr": config.lr, "batch": min(config.batch, self.batches[-1]), "weight_decay": config.weight_decay}
        return found | ({"smoothing": config.smoothing} if self.smooths else {})


def _attempt(journal: Journal, space: _Space, trainer: _Trainer, trials: int) -> None:
    """One trial, and a line about it."""
    trial = journal.ask()
    settings = space.draw(trial)
    config, epochs = replace(space.config, **settings), 0

    def on_epoch(epoch: int, score: float) -> None:
        nonlocal epochs
        epochs = epoch + 1
        trial.report(score, epoch)
        if epochs < config.epochs and trial.should_prune():
            raise _Hopeless

    label = f"trial {trial.number}: " + ", ".join(f"{key} {value:g}" for key, value in settings.items())
    try:
        score = trainer.score(config, label, on_epoch)
    except _Hopeless:
        journal.tell(trial, "PRUNED")
        outcome = f"given up after {epochs} of {config.epochs} epochs"
    except (EdgekitError, torch.OutOfMemoryError) as error:
        if isinstance(error, UsageError | DataError):
            journal.tell(trial, "FAIL")  # it does not count: what is wrong is the call
            raise
        reason = first_line(error)
        journal.tell(trial, "FAIL", reason=reason)
        outcome = f"failed: {reason}"
    except BaseException:
        with contextlib.suppress(Exception):  # it may be the journal that cannot be written
            journal.tell(trial, "FAIL")
        raise
    else:
        journal.tell(trial, "COMPLETE", (score,))
        outcome = f"{trainer.objective(config).metric} {score:.2%}"
    say(f"trial {trial.number}: {outcome}; {len(journal.finished())} of {trials} done")


class _Hopeless(Exception):
    """Ends a trial that will not be among the best."""


def _top(journal: Journal, space: _Space) -> list[dict[str, Any]]:
    """The best trials, best first. Raises `EdgekitError` where there is none."""
    good = sorted(journal.complete(), key=lambda t: (-t.value, t.number))
    return [{"trial": t.number, "score": t.value, **space.settings(t.params)} for t in good[:SHOWN]]

"""`train`: from a data set to a bundle."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edgekit.bundle import Bundle, new_path
from edgekit.data.augment import Augmentation, make_augmentation, policy_named
from edgekit.errors import UsageError
from edgekit.evaluation import judge
from edgekit.manifest import FORMAT, Manifest, history_entry
from edgekit.models.module import macs, parameters, write_model
from edgekit.progress import say

from .devices import Devices
from .fit import ANSWERED, FitConfig, Watched, fit, outputs_of
from .logs import tensorboard
from .objective import Classification, Distillation, Objective, Reading, objective_for
from .plan import Plan, Splits, check_custom, class_weights, make_plan, read_splits
from .teacher import load_teacher

__all__ = ["fit_config", "train"]

PHOTO_BATCH = 64


def train(
    *,
    data: str,
    out: str | os.PathLike[str],
    model: str | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    weight_decay: float = FitConfig.weight_decay,
    smoothing: float = FitConfig.smoothing,
    size: int | None = None,
    width: float = 1.0,
    seed: int = 0,
    augment: str | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    validation: float = 0.0,
    patience: int = 0,
    balance: bool = False,
    teacher: str | os.PathLike[str] | Bundle | None = None,
    logs: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Train a model on a data set and write it as a new bundle.

    ``data`` is a spec (`edgekit.data.load`); ``model`` a preset, ``hf:FOLDER`` or ``package.module:factory`` (default: what
    suits the data); ``epochs`` to ``smoothing`` and ``optimizer`` are `FitConfig`'s; ``size`` is the height and width of
    pictures in pixels (default: the data set's), ``width`` a factor on the channels of a preset, ``augment`` a policy,
    ``validation`` the share of the training split by which the best epoch is chosen, ``patience`` the epochs without a better
    one after which training stops. ``balance`` weighs classes alike; ``teacher`` is a bundle to distil from; ``logs`` a folder
    for TensorBoard. Stopped runs resume from ``OUT.checkpoint``. The figures in the history are measured on the held-out split
    after the last epoch; nothing is chosen by it. Under torchrun every process returns the bundle.
    Raises `OutputExists`, `DataError` for missing or damaged data, `UsageError` for options that do not fit each other.
    """
    target = new_path(out)
    _check(validation, patience)
    plan = make_plan(data, model, size, augment, width)
    stated = {"weight_decay": weight_decay, "smoothing": smoothing}
    config = fit_config(plan, epochs, batch, lr, seed, optimizer=optimizer, patience=patience, **stated)
    module = plan.module(seed)
    augmentation = make_augmentation(plan.augmentation, plan.preprocessing, plan.tokenizer, resizes=plan.preset.resizes)
    learnt, objective = _objectives(plan, config, teacher)
    splits = read_splits(plan.dataset, plan.preprocessing, augmentation, plan.tokenizer, validation, seed)
    check_custom(module, plan, splits.held_out)
    weights = class_weights(splits.train.y, len(plan.dataset.labels), balance)
    if isinstance(learnt, Classification):
        learnt.weigh(weights)
    _announce(plan, module, splits)
    target.parent.mkdir(parents=True, exist_ok=True)
    figures = _learn(target, plan, module, splits, config, objective, augmentation, logs)
    settings = {"data": data, "data_digest": plan.dataset.digest, "model": plan.model.name, **asdict(config)}
    settings |= {"validation": validation, "balance": balance}
    settings |= {"teacher": objective.teacher_digest} if isinstance(objective, Distillation) else {}
    return _write(target, plan, module, splits, settings, figures)


def _announce(plan: Plan, module: nn.Module, splits: Splits) -> None:
    say(
        f"{plan.model.name}: {parameters(module):,} parameters, {len(splits.train.y):,} samples to train on, "
        f"{len(splits.held_out.y):,} held out"
        + (f", {len(splits.validation.y):,} to choose the epoch by" if splits.validation is not None else "")
    )


def _learn(
    target: Path,
    plan: Plan,
    module: nn.Module,
    splits: Splits,
    config: FitConfig,
    objective: Objective,
    augmentation: Augmentation,
    logs: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """Run the loop; the seconds that it took and its curve."""
    watched = Watched(splits.validation, choose=True) if splits.validation else Watched(splits.held_out)
    started = time.perf_counter()
    with tensorboard(logs if Devices().main else None) as log:
        curve = fit(
            module,
            splits.train,
            watched,
            config,
            objective=objective,
            augmentation=augmentation,
            checkpoint=_checkpoint(target),
            about=f"{plan.dataset.digest} {plan.preprocessing}",
            log=log,
        )
    return {"seconds": round(time.perf_counter() - started, 1), "curve": curve}


def _checkpoint(target: Path) -> Path:
    return target.with_name(f"{target.name}.checkpoint")


def _check(validation: float, patience: int) -> None:
    if not isinstance(validation, int | float) or not 0 <= validation < 1:
        raise UsageError(f"a validation share of {validation!r}", "give a share of the training split, for example 0.1")
    if patience and not validation:
        raise UsageError("--patience needs a validation split to judge by", "add --validation 0.1")


def _objectives(
    plan: Plan, config: FitConfig, teacher: str | os.PathLike[str] | Bundle | None
) -> tuple[Classification | Reading, Objective]:
    """The data's own objective, and what is trained with: the same, or a teacher around it."""
    learnt = objective_for(plan.dataset.task, len(plan.dataset.labels), config.smoothing, policy_named(plan.augmentation))
    if isinstance(learnt, Reading) and config.smoothing != FitConfig.smoothing:
        raise UsageError(f"{plan.dataset.spec} is for {plan.dataset.task}: only classes are smoothed", "leave --smoothing out")
    if teacher is None:
        return learnt, learnt
    if not isinstance(learnt, Classification):
        raise UsageError(f"a teacher is for classifiers, {plan.dataset.spec} is for {plan.dataset.task}", "leave --teacher out")
    module, digest = load_teacher(teacher, plan.dataset.labels, plan.preprocessing, plan.tokenizer)
    return learnt, Distillation(learnt, module, digest)


def fit_config(
    plan: Plan,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    *,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    patience: int = 0,
    weight_decay: float = FitConfig.weight_decay,
    smoothing: float = FitConfig.smoothing,
) -> FitConfig:
    """How a plan is trained: what is stated, else what suits its model and data. Raises `UsageError`."""
    preset = plan.preset
    rate = preset.lr * (10 if optimizer == "sgd" else 1) if lr is None else lr
    fitting = min(preset.batch, PHOTO_BATCH) if policy_named(plan.augmentation).crop else preset.batch
    default = max(preset.epochs, policy_named(plan.augmentation).epochs)
    return FitConfig(
        default if epochs is None else epochs,
        rate,
        fitting if batch is None else batch,
        weight_decay,
        smoothing,
        seed=seed,
        augmentation=plan.augmentation,
        optimizer=optimizer,
        patience=patience,
    )


def _write(
    target: Path, plan: Plan, module: nn.Module, splits: Splits, settings: dict[str, Any], figures: dict[str, Any]
) -> Bundle:
    """Judge the module on the held-out split and write it; only the main process does, the others wait for it."""
    devices, written = Devices(), None
    if devices.main:
        held_out = splits.held_out
        outputs = outputs_of(module, held_out.x, min(ANSWERED, 2 * settings["batch"]))
        judged = judge(plan.dataset.task, outputs, held_out.y, len(plan.dataset.labels))
        figures = {
            **judged.record(),
            "parameters": parameters(module),
            "macs": macs(module, torch.from_numpy(held_out.x[:1])),
            "damaged": [name for part in splits if part is not None for name in part.damaged],
            "processes": devices.world,
            **figures,
        }
        manifest = Manifest(
            format=FORMAT,
            name=target.name.removesuffix(".edge"),
            task=plan.dataset.task,
            inputs=(),
            outputs=(),
            model=plan.model,
            preprocessing=plan.preprocessing,
            labels=plan.dataset.labels,
        )
        entry = history_entry("train", settings, figures)
        say("exporting to ONNX, and comparing the graph with torch")
        written = write_model(target, module, held_out.x, manifest, entry, plan.tokenizer).manifest
        _checkpoint(target).unlink(missing_ok=True)
    with devices.together():  # on another machine there is no file to open
        written = devices.share(written)
    assert written is not None
    return Bundle(target, written)

"""`prune`: a smaller bundle from a trained one. Cut, fine-tune, export, measure both on the same machine in turn."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from edgekit.bundle import FLOAT_GRAPH, Bundle, new_path
from edgekit.data import Dataset, Tensors, load
from edgekit.data.augment import Augmentation, make_augmentation, policy_named
from edgekit.errors import BudgetNotMet, DataError, UsageError
from edgekit.evaluation import accuracy
from edgekit.manifest import Preprocessing
from edgekit.models import preset_named
from edgekit.models.module import export_onnx, parameters, write_model
from edgekit.models.module import load as load_module
from edgekit.models.module import macs as macs_of
from edgekit.progress import say
from edgekit.training import FitConfig, fit
from edgekit.training.fit import answers
from edgekit.training.objective import Classification
from edgekit.training.plan import Splits, read_splits

from .latency import paired_latency
from .search import Step, cut_path
from .sparsity import Mask24

__all__ = ["prune"]

SAMPLES = 512  # training samples that judge a cut
EPOCHS = 30


class _Cut(NamedTuple):
    module: nn.Module
    steps: list[Step]


def prune(
    bundle: Bundle | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    keep: float | None = None,
    speedup: float | None = None,
    max_drop: float | None = None,
    sparsity: str | None = None,
    data: str | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> Bundle:
    """Remove channels until ``keep`` (share of the MACs) or ``speedup`` (measured on ONNX Runtime, one thread) is reached.

    Neither given: ``keep=0.5``, or no cut with ``sparsity="2:4"``. Then fine-tune for ``epochs`` on ``data`` (default:
    what the bundle was trained on). ``max_drop``: points of top-1 on the held-out split that may be lost.
    Raises `BudgetNotMet` (exit 3) where ``speedup`` (by more than 2%, which two measurements of one graph differ by) or
    ``max_drop`` is missed; the best found is written all the same.
    """
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    target = new_path(out)
    _check(keep, speedup, sparsity)
    if source.manifest.task not in ("image-classification", "tensor"):
        raise UsageError(f"{source.path} does {source.manifest.task}; prune cuts image classifiers", "leave prune out")
    module = load_module(source)
    dataset = _dataset(source, data)
    preprocessing, model = source.manifest.preprocessing, source.manifest.model
    assert preprocessing is not None
    assert model is not None
    config = _fit_config(source, dataset, epochs, seed)
    augmentation = make_augmentation(config.augmentation, preprocessing, resizes=preset_named(model.name).resizes)
    splits = read_splits(dataset, preprocessing, augmentation)
    held_out = splits.held_out
    started = time.perf_counter()
    before = _Before(source, module, held_out)
    whole = sparsity and keep is None and speedup is None
    cut = _Cut(module, []) if whole else _cut(before, _samples(dataset, preprocessing), keep, speedup)
    mask = Mask24(cut.module) if sparsity else None
    checkpoint = target.with_name(f"{target.name}.checkpoint")
    target.parent.mkdir(parents=True, exist_ok=True)
    curve = _recover(cut.module, splits, config, augmentation, len(dataset.labels), checkpoint, mask)
    figures = {
        **before.against(cut.module, held_out, len(dataset.labels)),
        "cuts": [{"layer": s.root, "before": s.before, "after": s.after, "kl": s.kl} for s in cut.steps],
        "sparse_share": mask.share if mask else 0.0,
        "seconds": round(time.perf_counter() - started, 1),
        "curve": curve,
    }
    options = {"keep": keep, "speedup": speedup, "max_drop": max_drop, "sparsity": sparsity, "data": dataset.spec}
    entry = source.entry("prune", {**options, **asdict(config), "data_digest": dataset.digest}, figures)
    manifest = msgspec.structs.replace(source.manifest, name=target.name.removesuffix(".edge"), files={})
    pruned = write_model(target, cut.module, held_out.x, manifest, entry)
    checkpoint.unlink(missing_ok=True)
    _gate(pruned, figures, speedup, max_drop)
    return pruned


def _recover(
    module: nn.Module,
    splits: Splits,
    config: FitConfig,
    augmentation: Augmentation,
    classes: int,
    checkpoint: Path,
    mask: Mask24 | None,
) -> list[dict[str, float]]:
    """Fine-tune what is left, with the loss of training; ``mask`` keeps pruned weights at zero."""
    if mask:
        mask()
    objective = Classification(classes, config.smoothing, policy_named(config.augmentation))
    options = {"objective": objective, "augmentation": augmentation, "checkpoint": checkpoint, "after_step": mask}
    return fit(module, splits.train, splits.held_out, config, label="fine-tuning", **options)  # type: ignore[arg-type]


class _Before:
    """What the unpruned model is: size, work, answers; and a pruned one held against it."""

    def __init__(self, source: Bundle, module: nn.Module, held_out: Tensors) -> None:
        self.graph = source.file(FLOAT_GRAPH).read_bytes()
        self.module = module
        self.sample = held_out.x[:1]
        self.parameters, self.macs = parameters(module), macs_of(module, torch.from_numpy(self.sample))
        self.top1 = float((answers(module, held_out.x) == held_out.y).mean())

    def against(self, module: nn.Module, held_out: Tensors, classes: int) -> dict[str, Any]:
        """Figures of the pruned ``module``; latencies are taken in turns, ONNX Runtime, one thread."""
        judged = accuracy(held_out.y, answers(module, held_out.x), classes)
        graph = export_onnx(module, torch.from_numpy(np.repeat(self.sample, 2, 0)))
        old_ms, new_ms = paired_latency(self.graph, graph, self.sample)
        macs = macs_of(module, torch.from_numpy(self.sample))
        return {
            **judged.record(),
            "drop": (self.top1 - judged.top1) * 100,
            "speedup": old_ms / new_ms,
            "latency_before_ms": old_ms,
            "latency_ms": new_ms,
            "macs": macs,
            "macs_share": macs / self.macs,
            "parameters": parameters(module),
            "parameters_before": self.parameters,
        }


def _check(keep: float | None, speedup: float | None, sparsity: str | None) -> None:
    if keep is not None and speedup is not None:
        raise UsageError("--keep and --speedup arrived together", "give one of them")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep {keep:g} is not a share", "give the share of the MACs to keep, for example 0.5")
    if speedup is not None and not 1 < speedup <= 100:
        raise UsageError(f"--speedup {speedup:g} is out of reach", "give how many times faster, for example 2")
    if sparsity not in (None, "2:4"):
        raise UsageError(f"there is no sparsity {sparsity!r}", "the one pattern that tensor cores know is 2:4")


def _dataset(bundle: Bundle, data: str | None) -> Dataset:
    trained = bundle.last("train")
    spec = data or (trained.config.get("data") if trained else None)
    if not spec:
        raise DataError(f"{bundle.path} does not say what it was trained on", "name the data: --data SPEC")
    try:
        dataset = load(str(spec))
    except DataError as error:
        if data:
            raise
        raise DataError(f"the data it was trained on: {error.message}", "name the data: --data SPEC") from None
    if dataset.labels != bundle.manifest.labels:
        raise DataError(f"{spec} has other classes than {bundle.path}", "name the data it was trained on: --data SPEC")
    return dataset


def _samples(dataset: Dataset, preprocessing: Preprocessing) -> Tensor:
    """Training samples, unaugmented, that judge a cut."""
    chosen = np.linspace(0, len(dataset.train) - 1, min(SAMPLES, len(dataset.train))).astype(int)
    x = dataset.train.take(chosen).tensors(preprocessing).x
    return torch.from_numpy(x[:])


def _cut(before: _Before, samples: Tensor, keep: float | None, speedup: float | None) -> _Cut:
    """The first model on the path of cuts that meets the budget; the last one where none does."""
    last = [name for name, layer in before.module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    module, total = before.module, before.macs
    budget = None if speedup else int((0.5 if keep is None else keep) * total)
    steps: list[Step] = []
    say("measuring what each cut costs")
    for step in cut_path(module, samples, frozenset({last}), budget):
        steps.append(step)
        share = step.macs / total
        say(f"cut {step.root}: {step.before} -> {step.after} channels, KL {step.kl:.3f}, {share:.0%} of the MACs left")
        # Speed is what was asked for, so speed is measured; with too few MACs gone it cannot be there yet.
        if speedup and step.macs * 0.6 * speedup <= total:
            graph = export_onnx(step.module, samples[:2])
            old, new = paired_latency(before.graph, graph, samples[:1].numpy(), rounds=10)
            say(f"measured {old / new:.2f}x at {step.macs / total:.0%} of the MACs")
            if old / new >= speedup:
                break
    if budget is not None and (not steps or steps[-1].macs > budget) and budget < total:
        left = (steps[-1].macs if steps else total) / total
        raise UsageError(f"--keep {budget / total:.2g}: what cannot be cut is {left:.0%} of the MACs", "ask for less")
    return _Cut(steps[-1].module if steps else module, steps)


def _fit_config(bundle: Bundle, dataset: Dataset, epochs: int, seed: int) -> FitConfig:
    assert bundle.manifest.model is not None
    trained = bundle.last("train")
    batch = int(trained.config.get("batch", 128)) if trained else 128
    rate = preset_named(bundle.manifest.model.name).lr * 0.6  # high, as pruned nets need it; not so high that it starts anew
    augmentation = str(trained.config.get("augmentation", dataset.augmentation)) if trained else dataset.augmentation
    return FitConfig(epochs, rate, batch, seed=seed, augmentation=augmentation)


def _gate(bundle: Bundle, figures: dict[str, Any], speedup: float | None, max_drop: float | None) -> None:
    result = {"bundle": str(bundle.path), **{k: figures[k] for k in ("top1", "drop", "speedup", "macs", "parameters")}}
    if max_drop is not None and figures["drop"] > max_drop + 1e-6:
        raise BudgetNotMet(
            f"top-1 fell by {figures['drop']:.2f} points, allowed {max_drop:g}; {bundle.path} is the best found",
            "keep more (--keep), or fine-tune longer (--epochs)",
            result,
        )
    if speedup is not None and figures["speedup"] < speedup * 0.98:
        raise BudgetNotMet(
            f"the pruned model is {figures['speedup']:.2f}x faster, asked {speedup:g}x; {bundle.path} is the best found",
            "ask for less; what remains is not in the layers that can be cut",
            result,
        )

"""What a pruned model is trained and judged with: the data, the loss and the teacher of the bundle it came from."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.bundle import TOKENIZER, Bundle
from edgekit.data import Dataset, load
from edgekit.data.augment import Augmentation, make_augmentation, policy_named
from edgekit.errors import DataError
from edgekit.evaluation import judge
from edgekit.manifest import Preprocessing
from edgekit.models import preset_named
from edgekit.preprocess import make_preprocessor
from edgekit.training import FitConfig, fit
from edgekit.training.fit import ANSWERED, epoch_seconds, outputs_of
from edgekit.training.objective import Classification, Distillation, Objective, objective_for
from edgekit.training.plan import Splits, class_weights, read_splits
from edgekit.training.teacher import load_teacher

__all__ = ["Recovery"]

SAMPLES, TAUGHT = 256, 1024  # training samples that judge a cut, and others that heal it
EPOCHS = 30  # of a bundle that does not say for how many it was trained


@dataclass
class Recovery:
    """``samples`` (N, ...) and ``targets`` (N,) judge a cut, ``taught`` (M, ...) heal it."""

    dataset: Dataset
    splits: Splits
    preprocessing: Preprocessing
    augmentation: Augmentation
    config: FitConfig
    objective: Objective
    samples: Tensor
    targets: Tensor
    taught: Tensor
    task: str
    tokenizer: bytes | None

    @classmethod
    def of(cls, bundle: Bundle, data: str | None, epochs: int | None, seed: int) -> Recovery:
        """Raises `DataError` for data that is missing or other than what ``bundle`` was trained on."""
        dataset = _dataset(bundle, data)
        preprocessing, model = bundle.manifest.preprocessing, bundle.manifest.model
        assert preprocessing is not None
        assert model is not None
        tokenizer = bundle.read(TOKENIZER) if bundle.has(TOKENIZER) else None
        config = _fit_config(bundle, dataset, epochs, seed)
        augmentation = make_augmentation(
            config.augmentation, preprocessing, tokenizer, resizes=preset_named(model.name).resizes
        )
        splits = read_splits(dataset, preprocessing, augmentation, tokenizer)
        order = np.random.default_rng(seed).permutation(len(dataset.train))
        count = min(SAMPLES, -(-len(order) // 2))
        preprocess = make_preprocessor(preprocessing, tokenizer)
        judged, taught = (
            dataset.train.take(np.sort(part)).tensors(preprocess)
            for part in (order[:count], order[count:][:TAUGHT] if len(order) > 1 else order)
        )
        learnt = objective_for(dataset.task, len(dataset.labels), config.smoothing, policy_named(config.augmentation))
        if isinstance(learnt, Classification) and _known(bundle).get("balance"):
            learnt.weigh(class_weights(splits.train.y, len(dataset.labels), True))
        objective: Objective = learnt
        if isinstance(learnt, Classification):
            objective = Distillation(learnt, *load_teacher(bundle, dataset.labels, preprocessing, tokenizer), share=0.5)
        samples, others = (torch.from_numpy(np.ascontiguousarray(part.x[:])) for part in (judged, taught))
        return cls(dataset, splits, preprocessing, augmentation, config, objective, samples,
                   torch.from_numpy(judged.y), others, dataset.task, tokenizer)  # fmt: skip

    def epoch_seconds(self, module: nn.Module) -> float:
        """What an epoch of fine-tuning ``module`` takes, by a few of its steps."""
        train, held_out = self.splits.train, self.splits.held_out
        return epoch_seconds(copy.deepcopy(module), train, held_out, self.config, self.objective, self.augmentation)

    def fit(self, module: nn.Module, checkpoint: Path, mask: Callable[[], None] | None = None) -> list[dict[str, float]]:
        """Fine-tune ``module`` in place; ``mask`` keeps pruned weights at zero. Returns the curve."""
        if mask is not None:
            mask()
        return fit(
            module,
            self.splits.train,
            self.splits.held_out,
            self.config,
            objective=self.objective,
            augmentation=self.augmentation,
            checkpoint=checkpoint,
            about=f"{self.dataset.digest} {self.preprocessing}",
            label="fine-tuning",
            after_step=mask,
        )

    def judge(self, module: nn.Module) -> dict[str, Any]:
        """Figures on the held-out split."""
        outputs = outputs_of(module, self.splits.held_out.x, min(ANSWERED, 2 * self.config.batch))
        return judge(self.dataset.task, outputs, self.splits.held_out.y, len(self.dataset.labels)).record()

    def drop(self, before: dict[str, Any], after: dict[str, Any]) -> float:
        """Points lost: of top-1, or of the character error rate of readers."""
        if "cer" in after:
            return float(after["cer"] - before["cer"]) * 100
        return float(before["top1"] - after["top1"]) * 100


def _dataset(bundle: Bundle, data: str | os.PathLike[str] | None) -> Dataset:
    spec = data or _known(bundle).get("data")
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
    if dataset.task != bundle.manifest.task:
        raise DataError(f"{spec} is for {dataset.task}, {bundle.path} is for {bundle.manifest.task}", "name other data")
    return dataset


def _fit_config(bundle: Bundle, dataset: Dataset, epochs: int | None, seed: int) -> FitConfig:
    assert bundle.manifest.model is not None
    known = _known(bundle)
    rate = float(known.get("lr", preset_named(bundle.manifest.model.name).lr))  # pruned nets lose points at lower ones
    same = {name: known[name] for name in ("weight_decay", "optimizer") if name in known}
    augmentation = str(known.get("augmentation", dataset.augmentation))
    smoothing = float(known.get("smoothing", FitConfig.smoothing))
    epochs = int(known.get("epochs", EPOCHS)) if epochs is None else epochs
    batch = int(known.get("batch", FitConfig.batch))
    return FitConfig(epochs, rate, batch, smoothing=smoothing, seed=seed, augmentation=augmentation, **same)


def _known(bundle: Bundle) -> dict[str, Any]:
    """What the bundle was trained with; nothing where it does not say."""
    trained = bundle.last("train")
    return dict(trained.config) if trained else {}

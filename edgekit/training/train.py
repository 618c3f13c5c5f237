"""`train`: from a data set to a bundle."""

from __future__ import annotations

import os
import time
from dataclasses import asdict

import msgspec
import torch

from edgekit.bundle import Bundle, new_path
from edgekit.data import Dataset, Tensors, check_damaged, load
from edgekit.errors import DataError
from edgekit.evaluation import accuracy
from edgekit.manifest import FORMAT, ImagePreprocessing, Manifest, ModelConfig, history_entry
from edgekit.models import DEFAULT, PRESETS
from edgekit.models.module import create, macs, parameters, write_model
from edgekit.progress import say

from .fit import FitConfig, answers, fit

__all__ = ["read_splits", "train"]

#: The shortest training that ends well: small sets need more epochs to see as many steps.
EPOCHS = 40


def read_splits(dataset: Dataset, preprocessing: ImagePreprocessing) -> tuple[Tensors, Tensors]:
    """(train, held-out) in memory. Raises `DataError` for too many damaged images, or too few to train on."""
    train_set, held_out = dataset.train.tensors(preprocessing), dataset.test.tensors(preprocessing)
    check_damaged(train_set, held_out)
    if len(train_set.y) < 2:
        raise DataError(f"{dataset.spec} has {len(train_set.y)} images to train on", "add images: one folder a class")
    if not len(held_out.y):
        raise DataError(
            f"none of the held-out images of {dataset.spec} can be read", "repair them: accuracy is measured on them"
        )
    return train_set, held_out


def train(
    *,
    data: str,
    out: str | os.PathLike[str],
    model: str = DEFAULT,
    epochs: int = EPOCHS,
    batch: int = 128,
    lr: float | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Bundle:
    """Train a preset on a data set and write it as a new bundle.

    ``data`` is a spec (`edgekit.data.load`), ``model`` a preset, ``size`` the input's height and width in pixels
    (default: the data set's). Stopped runs resume from ``OUT.checkpoint``. The figures in the history are measured on
    the held-out split after the last epoch; nothing is chosen by it.
    Raises `OutputExists`, `DataError` for missing or damaged data, `UsageError` for an unknown model or data set.
    """
    target = new_path(out)
    dataset = load(data)
    preprocessing = dataset.preprocessing
    if size:
        preprocessing = msgspec.structs.replace(preprocessing, width=size, height=size)
    shape = {"channels": preprocessing.channels, "height": preprocessing.height, "width": preprocessing.width}
    model_config = ModelConfig(model, {"classes": len(dataset.labels), **shape})
    torch.manual_seed(seed)
    module = create(model_config)
    config = FitConfig(epochs, lr or PRESETS[model].lr, batch, seed=seed, augmentation=dataset.augmentation)
    train_set, held_out = read_splits(dataset, preprocessing)
    say(f"{model}: {parameters(module):,} parameters, {len(train_set.y):,} samples to train on, {len(held_out.y):,} held out")
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = target.with_name(f"{target.name}.checkpoint")
    started = time.perf_counter()
    curve = fit(module, train_set, held_out, config, checkpoint=checkpoint)
    judged = accuracy(held_out.y, answers(module, held_out.x), len(dataset.labels))
    figures = {
        **judged.record(),
        "parameters": parameters(module),
        "macs": macs(module, torch.from_numpy(held_out.x[:1])),
        "seconds": round(time.perf_counter() - started, 1),
        "damaged": [*train_set.damaged, *held_out.damaged],
        "curve": curve,
    }
    settings = {"data": data, "data_digest": dataset.digest, "model": model, **asdict(config)}
    manifest = Manifest(
        format=FORMAT,
        name=target.name.removesuffix(".edge"),
        task="image-classification",
        inputs=(),
        outputs=(),
        model=model_config,
        preprocessing=preprocessing,
        labels=dataset.labels,
    )
    bundle = write_model(target, module, held_out.x, manifest, history_entry("train", settings, figures))
    checkpoint.unlink(missing_ok=True)
    return bundle

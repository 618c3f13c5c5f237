"""Accuracy of a bundle on a data set, through the runtime: what the device would answer, not what the trainer believes."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .data import Dataset, Split, check_damaged, load
from .errors import UsageError
from .progress import say, track
from .runtime import Model
from .runtime.model import Precision

__all__ = ["Accuracy", "accuracy", "evaluate", "evaluation_split"]

RECORDED_CLASSES = 200


class Accuracy(NamedTuple):
    """``top1`` and ``macro_f1`` are shares in 0..1; ``confusion`` int (classes, classes), rows truth, columns answers."""

    top1: float
    macro_f1: float
    confusion: NDArray[np.int64]

    def figures(self) -> dict[str, Any]:
        return {"top1": self.top1, "macro_f1": self.macro_f1, "confusion": self.confusion.tolist()}

    def record(self) -> dict[str, Any]:
        """Figures for a bundle's history: without the confusion of more classes than a page can show."""
        figures = self.figures()
        return figures if len(self.confusion) <= RECORDED_CLASSES else {k: v for k, v in figures.items() if k != "confusion"}


def accuracy(truth: NDArray[np.int64], answers: NDArray[np.int64], classes: int) -> Accuracy:
    """Figures from class indices (N,) and (N,). Macro F1 is over the classes that occur in ``truth`` or ``answers``."""
    confusion = np.bincount(truth * classes + answers, minlength=classes * classes).reshape(classes, classes)
    right = np.diag(confusion).astype(float)
    occurring = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * right[occurring > 0] / occurring[occurring > 0]
    return Accuracy(float(right.sum() / max(len(truth), 1)), float(f1.mean()) if len(f1) else 0.0, confusion)


def evaluation_split(bundle: Bundle, dataset: Dataset) -> Split:
    """What the bundle may be judged on: the held-out split of data it was trained on, all of any other data.

    A folder that has changed since training counts as trained on: better a smaller test than one learnt by heart.
    """
    trained_on = [entry.config for entry in bundle.manifest.history if "data_digest" in entry.config]
    if any(dataset.digest in (config["data_digest"], config.get("labelled_digest")) for config in trained_on):
        return dataset.test
    if any(config.get("data") == dataset.spec for config in trained_on):
        say(f"{dataset.spec} has changed since training: judged on its held-out split")
        return dataset.test
    return dataset.all


def evaluate(
    bundle: Bundle | str | os.PathLike[str],
    data: str,
    *,
    backend: str = "auto",
    precision: Precision = "auto",
    threads: int = 1,
    save: bool = False,
) -> dict[str, Any]:
    """Top-1, macro F1, confusion and the damaged images of ``data`` (a spec), through ``backend``.

    ``precision``: which graph of the bundle; ``auto`` takes int8 where there is one.
    ``save`` records the figures in the bundle's history, where the report finds them.
    Raises `UsageError` where the data set has a class that the model does not know, `DataError` for damaged data.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    labels = opened.manifest.labels
    if not labels or opened.manifest.preprocessing is None:
        raise UsageError(f"{opened.path} has no classes to evaluate", "eval is for trained bundles; use compare for raw graphs")
    dataset = load(data)
    if unknown := [label for label in dataset.labels if label not in labels]:
        raise UsageError(
            f"{data} has the class {unknown[0]!r}, the model knows {', '.join(labels[:8])} ...",
            "evaluate on data with its classes",
        )
    tensors = evaluation_split(opened, dataset).tensors(opened.manifest.preprocessing)
    check_damaged(tensors)
    truth = np.array([labels.index(label) for label in dataset.labels])[tensors.y]
    answers = np.empty(len(truth), np.int64)
    with Model.open(opened.path, backend, precision=precision, threads=threads) as model:
        source, target = model.inputs[0], model.outputs[0].name
        step = 64 if isinstance(source.shape[0], str) else 1
        for start in track(range(0, len(truth), step), "evaluating"):
            batch = tensors.x[start : start + step]
            answers[start : start + step] = model.run({source.name: batch})[target].argmax(1)
        described = {"graph": model.runner.graph, **model.runner.describe()}
    judged = accuracy(truth, answers, len(labels))
    if save:
        config = {"data": data, **described}
        opened.extend({}, opened.entry("eval", config, {**judged.record(), "samples": len(truth)}))
    return {**judged.figures(), "samples": len(truth), "damaged": list(tensors.damaged), "data": data, **described}

"""Accuracy of a bundle on a data set, through the runtime: what the device would answer, not what the trainer believes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bundle import EXAMPLES, TOKENIZER, Bundle
from .data import Dataset, Split, Tensors, check_damaged, load
from .data.examples import examples
from .data.tensors import batches
from .errors import UsageError
from .manifest import Task
from .preprocess import make_preprocessor
from .progress import say, track
from .runtime import Model
from .runtime.ctc import read_line
from .runtime.golden import run_samples
from .runtime.model import Precision

__all__ = [
    "Accuracy",
    "Judgement",
    "LineAccuracy",
    "accuracy",
    "character_errors",
    "evaluate",
    "evaluation_split",
    "judge",
    "line_accuracy",
]

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


class LineAccuracy(NamedTuple):
    """``cer``: insertions, deletions and substitutions over the characters there are. ``top1``: lines without an error."""

    cer: float
    top1: float

    def figures(self) -> dict[str, Any]:
        return {"top1": self.top1, "cer": self.cer}

    def record(self) -> dict[str, Any]:
        return self.figures()


Judgement = Accuracy | LineAccuracy


def line_accuracy(read: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> LineAccuracy:
    """Figures from what was read and what stands there, a sequence of character indices a line."""
    errors, characters = character_errors(read, wanted)
    right = sum(list(a) == list(b) for a, b in zip(read, wanted, strict=True))
    return LineAccuracy(errors / max(characters, 1), right / max(len(wanted), 1))


def character_errors(read: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(edits that would mend all lines, characters there are)."""
    edits = sum(_edit_distance(a, b) for a, b in zip(read, wanted, strict=True))
    return edits, sum(map(len, wanted))


def _edit_distance(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Insertions, deletions and substitutions that turn ``found`` into ``wanted`` (Levenshtein 1966)."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def judge(task: Task, outputs: NDArray[Any], truth: NDArray[np.int64], classes: int, beam: int = 1) -> Judgement:
    """Figures from a model's logits: (N, classes) and (N,), or of a reader (N, steps, alphabet) and (N, L), -1 behind ends."""
    if task != "text-recognition":
        return accuracy(truth, outputs.argmax(1), classes)
    scores = np.exp(outputs - outputs.max(2, keepdims=True))
    scores /= scores.sum(2, keepdims=True)
    return line_accuracy([read_line(s, beam)[0] for s in scores], [[int(c) for c in row if c >= 0] for row in truth])


def evaluation_split(bundle: Bundle, dataset: Dataset) -> Split:
    """What the bundle may be judged on: the held-out split of data it was trained on, all of any other data.

    A folder that has changed since training counts as trained on: better a smaller test than one learnt by heart.
    Raises `UsageError` for a validation part whose samples the bundle was trained on.
    """
    trained_on = [entry.config for entry in bundle.manifest.history if "data_digest" in entry.config]
    if dataset.spec.startswith("validation:"):
        for spec in {str(config["data"]) for config in trained_on if config.get("data")} - {dataset.spec}:
            if _place(spec) == _place(dataset.spec):
                raise UsageError(
                    f"{bundle.path} was trained on {spec}, with the samples of {dataset.spec}", f"add --data {spec}"
                )
    if any(dataset.digest in (config["data_digest"], config.get("labelled_digest")) for config in trained_on):
        return dataset.test
    if any(_place(str(config.get("data"))) == _place(dataset.spec) for config in trained_on):
        say(f"{dataset.spec} has changed since training: judged on its held-out split, some of it may have been trained on")
        return dataset.test
    return dataset.all


def _place(spec: str) -> str:
    """The spec with one spelling of its path; a validation part counts as the data set that it is of."""
    kind, colon, path = spec.partition(":")
    if kind == "validation":
        return _place(path.partition(":")[2])
    return f"{kind}:{os.path.realpath(path)}" if colon else kind


def evaluate(
    bundle: Bundle | str | os.PathLike[str],
    data: str,
    *,
    backend: str = "auto",
    precision: Precision = "auto",
    threads: int = 1,
    beam: int = 1,
    save: bool = False,
) -> dict[str, Any]:
    """Top-1, macro F1 and confusion (of a reader: lines right and character error rate) on ``data`` (a spec).

    ``precision``: which graph of the bundle; ``auto`` takes int8 where there is one. ``beam``: a reader's beam width.
    ``save`` records the figures in the bundle's history, where the report finds them, and of a classifier a few samples of
    each confusion (100 kB at most), which packs leave out.

    Returns ``data``, ``samples`` (how many), ``damaged`` (those left out), ``top1`` and ``macro_f1`` (shares), ``confusion``
    (rows truth, columns answers; of a reader the three are lines right and character error rate instead), and of what ran it
    ``backend``, ``version``, ``provider``, ``graph``, ``threads``, of an int8 graph ``int8`` (computed by kernels, or in float
    where Q/DQ is taken as written) and ``passed_over`` (backends that did not do, where there are some).
    Raises `UsageError` where the data set has a class that the model does not know, `DataError` for damaged data.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    labels, task = opened.manifest.labels, opened.manifest.task
    if not labels or opened.manifest.preprocessing is None:
        raise UsageError(f"{opened.path} has no classes to evaluate", "eval is for trained bundles; use compare for raw graphs")
    if beam != 1 and task != "text-recognition":
        raise UsageError(f"{opened.path} does {task}, a beam of {beam} is for readers of text", "leave --beam out")
    dataset = load(data)
    if dataset.task != task:
        raise UsageError(f"{opened.path} does {task}, {data} is for {dataset.task}", "evaluate on data of its kind")
    if unknown := [label for label in dataset.labels if label not in labels]:
        raise UsageError(
            f"{data} has the class {unknown[0]!r}, the model knows {', '.join(labels[:8])} ...",
            "evaluate on data with its classes",
        )
    tokenizer = opened.read(TOKENIZER) if opened.has(TOKENIZER) else None
    split = evaluation_split(opened, dataset)
    tensors = split.tensors(make_preprocessor(opened.manifest.preprocessing, tokenizer))
    check_damaged(tensors)
    own = np.array([labels.index(label) for label in dataset.labels])
    truth = np.where(tensors.y < 0, -1, own[tensors.y])
    with Model.open(opened.path, backend, precision=precision, threads=threads) as model:
        outputs = _outputs(model, tensors)
        described = {"graph": model.runner.graph, **model.runner.describe()}
    judged = judge(task, outputs, truth, len(labels), beam)
    if save:
        config = {"data": data, **({"beam": beam} if beam > 1 else {}), **described}
        kept = _examples(split, tensors, truth, outputs, data) if isinstance(judged, Accuracy) else {}
        opened.extend(
            kept, opened.entry("eval", config, {**judged.record(), "samples": len(truth), "data_digest": dataset.digest})
        )
    return {**judged.figures(), "samples": len(truth), "damaged": list(tensors.damaged), "data": data, **described}


def _examples(split: Split, tensors: Tensors, truth: NDArray[np.int64], outputs: NDArray[Any], data: str) -> dict[str, bytes]:
    """The file that the report's confusion matrix shows samples from; none where no more classes are recorded."""
    if outputs.shape[1] > RECORDED_CLASSES:
        return {}
    scores = 1 / np.exp(outputs - outputs.max(1, keepdims=True)).sum(1)  # softmax of the answer
    return {EXAMPLES: examples(split, tensors.ids, truth, outputs.argmax(1), scores, data)}


def _outputs(model: Model, tensors: Tensors) -> NDArray[Any]:
    """The model's first output for all samples, by batches where its first axis allows."""
    source, target = model.inputs[0], model.outputs[0].name
    step = 64 if isinstance(source.shape[0], str) else 1
    orders = [np.arange(i, min(i + step, len(tensors.y))) for i in range(0, len(tensors.y), step)]
    parts = track(batches(tensors.x, orders), "evaluating", len(orders))
    found = [run_samples(model.runner, {source.name: x})[target] for x in parts]
    return np.concatenate(found)

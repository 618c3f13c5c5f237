"""What will be trained: the data set, the model that fits it, and how its samples become the model's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgekit.data import Dataset, Tensors, check_damaged, load
from edgekit.data.augment import Augmentation, make_augmentation
from edgekit.errors import DataError, GraphError, MissingExtra, UsageError, first_line
from edgekit.manifest import ImagePreprocessing, ModelConfig, Preprocessing, TextPreprocessing
from edgekit.models import DEFAULTS, Preset, check_model, is_custom, preset_named, sized, trust
from edgekit.models.export import export_onnx
from edgekit.models.module import create
from edgekit.models.widths import scaled
from edgekit.preprocess import make_preprocessor
from edgekit.progress import say

from .tokenizer import fit_tokenizer

try:
    from tokenizers import Tokenizer
except ImportError:
    raise MissingExtra("train", "tokenizers") from None

__all__ = ["Plan", "Splits", "check_custom", "class_weights", "make_plan", "read_splits"]

VOCABULARY = 10_000
#: A class with so many times the samples of another is worth a word.
UNBALANCED = 5


@dataclass(frozen=True)
class Plan:
    """``model`` is what the bundle will say; ``tokenizer`` the bytes of a text model's ``tokenizer.json``; ``weights_from``
    the folder of a checkpoint that the module starts from."""

    dataset: Dataset
    preset: Preset
    model: ModelConfig
    preprocessing: Preprocessing
    augmentation: str
    tokenizer: bytes | None = None
    weights_from: str | None = None

    def module(self, seed: int) -> nn.Module:
        """The module with its starting weights, the same for the same seed."""
        torch.manual_seed(seed)
        module = create(self.model)
        if self.weights_from is not None:
            from edgekit.models.pretrained import load_weights

            load_weights(module, self.weights_from)
        return module


class Splits(NamedTuple):
    """``train`` as the augmentation reads it; ``held_out`` and ``validation`` (None without one) as the module takes them."""

    train: Tensors
    held_out: Tensors
    validation: Tensors | None


def make_plan(
    data: str, model: str | None = None, size: int | None = None, augment: str | None = None, width: float = 1.0
) -> Plan:
    """Load the data set ``data`` and find the model for it; ``size`` is the height and width of pictures, ``width`` scales
    the channels of a preset.

    Raises `UsageError` for an unknown model or data set, or a model for another kind of data, `DataError` for missing data.
    """
    dataset = load(data)
    name = DEFAULTS[dataset.task] if model is None else model
    check_model(name)
    if is_custom(name):
        trust(name)
    preset = preset_named(name)
    if preset.task not in ("any", dataset.task):
        raise UsageError(
            f"the model {name} is for {preset.task}, {data} is for {dataset.task}",
            f"leave --model out, or take {DEFAULTS[dataset.task]}",
        )
    tokenizer, weights_from = None, None
    own: dict[str, Any] = {}
    preprocessing = dataset.preprocessing
    augmentation = augment or dataset.augmentation
    if size is not None:
        if not isinstance(preprocessing, ImagePreprocessing) or dataset.task == "text-recognition":
            raise UsageError(f"--size {size} is for pictures to classify, {data} is for {dataset.task}", "leave --size out")
        if not isinstance(size, int) or not 8 <= size <= 1024:
            raise UsageError(f"pictures of {size!r} pixels", "wanted: --size 8 to 1024")
        preprocessing = msgspec.structs.replace(preprocessing, width=size, height=size)
    if isinstance(preprocessing, ImagePreprocessing):
        name = sized(name, min(preprocessing.height, preprocessing.width))
        preset = preset_named(name)
    channels = scaled(name, width)
    if isinstance(preprocessing, TextPreprocessing):
        if name.startswith("hf:"):
            if augment not in (None, "none"):
                raise UsageError(f"--augment {augment} does not know this encoder's tokens", "leave --augment out")
            weights_from = name.removeprefix("hf:")
            name = "pretrained"
            augmentation = augment or "none"  # its tokens are not ours to drop
            preprocessing, tokenizer, own = _pretrained(preprocessing, weights_from)
        else:
            tokenizer = fit_tokenizer((dataset.train.read(i) for i in range(len(dataset.train))), VOCABULARY)
            entries = Tokenizer.from_buffer(tokenizer).get_vocab_size()
            own = {"vocabulary": -(-entries // 8) * 8}  # few texts fill fewer entries, and the device carries each
    args = {"classes": len(dataset.labels), **_described(preprocessing), **preset.args, **channels, **own}
    make_augmentation(augmentation, preprocessing, tokenizer)  # refuses what does not fit before anything is read
    return Plan(dataset, preset, ModelConfig(name, args), preprocessing, augmentation, tokenizer, weights_from)


def _pretrained(spec: TextPreprocessing, folder: str) -> tuple[TextPreprocessing, bytes, dict[str, Any]]:
    from edgekit.models.pretrained import read_checkpoint

    checkpoint = read_checkpoint(folder)
    spec = TextPreprocessing(min(spec.length, checkpoint.length), checkpoint.pad)
    return spec, checkpoint.tokenizer, {"config": checkpoint.config}


def _described(spec: Preprocessing) -> dict[str, Any]:
    """The input, in the words of a preset's parameters."""
    if isinstance(spec, ImagePreprocessing):
        return {"channels": spec.channels, "height": spec.height, "width": spec.width}
    if isinstance(spec, TextPreprocessing):
        return {"vocabulary": VOCABULARY, "length": spec.length, "pad": spec.pad}
    return {"channels": spec.channels, "length": spec.length}


def read_splits(
    dataset: Dataset,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    tokenizer: bytes | None = None,
    validation: float = 0.0,
    seed: int = 0,
) -> Splits:
    """Decode the splits; ``validation`` is the share of the training split set aside.

    Raises `DataError` for too many damaged samples, or too few to train on.
    """
    preprocess = make_preprocessor(preprocessing, tokenizer)
    kept, aside = dataset.train.part(validation, seed) if validation else (dataset.train, None)
    splits = Splits(
        kept.tensors(augmentation.read),
        dataset.test.tensors(preprocess),
        aside.tensors(preprocess) if aside is not None else None,
    )
    check_damaged(*(part for part in splits if part is not None))
    if len(splits.train.y) < 2:
        raise DataError(f"{dataset.spec} has {len(splits.train.y)} samples to train on", "add samples, several a class")
    if not len(splits.held_out.y):
        raise DataError(
            f"none of the held-out samples of {dataset.spec} can be read", "repair them: accuracy is measured on them"
        )
    if splits.train.y.ndim == 1:
        others = [part.y for part in splits[1:] if part is not None]
        if len(lost := np.setdiff1d(np.concatenate(others), splits.train.y)):
            raise DataError(
                f"no sample of {dataset.labels[lost[0]]!r} is left to train on",
                "add samples of it, or lower --validation" if validation else "add samples of it",
            )
        if len(absent := np.setdiff1d(splits.train.y, splits.held_out.y)):
            names = ", ".join(dataset.labels[i] for i in absent[:5]) + (" ..." if len(absent) > 5 else "")
            say(f"no sample of {len(absent)} of the classes is held out, nothing measures them: {names}")
    if splits.validation is not None and not len(splits.validation.y):
        raise DataError(f"a validation split of {validation:g} of {dataset.spec} holds nothing", "raise --validation")
    return splits


def class_weights(targets: NDArray[np.int64], classes: int, balance: bool) -> NDArray[np.float32] | None:
    """Weights that make every class count alike, mean 1 over the samples; None where ``balance`` is off.

    Raises `UsageError` for ``balance`` of lines of text (N, L), which have no classes.
    """
    if targets.ndim != 1:
        if balance:
            raise UsageError("only classes are weighed, a reader's lines have none", "leave --balance out")
        return None
    counts = np.bincount(targets, minlength=classes).astype(np.float64)
    present = counts[counts > 0]
    if not balance:
        if len(present) and present.max() >= UNBALANCED * present.min():
            times = present.max() / present.min()
            say(f"the largest class has {times:.0f} times the samples of the smallest: --balance weighs them alike")
        return None
    weights = np.where(counts > 0, len(targets) / (len(present) * np.maximum(counts, 1)), 0.0)
    return weights.astype(np.float32)


def check_custom(module: nn.Module, plan: Plan, samples: Tensors) -> None:
    """Raise `UsageError` where a user's own model cannot do what comes after hours of training.

    It must answer two samples as the task asks, export, and hold no weights twice. Presets are tested to.
    """
    if not is_custom(plan.model.name):
        return
    if not any(p.requires_grad for p in module.parameters()):
        raise UsageError(f"{plan.model.name} has no parameters to train", "set requires_grad of those to train")
    x = torch.from_numpy(np.repeat(samples.x[:1], 2, 0))
    try:
        with torch.no_grad():
            found = tuple(module.eval()(x).shape)
    except Exception as error:  # noqa: BLE001  it is the user's code
        reason = first_line(error)
        raise UsageError(f"{plan.model.name} cannot be run: {reason}", f"it is given {tuple(x.shape)}") from None
    classes = len(plan.dataset.labels)
    if len(found) != (3 if plan.dataset.task == "text-recognition" else 2) or found[-1] != classes:
        raise UsageError(f"{plan.model.name} answers {found} to two samples", f"its last axis must be the {classes} classes")
    held = [tensor.data_ptr() for tensor in module.state_dict().values() if tensor.numel()]
    if len(set(held)) < len(held):
        raise UsageError(f"{plan.model.name} has tied weights, which a bundle cannot hold", "give each layer its own")
    try:
        export_onnx(module, x)
    except GraphError as error:
        raise UsageError(f"{plan.model.name}: {error.message}", error.hint) from None

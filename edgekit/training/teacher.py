"""A trained bundle that teaches: its module, for `Distillation`."""

from __future__ import annotations

import os

import msgspec
import torch.nn.functional as F
from torch import Tensor, nn

from edgekit.bundle import Bundle
from edgekit.errors import UsageError
from edgekit.manifest import ImagePreprocessing, Preprocessing
from edgekit.models.module import load as load_module

__all__ = ["load_teacher"]


class _Resized(nn.Module):
    """A teacher that is given its own size, whatever the student's pictures have: crops are smaller than the input says."""

    def __init__(self, module: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.module, self.size = module, (height, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        logits: Tensor = self.module(x)
        return logits


def load_teacher(
    path: str | os.PathLike[str] | Bundle, labels: tuple[str, ...], preprocessing: Preprocessing, tokenizer: bytes | None
) -> tuple[nn.Module, str]:
    """(module, digest) of the bundle at ``path``. Raises `UsageError` where it knows other classes or other inputs."""
    bundle = path if isinstance(path, Bundle) else Bundle.open(path)
    manifest = bundle.manifest
    if manifest.task == "text-recognition" or manifest.labels != labels:
        raise UsageError(
            f"the teacher {bundle.path} knows other classes ({', '.join(manifest.labels[:6])} ...) than the data "
            f"({', '.join(labels[:6])} ...)",
            "take a teacher that was trained on this data",
        )
    module, own = load_module(bundle), manifest.preprocessing
    if isinstance(own, ImagePreprocessing) and isinstance(preprocessing, ImagePreprocessing):
        if msgspec.structs.replace(own, height=preprocessing.height, width=preprocessing.width) != preprocessing:
            raise UsageError(f"the teacher {bundle.path} sees pictures otherwise prepared", "train it with the same data")
        return _Resized(module, own.height, own.width), bundle.digest
    if own != preprocessing or (tokenizer is not None and bundle.read("tokenizer.json") != tokenizer):
        raise UsageError(
            f"the teacher {bundle.path} takes other inputs than the student", "take one with the same tokenizer and length"
        )
    return module, bundle.digest

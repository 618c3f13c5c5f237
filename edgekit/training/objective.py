"""What is learnt and how it is judged: a loss and a score for each task. The task picks the class, by a plain dict."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit.data.augment import Policy
from edgekit.evaluation import character_errors
from edgekit.runtime.ctc import BLANK, read_line

__all__ = ["Classification", "Distillation", "Objective", "Reading", "objective_for"]


class Objective(Protocol):
    """``metric`` is the score's name in the curve; higher is better."""

    metric: str

    def blend(self, on: bool) -> None:
        """Whether pairs are blended from now on: the last epochs see whole pictures."""
        ...

    def loss(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch."""
        ...

    def score(self, outputs: NDArray[np.float32], y: NDArray[np.int64]) -> float:
        """How good ``outputs`` (N, ...) are, 0..1."""
        ...


class Classification:
    """Cross-entropy with label smoothing (arXiv:1512.00567), class weights, and pairs blended by mixup or cutmix."""

    metric = "top1"

    def __init__(self, classes: int, smoothing: float, policy: Policy) -> None:
        self.classes, self.smoothing, self.policy = classes, smoothing, policy
        self.weights: Tensor | None = None
        self._blends = True

    def weigh(self, weights: NDArray[np.float32] | None) -> None:
        """Weights (classes,) of the classes' losses; None: all count as often as they occur."""
        self.weights = None if weights is None else torch.from_numpy(weights)

    def blend(self, on: bool) -> None:
        self._blends = on

    def loss(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x, wanted = self.blended(x, y)
        return self.against(module(x), wanted)

    def blended(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The batch, and its targets as indices (N,) or, where pairs were blended, as shares (N, classes)."""
        p = self.policy
        if not self._blends or not (p.mixup or p.cutmix):
            return x, y
        other = torch.randperm(len(x), device=x.device)
        if float(torch.rand(())) < p.cutmix:
            x, share = _pasted(x, x[other])
        else:
            share = float(torch.distributions.Beta(p.mixup, p.mixup).sample()) if p.mixup else 1.0
            x = torch.lerp(x[other], x, share)
        one = F.one_hot(y, self.classes).to(x.dtype)
        return x, torch.lerp(one[other], one, share)

    def against(self, logits: Tensor, wanted: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(logits.device)
        return F.cross_entropy(logits.float(), wanted, weights, label_smoothing=self.smoothing)

    def score(self, outputs: NDArray[np.float32], y: NDArray[np.int64]) -> float:
        return float((outputs.argmax(1) == y).mean())


def _pasted(x: Tensor, other: Tensor) -> tuple[Tensor, float]:
    """``x`` (N, C, H, W) under a rectangle of ``other``, and the share of ``x`` that is left.

    The area is drawn evenly and cut at the border, as in the paper: two thirds of ``x`` are left on average.
    """
    height, width = x.shape[2:]
    side = float(torch.rand(())) ** 0.5
    top, left = (float(torch.rand(())) * length for length in (height, width))  # the middle: rectangles may leave the picture
    rows = slice(max(0, round(top - side * height / 2)), min(height, round(top + side * height / 2)))
    columns = slice(max(0, round(left - side * width / 2)), min(width, round(left + side * width / 2)))
    x = x.clone()
    x[:, :, rows, columns] = other[:, :, rows, columns]
    return x, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


class Reading:
    """Connectionist temporal classification (Graves et al., ICML 2006); scored by 1 - character error rate."""

    metric = "characters"

    def blend(self, on: bool) -> None:
        """Lines are never blended."""

    def loss(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = module(x)  # (N, steps, alphabet)
        steps = torch.full((len(x),), logits.shape[1], dtype=torch.long)
        lengths = (y >= 0).sum(1)
        scores = logits.float().log_softmax(2).transpose(0, 1)  # (steps, N, alphabet)
        return F.ctc_loss(scores, y.clamp(min=BLANK), steps, lengths.cpu(), blank=BLANK, zero_infinity=True)

    def score(self, outputs: NDArray[np.float32], y: NDArray[np.int64]) -> float:
        read = [read_line(row)[0] for row in outputs]
        wanted = [[int(c) for c in row if c >= 0] for row in y]
        errors, characters = character_errors(read, wanted)
        return max(0.0, 1 - errors / max(characters, 1))


class Distillation:
    """A classifier that also learns a teacher's answers (Hinton et al., arXiv:1503.02531).

    The teacher sees the very pictures that the student sees, blended and cropped (arXiv:2106.05237).
    """

    metric = Classification.metric

    def __init__(
        self, inner: Classification, teacher: nn.Module, digest: str, share: float = 0.7, temperature: float = 2.0
    ) -> None:
        self.teacher_digest = digest
        self.inner, self.teacher = inner, teacher.eval().requires_grad_(False)
        self.share, self.temperature = share, temperature

    def blend(self, on: bool) -> None:
        self.inner.blend(on)

    def loss(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x, wanted = self.inner.blended(x, y)
        logits, warm = module(x), self.temperature
        with torch.no_grad():
            taught = (self.teacher.to(x.device)(x).float() / warm).log_softmax(1)
        soft = F.kl_div((logits.float() / warm).log_softmax(1), taught, reduction="batchmean", log_target=True) * warm**2
        return self.share * soft + (1 - self.share) * self.inner.against(logits, wanted)

    def score(self, outputs: NDArray[np.float32], y: NDArray[np.int64]) -> float:
        return self.inner.score(outputs, y)


def objective_for(task: str, classes: int, smoothing: float, policy: Policy) -> Classification | Reading:
    """The objective of a task."""
    return Reading() if task == "text-recognition" else Classification(classes, smoothing, policy)

"""One image, one class, one model that can be asked again with parts of the image hidden."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.runtime import Model
from edgekit.runtime.golden import run_samples

__all__ = ["Attribution", "Question"]

Float = NDArray[np.float32]
Mask = NDArray[np.bool_]
BATCH = 64
BATCH_VALUES = 1_200_000  # a batch of 5 MB stays in the cache: larger ones took twice as long


class Attribution(NamedTuple):
    """``heat`` float32 (H, W) over the model's input: above 0 speaks for the class, below against it."""

    heat: Float
    figures: dict[str, Any]


@dataclass(frozen=True)
class Question:
    """``x`` float32 (1, C, H, W), as the model sees it; ``target`` the class in question."""

    model: Model
    x: Float
    target: int
    _fill: Float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # The median colour is the paper of a drawing and a dull tone of a photo: hiding with it removes and adds little.
        object.__setattr__(self, "_fill", np.median(self.x, axis=(2, 3), keepdims=True).astype(np.float32))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the model's input."""
        return self.x.shape[2], self.x.shape[3]

    def logits(self, batch: Float) -> Float:
        """(N, C, H, W) -> (N, classes), in as few runs as the model takes."""
        source, output = self.model.inputs[0], self.model.outputs[0].name
        rows = run_samples(self.model.runner, {source.name: batch})[output]
        logits: Float = rows.reshape(len(batch), -1).astype(np.float32)
        return logits

    def hide(self, masks: Iterable[Mask]) -> Iterator[Float]:
        """Logits (n, classes) of the image with each mask (H, W) hidden, a batch of masks a piece, in order."""
        pending: list[Mask] = []
        batch = max(1, min(BATCH, BATCH_VALUES // self.x.size))
        for mask in masks:
            pending.append(mask)
            if len(pending) == batch:
                yield self._ask(pending)
                pending = []
        if pending:
            yield self._ask(pending)

    def _ask(self, masks: list[Mask]) -> Float:
        return self.logits(np.where(np.stack(masks)[:, None], self._fill, self.x))

    def log_odds(self, logits: Float) -> Float:
        """(N, classes) -> (N,): log p / (1 - p) of the class. Unlike p itself it does not flatten near 0 and 1."""
        if logits.shape[1] == 1:
            return logits[:, 0]
        others = np.delete(logits, self.target, axis=1).astype(np.float64)
        top = others.max(1)
        rest = top + np.log(np.exp(others - top[:, None]).sum(1))
        return np.asarray(logits[:, self.target] - rest, np.float32)

    def probability(self, logits: Float) -> Float:
        """(N, classes) -> (N,): softmax of the class."""
        exponent = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(exponent[:, self.target] / exponent.sum(1), np.float32)

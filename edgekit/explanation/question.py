"""One sample, one class, one model that can be asked again with parts of the sample hidden."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.runtime import Model
from edgekit.runtime.golden import run_samples

__all__ = ["Attribution", "Float", "Mask", "Question"]

Float = NDArray[np.float32]
Mask = NDArray[np.bool_]
BATCH = 64
BATCH_VALUES = 1_200_000  # a batch of 5 MB stays in the cache: larger ones took twice as long


class Attribution(NamedTuple):
    """``heat`` float32 of the question's size: above 0 speaks for the class, below against it."""

    heat: Float
    figures: dict[str, Any]


@dataclass(frozen=True)
class Question(ABC):
    """``x`` (1, ...), the sample as the model sees it; ``target`` the class in question.

    A subclass says what can be hidden: a mask has `size`, and True hides.
    """

    model: Model
    x: NDArray[Any]
    target: int

    @property
    @abstractmethod
    def size(self) -> tuple[int, ...]:
        """The shape of masks and heat."""

    @abstractmethod
    def covered(self, masks: Mask) -> NDArray[Any]:
        """(N, *size) -> the model's input (N, ...) with each mask hidden."""

    @abstractmethod
    def windows(self) -> Iterator[Mask]:
        """What occlusion hides, one after the other; each place is hidden at least once."""

    @abstractmethod
    def parts(self) -> NDArray[np.int64]:
        """What LIME hides as one: numbers from 0 without gaps, of `size`."""

    def logits(self, batch: NDArray[Any]) -> Float:
        """(N, ...) -> (N, classes), in as few runs as the model takes. Raises `DataError` for an answer that is not finite."""
        source, output = self.model.inputs[0], self.model.outputs[0].name
        rows = run_samples(self.model.runner, {source.name: batch})[output]
        logits: Float = rows.reshape(len(batch), -1).astype(np.float32)
        if not np.isfinite(logits).all():
            where = "for this sample" if batch is self.x else "for this sample with a part of it hidden"
            raise DataError(
                f"the model answers NaN or Inf {where}", f"see whether it answers any: edgekit eval {self.model.bundle.path}"
            )
        return logits

    def hide(self, masks: Iterable[Mask]) -> Iterator[Float]:
        """Logits (n, classes) of the sample with each mask hidden, a batch of masks a piece, in order."""
        pending: list[Mask] = []
        batch = max(1, min(BATCH, BATCH_VALUES // self.x.size))
        for mask in masks:
            pending.append(mask)
            if len(pending) == batch:
                yield self.logits(self.covered(np.stack(pending)))
                pending = []
        if pending:
            yield self.logits(self.covered(np.stack(pending)))

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

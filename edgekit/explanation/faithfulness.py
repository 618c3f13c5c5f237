"""Does the model rely on what the map shows? Deletion and insertion curves (Petsiuk, Das and Saenko 2018, arXiv:1806.07421).

What is not shown has the question's fill in both curves; the authors blur it for insertion, which text has no equal of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .question import Float, Mask, Question

__all__ = ["Curve", "Faithfulness", "faithfulness"]

STEPS = 20
CONTROLS = 4


class Curve(NamedTuple):
    """The area under the class's probability over the share hidden (or shown), in 0..1, and the same map's when misplaced.

    ``misplaced`` is the control: the mean over `CONTROLS` random shifts of the map. ``values``: `STEPS` + 1 probabilities.
    """

    auc: float
    misplaced: float
    values: list[float]


class Faithfulness(NamedTuple):
    """A map is faithful where ``deletion.auc`` lies below its control and ``insertion.auc`` above it."""

    deletion: Curve
    insertion: Curve

    def figures(self) -> dict[str, Any]:
        return {
            "deletion_auc": self.deletion.auc,
            "misplaced_auc": self.deletion.misplaced,
            "insertion_auc": self.insertion.auc,
            "misplaced_insertion_auc": self.insertion.misplaced,
            "deletion_curve": self.deletion.values,
            "insertion_curve": self.insertion.values,
        }


def faithfulness(question: Question, heat: Float) -> Faithfulness:
    """Hide, and from nothing show, what ``heat`` (of the question's size) ranks highest, a twentieth at a time."""
    rng = np.random.default_rng(0)
    axes = tuple(range(heat.ndim))
    shifts = [tuple(int(rng.integers(1, max(2, side))) for side in heat.shape) for _ in range(CONTROLS)]
    maps = [heat, *(np.roll(heat, shift, axes) for shift in shifts)]
    masks = (mask for inserting in (False, True) for one in maps for mask in _steps(one, inserting))
    p = np.concatenate([question.probability(logits) for logits in question.hide(masks)])
    curves = p.reshape(2, len(maps), STEPS + 1)
    areas = ((curves[:, :, 1:] + curves[:, :, :-1]) / 2).mean(2)  # (2, maps)
    deletion, insertion = (
        Curve(float(area[0]), float(area[1:].mean()), curve[0].tolist()) for area, curve in zip(areas, curves, strict=True)
    )
    return Faithfulness(deletion, insertion)


def _steps(heat: Float, inserting: bool) -> Iterator[Mask]:
    rank = np.empty(heat.size, np.int64)
    rank[np.argsort(-heat, axis=None, kind="stable")] = np.arange(heat.size)
    for step in range(STEPS + 1):
        first = (rank < round(step * heat.size / STEPS)).reshape(heat.shape)
        yield ~first if inserting else first

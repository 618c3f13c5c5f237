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
FEWEST = 3  # of two parts the other is all that a shift can choose, of one itself


class Curve(NamedTuple):
    """The area under the class's probability over the share hidden (or shown), in 0..1, and the same map's when misplaced.

    ``misplaced`` is the control: the mean over `CONTROLS` random shifts of the map; None where it has too few parts for one.
    ``values``: `STEPS` + 1 probabilities.
    """

    auc: float
    misplaced: float | None
    values: list[float]


class Faithfulness(NamedTuple):
    """A map is faithful where ``deletion.auc`` lies below its control and ``insertion.auc`` above it."""

    deletion: Curve
    insertion: Curve

    def words(self) -> str:
        """For a caption."""
        if self.deletion.misplaced is None or self.insertion.misplaced is None:
            return "too few parts to check"
        lost = [
            name
            for name, better in (
                ("deletion", self.deletion.auc < self.deletion.misplaced),
                ("insertion", self.insertion.auc > self.insertion.misplaced),
            )
            if not better
        ]
        return f"no better than misplaced by {' and '.join(lost)}" if lost else "better than misplaced"

    def figures(self) -> dict[str, Any]:
        """For explanation.json; ``unchecked`` says why there are no controls."""
        unchecked = {"unchecked": f"a map of fewer than {FEWEST} parts cannot be misplaced"}
        return {
            "deletion_auc": self.deletion.auc,
            "misplaced_auc": self.deletion.misplaced,
            "insertion_auc": self.insertion.auc,
            "misplaced_insertion_auc": self.insertion.misplaced,
            "deletion_curve": self.deletion.values,
            "insertion_curve": self.insertion.values,
            **(unchecked if self.deletion.misplaced is None else {}),
        }


def faithfulness(question: Question, heat: Float) -> Faithfulness:
    """Hide, and from nothing show, what ``heat`` (of the question's size) ranks highest, a twentieth at a time."""
    rng = np.random.default_rng(0)
    axes = tuple(range(heat.ndim))
    controls = CONTROLS if heat.size >= FEWEST else 0
    shifts = [tuple(int(rng.integers(1, max(2, side))) for side in heat.shape) for _ in range(controls)]
    maps = [heat, *(np.roll(heat, shift, axes) for shift in shifts)]
    masks = (mask for inserting in (False, True) for one in maps for mask in _steps(one, inserting))
    p = np.concatenate([question.probability(logits) for logits in question.hide(masks)])
    curves = p.reshape(2, len(maps), STEPS + 1)
    areas = ((curves[:, :, 1:] + curves[:, :, :-1]) / 2).mean(2)  # (2, maps)
    deletion, insertion = (
        Curve(float(area[0]), float(area[1:].mean()) if controls else None, curve[0].tolist())
        for area, curve in zip(areas, curves, strict=True)
    )
    return Faithfulness(deletion, insertion)


def _steps(heat: Float, inserting: bool) -> Iterator[Mask]:
    rank = np.empty(heat.size, np.int64)
    rank[np.argsort(-heat, axis=None, kind="stable")] = np.arange(heat.size)
    for step in range(STEPS + 1):
        first = (rank < round(step * heat.size / STEPS)).reshape(heat.shape)
        yield ~first if inserting else first

"""Does the model rely on what the map shows? The deletion curve (Petsiuk, Das and Saenko 2018, arXiv:1806.07421)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .question import Float, Mask, Question

__all__ = ["Deletion", "deletion"]

STEPS = 20
CONTROLS = 4


class Deletion(NamedTuple):
    """Areas under probability over hidden share, in 0..1. ``misplaced``: the same map shifted at random, the control.

    A map is faithful where ``auc`` lies below ``misplaced``. ``curve``: `STEPS` + 1 probabilities.
    """

    auc: float
    misplaced: float
    curve: list[float]


def deletion(question: Question, heat: Float) -> Deletion:
    """Hide the pixels in falling order of ``heat`` (H, W), a twentieth at a time."""
    rng = np.random.default_rng(0)
    shifts = [(int(rng.integers(1, max(2, s))), int(rng.integers(1, max(2, t)))) for s, t in [heat.shape] * CONTROLS]
    maps = [heat, *(np.roll(heat, shift, (0, 1)) for shift in shifts)]
    masks = (mask for one in maps for mask in _steps(one))
    p = np.concatenate([question.probability(logits) for logits in question.hide(masks)])
    curves = p.reshape(len(maps), STEPS + 1)
    areas = ((curves[:, 1:] + curves[:, :-1]) / 2).mean(1)
    return Deletion(float(areas[0]), float(areas[1:].mean()), curves[0].tolist())


def _steps(heat: Float) -> Iterator[Mask]:
    rank = np.empty(heat.size, np.int64)
    rank[np.argsort(-heat, axis=None, kind="stable")] = np.arange(heat.size)
    for step in range(STEPS + 1):
        yield (rank < round(step * heat.size / STEPS)).reshape(heat.shape)

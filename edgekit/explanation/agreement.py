"""How far two maps of one sample agree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .question import Float

__all__ = ["spearman"]


def spearman(first: Float, second: Float) -> float | None:
    """Rank correlation of two maps of one shape, -1..1, ties with their mean rank; None where a map is flat."""
    ranks = np.stack([_ranks(first), _ranks(second)])
    ranks -= ranks.mean(1, keepdims=True)
    spread = np.sqrt((ranks**2).sum(1)).prod()
    return float((ranks[0] * ranks[1]).sum() / spread) if spread > 0 else None


def _ranks(values: Float) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[place.ravel()], np.float64)

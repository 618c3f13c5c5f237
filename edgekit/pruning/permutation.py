"""Which order of a layer's input channels loses least under 2:4: J. Pool, C. Yu, "Channel Permutations for N:M Sparsity",
NeurIPS 2021.

Only which channels share a stripe of four counts. As there, two stripes at a time are parted anew in the best of the 35 ways,
until no two gain anything; then a few stripes are shuffled, and kept where what follows ends higher. Many disjoint pairs of
stripes are parted at once, and the work is counted, not timed: the same weights and seed give the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra, UsageError

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise MissingExtra("train", error.name or "torch") from None

__all__ = ["permutation", "retained"]

Array = NDArray[Any]
ROWS = 2048  # rows that judge an order, drawn where there are more
WORK = 4 << 20  # pairs of stripes times rows that one search looks at: about a second
SWEEPS = 2  # over all pairs that it may look at in any case
ESCAPES = 60
SHUFFLED = 3  # stripes that one escape shuffles
_CHUNK = 1 << 14  # rows of pairs at a time: fits into the cache
_CALL = 2000  # rows of pairs that the calls themselves cost as much as
_TWO = list(combinations(range(8), 2))
#: The ways to part eight columns into two stripes: column 0 is in the first.
_WAYS = [((0, *three), tuple(sorted(set(range(1, 8)) - set(three)))) for three in combinations(range(1, 8), 3)]


def retained(weights: Sequence[Tensor]) -> float:
    """Share of the magnitude, sum |w|, that the two largest of every four columns hold; 1 for zeros.

    ``weights``: (rows, C) each, of any float type. Raises `UsageError` where C does not divide by four.
    """
    total = kept = 0.0
    for matrix in map(_magnitudes, weights):
        total += float(matrix.sum(dtype=np.float64))
        kept += _kept(matrix)
    return kept / total if total else 1.0


def permutation(weights: Sequence[Tensor], *, seed: int = 0) -> Tensor:
    """The order of C channels in which most magnitude stays under 2:4: int64 (C,), where column i takes channel order[i].

    ``weights``: (rows, C) each, of any float type: all that reads the same channels, a row for each output and kernel
    position. Never worse than the order they are in, which is returned where none better is found. A second for C = 256.
    Raises `UsageError` where there are no weights, or C does not divide by four or is not the same in all.
    """
    matrices = [_magnitudes(weight) for weight in weights]
    if len({matrix.shape[1] for matrix in matrices}) != 1:
        widths = ", ".join(str(matrix.shape[1]) for matrix in matrices) or "no weights"
        raise UsageError(f"{widths}: one number of channels was expected", "give the matrices that read the same channels")
    every = np.concatenate(matrices)
    order = _Search(every, seed).run()
    better = _kept(every[:, order]) > _kept(every)
    return torch.from_numpy(order if better else np.arange(every.shape[1]))


def _magnitudes(weight: Tensor) -> NDArray[np.float32]:
    if weight.ndim != 2 or weight.shape[1] % 4 or not weight.shape[1]:
        raise UsageError(
            f"weights of shape {tuple(weight.shape)}: (rows, C) was expected, C a multiple of four", "leave this layer dense"
        )
    found: NDArray[np.float32] = weight.detach().abs().float().cpu().numpy()
    return found


def _kept(matrix: Array) -> float:
    fours = np.sort(matrix.reshape(len(matrix), -1, 4), axis=2)
    return float(fours[:, :, 2:].sum(dtype=np.float64))


class _Search:
    """``columns`` (C, rows) as they were, ``order`` of the best so far."""

    def __init__(self, matrix: Array, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        rows = np.flatnonzero(matrix.any(axis=1))
        if len(rows) > ROWS:
            rows = np.sort(self.random.choice(rows, ROWS, replace=False))
        self.columns = np.ascontiguousarray(matrix[rows].T)
        self.order = np.arange(matrix.shape[1])
        stripes = len(self.order) // 4
        self.left = max(WORK, SWEEPS * (stripes * (stripes - 1) // 2) * len(rows))
        self.untried = ~np.eye(stripes, dtype=bool)  # pairs of stripes, one of which changed since they were looked at
        self.rounds = list(_rounds(stripes))

    def run(self) -> NDArray[np.int64]:
        if len(self.order) < 8 or not self.columns.size:
            return self.order
        self._descend()
        best, found = self.order.copy(), self._score(self.order)
        for _ in range(ESCAPES):
            if self.left <= 0:
                break
            self._shuffle()
            self._descend()
            if (score := self._score(self.order)) > found:
                best, found = self.order.copy(), score
            else:
                self.order = best.copy()
                self.untried[:] = False
        return best

    def _score(self, order: Array) -> float:
        return _kept(self.columns[order].T)

    def _shuffle(self) -> None:
        chosen = self.random.choice(len(self.untried), min(SHUFFLED, len(self.untried)), replace=False)
        slots = (4 * chosen[:, None] + np.arange(4)).ravel()
        self.order[slots] = self.order[self.random.permutation(slots)]
        self._touch(chosen)

    def _touch(self, stripes: Array) -> None:
        self.untried[stripes] = self.untried[:, stripes] = True
        self.untried[stripes, stripes] = False

    def _descend(self) -> None:
        """Until no two stripes gain anything by being parted anew, or the work is done."""
        while self.untried.any() and self.left > 0:
            for pairs in self.rounds:
                pairs = pairs[self.untried[pairs[:, 0], pairs[:, 1]]]
                if len(pairs) and self.left > 0:
                    self._part(pairs)

    def _part(self, pairs: Array) -> None:
        """Each of these disjoint pairs (P, 2) of stripes in the best of its ways."""
        self.untried[pairs[:, 0], pairs[:, 1]] = self.untried[pairs[:, 1], pairs[:, 0]] = False
        self.left -= len(pairs) * self.columns.shape[1] + _CALL
        slots = (4 * pairs[:, :, None] + np.arange(4)).reshape(-1, 8)
        scores = np.zeros((len(_WAYS), len(pairs)))
        width = max(1, _CHUNK // len(pairs))
        for start in range(0, self.columns.shape[1], width):
            scores += _of_ways(self.columns[self.order[slots], start : start + width])
        way = scores.argmax(0)
        gains = scores[way, np.arange(len(pairs))] > scores[0] * (1 + 1e-6)
        if not gains.any():
            return
        chosen = np.array([[*first, *second] for first, second in _WAYS])[way[gains]]
        self.order[slots[gains]] = np.take_along_axis(self.order[slots[gains]], chosen, axis=1)
        self._touch(pairs[gains].ravel())


def _of_ways(columns: Array) -> Array:
    """What each of the 35 ways retains of each pair: (P, 8, rows) -> float64 (35, P)."""
    eight = [np.ascontiguousarray(columns[:, i]) for i in range(8)]
    larger = {(i, j): np.maximum(eight[i], eight[j]) for i, j in _TWO}
    both = {(i, j): eight[i] + eight[j] for i, j in _TWO}
    result = np.empty((len(_WAYS), len(columns)))
    for i, way in enumerate(_WAYS):
        total = np.zeros(len(columns))
        for a, b, c, d in way:
            two = larger[a, b] + larger[c, d]  # the two largest of four: one of each half, or both of one
            np.maximum(two, both[a, b], out=two)
            np.maximum(two, both[c, d], out=two)
            total += two.sum(axis=1)
        result[i] = total
    return result


def _rounds(stripes: int) -> Iterator[Array]:
    """All pairs of stripes in rounds of disjoint ones, as a tournament of all against all."""
    places = [*range(stripes)] + ([-1] if stripes % 2 else [])
    half = len(places) // 2
    for _ in range(len(places) - 1):
        pairs = [(a, b) for a, b in zip(places[:half], reversed(places[half:]), strict=True) if min(a, b) >= 0]
        yield np.array(pairs)
        places = [places[0], places[-1], *places[1:-1]]

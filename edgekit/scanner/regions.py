"""Where on a frame a code may be: a place of dense strong edges. Treating only that costs a tenth of the frame."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .restore import Grey, image

__all__ = ["Box", "regions"]

_SEARCHED = 120_000  # pixels; larger frames are searched on a smaller copy
_CELL = 8  # pixels of that copy


class Box(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int

    def of(self, grey: Grey) -> Grey:
        return grey[self.top : self.bottom, self.left : self.right]


def regions(grey: Grey, most: int = 3) -> list[Box]:
    """uint8 (H, W) -> at most ``most`` boxes of connected edges, the one with the most edges first, with a margin."""
    factor = max(1, math.ceil(math.sqrt(grey.size / _SEARCHED)))
    small = np.asarray(image(grey).reduce(factor)) if factor > 1 else grey
    if min(small.shape) < 3 * _CELL:
        return []
    energy = _energy(small)
    # A code's cells are full of edges; noise fills all cells evenly and little.
    level = max(float(np.median(energy)) * 2.0, 0.3 * float(np.percentile(energy, 99)), 1.0)
    found = []
    for cells in _connected(energy > level):
        j, i = cells
        if len(j) < 4 or np.ptp(j) < 1 or np.ptp(i) < 1:
            continue
        found.append((float(energy[j, i].sum()), _box(grey, j, i, factor * _CELL)))
    found.sort(key=lambda each: -each[0])
    return [box for score, box in found[:most] if score > 0.15 * found[0][0]]


def _energy(small: Grey) -> NDArray[np.float32]:
    """Edges a cell: slopes, capped, so that one strong line does not look like a code."""
    a = small.astype(np.float32)
    slope = np.abs(a[2:, 1:-1] - a[:-2, 1:-1]) + np.abs(a[1:-1, 2:] - a[1:-1, :-2])
    cap = float(np.percentile(slope[::2, ::2], 99))
    np.minimum(slope, cap, out=slope)
    height, width = (side // _CELL for side in slope.shape)
    cells = slope[: height * _CELL, : width * _CELL].reshape(height, _CELL, width, _CELL)
    padded = np.pad(cells.mean(axis=(1, 3)), 1, mode="edge")  # 3 x 3 mean: gaps between bars and cells close
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    mean: NDArray[np.float32] = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
    return mean


def _connected(mask: NDArray[np.bool_]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Groups of set cells that touch, as rows and columns."""
    left = {(int(j), int(i)) for j, i in zip(*np.nonzero(mask), strict=True)}
    groups = []
    while left:
        stack, group = [left.pop()], []
        while stack:
            j, i = stack.pop()
            group.append((j, i))
            for near in ((j - 1, i), (j + 1, i), (j, i - 1), (j, i + 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        rows, columns = np.array(group, np.int64).T
        groups.append((rows, columns))
    return groups


def _box(grey: Grey, j: NDArray[np.int64], i: NDArray[np.int64], cell: int) -> Box:
    margin = round(1.5 * cell)
    return Box(
        max(0, int(i.min()) * cell - margin),
        max(0, int(j.min()) * cell - margin),
        min(grey.shape[1], (int(i.max()) + 1) * cell + margin),
        min(grey.shape[0], (int(j.max()) + 1) * cell + margin),
    )

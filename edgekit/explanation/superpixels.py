"""Superpixels: SLIC (Achanta et al. 2012, IEEE TPAMI 34(11)), each pixel choosing among its 3 x 3 nearest centres."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .question import Float

__all__ = ["superpixels"]

SEGMENTS = 49
COLOUR = 3.0  # weight of colour against place
ROUNDS = 5


def superpixels(image: Float) -> NDArray[np.int64]:
    """float32 (C, H, W) -> int64 (H, W): about `SEGMENTS`, numbered from 0 without gaps."""
    _, height, width = image.shape
    rows = max(1, min(height, round(np.sqrt(SEGMENTS * height / width))))
    columns = max(1, min(width, round(SEGMENTS / rows)))
    y, x = np.mgrid[:height, :width]
    row, column = y * rows // height, x * columns // width
    scale = float(image.std()) or 1.0
    place = np.stack([y * rows / height, x * columns / width]).astype(np.float32)
    features = np.concatenate([COLOUR * image / scale / len(image) ** 0.5, place])  # (C + 2, H, W)
    segments = row * columns + column
    near = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    for _ in range(ROUNDS):
        total = np.maximum(np.bincount(segments.ravel(), minlength=rows * columns), 1)
        centres = np.stack(
            [np.bincount(segments.ravel(), f.ravel(), rows * columns) / total for f in features], dtype=np.float32
        )  # (C + 2, S)
        candidates = [np.clip(row + dy, 0, rows - 1) * columns + np.clip(column + dx, 0, columns - 1) for dy, dx in near]
        distances = np.stack([((features - centres[:, candidate]) ** 2).sum(0) for candidate in candidates])
        segments = np.take_along_axis(np.stack(candidates), distances.argmin(0)[None], 0)[0]
    return np.unique(segments, return_inverse=True)[1].reshape(height, width)

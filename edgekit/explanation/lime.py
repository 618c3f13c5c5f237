"""LIME: a weighted linear model around one image (Ribeiro, Singh and Guestrin 2016, arXiv:1602.04938).

Superpixels are SLIC's (Achanta et al. 2012, IEEE TPAMI 34(11)), each pixel choosing among its 3 x 3 nearest centres.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .question import Attribution, Float, Question

__all__ = ["attribute", "superpixels"]

SEGMENTS = 49
KERNEL_WIDTH = 0.25  # of the cosine distance to the whole image, as in the authors' code for images
RIDGE = 1.0
COLOUR = 3.0  # weight of colour against place in SLIC
ROUNDS = 5


def attribute(question: Question, samples: int = 1000, seed: int = 0) -> Attribution:
    """Heat: each superpixel's weight in the local linear model of the log-odds.

    ``r2`` is how much of the variance around the image the linear model explains; near 0 the picture means nothing.
    """
    segments = superpixels(question.x[0])
    count = int(segments.max()) + 1
    shown = np.random.default_rng(seed).random((samples, count)) < 0.5  # (N, S)
    shown[0] = True
    masks = (~row[segments] for row in shown)
    y = np.concatenate([question.log_odds(logits) for logits in question.hide(masks)]).astype(np.float64)
    z = shown.astype(np.float64)
    distance = 1 - np.sqrt(z.mean(1))  # cosine distance of a binary vector to all ones
    weight = np.exp(-(distance**2) / KERNEL_WIDTH**2)
    centred, target = z - np.average(z, 0, weight), y - np.average(y, 0, weight)
    weighted = centred * weight[:, None]
    coefficients = np.linalg.solve(weighted.T @ centred + RIDGE * np.eye(count), weighted.T @ target)
    spread = float((weight * target**2).sum())
    left = float((weight * (target - centred @ coefficients) ** 2).sum())
    r2 = 1 - left / spread if spread > 0 else 0.0
    figures = {"segments": count, "runs": samples, "r2": r2}
    return Attribution(coefficients.astype(np.float32)[segments], figures)


def superpixels(image: Float, wanted: int = SEGMENTS) -> NDArray[np.int64]:
    """float32 (C, H, W) -> int64 (H, W): about ``wanted`` segments, numbered from 0 without gaps."""
    _, height, width = image.shape
    rows = max(1, min(height, round(np.sqrt(wanted * height / width))))
    columns = max(1, min(width, round(wanted / rows)))
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

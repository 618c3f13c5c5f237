"""LIME: a weighted linear model around one sample (Ribeiro, Singh and Guestrin 2016, arXiv:1602.04938).

Its variables are superpixels of an image, words of a text, stretches of a series' time.
"""

from __future__ import annotations

import numpy as np

from .question import Attribution, Question

__all__ = ["attribute"]

KERNEL_WIDTH = 0.25  # of the cosine distance to the whole sample, as in the authors' code for images and texts
RIDGE = 1.0


def attribute(question: Question, samples: int = 1000, seed: int = 0) -> Attribution:
    """Heat: each part's weight in the local linear model of the log-odds.

    ``r2``: how much of the variance around the sample the linear model would explain of runs that it was not fitted to
    (predicted R2, by Allen's PRESS, doi:10.1080/00401706.1974.10489157), for with many parts it fits noise; near 0 the map
    means nothing.
    """
    segments = question.parts()
    count = int(segments.max()) + 1
    shown = np.random.default_rng(seed).random((samples, count)) < 0.5  # (N, S)
    shown[0] = True
    masks = (~row[segments] for row in shown)
    y = np.concatenate([question.log_odds(logits) for logits in question.hide(masks)]).astype(np.float64)
    z = shown.astype(np.float64)
    distance = 1 - np.sqrt(z.mean(1))  # cosine distance of a binary vector to all ones
    weight = np.exp(-(distance**2) / (2 * KERNEL_WIDTH**2))  # the authors' code takes the root of the paper's kernel
    centred, target = z - np.average(z, 0, weight), y - np.average(y, 0, weight)
    weighted = centred * weight[:, None]
    inverse = np.linalg.inv(weighted.T @ centred + RIDGE * np.eye(count))
    coefficients = inverse @ (weighted.T @ target)
    leverage = (weighted @ inverse * centred).sum(1) + weight / weight.sum()
    alone = (target - centred @ coefficients) / np.maximum(1 - leverage, 1e-6)  # of each run by a fit to the others
    spread = float((weight * target**2).sum())
    r2 = max(0.0, 1 - float((weight * alone**2).sum()) / spread) if spread > 0 else 0.0
    figures = {"segments": count, "runs": samples, "r2": r2}
    return Attribution(coefficients.astype(np.float32)[segments], figures)

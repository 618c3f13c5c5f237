"""Occlusion sensitivity: hide a window, see how far the class falls (Zeiler and Fergus 2014, arXiv:1311.2901).

A window is a square of an image, a word of a text, a stretch of a series' time.
"""

from __future__ import annotations

import numpy as np

from .question import Attribution, Question

__all__ = ["attribute"]


def attribute(question: Question) -> Attribution:
    """Heat: mean fall of the log-odds over the windows that cover a place."""
    base = question.log_odds(question.logits(question.x))[0]
    falls = base - np.concatenate([question.log_odds(logits) for logits in question.hide(question.windows())])
    heat, count = np.zeros(question.size, np.float32), np.zeros(question.size, np.float32)
    for mask, fall in zip(question.windows(), falls, strict=True):
        heat[mask] += fall
        count[mask] += 1
    return Attribution(heat / count, {"runs": len(falls)})

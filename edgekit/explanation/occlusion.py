"""Occlusion sensitivity: hide a patch, see how far the class falls (Zeiler and Fergus 2014, arXiv:1311.2901)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .question import Attribution, Mask, Question

__all__ = ["attribute"]

PATCH = 1 / 5  # of the shorter side: a patch that hides a part, not the object
STEPS = 3  # patches overlap so that each pixel is judged by about STEPS squared of them


def attribute(question: Question) -> Attribution:
    """Heat: mean fall of the log-odds over the patches that cover a pixel."""
    height, width = question.size
    patch = max(2, round(min(height, width) * PATCH))
    step = max(1, patch // STEPS)
    boxes = [(top, left) for top in _starts(height, patch, step) for left in _starts(width, patch, step)]

    def masks() -> Iterator[Mask]:
        for top, left in boxes:
            mask = np.zeros((height, width), bool)
            mask[max(0, top) : top + patch, max(0, left) : left + patch] = True
            yield mask

    base = question.log_odds(question.logits(question.x))[0]
    falls = base - np.concatenate([question.log_odds(logits) for logits in question.hide(masks())])
    heat, count = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    for mask, fall in zip(masks(), falls, strict=True):
        heat[mask] += fall
        count[mask] += 1
    return Attribution(heat / count, {"patch": patch, "step": step, "runs": len(boxes)})


def _starts(size: int, patch: int, step: int) -> list[int]:
    """Patches begin before the edge and end behind it: border pixels are judged by as many as inner ones."""
    return list(range(step - patch, size, step))

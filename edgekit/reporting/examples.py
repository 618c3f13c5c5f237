"""The samples that an evaluation left in the bundle, by truth and answer; whatever is odd among them is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .figures import mapping, number, numbers, words

__all__ = ["Examples", "read_examples"]

#: "TRUTH/ANSWER" (class indices) -> samples with ``id``, ``score`` and a ``png`` (base64), ``text`` or ``series``.
Examples = dict[str, list[dict[str, Any]]]

MAX_EACH, MAX_PNG_TEXT, MAX_POINTS = 6, 20_000, 200
PNG = re.compile(r"iVBORw0KGgo[A-Za-z0-9+/]+={0,2}")


def read_examples(data: Mapping[str, Any], spec: object, classes: int) -> Examples:
    """Those of an evaluation on ``spec``, the data that the matrix is of; none of any other."""
    found: Examples = {}
    cells = data.get("cells")
    if data.get("data") != spec or not isinstance(cells, list):
        return {}
    for cell in cells:
        truth, answer, samples = number(cell, "truth"), number(cell, "answer"), mapping(cell).get("samples")
        if truth in range(classes) and answer in range(classes) and isinstance(samples, list):
            shown = [sample for raw in samples[:MAX_EACH] if (sample := _sample(raw))]
            if shown:
                found[f"{truth:.0f}/{answer:.0f}"] = shown
    return found


def _sample(raw: object) -> dict[str, Any] | None:
    about = {"id": words(raw, "id") or "", "score": number(raw, "score")}
    png, text, series = (mapping(raw).get(kind) for kind in ("png", "text", "series"))
    if isinstance(png, str) and len(png) <= MAX_PNG_TEXT and PNG.fullmatch(png):
        return {**about, "png": png}
    if isinstance(text, str):
        return {**about, "text": text[:MAX_POINTS]}
    if isinstance(series, Sequence) and not isinstance(series, str):
        lines = [line for raw in series[:3] if (line := numbers(raw)) and len(line) <= MAX_POINTS]
        return {**about, "series": lines} if lines else None
    return None

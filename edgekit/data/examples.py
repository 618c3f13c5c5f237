"""A few samples of each kind of answer, small enough to lie in a bundle: what a reader of a confusion matrix asks for."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dataset import Split

__all__ = ["examples"]

EACH = 3  # of one truth and answer
MAX_CELLS = 150
MAX_TEXT = 100_000  # characters of all pictures, texts and lines together
SIDE = 48  # pixels of a thumbnail's longer side
LETTERS, POINTS, LINES = 160, 40, 3


def examples(
    split: Split, ids: Sequence[str], truth: NDArray[np.int64], answers: NDArray[np.int64], scores: NDArray[Any], data: str
) -> bytes:
    """JSON: ``data``, and ``cells`` with ``truth``, ``answer`` (class indices) and their ``samples`` (``id``, ``score`` and a
    ``png``, ``text`` or ``series``).

    ``ids`` (N,) are the samples that were answered; ``scores`` (N,) of the answers. Mistakes come first, the most frequent
    before others and of each the surest; of right answers the least sure are shown.
    """
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, cell in enumerate(zip(truth.tolist(), answers.tolist(), strict=True)):
        members[cell].append(i)
    place = {name: i for i, name in enumerate(split.ids)}
    order = sorted(members, key=lambda cell: (cell[0] == cell[1], -len(members[cell]), cell))
    cells, left = [], MAX_TEXT
    for cell in order[:MAX_CELLS]:
        sign = 1 if cell[0] == cell[1] else -1
        samples = []
        for i in sorted(members[cell], key=lambda i: sign * float(scores[i]))[:EACH]:
            shown = _shown(split.read(place[ids[i]]))
            left -= len(str(shown))
            if left < 0:
                break
            samples.append({"id": ids[i][-80:], "score": round(float(scores[i]), 4), **shown})
        if samples:
            cells.append({"truth": cell[0], "answer": cell[1], "samples": samples})
    return json.dumps({"data": data, "cells": cells}, allow_nan=False).encode()


def _shown(sample: Any) -> dict[str, Any]:
    if isinstance(sample, str):
        return {"text": sample[:LETTERS]}
    array = np.asarray(sample)
    if array.dtype == np.uint8:
        return {"png": base64.b64encode(_png(_thumbnail(array))).decode()}
    chosen = array[np.linspace(0, len(array) - 1, min(POINTS, len(array))).astype(int), :LINES]  # (points, channels)
    return {"series": [[float(f"{v:.3g}") for v in line] for line in np.nan_to_num(chosen.astype(float)).T]}


def _thumbnail(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3) by the mean of whole blocks, so that the longer side is at most `SIDE`."""
    step = -(-max(frame.shape[:2]) // SIDE)
    height, width = (max(side // step, 1) * min(step, side) for side in frame.shape[:2])
    down, across = min(step, frame.shape[0]), min(step, frame.shape[1])
    blocks = frame[:height, :width].reshape(height // down, down, width // across, across, -1)
    small: NDArray[np.uint8] = blocks.mean((1, 3)).round().astype(np.uint8)
    if small.shape[2] == 1:
        small = small[..., 0]
    return small


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """Grey or RGB; written here so that an evaluation needs no imaging library."""
    height, width = pixels.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)  # each row's filter: none
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

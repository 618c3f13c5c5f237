"""``frames_of``: frames that the program makes itself."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from . import Captured

__all__ = ["frames_of"]


def frames_of(frames: Iterable[Any], name: str = "frames") -> Iterator[Captured | None]:
    """Arrays uint8, (H, W) or (H, W, 3) RGB, of any iterable as a source; None in it says that nothing came for a while.

    Each is copied: it may be filled again once the next one is asked for, while a trigger or a ring still holds it. What is no
    such array is a frame that could not be read, with the reason; what the iterable raises goes through.
    """
    seq = 0
    for frame in frames:
        if frame is None:
            yield None
            continue
        wall, monotonic = time.time(), time.monotonic()
        error = _problem(frame)
        yield Captured(None if error else np.array(frame), name, seq, wall, error, monotonic)
        seq += 1


def _problem(frame: Any) -> str:
    if not isinstance(frame, np.ndarray):
        return f"the frame is a {type(frame).__name__}, not an array"
    if frame.dtype != np.uint8:
        return f"the frame is {frame.dtype}, not uint8"
    if not (frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 3)) or not frame.size:
        return f"the frame is {' x '.join(map(str, frame.shape))}, not (H, W) or (H, W, 3)"
    return ""

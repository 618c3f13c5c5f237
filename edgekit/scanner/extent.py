"""How far the bars reach of which a linear code was read: beside it, and above and below the lines that were read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .estimates import Floats, Grey, bars

__all__ = ["goes_on", "whole_height"]

Point = NDArray[np.float64]
_SQUARE = 0.03  # cosine: zxing-cpp's corners are good where its lines were square to the bars
_ALIKE = 0.45  # correlation; bars of two pixels, sampled at whole ones, reach 0.6
_SAMPLES = 160  # across the bars


def whole_height(grey: Grey, corners: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Corners of the bars as high as they are, where lines at an angle read a part of the height.

    From the middle up and down along the bars, as long as a line across them sees what the middle sees. ``corners``: (x, y),
    clockwise from the code's own top left.
    """
    a, b, c, d = np.array(corners, np.float64)
    side, width = (d - a + c - b) / 2, float(np.hypot(*(b - a)))
    height = float(np.hypot(*side))
    if width < 8 or (height > 0.1 * width and abs(float(side @ (b - a))) < _SQUARE * width * height):
        return corners
    across = _across(grey, (a, b, c, d))
    size = float(np.hypot(*across))
    if size < 8:
        return corners
    along = np.array([-across[1], across[0]]) / size  # a pixel down
    centre = (a + b + c + d) / 4
    steps = np.arange(-round(size), round(size) + 1)  # pixels; no linear code is higher than wide, twice
    points = centre + steps[:, None, None] * along + np.linspace(-0.5, 0.5, _SAMPLES)[:, None] * across
    x, y = np.rint(points).astype(int).transpose(2, 0, 1)
    on = (x >= 0) & (y >= 0) & (x < grey.shape[1]) & (y < grey.shape[0])
    lines = grey[np.clip(y, 0, grey.shape[0] - 1), np.clip(x, 0, grey.shape[1] - 1)].astype(np.float32)
    lines -= lines.mean(axis=1, keepdims=True)
    lines /= np.sqrt((lines * lines).sum(axis=1, keepdims=True)) + np.float32(1e-3)
    middle = len(steps) // 2
    alike = (lines @ lines[middle] > _ALIKE) & (on.mean(axis=1) > 0.9)
    other = np.flatnonzero(~alike)
    above, below = other[other < middle], other[other > middle]
    top = steps[above[-1] + 1] if len(above) else steps[0]
    bottom = steps[below[0] - 1] if len(below) else steps[-1]
    ends = (centre - across / 2, centre + across / 2)
    found = (ends[0] + top * along, ends[1] + top * along, ends[1] + bottom * along, ends[0] + bottom * along)
    return [(float(at[0]), float(at[1])) for at in found]


def _across(grey: Grey, corners: tuple[Point, Point, Point, Point]) -> Point:
    """From the code's left end to its right end, square to the bars."""
    a, b, _, _ = corners
    left, top = np.maximum(np.floor(np.min(corners, axis=0)).astype(int) - 8, 0)
    right, bottom = np.ceil(np.max(corners, axis=0)).astype(int) + 9
    degrees = math.radians(bars(grey[top:bottom, left:right])[0])
    unit = np.array([math.cos(degrees), math.sin(degrees)])
    across: Point = unit * float((b - a) @ unit)
    return across


def goes_on(grey: Grey, corners: Sequence[tuple[float, float]], reach: float) -> bool:
    """Whether bars go on beside a code, within ``reach`` of its lengths on one side: then it was only a part.

    Three lines across it must see the same there, and four changes from dark to light or back: print differs from line to
    line. ``corners``: (x, y), clockwise from its own top left.
    """
    a, b, c, d = np.array(corners, np.float64)
    # A scan line over turned bars is not square to them, and leaves the code at its top: go on square to the bars.
    across = _across(grey, (a, b, c, d)) * reach
    seen: tuple[list[Floats], list[Floats]] = ([], [])  # on the left, on the right
    for share in (0.3, 0.5, 0.7):
        start, end = a + (d - a) * share, b + (c - b) * share
        low, high = np.percentile(_along(grey, start, end), [10, 90])
        for lines, first, last in zip(seen, (start, end), (start - across, end + across), strict=True):
            line = _along(grey, first, last)[2:].astype(np.float32)  # past the last bar
            lines.append(np.sign(line - np.float32((low + high) / 2)) * (np.abs(line - (low + high) / 2) > 0.15 * (high - low)))
    return any(_same_bars(lines) for lines in seen)


def _same_bars(lines: list[Floats]) -> bool:
    """-1 for dark, 1 for light, 0 between."""
    length = min(len(line) for line in lines)
    changes = []
    for line in lines:
        clear = line[line != 0]
        changes.append(int((clear[1:] != clear[:-1]).sum()))
    if length < 4 or min(changes) < 4:
        return False
    return all(float((one[:length] * lines[1][:length]).mean()) > 0.5 for one in (lines[0], lines[2]))


def _along(grey: Grey, first: NDArray[np.float64], last: NDArray[np.float64]) -> Grey:
    """The pixels on a line, as far as it is on the picture."""
    steps = max(2, round(float(np.abs(last - first).max())))
    x, y = np.rint(np.linspace(first, last, steps)).astype(int).T
    on = (x >= 0) & (y >= 0) & (x < grey.shape[1]) & (y < grey.shape[0])
    line: Grey = grey[y[on], x[on]]
    return line

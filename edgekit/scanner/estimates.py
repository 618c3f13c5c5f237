"""What a picture says about how it was taken: turn, blur, noise, motion. Every parameter of the cascade comes from here."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Motion", "bars", "blur_sigma", "crossings", "gradients", "motion", "noise_sigma", "orientation"]

Grey = NDArray[np.uint8]
Floats = NDArray[np.float32]

_AROUND = 25.0  # degrees
_LONGEST = 18  # pixels of motion


class Motion(NamedTuple):
    """A straight smear: ``length`` in pixels, ``degrees`` in [0, 180) from the x axis towards y (downwards)."""

    length: float
    degrees: float
    score: float  # 0..1: the depth of the minimum that gave it, as a share of the autocorrelation at 0


def orientation(grey: Grey) -> float:
    """By how many degrees, in [-45, 45), the strongest edges are turned away from the picture's axes.

    The peak of the gradients' directions, weighted by magnitude, modulo 90 degrees: a code's bars give one direction, its
    ends the other.
    """
    gx, gy, magnitude = _strong(grey)
    if not len(magnitude):
        return 0.0
    degrees = np.degrees(np.arctan2(gy, gx)) % 90.0
    histogram = np.bincount((degrees * 2).astype(int) % 180, weights=magnitude, minlength=180)
    smooth = sum(np.roll(histogram, shift) for shift in range(-3, 4))
    peak = float(np.argmax(smooth)) / 2 + 0.25
    # Edges as sharp as pixels look nearer to the axes than they are, by up to 7 degrees; the mean around them does not.
    near = np.abs((degrees - peak + 45) % 90 - 45) < _AROUND
    mean = float(np.degrees(np.angle((np.exp(4j * np.radians(degrees[near])) * magnitude[near]).sum()))) / 4
    return mean if mean < 45 else mean - 90


def bars(grey: Grey) -> tuple[float, float]:
    """The direction across the bars in degrees, [-90, 90), and how many more edges lie along it than across it, 0..1.

    1 for bars, near 0 for a matrix of cells. Edges are counted, not weighed: motion leaves of bars many weak edges, of the
    label's border few strong ones.
    """
    gx, gy, magnitude = _strong(grey, 0.12)
    if not len(magnitude):
        return 0.0, 0.0
    peak = orientation(grey)
    degrees = np.degrees(np.arctan2(gy, gx))
    away = [np.abs((degrees - axis + 90) % 180 - 90) < 12 for axis in (peak, peak + 90)]
    first, second = (int(near.sum()) for near in away)
    near = away[0] if first >= second else away[1]
    twice = np.exp(2j * np.radians(degrees))  # twice the angle: opposite edges of a bar agree
    rough = float(np.degrees(np.angle(twice[near].sum()))) / 2
    wide = np.abs((degrees - rough + 90) % 180 - 90) < _AROUND
    direction = float(np.degrees(np.angle((twice * magnitude)[wide].sum()))) / 2
    return direction, abs(first - second) / max(1, first + second)


def _strong(grey: Grey, share: float = 0.3) -> tuple[Floats, Floats, Floats]:
    """The strong gradients of the smoothed picture: x, y, magnitude, each (n,)."""
    a = _middle(grey).astype(np.float32)
    if min(a.shape) < 5:
        empty = np.empty(0, np.float32)
        return empty, empty, empty
    a = a[:-2] + 2 * a[1:-1] + a[2:]  # binomial smoothing, weights 1, 2, 1 both ways, over 16
    gx, gy = gradients((a[:, :-2] + 2 * a[:, 1:-1] + a[:, 2:]) / np.float32(16))
    magnitude = np.sqrt(gx * gx + gy * gy)
    strong = magnitude > max(4.0, float(np.percentile(magnitude[::2, ::2], 99.5)) * share)
    return gx[strong], gy[strong], magnitude[strong]


def blur_sigma(grey: Grey) -> float:
    """Standard deviation, in pixels, of the Gaussian that would blur a sharp edge as the steepest edges here are.

    A step of height A under a Gaussian has slope A / (sigma sqrt(2 pi)) in its middle. The difference over two pixels
    that measures the slope blurs by itself, with a variance of 1/3. 0.88: too low a guess costs fewer reads than too high.
    """
    grey = _middle(grey, 120_000)
    gx, gy = gradients(grey.astype(np.float32))
    steepest = float(np.percentile(np.sqrt(gx * gx + gy * gy), 99.95))
    low, high = np.percentile(grey[::2, ::2], [1, 99])
    seen = float(high - low) / (max(steepest, 1e-3) * math.sqrt(2 * math.pi))
    return 0.88 * math.sqrt(max(0.0, seen**2 - 1 / 3))


def crossings(grey: Grey) -> int:
    """How often dark and light change along the lines with most changes, rows or columns: few where no code can be.

    Against the mean of 41 pixels around, so that a shadow or a bright label beside the code does not hide its bars.
    """
    most = 0
    for a in (grey, grey.T):
        if a.shape[1] < 8:
            continue
        lines = a[:: max(1, len(a) // 64)].astype(np.float32)
        around = np.cumsum(np.pad(lines, ((0, 0), (21, 20)), mode="edge"), axis=1)
        lines -= (around[:, 41:] - around[:, :-41]) / np.float32(41)
        margin = max(4.0, 0.06 * float(np.ptp(np.percentile(lines[:, ::2], [3, 97]))))
        state = (lines > margin).astype(np.int8) - (lines < -margin)
        last = np.maximum.accumulate(np.where(state != 0, np.arange(state.shape[1]), 0), axis=1)
        state = np.take_along_axis(state, last, axis=1)
        counts = np.sort((state[:, 1:] != state[:, :-1]).sum(axis=1))
        most = max(most, int(counts[-min(6, len(counts))]))
    return most


def _middle(grey: Grey, most: int = 60_000) -> Grey:
    """The middle of a large picture: enough to estimate from."""
    share = math.sqrt(most / grey.size)
    if share >= 1:
        return grey
    height, width = (max(8, round(side * share)) for side in grey.shape)
    top, left = max(0, (grey.shape[0] - height) // 2), max(0, (grey.shape[1] - width) // 2)
    return grey[top : top + height, left : left + width]


def gradients(a: Floats) -> tuple[Floats, Floats]:
    """Slopes along x and y in grey levels a pixel, float32 (H - 2, W - 2).

    Scharr's weights 3, 10, 3 across: with equal weights the direction of fine bars is off by up to 8 degrees.
    """
    edge, middle = np.float32(3 / 32), np.float32(10 / 32)
    rows = edge * (a[:-2] + a[2:]) + middle * a[1:-1]
    columns = edge * (a[:, :-2] + a[:, 2:]) + middle * a[:, 1:-1]
    return rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]


def noise_sigma(grey: Grey) -> float:
    """Noise in grey levels, from the median response of a mask that is blind to edges (after Immerkaer, CVIU 64(2), 1996)."""
    a = _middle(grey).astype(np.float32)
    rows = a[:-2] - 2 * a[1:-1] + a[2:]
    response = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    return float(np.median(np.abs(response))) / (6 * 0.6745)


def motion(grey: Grey) -> list[Motion]:
    """The two most likely smears, best first.

    A line of length L under the derivative along itself is two opposite points L apart: the autocorrelation of that
    derivative has its minimum at L. All directions come from three inverse transforms.
    """
    grey = _middle(grey)
    height, width = grey.shape
    a = grey.astype(np.float32) - np.float32(grey.mean())
    a *= np.hanning(height)[:, None].astype(np.float32) * np.hanning(width)[None, :].astype(np.float32)
    power = np.abs(np.fft.rfft2(a)) ** 2
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    sx, sy = np.sin(2 * math.pi * fx), np.sin(2 * math.pi * fy)
    xx, xy, yy = (np.fft.irfft2(power * each, grey.shape) for each in (sx * sx, sx * sy, sy * sy))
    reach = min(_LONGEST, min(grey.shape) // 3)
    if reach < 5:
        return []
    # The difference over two pixels has a minimum of its own at 2, also where nothing moved.
    steps = np.arange(3.5, reach + 0.01, 0.5)
    found = []
    for degrees in range(0, 180, 15):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        zero = c * c * xx[0, 0] + 2 * c * s * xy[0, 0] + s * s * yy[0, 0]
        if zero <= 0:
            continue
        at = [_at(each, steps * s, steps * c) for each in (xx, xy, yy)]
        along = (c * c * at[0] + 2 * c * s * at[1] + s * s * at[2]) / zero
        best = int(np.argmin(along))
        found.append(Motion(float(steps[best]), float(degrees), max(0.0, -float(along[best]))))
    return sorted(found, key=lambda each: -each.score)[:2]


def _at(a: NDArray[np.float64], y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bilinear samples of a periodic array."""
    j, i = np.floor(y).astype(int), np.floor(x).astype(int)
    v, u = y - j, x - i
    h, w = a.shape
    top = a[j % h, i % w] * (1 - u) + a[j % h, (i + 1) % w] * u
    bottom = a[(j + 1) % h, i % w] * (1 - u) + a[(j + 1) % h, (i + 1) % w] * u
    sampled: NDArray[np.float64] = top * (1 - v) + bottom * v
    return sampled

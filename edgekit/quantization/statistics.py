"""Streaming statistics of a tensor, and the clip that each calibration method reads from them. Memory does not grow.

A histogram of |x| whose range is always a power of two: it widens by merging neighbours, so counts stay exact and two
histograms can be added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "LEVELS", "METHODS", "MIN_SCALE", "Statistics", "packed", "scale_of", "unpacked"]

BINS = 4096
LEVELS = 127  # signed symmetric int8
#: The least scale: a normal float32, and so is its product with another that is not extreme.
MIN_SCALE = 1e-30
_PERCENTILE = 0.9999
_CANDIDATES = 100
_ENTROPY_BINS = 2048
_MIN_CLIP = 0.02


@dataclass
class Statistics:
    """What is known of one tensor's values. ``counts`` int64 (BINS,) are of |x| > 0 over [0, ``top``)."""

    minimum: float = np.inf
    maximum: float = -np.inf
    total: float = 0.0
    squares: float = 0.0
    count: int = 0
    zeros: int = 0
    top: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def update(self, values: NDArray[Any]) -> None:
        """Add an array of any shape. Raises `FloatingPointError` for NaN or Inf."""
        flat = values.ravel()
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise FloatingPointError("NaN or Inf")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.total += float(flat.sum(dtype=np.float64))
        self.squares += float(np.square(flat, dtype=np.float64).sum())
        self.count += flat.size
        size = np.abs(flat)
        size = size[size > 0]
        self.zeros += flat.size - size.size
        if not size.size:
            return
        self._widen(_power_above(max(-low, high)))
        index = np.minimum((size * np.float64(BINS / self.top)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    def merged(self, other: Statistics) -> Statistics:
        """The statistics of both tensors' values together."""
        result = Statistics(
            min(self.minimum, other.minimum), max(self.maximum, other.maximum), self.total + other.total,
            self.squares + other.squares, self.count + other.count, self.zeros + other.zeros, self.top, self.counts.copy(),
        )  # fmt: skip
        result._widen(other.top)
        same = Statistics(top=other.top, counts=other.counts.copy())
        same._widen(result.top)
        result.counts += same.counts
        return result

    @property
    def amax(self) -> float:
        """Largest |x|; 0 where nothing but zeros was seen."""
        return max(-self.minimum, self.maximum, 0.0) if self.count else 0.0

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0

    @property
    def centres(self) -> NDArray[np.float64]:
        return (np.arange(BINS, dtype=np.float64) + 0.5) * np.float64(self.top / BINS)

    def _widen(self, top: float) -> None:
        if self.top == 0.0:
            self.top = top
        while self.top < top:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2


def packed(found: Sequence[Statistics]) -> dict[str, NDArray[Any]]:
    """Statistics as arrays: ``numbers`` float64 (n, 7), ``counts`` int64 (n, BINS)."""
    numbers = [[s.minimum, s.maximum, s.total, s.squares, s.count, s.zeros, s.top] for s in found]
    return {"numbers": np.array(numbers, np.float64), "counts": np.array([s.counts for s in found], np.int64)}


def unpacked(arrays: Mapping[str, NDArray[Any]]) -> list[Statistics]:
    """The inverse of `packed`."""
    return [
        Statistics(low, high, total, squares, int(count), int(zeros), top, counts)
        for (low, high, total, squares, count, zeros, top), counts in zip(
            arrays["numbers"].tolist(), arrays["counts"], strict=True
        )
    ]


def _power_above(value: float) -> float:
    """The least power of two above ``value``; never so small that BINS / top overflows."""
    return float(2.0 ** max(np.floor(np.log2(value)) + 1, -900))


def scale_of(clip: float) -> float:
    """The scale of a symmetric range [-clip, clip], rounded to float32. All-zero tensors get a harmless one."""
    return float(np.float32(max(clip, LEVELS * MIN_SCALE) / LEVELS)) if clip > 0 else float(np.float32(1 / LEVELS))


def minmax(statistics: Statistics) -> float:
    """The whole range."""
    return statistics.amax


def percentile(statistics: Statistics) -> float:
    """The value that 99.99% of all |x| stay below, zeros included."""
    reached = np.cumsum(statistics.counts) + statistics.zeros
    if not reached[-1]:
        return 0.0
    edge = int(np.searchsorted(reached, _PERCENTILE * reached[-1])) + 1
    return min(edge * statistics.top / BINS, statistics.amax)


def mse(statistics: Statistics) -> float:
    """The clip with the least mean squared rounding and clipping error over the histogram."""
    if not statistics.amax:
        return 0.0
    clips = statistics.amax * np.linspace(1.0, _MIN_CLIP, _CANDIDATES)  # largest first: a tie keeps the wider range
    return float(clips[int(np.argmin(_squared_errors(statistics, clips)))])


def _squared_errors(statistics: Statistics, clips: NDArray[np.float64]) -> list[float]:
    """Sum over all values of the squared rounding and clipping error of each clip, to the histogram's resolution."""
    used = np.flatnonzero(statistics.counts)
    x, counts = np.minimum(statistics.centres[used], statistics.amax), statistics.counts[used]  # (bins in use,)
    scales = clips / LEVELS
    return [float((counts * (np.minimum(np.rint(x / scale), LEVELS) * scale - x) ** 2).sum()) for scale in scales]


def entropy(statistics: Statistics) -> float:
    """The clip that keeps the distribution: least Kullback-Leibler divergence of the quantized from the clipped one.

    S. Migacz, "8-bit inference with TensorRT", GTC 2017, with 2048 bins as there: outliers join the last bin of the
    reference, never the candidate. The divergence knows no distances: values that crowd in a few bins look spoiled by any
    level wider than a bin, and near 128 bins the candidate repeats the reference, whatever was cut off. So only clips with
    no more squared error than the whole range has are compared.
    """
    counts = statistics.counts.reshape(-1, BINS // _ENTROPY_BINS).sum(1).astype(np.float64)
    last = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    levels = LEVELS + 1
    if last <= levels:
        return statistics.amax
    stops = np.arange(last, levels - 1, -max(1, (last - levels) // _CANDIDATES))  # widest first
    clips = np.minimum(stops * (statistics.top / _ENTROPY_BINS), statistics.amax)
    errors = _squared_errors(statistics, clips)
    allowed = [i for i, error in enumerate(errors) if error <= errors[0]]
    return float(clips[min(allowed, key=lambda i: _divergence(counts, int(stops[i]), levels))])


def _divergence(counts: NDArray[np.float64], stop: int, levels: int) -> float:
    """Of the first ``stop`` bins, made of ``levels`` equal parts, from the same bins with all that lies behind in the last."""
    reference = counts[:stop].copy()
    reference[-1] += counts[stop:].sum()
    used = counts[:stop] > 0
    level = np.arange(stop) * levels // stop
    mass = np.bincount(level, counts[:stop], minlength=levels)
    occupied = np.bincount(level, used, minlength=levels)
    candidate = np.where(used, (mass / np.maximum(occupied, 1))[level], 0.0)
    if not candidate.any():
        return float(np.inf)
    p, q = reference / reference.sum(), candidate / candidate.sum()
    both = p > 0
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())


#: Calibration methods by name.
METHODS: dict[str, Callable[[Statistics], float]] = {"mse": mse, "entropy": entropy, "percentile": percentile, "minmax": minmax}

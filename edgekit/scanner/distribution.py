"""Has a distribution moved? A baseline in bins, a window of what came, PSI and KS between the two, and what chance gives."""

from __future__ import annotations

import math
from array import array
from collections import deque
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Baseline", "Moved", "Window", "learnt_scalar", "learnt_shares", "psi"]

Shares = NDArray[np.float64]
BINS = 10
_FLOOR = 1e-3  # a share no smaller: PSI stays finite, below 14
#: So many times what chance gives on average is no chance: of 20 windows that overlap by three quarters, none in hundreds.
NOISE = 5.0


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``shares`` of what fell between ``edges`` (one fewer than the bins), over ``frames`` frames; ``origin`` says which.

    ``values``: figures of it, for people.
    """

    edges: tuple[float, ...]
    shares: tuple[float, ...]
    frames: int
    origin: str
    values: dict[str, float]

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.edges) + 1 or self.frames < 1 or len(self.shares) > 256:
            raise ValueError("a baseline has one share more than edges, at most 256")
        if not all(math.isfinite(v) for v in (*self.edges, *self.shares)) or min(self.shares) < 0 or sum(self.shares) <= 0:
            raise ValueError("shares and edges are finite, and shares not negative")


class Moved(NamedTuple):
    """``psi`` in 0..14, ``ks`` in 0..1; ``chance``: the PSI that as many frames of the baseline's own kind give on average."""

    psi: float
    ks: float
    chance: float
    values: dict[str, float]


class Window:
    """The last ``size`` frames of one part. Give each frame's value (`add`), or its shares of values (`add_shares`)."""

    def __init__(self, baseline: Baseline, size: int) -> None:
        self.baseline = baseline
        self._edges = np.array(baseline.edges)
        self._shares: deque[NDArray[np.float32]] = deque(maxlen=size)
        self._values: deque[tuple[float, ...]] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._shares)

    def add(self, value: float) -> None:
        shares = np.zeros(len(self.baseline.shares), np.float32)
        shares[int(np.searchsorted(self._edges, value, "right"))] = 1
        self._shares.append(shares)
        self._values.append((value,))

    def add_shares(self, values: NDArray[Any], mean: float, rms: float) -> None:
        """Values of one frame (n,)."""
        counts = np.bincount(np.searchsorted(self._edges, values, "right"), minlength=len(self.baseline.shares))
        self._shares.append((counts / max(len(values), 1)).astype(np.float32))
        self._values.append((mean, rms))

    def moved(self) -> Moved:
        found = np.stack(self._shares).astype(np.float64)
        before, now = np.array(self.baseline.shares), found.mean(0)
        before /= before.sum()
        spread = (found.var(0) / np.maximum(before, _FLOOR * 10)).sum()
        chance = float(spread) * (1 / len(found) + 1 / self.baseline.frames)
        ks = float(np.abs(np.cumsum(now) - np.cumsum(before)).max())
        columns = np.array(self._values)
        if columns.shape[1] == 2:
            return Moved(psi(before, now), ks, chance, _figures(("mean", "rms"), columns.mean(0)))
        # A bin that few frames missed by chance is not empty: half a frame is in it.
        return Moved(psi(before, now, max(_FLOOR, 0.5 / len(found))), ks, chance, scalar_values(columns[:, 0]))


def psi(before: Shares, now: Shares, floor: float = _FLOOR) -> float:
    """The population stability index of two sets of shares: sum of (now - before) ln(now / before); 0 where they are equal.

    No share counts as less than ``floor``.
    """
    a, b = np.maximum(before, floor), np.maximum(now, floor)
    a, b = a / a.sum(), b / b.sum()
    return float(((b - a) * np.log(b / a)).sum())


def scalar_values(values: NDArray[Any]) -> dict[str, float]:
    return _figures(("mean", "p10", "p50", "p90"), [values.mean(), *np.percentile(values, [10, 50, 90])])


def learnt_scalar(values: array[float], origin: str) -> Baseline:
    """Bins of like shares from a value a frame; fewer where values repeat (a score of 1.0)."""
    data = np.array(values)
    edges = np.unique(np.quantile(data, np.arange(1, BINS) / BINS))
    counts = np.bincount(np.searchsorted(edges, data, "right"), minlength=len(edges) + 1)
    shares = counts / counts.sum()
    return Baseline(tuple(edges.tolist()), tuple(shares.tolist()), len(data), origin, scalar_values(data))


def learnt_shares(edges: Shares, rows: Shares, values: dict[str, float], origin: str) -> Baseline:
    """Bins of at least a twentieth each, from shares (frames, bins) of values between ``edges``."""
    kept, shares = merged(edges, rows.mean(0))
    return Baseline(tuple(kept), tuple(shares), len(rows), origin, values)


def merged(edges: Shares, shares: Shares, least: float = 0.05) -> tuple[list[float], list[float]]:
    """Neighbouring bins put together until they hold ``least``. One that holds it alone stays alone, and so do the few values
    beside it: among an even ground, which is most of many pictures, noise comes where nothing was."""
    kept: list[float] = []
    found: list[float] = []
    held, any_held = 0.0, False
    for i, share in enumerate(shares):
        if any_held and share >= least:
            kept.append(float(edges[i - 1]))
            found.append(held)
            held = 0.0
        held, any_held = held + float(share), True
        if held >= least and i < len(edges):
            kept.append(float(edges[i]))
            found.append(held)
            held, any_held = 0.0, False
    return kept, [*found, held]


def _figures(names: tuple[str, ...], values: Any) -> dict[str, float]:
    return {name: float(f"{float(value):.4g}") for name, value in zip(names, values, strict=True)}

"""The arithmetic of figures: percentiles, steadiness, histograms, and an interval for the ratio of two medians."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Interval",
    "coefficient_of_variation",
    "histogram",
    "jitter",
    "log_median",
    "median_ratio",
    "paired_ratio",
    "percentiles",
    "runs_ratio",
    "thin",
]

Floats = NDArray[np.float64]
_BATCHES = 8
_T_99 = 3.499  # Student's t, 7 degrees of freedom, two-sided 99%
_Z_99 = 2.576  # the normal distribution's
#: Student's t, two-sided 99%, from one degree of freedom on; the last one for more.
_T_99_BY_FREEDOM = (63.66, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169)


def percentiles(samples_ms: Floats) -> dict[str, float]:
    """p50, p90, p95, p99 by nearest rank (an observed latency, never one between two), min, mean, max; all in ms.

    p99.9 (``p999``) is given from 10,000 samples on: below that fewer than ten lie above it.
    """
    ranks = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    if len(samples_ms) >= 10_000:
        ranks["p999"] = 0.999
    values = np.quantile(samples_ms, list(ranks.values()), method="inverted_cdf")
    figures = dict(zip(ranks, values.tolist(), strict=True))
    return {**figures, "min": float(samples_ms.min()), "mean": float(samples_ms.mean()), "max": float(samples_ms.max())}


def coefficient_of_variation(values: Floats) -> float:
    """Standard deviation over mean; 0 for fewer than two values or a zero mean."""
    mean = float(values.mean()) if len(values) > 1 else 0.0
    return float(values.std(ddof=1) / mean) if mean else 0.0


def jitter(samples_ms: Floats) -> float:
    """Median of the absolute change from one latency to the next, ms; 0 for a single one (RFC 3550's, without its filter)."""
    return float(np.median(np.abs(np.diff(samples_ms)))) if len(samples_ms) > 1 else 0.0


def histogram(samples_ms: Floats, bins: int = 40) -> dict[str, Any]:
    """``bins`` (edges in ms, one more than counts), ``counts``, and ``over``: samples beyond the last edge.

    The edges span the fastest sample to p99.5, so that one hiccup does not squeeze the rest into one bar.
    """
    low = float(samples_ms.min())
    high = float(np.quantile(samples_ms, 0.995, method="inverted_cdf"))
    high = max(high, low * (1 + 1e-6), low + 1e-9)
    counts, edges = np.histogram(samples_ms, bins=bins, range=(low, high))
    return {"bins": edges.tolist(), "counts": counts.tolist(), "over": int(len(samples_ms) - counts.sum())}


def thin(samples: Floats, count: int = 512) -> Floats:
    """At most ``count`` of the samples, evenly spread over the run and in its order."""
    if len(samples) <= count:
        return samples
    kept: Floats = samples[np.linspace(0, len(samples) - 1, count).round().astype(int)]
    return kept


class Interval(NamedTuple):
    """A ratio of medians, new over old, with its confidence bounds."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``same`` where the interval holds 1, else ``slower`` or ``faster``."""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "same"


def median_ratio(old: Floats, new: Floats, between: float = 0.0) -> Interval:
    """median(new) / median(old) of latencies (N,) with a 99% confidence interval, by batch means.

    Latencies of one run are not independent (clocks drift, a neighbour comes and goes), so single samples would claim
    too much. Each run is cut into eight stretches and the logarithms of their medians are compared by Student's t, with
    the conservative seven degrees of freedom (batch means: Law, Simulation Modeling and Analysis, section 9.5).
    ``between``: standard deviation of the logarithm of the ratio between pairs of runs, which the stretches do not show.
    Raises ValueError for fewer than 16 samples in a run, or one that is not positive.
    """
    if min(len(old), len(new)) < 16 or min(old.min(), new.min()) <= 0:
        raise ValueError("both runs need 16 positive samples")
    (before, error_before), (after, error_after) = (log_median(run) for run in (old, new))
    within = _T_99 * float(np.hypot(error_before, error_after))
    margin = float(np.hypot(within, _Z_99 * between))
    ratio = float(np.median(new) / np.median(old))
    low, high = float(np.exp(after - before - margin)), float(np.exp(after - before + margin))
    return Interval(ratio, min(low, ratio), max(high, ratio))


def log_median(run: Floats) -> tuple[float, float]:
    """Mean of the logarithms of the medians of eight stretches, and its standard error."""
    logs = np.log([np.median(part) for part in np.array_split(run, _BATCHES)])
    return float(logs.mean()), float(logs.std(ddof=1)) / float(np.sqrt(_BATCHES))


def runs_ratio(old: Floats, new: Floats) -> Interval:
    """The ratio of what (N,) and (M,) runs found, a figure for each, with its 99% confidence interval by Student's t on the
    logarithms: what it holds is what runs differ by, whatever the cause.

    Raises ValueError for fewer than two runs of either, or a figure that is not positive.
    """
    if min(len(old), len(new)) < 2 or min(old.min(), new.min()) <= 0:
        raise ValueError("two runs of each are needed, with positive figures")
    before, after = np.log(old), np.log(new)
    freedom = len(before) + len(after) - 2
    variance = (before.var() * len(before) + after.var() * len(after)) / freedom
    t = _T_99_BY_FREEDOM[min(freedom, len(_T_99_BY_FREEDOM)) - 1]
    margin = t * float(np.sqrt(variance * (1 / len(before) + 1 / len(after))))
    centre = float(after.mean() - before.mean())
    return Interval(float(np.exp(centre)), float(np.exp(centre - margin)), float(np.exp(centre + margin)))


def paired_ratio(old_ms: Floats, new_ms: Floats) -> Interval:
    """The median of new / old, measured side by side (N,) each, with a 99% confidence interval, by batch means as above: the
    logarithms of the ratios are cut into eight stretches, for the machine's pace changes slower than from one to the next.

    Raises ValueError for fewer than 16 pairs, or a latency that is not positive.
    """
    if len(old_ms) < 2 * _BATCHES or len(old_ms) != len(new_ms) or min(old_ms.min(), new_ms.min()) <= 0:
        raise ValueError("16 pairs of positive latencies are needed")
    ratios = np.log(new_ms / old_ms)
    stretches = np.array([np.median(part) for part in np.array_split(ratios, _BATCHES)])
    middle = float(np.median(ratios))
    margin = _T_99 * float(stretches.std(ddof=1)) / float(np.sqrt(_BATCHES))
    centre = float(stretches.mean())
    low, high = float(np.exp(centre - margin)), float(np.exp(centre + margin))
    ratio = float(np.exp(middle))
    return Interval(ratio, min(low, ratio), max(high, ratio))

"""The arithmetic of figures: percentiles, steadiness, histograms, and an interval for the ratio of two medians."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "coefficient_of_variation", "histogram", "median_ratio", "percentiles", "thin"]

Floats = NDArray[np.float64]


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


def median_ratio(
    old_ms: Floats, new_ms: Floats, *, confidence: float = 0.99, resamples: int = 2000, blocks: int = 16
) -> Interval:
    """median(new) / median(old) with a percentile bootstrap interval.

    Latencies of one run are not independent (clocks drift, a neighbour comes and goes), so whole stretches of the run
    are drawn, not single samples: the moving-block bootstrap (Künsch 1989, Annals of Statistics 17(3)), ``blocks`` of
    them a run. Raises ValueError for empty or non-positive samples.
    """
    if not len(old_ms) or not len(new_ms) or min(old_ms.min(), new_ms.min()) <= 0:
        raise ValueError("both runs need positive samples")
    rng = np.random.default_rng(0)  # the same files always give the same verdict
    ratios = _block_medians(new_ms, rng, resamples, blocks) / _block_medians(old_ms, rng, resamples, blocks)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(np.median(new_ms) / np.median(old_ms)), float(low), float(high))


def _block_medians(samples: Floats, rng: np.random.Generator, resamples: int, blocks: int) -> Floats:
    """Medians (resamples,) of runs put together from blocks drawn at random."""
    length = max(1, len(samples) // blocks)
    starts = rng.integers(0, len(samples) - length + 1, (resamples, -(-len(samples) // length)))
    drawn = samples[(starts[:, :, None] + np.arange(length)).reshape(resamples, -1)[:, : len(samples)]]
    medians: Floats = np.median(drawn, axis=1)
    return medians

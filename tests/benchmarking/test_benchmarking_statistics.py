"""The arithmetic of figures against definitions and simulated runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgekit.benchmarking.statistics import (
    coefficient_of_variation,
    histogram,
    median_ratio,
    percentiles,
    runs_ratio,
    thin,
)

Array = np.ndarray[Any, Any]
runs = arrays(np.float64, st.integers(1, 400), elements=st.floats(1e-4, 1e4))
long_runs = arrays(np.float64, st.integers(16, 400), elements=st.floats(1e-4, 1e4))


@given(runs)
def test_percentiles_are_observed_and_ordered(samples: Array) -> None:
    found = percentiles(samples)
    assert [found[k] for k in ("p50", "p90", "p95", "p99")] == sorted(found[k] for k in ("p50", "p90", "p95", "p99"))
    for key, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[key] in samples
        assert np.mean(samples <= found[key]) >= share - 1e-9  # nearest rank: the smallest value that covers the share
        below = samples[samples < found[key]]
        assert len(below) / len(samples) < share
    assert found["min"] == samples.min()
    assert found["max"] == samples.max()
    assert "p999" not in found


def test_the_far_tail_needs_samples() -> None:
    assert "p999" not in percentiles(np.arange(1.0, 10_000.0))
    assert percentiles(np.arange(1.0, 10_001.0))["p999"] == 9990.0


@given(runs)
def test_a_histogram_counts_every_sample(samples: Array) -> None:
    found = histogram(samples)
    assert len(found["bins"]) == len(found["counts"]) + 1
    assert sum(found["counts"]) + found["over"] == len(samples)
    assert found["bins"] == sorted(set(found["bins"]))
    assert found["over"] <= 0.005 * len(samples)


def test_cv() -> None:
    assert coefficient_of_variation(np.array([9.0, 10.0, 11.0])) == pytest.approx(0.1)
    assert coefficient_of_variation(np.array([5.0])) == 0
    assert coefficient_of_variation(np.zeros(4)) == 0


@given(st.integers(1, 3000), st.integers(1, 600))
def test_thinning_keeps_order_and_ends(size: int, count: int) -> None:
    kept = thin(np.arange(float(size)), count)
    assert len(kept) == min(size, count)
    assert (np.diff(kept) > 0).all()
    assert kept[0] == 0
    assert kept[-1] == size - 1 or count == 1


def simulated(seed: int, slower: float = 1.0, size: int = 512) -> Array:
    """A run as machines give them: a skewed base, hiccups, and a clock that wanders slowly by about 1%."""
    rng = np.random.default_rng(seed)
    wander = np.repeat(rng.normal(1, 0.01, -(-size // 64)), 64)[:size]
    hiccups = np.where(rng.random(size) < 0.02, rng.exponential(1, size), 0)
    return slower * wander * (1 + rng.gamma(2, 0.01, size) + hiccups)


def test_the_interval_holds_the_truth_and_sees_five_percent() -> None:
    held = seen = 0
    for seed in range(200):
        same = median_ratio(simulated(seed), simulated(1000 + seed))
        held += same.low <= 1 <= same.high
        slow = median_ratio(simulated(seed), simulated(1000 + seed, 1.05))
        seen += slow.low > 1
        assert same.low <= same.ratio <= same.high
    assert held >= 195
    assert seen >= 190


@given(long_runs, long_runs, st.floats(0, 0.1))
def test_an_interval_is_finite_and_reproducible(old: Array, new: Array, between: float) -> None:
    found = median_ratio(old, new, between)
    assert np.isfinite(found).all()
    assert 0 < found.low <= found.ratio <= found.high
    assert found == median_ratio(old, new, between)


def test_an_interval_needs_samples() -> None:
    for old, new in ((np.array([]), np.ones(16)), (np.ones(16), np.ones(15)), (np.zeros(16), np.ones(16))):
        with pytest.raises(ValueError, match="positive"):
            median_ratio(old, new)


def relative(seed: int, slower: float = 1.0, between: float = 0.01) -> Array:
    """Stretches beside a yardstick: what remains of the noise is skewed and comes in spells, and each run is off a little."""
    rng = np.random.default_rng(seed)
    spells = np.repeat(rng.normal(0, 0.03, 100), 4)
    return slower * np.exp(rng.normal(0, between) + spells + rng.gamma(2, 0.02, 400))


def test_the_interval_by_the_yardstick_holds_what_differs_between_runs() -> None:
    held = seen = careless = 0
    for seed in range(200):
        same = median_ratio(relative(seed), relative(1000 + seed), 0.0142)
        held += same.low <= 1 <= same.high
        careless += median_ratio(relative(seed), relative(1000 + seed), 0.0).verdict != "same"
        slow = median_ratio(relative(seed), relative(1000 + seed, 1.08), 0.0142)
        seen += slow.verdict == "slower"
        assert same.low <= same.ratio <= same.high
    assert held >= 195
    assert seen >= 190
    assert careless > 20  # the noise within the runs alone claims too much


@pytest.mark.parametrize(("spread", "found"), [(0.008, True), (0.05, False)])
def test_the_interval_of_several_processes_is_as_wide_as_they_differ(spread: float, found: bool) -> None:
    """A share of 1 in 100 false alarms whatever the machine; 5% more is found where processes agree."""
    rng = np.random.default_rng(1)
    draw = lambda slower=1.0: slower * np.exp(rng.normal(0, spread, 5))  # noqa: E731
    alarms = sum(runs_ratio(draw(), draw()).verdict != "same" for _ in range(1000))
    assert alarms <= 25
    seen = sum(runs_ratio(draw(), draw(1.05)).verdict == "slower" for _ in range(1000))
    assert (seen >= 950) is found
    both = runs_ratio(np.array([1.0, 1.1]), np.array([1.0, 1.1]))
    assert both.ratio == pytest.approx(1)
    assert both.low < 1 < both.high


def test_several_processes_are_wanted_with_positive_figures() -> None:
    for old, new in (([1.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1.0])):
        with pytest.raises(ValueError, match="two runs"):
            runs_ratio(np.array(old), np.array(new))

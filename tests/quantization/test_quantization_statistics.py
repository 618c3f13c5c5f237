"""Clips that calibration methods read from a histogram: never absurd, whatever the distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.quantization.statistics import LEVELS, METHODS, Statistics, scale_of

Array = np.ndarray[Any, Any]


def seen(values: Array) -> Statistics:
    statistics = Statistics()
    statistics.update(values)
    return statistics


def squared_error(values: Array, clip: float) -> float:
    """Mean over the values themselves, as int8 with this clip gives them."""
    scale = scale_of(clip)
    return float(np.square(np.clip(np.rint(values / scale), -LEVELS, LEVELS) * scale - values).mean())


def drawn(seed: int, kind: str, spikes: int, outliers: float, zeros: float) -> Array:
    """Activations: a bulk of ``kind``, a share of it at few exact values (flat parts of pictures), outliers, zeros."""
    r = np.random.default_rng(seed)
    size = 20_000
    values = {
        "normal": lambda: r.normal(size=size),
        "laplace": lambda: r.laplace(size=size),
        "student": lambda: r.standard_t(2.0, size),
        "uniform": lambda: r.uniform(-1, 1, size),
        "exponential": lambda: r.exponential(size=size),
        "lognormal": lambda: r.lognormal(0, 2, size),
    }[kind]()
    if spikes:
        at = r.random(size) < 0.9
        values[at] = r.choice(r.choice(values, spikes), int(at.sum()))
    values[r.random(size) < outliers] *= 20
    values[r.random(size) < zeros] = 0.0
    return values.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "laplace", "student", "uniform", "exponential", "lognormal"]),
    st.sampled_from([0, 1, 3, 30]),
    st.sampled_from([0.0, 1e-3, 0.05]),
    st.sampled_from([0.0, 0.5]),
)
def test_entropy_loses_little_against_the_whole_range(seed: int, kind: str, spikes: int, outliers: float, zeros: float) -> None:
    values = drawn(seed, kind, spikes, outliers, zeros)
    statistics = seen(values)
    whole = squared_error(values, METHODS["minmax"](statistics))
    assert squared_error(values, METHODS["entropy"](statistics)) <= 2 * whole  # not 1: a bin is not a value


def test_entropy_keeps_a_range_whose_values_crowd() -> None:
    """The first layer of a digits net: a background that is one value, and strokes. The clip once fell to 4% of the range."""
    r = np.random.default_rng(0)
    background, strokes = r.normal(0.1, 0.001, 60_000), np.abs(r.normal(0, 1.5, 6_000))
    values = np.concatenate([background, strokes]).astype(np.float32)
    clip = METHODS["entropy"](seen(values))
    assert clip > 0.5 * values.max()


@pytest.mark.parametrize("method", ["entropy", "mse", "percentile"])
def test_rare_outliers_are_cut_off(method: str) -> None:
    r = np.random.default_rng(0)
    values = r.normal(size=500_000)
    values[0] = 60.0
    clip = METHODS[method](seen(values))
    assert 2.5 < clip < 30


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e30])
def test_a_scale_spans_its_clip_at_any_size(size: float) -> None:
    assert LEVELS * scale_of(size) == pytest.approx(size, rel=1e-6)
    assert scale_of(1e-44) > np.finfo(np.float32).tiny


@pytest.mark.parametrize("method", METHODS)
def test_zeros_and_single_values_have_a_clip(method: str) -> None:
    assert METHODS[method](seen(np.zeros(10, np.float32))) == 0.0
    assert METHODS[method](Statistics()) == 0.0
    assert METHODS[method](seen(np.full(10, -3.0, np.float32))) == pytest.approx(3.0, rel=1e-2)

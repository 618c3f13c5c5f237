"""Which quantizers of a tensor are proposed: a scale, a shift where channels are one-sided, a factor where they differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.quantization.graph import Quantizer
from edgekit.quantization.placement import Layer
from edgekit.quantization.ranges import Drawn, Reader, propose
from edgekit.quantization.unfold import Unfolding

Array = np.ndarray[Any, Any]
CHANNELS = 16


def reader(weight: Array) -> Reader:
    """A MatMul by ``weight`` (channels, outputs)."""
    layer = Layer("m", "MatMul", "x", "w", 1, 1, "y", -1, -1, None, "")
    shape = Unfolding(layer, weight.shape, 1, (), (), (), ())
    return Reader(shape, shape.matrix(weight))


def drawn(rows: Array) -> Drawn:
    return Drawn(rows.astype(np.float32), rows.min(0).astype(np.float32), rows.max(0).astype(np.float32))


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def simulated(x: Array, quantizer: Quantizer) -> Array:
    """int8 and back, as the inserted operators do it."""
    shift = 0.0 if quantizer.shift is None else quantizer.shift.astype(np.float64)
    factor = 1.0 if quantizer.factor is None else quantizer.factor.astype(np.float64)
    q = np.clip(np.rint((x - shift) * factor / quantizer.scale), -128, 127)
    back: Array = q * quantizer.scale / factor + shift
    return back


def loss(x: Array, quantizer: Quantizer, weight: Array) -> float:
    """Of the outputs, from rounding the inputs; a bias carries means."""
    off = (simulated(x, quantizer) - x) @ weight
    return float(np.square(off - off.mean(0)).mean())


WEIGHT = normal(0, CHANNELS, 12)


def test_alike_symmetric_channels_take_a_scale_alone() -> None:
    halves = [drawn(normal(seed, 400, CHANNELS)) for seed in (1, 2)]
    (plain,) = propose(halves, [reader(WEIGHT)], extra=True)
    assert plain.plain
    x = normal(3, 4000, CHANNELS)
    best = min(loss(x, Quantizer(s), WEIGHT) for s in np.linspace(0.2, 2.0, 60) * np.abs(x).max() / 127)
    assert loss(x, plain, WEIGHT) < 1.3 * best


@pytest.mark.parametrize("offset", [4.0, -4.0])
def test_one_sided_channels_are_shifted(offset: float) -> None:
    halves = [drawn(normal(seed, 400, CHANNELS) + offset) for seed in (1, 2)]
    plain, *extra = propose(halves, [reader(WEIGHT)], extra=True)
    assert plain.plain
    shifted = [quantizer for quantizer in extra if quantizer.shift is not None]
    assert shifted
    x = normal(3, 4000, CHANNELS) + offset
    for quantizer in shifted:
        assert quantizer.shift is not None
        assert np.abs(quantizer.shift - offset).max() < 1.5
        assert loss(x, quantizer, WEIGHT) < 0.5 * loss(x, plain, WEIGHT)


def test_each_channel_has_its_own_shift() -> None:
    offsets = np.linspace(-6, 6, CHANNELS)
    halves = [drawn(normal(seed, 400, CHANNELS) + offsets) for seed in (1, 2)]
    found = propose(halves, [reader(WEIGHT)], extra=True)
    shift = next(quantizer.shift for quantizer in found if quantizer.shift is not None)
    assert shift.dtype == np.float32
    np.testing.assert_allclose(shift, offsets, atol=1.5)


def test_channels_of_very_different_ranges_take_a_factor() -> None:
    ranges = np.geomspace(0.01, 10, CHANNELS)
    weight = WEIGHT / ranges[:, None]  # each channel says as much at the output
    halves = [drawn(normal(seed, 400, CHANNELS) * ranges) for seed in (1, 2)]
    plain, *extra = propose(halves, [reader(weight)], extra=True)
    assert plain.plain
    scaled = [quantizer for quantizer in extra if quantizer.factor is not None]
    assert scaled
    x = normal(3, 4000, CHANNELS) * ranges
    for quantizer in scaled:
        assert quantizer.factor is not None
        assert quantizer.factor.dtype == np.float32
        assert quantizer.factor[0] > 100 * quantizer.factor[-1]
        assert loss(x, quantizer, weight) < 0.05 * loss(x, plain, weight)


@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_without_extra_operators_there_is_one_plain_quantizer(offset: float) -> None:
    halves = [drawn(normal(seed, 100, CHANNELS) * np.geomspace(0.01, 10, CHANNELS) + offset) for seed in (1, 2)]
    (found,) = propose(halves, [reader(WEIGHT)], extra=False)
    assert found.plain


def test_a_channel_that_matters_little_may_be_clipped() -> None:
    """A channel a hundred times as wide as the others, which the layer all but ignores."""
    weight = WEIGHT.copy()
    weight[0] *= 1e-6
    halves = [drawn(normal(seed, 400, CHANNELS) * np.where(np.arange(CHANNELS) == 0, 100, 1)) for seed in (1, 2)]
    ignored, heard = (propose(halves, [reader(w)], extra=False)[0].scale for w in (weight, WEIGHT))
    assert ignored < 0.5 * heard


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_few_rows_leave_a_margin(rows: int) -> None:
    """New samples leave the range of a few old ones: what is chosen must not clip them much."""
    clipped = []
    for seed in range(12):
        halves = [drawn(normal(2 * seed + i, rows, CHANNELS)) for i in range(2)]
        for quantizer in propose(halves, [reader(WEIGHT)], extra=True):
            x = normal(1000 + seed, 2000, CHANNELS)
            factor = 1.0 if quantizer.factor is None else quantizer.factor
            moved = (x - (0.0 if quantizer.shift is None else quantizer.shift)) * factor / quantizer.scale
            clipped.append(float((np.abs(moved) > 128).mean()))
    assert np.mean(clipped) < 0.01
    assert max(clipped) < 0.05


def test_a_later_half_that_is_wider_widens_the_scale() -> None:
    """Judged across halves: rows of twice the range in one of them cost the scale of the other."""
    alike = [drawn(normal(seed, 64, CHANNELS)) for seed in (1, 2)]
    apart = [drawn(normal(seed, 64, CHANNELS) * seed) for seed in (1, 2)]
    x = normal(3, 4000, CHANNELS) * 2
    one, other = (propose(halves, [reader(WEIGHT)], extra=False)[0] for halves in (alike, apart))
    assert loss(x, other, WEIGHT) < loss(x, one, WEIGHT)
    assert np.abs(x / other.scale).max() < 160


def test_all_readers_count() -> None:
    """Channels that the first layer ignores, and the second hears."""
    half = np.arange(CHANNELS) < CHANNELS // 2
    ranges = np.where(half, 1.0, 30.0)
    deaf, keen = WEIGHT * np.where(half, 1.0, 1e-6)[:, None], WEIGHT * np.where(half, 1e-6, 1.0)[:, None]
    halves = [drawn(normal(seed, 400, CHANNELS) * ranges) for seed in (1, 2)]
    alone = propose(halves, [reader(deaf)], extra=False)[0].scale
    both = propose(halves, [reader(deaf), reader(keen)], extra=False)[0].scale
    assert both > 5 * alone


@pytest.mark.parametrize("exponent", [-40, 70])
def test_tensors_of_any_size_take_the_same_quantizers(exponent: int) -> None:
    """1e-12 and 1e21: a power of two is exact."""
    rows = [normal(seed, 400, CHANNELS) * np.where(np.arange(CHANNELS) < 3, 40.0, 1.0) + 3.0 for seed in (1, 2)]
    usual, other = (
        propose([drawn(np.ldexp(part, power)) for part in rows], [reader(WEIGHT)], extra=True) for power in (0, exponent)
    )
    assert len(usual) == len(other) > 1
    for a, b in zip(usual, other, strict=True):
        assert b.scale == np.ldexp(a.scale, exponent)
        for x, y, power in ((a.shift, b.shift, exponent), (a.factor, b.factor, 0)):
            assert (x is None) == (y is None)
            assert x is None or y is None or (np.ldexp(x, power) == y).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 30), st.integers(1, 2),
    st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6]), st.sampled_from([0.0, 5.0, -1e4]), st.booleans(),
)  # fmt: skip
def test_any_rows_give_quantizers_that_can_be_inserted(
    seed: int, channels: int, rows: int, parts: int, spread: float, offset: float, dead: bool
) -> None:
    halves = []
    for i in range(parts):
        x = normal(seed + i, rows, channels) * spread + offset
        if dead:
            x[:, 0] = 0.0
        halves.append(drawn(x))
    found = propose(halves, [reader(normal(seed, channels, 3))], extra=True)
    assert found[0].plain
    for quantizer in found:
        assert 0 < quantizer.scale < np.inf
        assert quantizer.scale == np.float32(quantizer.scale)
        for part in (quantizer.shift, quantizer.factor):
            assert part is None or (part.shape == (channels,) and part.dtype == np.float32 and np.isfinite(part).all())
        assert quantizer.factor is None or (quantizer.factor > 0).all()
    rows_of_all = np.concatenate([half.rows for half in halves]).astype(np.float64)
    widest = np.abs(rows_of_all).max()
    for quantizer in found:
        assert np.abs(simulated(rows_of_all, quantizer) - rows_of_all).max() <= 1.01 * widest + 1e-6

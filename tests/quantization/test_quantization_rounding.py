"""Weights fitted and rounded on second moments: nearer to the float outputs than rounding to nearest, on new rows too."""

from __future__ import annotations

import tracemalloc
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edgekit.quantization import rounding
from edgekit.quantization.rounding import Moments, Rounded, clip_scales, fit_and_round, round_to_scales, weight_scales
from edgekit.quantization.statistics import MIN_SCALE

Array = np.ndarray[Any, Any]
LEAST, LEVELS = 0.3, 127  # of the largest weight: the narrowest clip


class Case(NamedTuple):
    """``x`` (groups, rows, inputs) as a quantized network gives them, ``y`` (groups, rows, outputs) of the float one."""

    x: Array
    y: Array
    weight: Array

    def part(self, rows: slice) -> Case:
        return Case(self.x[:, rows], self.y[:, rows], self.weight)


def layer(seed: int, groups: int, inputs: int, outputs: int, rows: int, mean: float = 0.0, noise: float = 0.0) -> Case:
    """Correlated inputs about ``mean``, which reach the layer with ``noise`` of the layers before."""
    r = np.random.default_rng(seed)
    mix = r.normal(size=(groups, inputs, inputs)) / np.sqrt(inputs)
    x = r.normal(size=(groups, rows, inputs)) @ mix + mean
    weight = r.normal(size=(groups, inputs, outputs))
    return Case(x + noise * r.normal(size=x.shape), x @ weight, weight)


def halves(case: Case, held: int) -> tuple[Moments, Moments]:
    """Moments of all rows but the last ``held``, and of those."""
    origin = (case.x.mean(1).astype(np.float32), case.y.mean(1).astype(np.float32))
    fit, held_out = (Moments(len(case.x), case.x.shape[2], case.y.shape[2], origin) for _ in range(2))
    cut = case.x.shape[1] - held
    fit.add(case.x[:, :cut], case.y[:, :cut])
    if held:
        held_out.add(case.x[:, cut:], case.y[:, cut:])
    return fit, held_out


def error(matrix: Array, case: Case, biased: bool = True) -> float:
    """Mean squared error of the outputs; a bias carries the means."""
    off = case.y - case.x @ matrix
    return float(np.square(off - off.mean(1, keepdims=True) if biased else off).mean())


def dequantized(found: Rounded) -> Array:
    assert found.integers.dtype == np.int8
    assert np.abs(found.integers.astype(int)).max() <= LEVELS
    matrix: Array = found.integers * found.scales[:, None, :]
    return matrix


def nearest(case: Case) -> Array:
    """Weights rounded to nearest, each output by its scale of least squared error."""
    scales = clip_scales(case.weight, np.ones(case.weight.shape[:2]))[:, None, :]
    rounded: Array = np.clip(np.rint(case.weight / scales), -LEVELS, LEVELS) * scales
    return rounded


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(6, 40), st.integers(8, 16),
    st.sampled_from([0.0, 3.0]), st.sampled_from([0.0, 0.05]), st.booleans(),
)  # fmt: skip
def test_fitting_is_no_worse_than_rounding_to_nearest(
    seed: int, groups: int, inputs: int, outputs: int, mean: float, noise: float, biased: bool
) -> None:
    case = layer(seed, groups, inputs, outputs, 8 * inputs, mean, noise)
    found = fit_and_round(case.weight, *halves(case, 2 * inputs), biased=biased)
    fitted = error(dequantized(found), case, biased)
    # noise on the inputs is the greater part then, and no rounding takes it away
    assert fitted < error(nearest(case), case, biased) * (1.05 if noise else 1.0)
    variance = np.square(case.y - (case.y.mean(1, keepdims=True) if biased else 0.0)).mean()
    assert found.error == pytest.approx(fitted / variance, rel=1e-3, abs=1e-6)  # of float32 products


def test_fitting_halves_the_error_of_rounding_alone() -> None:
    """Without noise on the inputs nothing but rounding is lost, and fitting wins most of it back on new rows too."""
    gains = []
    for seed in range(10):
        case = layer(seed, 1, 32, 16, 1256)
        seen, new = case.part(slice(256)), case.part(slice(256, None))
        matrix = dequantized(fit_and_round(case.weight, *halves(seen, 64)))
        gains.append(error(matrix, new) / error(nearest(case), new))
    assert np.median(gains) < 0.5


def test_the_refit_mends_errors_of_the_layers_before() -> None:
    """Noise that follows the inputs, a gain of 0.9: no rounding of the given weights can undo it, other weights can."""
    case = layer(0, 1, 16, 8, 1512)
    case = case._replace(x=0.9 * case.x)
    seen, new = case.part(slice(512)), case.part(slice(512, None))
    matrix = dequantized(fit_and_round(case.weight, *halves(seen, 128)))
    assert error(matrix, new) < 0.05 * error(nearest(case), new)


@pytest.mark.parametrize(("rows", "held"), [(16, 4), (32, 8), (128, 32)])
@pytest.mark.parametrize("inputs", [8, 32, 128])
@pytest.mark.parametrize("outputs", [1, 10])
def test_few_rows_do_not_overfit(rows: int, held: int, inputs: int, outputs: int) -> None:
    """About as many rows as inputs, some noise: what a few held-out rows like by luck once cost up to 9 dB on new ones."""
    ratios = []
    for seed in range(8):
        r = np.random.default_rng(seed)
        clean = np.maximum(r.normal(size=(1, rows + 1000, inputs)), 0)
        weight = r.normal(size=(1, inputs, outputs))
        case = Case(clean + 0.02 * r.normal(size=clean.shape), clean @ weight, weight)
        matrix = dequantized(fit_and_round(weight, *halves(case.part(slice(rows)), held)))
        new = case.part(slice(rows, None))
        ratios.append(error(matrix, new) / error(nearest(case), new))
    assert np.mean(ratios) < 1.05
    assert max(ratios) < 1.25  # 1 dB, of the luckiest


@pytest.mark.parametrize("held", [0, 32])
def test_without_held_out_rows_weights_are_rounded_only(held: int) -> None:
    case = layer(3, 1, 8, 4, 96)
    case = case._replace(x=0.5 * case.x)  # a refit would double the weights
    found = dequantized(fit_and_round(case.weight, *halves(case, held)))
    ratio = float((found * case.weight).sum() / np.square(case.weight).sum())
    assert ratio == pytest.approx(2.0 if held else 1.0, abs=0.1)


@pytest.mark.parametrize("mean", [100.0, 3000.0])
def test_moments_about_a_large_mean_keep_their_precision(mean: float) -> None:
    case = layer(1, 2, 12, 5, 400)
    far = Case((case.x + mean).astype(np.float32), (case.y - mean).astype(np.float32), case.weight)
    fit, held_out = halves(far, 100)
    every = fit.merged(held_out)
    assert every.count == 400
    xx, xy, yy = every.centred(True)
    x, y = (part - part.mean(1, keepdims=True) for part in (case.x, case.y))
    close = {"rtol": 2e-3, "atol": 2e-3}
    np.testing.assert_allclose(xx, x.transpose(0, 2, 1) @ x / 400, **close)
    np.testing.assert_allclose(xy, x.transpose(0, 2, 1) @ y / 400, **close)
    np.testing.assert_allclose(yy, np.square(y).mean(1), **close)
    about_zero = every.centred(False)[0]
    wide = far.x.astype(np.float64)
    np.testing.assert_allclose(about_zero, wide.transpose(0, 2, 1) @ wide / 400, rtol=1e-5)
    near = error(dequantized(fit_and_round(case.weight, *halves(case, 100))), case)
    moved = Case(case.x, case.y, case.weight)
    assert error(dequantized(fit_and_round(case.weight, fit, held_out)), moved) < 1.2 * near


def test_moments_are_the_same_in_any_portions() -> None:
    case = layer(2, 2, 7, 3, 60, mean=2.0)
    whole, _ = halves(case, 0)
    parts = Moments(2, 7, 3, whole.origin)
    for start, stop in ((0, 1), (1, 20), (20, 60)):
        parts.add(case.x[:, start:stop], case.y[:, start:stop])
    for one, other in zip(parts.centred(True), whole.centred(True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_moments_of_some_groups_are_those_of_their_rows() -> None:
    case = layer(4, 4, 6, 2, 80, mean=1.0)
    some = slice(1, None, 2)
    found = halves(case, 0)[0].of_groups(some)
    wanted = halves(Case(case.x[some], case.y[some], case.weight[some]), 0)[0]
    assert found.count == wanted.count
    for one, other in zip(found.centred(True), wanted.centred(True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_without_a_bias_the_means_are_fitted_too() -> None:
    """Inputs about 5: half a step off on each weight moves the mean of the output, which no bias mends."""
    errors = []
    for seed in range(8):
        case = layer(seed, 1, 16, 8, 400, mean=5.0)
        errors.append(
            [error(dequantized(fit_and_round(case.weight, *halves(case, 100), biased=b)), case, False) for b in (False, True)]
        )
    without, with_bias = np.mean(errors, axis=0)
    assert without < 0.1 * with_bias


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5))
def test_tied_outputs_share_their_scale(seed: int, taps: int, channels: int) -> None:
    case = layer(seed, 1, 10, taps * channels, 120)
    case = case._replace(weight=case.weight * np.exp(np.random.default_rng(seed).normal(size=taps * channels)))
    case = case._replace(y=case.x @ case.weight)
    tie = np.repeat(np.arange(channels), taps)
    found = fit_and_round(case.weight, *halves(case, 30), tie)
    shared = found.scales.reshape(channels, taps)
    assert (shared == shared[:, :1]).all()
    assert (shared[:, 0] * LEVELS >= 0.99 * LEAST * np.abs(case.weight[0]).reshape(10, channels, taps).max((0, 2))).all()
    assert error(dequantized(found), case) < 1e-3 * np.square(case.y).mean()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = layer(5, 2, 50, 6, 400, noise=0.02)
    whole = fit_and_round(case.weight, *halves(case, 100))
    monkeypatch.setattr(rounding, "_BLOCK", 16)
    parted = fit_and_round(case.weight, *halves(case, 100))
    assert (parted.integers != whole.integers).mean() < 0.01  # sums in another order may turn a tie
    np.testing.assert_allclose(parted.scales, whole.scales, rtol=1e-5)
    assert parted.error == pytest.approx(whole.error, rel=1e-3)


def test_given_scales_are_kept_and_outputs_do_not_matter() -> None:
    case = layer(6, 1, 24, 8, 400)
    fit, held_out = halves(case, 100)
    scales = clip_scales(case.weight, np.ones((1, 24)))
    found = Rounded(round_to_scales(case.weight, scales, fit.merged(held_out)), scales, 0.0)
    assert error(dequantized(found), case) < error(nearest(case), case)
    silent = Moments(1, 24, 1, (fit.origin[0], np.zeros((1, 1), np.float32)))
    silent.add(case.x, np.zeros((1, 400, 1)))
    again = round_to_scales(case.weight, scales, silent)
    np.testing.assert_array_equal(again, found.integers)


@pytest.mark.parametrize("decades", [0, 3, 6])
def test_given_scales_bear_inputs_of_any_power(decades: int) -> None:
    """float32 work: where one input's power is a million times another's, it must not drown what descent goes by."""
    case = layer(8, 1, 96, 40, 1000)
    case = case._replace(x=case.x * 10.0 ** np.random.default_rng(1).uniform(-decades / 2, decades / 2, 96))
    case = case._replace(y=case.x @ case.weight)
    fit, _ = halves(case, 0)
    scales = clip_scales(case.weight, np.einsum("gkk->gk", fit.centred(True)[0]))
    exact = np.clip(np.rint(case.weight / scales[:, None, :]), -LEVELS, LEVELS) * scales[:, None, :]
    found = round_to_scales(case.weight.astype(np.float32), scales, fit) * scales[:, None, :]
    assert error(found, case) < 0.7 * error(exact, case)


@pytest.mark.parametrize("exponent", [-40, 60])
def test_layers_of_any_size_are_fitted_alike(exponent: int) -> None:
    """Inputs and outputs of 1e-12 and 1e18, whose squares float32 does not hold or hardly."""
    case = layer(11, 1, 24, 8, 400, noise=0.05)
    other = Case(np.ldexp(case.x, exponent), np.ldexp(case.y, exponent), case.weight)
    fitted, again = (fit_and_round(c.weight, *halves(c, 100)) for c in (case, other))
    assert again.error == pytest.approx(fitted.error, rel=0.01)
    np.testing.assert_allclose(again.scales, fitted.scales, rtol=0.01)
    scales = clip_scales(case.weight, np.ones((1, 24)))
    rounded, same = (round_to_scales(c.weight, scales, halves(c, 0)[0]) for c in (case, other))
    assert (rounded != same).mean() < 0.01


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e15])
def test_weights_of_any_size_are_rounded_alike(size: float) -> None:
    """A channel far below the others becomes zeros: float16 holds its scale then, for it may be any."""
    weight = np.random.default_rng(0).normal(size=(1, 32, 4)) * size
    scales = clip_scales(weight, np.ones((1, 32)))
    rounded = np.rint(weight / scales[:, None, :]) * scales[:, None, :]
    assert np.square(rounded - weight).mean() < 1e-3 * np.square(weight).mean()
    dying = weight * [1.0, 1.0, 1e-14, 1.0]
    assert not np.rint(dying / clip_scales(dying, np.ones((1, 32)))[:, None, :])[:, :, 2].any()


def test_parts_of_the_outputs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = layer(9, 2, 30, 23, 400, noise=0.02)
    fit, held_out = halves(case, 100)
    scales = clip_scales(case.weight, np.ones((2, 30)))
    whole = fit_and_round(case.weight, fit, held_out), round_to_scales(case.weight, scales, fit)
    monkeypatch.setattr(rounding, "_OUTPUTS", 10)
    np.testing.assert_allclose(clip_scales(case.weight, np.ones((2, 30))), scales)
    parted = fit_and_round(case.weight, fit, held_out), round_to_scales(case.weight, scales, fit)
    assert (parted[0].integers != whole[0].integers).mean() < 0.01  # sums in another order may turn a tie
    np.testing.assert_allclose(parted[0].scales, whole[0].scales, rtol=1e-5)
    assert (parted[1] != whole[1]).mean() < 0.01


def test_memory_is_that_of_the_integers() -> None:
    """It was 22 times the weights: +1.6 GB for a layer of 72 MB."""
    r = np.random.default_rng(0)
    weight = r.normal(size=(1, 64, 1 << 15)).astype(np.float32)  # 8 MB
    moments = Moments(1, 64, 1)
    moments.add(r.normal(size=(1, 200, 64)), np.zeros((1, 200, 1)))
    tracemalloc.start()
    try:
        scales = weight_scales(weight[0], 1, "mse")[None]
        at_scales = tracemalloc.get_traced_memory()[1]
        integers = round_to_scales(weight, scales, moments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert at_scales < 0.6 * weight.nbytes
    assert peak < integers.nbytes + 0.6 * weight.nbytes


def test_inputs_that_never_move_and_weights_of_zero_do_no_harm() -> None:
    case = layer(7, 1, 8, 4, 64)
    x, weight = case.x.copy(), case.weight.copy()
    x[:, :, 2], weight[:, :, 1] = 0.0, 0.0
    dead = Case(x, x @ weight, weight)
    found = fit_and_round(weight, *halves(dead, 16))
    assert not found.integers[:, :, 1].any()
    assert (found.scales > 0).all()
    matrix = dequantized(found)
    np.testing.assert_allclose(matrix[0, 2], weight[0, 2], atol=float(found.scales.max()))  # to nearest
    still = Case(np.zeros_like(x), np.zeros_like(case.y), case.weight)
    np.testing.assert_allclose(dequantized(fit_and_round(case.weight, *halves(still, 16))), case.weight, atol=0.05)


FINITE = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, array_shapes(min_dims=3, max_dims=3, max_side=5), elements=FINITE), st.integers(0, 100))
@example(np.full((1, 1, 1), 1.2e-38, np.float32), 0)
def test_clips_lie_within_the_weights(weight: Array, seed: int) -> None:
    power = np.random.default_rng(seed).uniform(0, 1, weight.shape[:2])
    scales = clip_scales(weight.astype(np.float64), power)
    amax = np.abs(weight.astype(np.float64)).max(1)
    assert scales.shape == amax.shape
    least = max(1e-10 * amax.max(), MIN_SCALE)
    alive = amax * LEAST / LEVELS > least  # others are dead
    np.testing.assert_allclose(scales[(amax > 0) & (amax / LEVELS < least)], least, rtol=1e-6)
    assert (scales[alive] <= amax[alive] / LEVELS * (1 + 1e-6)).all()
    assert (scales[alive] >= amax[alive] * LEAST / LEVELS * (1 - 1e-6)).all()
    assert ((scales > 0) & np.isfinite(scales)).all()
    np.testing.assert_array_equal(scales[amax == 0], np.float64(np.float32(1 / LEVELS)))
    np.testing.assert_array_equal(scales, scales.astype(np.float32))


def test_a_clip_weighs_inputs_by_their_power() -> None:
    """One large weight among small ones: clipped where its input is silent, kept where it carries the output."""
    weight = np.full((1, 64, 1), 0.03)
    weight[0, :, 0] *= np.linspace(0.2, 1, 64)
    weight[0, 0, 0] = 1.0
    power = np.ones((1, 64))
    power[0, 0] = 1e-6
    assert clip_scales(weight, power)[0, 0] < 0.5 / LEVELS
    power[0, 0] = 1.0
    assert clip_scales(weight, power)[0, 0] > 0.9 / LEVELS


@pytest.mark.parametrize("method", ["mse", "minmax"])
@pytest.mark.parametrize("axis", [0, 1])
def test_weight_scales(method: str, axis: int) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 6, 3, 3)).astype(np.float32)
    np.moveaxis(weight, axis, 0)[2] = 0.0
    scales = weight_scales(weight, axis, method)
    amax = np.abs(np.moveaxis(weight, axis, 0)).reshape(6, -1).max(1)
    assert scales.dtype == np.float32
    assert scales.shape == (6,)
    assert scales[2] == np.float32(1 / LEVELS)
    alive = amax > 0
    if method == "minmax":
        np.testing.assert_allclose(scales[alive], amax[alive] / LEVELS, rtol=1e-6)
    else:
        assert (scales[alive] <= amax[alive] / LEVELS * (1 + 1e-6)).all()
        assert (scales[alive] >= LEAST * amax[alive] / LEVELS * (1 - 1e-6)).all()


def masked(case: Case, seed: int = 0) -> tuple[Case, Array]:
    """The case with two of every four consecutive inputs of each output at zero, and its mask."""
    groups, inputs, outputs = case.weight.shape
    order = np.random.default_rng(seed).random((groups, inputs // 4, 4, outputs)).argsort(2)
    mask = (order < 2).reshape(groups, inputs, outputs)
    weight = case.weight * mask
    return Case(case.x, case.y - case.x @ (case.weight - weight), weight), mask


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 2), st.integers(2, 20), st.integers(0, 30), st.booleans(), st.integers(0, 2))
def test_what_is_masked_stays_zero(seed: int, groups: int, fours: int, held: int, biased: bool, sweeps: int) -> None:
    case, mask = masked(layer(seed, groups, 4 * fours, 9, 80, 1.0, 0.2), seed)
    fit, held_out = halves(case, held)
    found = fit_and_round(case.weight, fit, held_out, biased=biased, sweeps=sweeps, mask=mask)
    assert not found.integers[~mask].any()
    given = round_to_scales(case.weight, found.scales, fit, biased=biased, sweeps=sweeps, mask=mask)
    assert not given[~mask].any()
    whole = fit_and_round(case.weight, fit, held_out, biased=biased, sweeps=sweeps, mask=np.ones_like(mask))
    free = fit_and_round(case.weight, fit, held_out, biased=biased, sweeps=sweeps)
    assert np.abs(dequantized(whole) - dequantized(free)).max() < 0.05 * np.abs(case.weight).max()


@pytest.mark.parametrize("gain", [1.0, 0.8], ids=["exact", "damped inputs"])
def test_fitting_under_a_mask_beats_nearest_and_zeroing_afterwards(gain: float) -> None:
    case, mask = masked(layer(3, 1, 64, 24, 3000))
    case = case._replace(x=gain * case.x)
    seen, new = case.part(slice(0, 2000)), case.part(slice(2000, None))
    found = error(dequantized(fit_and_round(case.weight, *halves(seen, 500), mask=mask)), new)
    free = dequantized(fit_and_round(case.weight, *halves(seen, 500)))
    assert (free[~mask] != 0).any()
    assert found < (0.9 if gain == 1 else 0.01) * error(nearest(case), new)
    assert found < 0.9 * error(free * mask, new)

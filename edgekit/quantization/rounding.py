"""Weights fitted and rounded so that a layer's int8 output is as near to the float one as int8 can be.

All on second moments: a layer (rows, inputs) x (inputs, outputs) is seen once, and its error is a quadratic form from then
on. Refit: ridge regression of the float outputs on the quantized inputs, its strength chosen on held-out rows. Rounding:
E. Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers", ICLR 2023, then
coordinate descent on the same objective (K. Behdin et al., "QuantEase", 2023). What a mask leaves out is 0 and stays 0, and
the rest makes up for that as well (E. Frantar, D. Alistarh, "SparseGPT", ICML 2023). (groups, ...) leads everywhere. float64,
and float32 where very wide layers meet scales that are given; outputs, which are independent, go in parts that fit into caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .statistics import LEVELS, MIN_SCALE

__all__ = ["SWEEPS", "Moments", "Rounded", "clip_scales", "fit_and_round", "round_to_scales", "weight_scales"]

Array = NDArray[Any]
_RATIOS = (*np.linspace(1.0, 0.52, 17), 0.47, 0.42, 0.36, 0.3)
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # times the mean diagonal
_DAMP = 1e-3
_SOLVED, _ITERATIONS = 1e-4, 60  # of the residual; ridges bound the condition
_BLOCK = 64
_OUTPUTS = 512  # of all groups, at a time
_LARGE = 1e15  # float32 bears sums of squares of less
#: Of the tensor's largest weight: a channel whose scale would be less is dead, and becomes zeros, which may have any scale: one
#: that float16 does not hold would keep the whole layer in float32.
_DEAD = 1e-10
SWEEPS = 2


class Moments:
    """Sums over rows of quantized inputs x (groups, rows, inputs) and float outputs y (groups, rows, outputs).

    Second moments are taken about an ``origin`` near the means: elsewhere their difference would drown in rounding.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, origin: tuple[Array, Array] | None = None) -> None:
        self.count = 0
        self.origin = origin or (np.zeros((groups, inputs), np.float32), np.zeros((groups, outputs), np.float32))
        self.x = np.zeros((groups, inputs))
        self.y = np.zeros((groups, outputs))
        self.xx = np.zeros((groups, inputs, inputs))
        self.xy = np.zeros((groups, inputs, outputs))
        self.yy = np.zeros((groups, outputs))

    def add(self, x: Array, y: Array) -> None:
        # float32 products of some thousand rows, float64 sums: twice as fast, and sums do not drift
        x = x.astype(np.float32) - self.origin[0][:, None]
        y = y.astype(np.float32) - self.origin[1][:, None]
        if max(_largest(x), _largest(y)) > _LARGE:
            x, y = x.astype(np.float64), y.astype(np.float64)
        self.count += x.shape[1]
        self.x += x.sum(1, dtype=np.float64)
        self.y += y.sum(1, dtype=np.float64)
        across = x.transpose(0, 2, 1)
        self.xx += across @ x
        self.xy += across @ y
        self.yy += np.square(y, dtype=np.float64).sum(1)

    def merged(self, other: Moments) -> Moments:
        result = Moments(self.x.shape[0], self.x.shape[1], self.y.shape[1], self.origin)
        for name in ("count", "x", "y", "xx", "xy", "yy"):
            setattr(result, name, getattr(self, name) + getattr(other, name))
        return result

    def centred(self, biased: bool) -> tuple[Array, Array, Array]:
        """Covariances of x (groups, inputs, inputs), of x with y (groups, inputs, outputs), and variance of y.

        Without a bias that could carry means, moments about zero.
        """
        n = max(self.count, 1)
        mx, my = self.x / n, self.y / n
        xx = self.xx / n - mx[:, :, None] * mx[:, None, :]
        xy = self.xy / n - mx[:, :, None] * my[:, None, :]
        yy = np.maximum(self.yy / n - my**2, 0.0)
        if not biased:
            mx, my = mx + self.origin[0], my + self.origin[1]
            return xx + mx[:, :, None] * mx[:, None, :], xy + mx[:, :, None] * my[:, None, :], yy + my**2
        np.einsum("gkk->gk", xx)[:] = np.maximum(np.einsum("gkk->gk", xx), 0.0)
        return xx, xy, yy

    def of_groups(self, chosen: slice) -> Moments:
        """Those of some groups alone: views, to be read."""
        result = Moments(0, 0, 0, (self.origin[0][chosen], self.origin[1][chosen]))
        result.count = self.count
        for name in ("x", "y", "xx", "xy", "yy"):
            setattr(result, name, getattr(self, name)[chosen])
        return result


class Rounded(NamedTuple):
    """``integers`` int8 (groups, inputs, outputs), ``scales`` (groups, outputs).

    ``error``: the mean squared error of the outputs over their variance, on all rows.
    """

    integers: NDArray[np.int8]
    scales: Array
    error: float


def fit_and_round(
    weight: Array,
    fit: Moments,
    held_out: Moments,
    tie: Array | None = None,
    *,
    biased: bool = True,
    sweeps: int = SWEEPS,
    mask: Array | None = None,
) -> Rounded:
    """Fit and round float64 weights (groups, inputs, outputs), which meet the inputs that the moments were taken of.

    ``sweeps``: how often coordinate descent goes through the inputs. ``mask``: bool (groups, inputs, outputs), False where
    the weight is 0 and its integer must be 0; None: nothing must.

    ``tie``: indices (outputs,) of outputs that share a scale, for a ConvTranspose's taps. Without a bias to carry the means
    (not ``biased``), moments are taken about zero.
    """
    every = fit.merged(held_out)
    xx, _, _ = every.centred(biased)
    hessian = _shrunk(xx, every.count)
    wanted = _refit(weight, fit, held_out, biased, mask)
    scales = clip_scales(wanted, np.einsum("gkk->gk", hessian), tie)
    order, upper = _spreading(hessian)
    integers = np.empty(weight.shape, np.int8)
    for part in _parts(weight):
        target, scale = hessian @ wanted[:, :, part], scales[:, part]
        free = None if mask is None else mask[:, :, part]
        q = _sweep(_gptq(wanted[:, :, part], scale, order, upper, free), scale, hessian, target, sweeps, free)
        if tie is None:
            scale = _rescaled(q, scale, hessian, target)
            q = _sweep(q, scale, hessian, target, sweeps, free)
        integers[:, :, part], scales[:, part] = q, scale
    return Rounded(integers, scales, _error(integers * scales[:, None, :], every, biased))


def round_to_scales(
    weight: Array, scales: Array, moments: Moments, *, biased: bool = True, sweeps: int = SWEEPS, mask: Array | None = None
) -> NDArray[np.int8]:
    """Weights (groups, inputs, outputs) of any float type to integers of given ``scales`` (groups, outputs), unfitted.

    What y the moments hold does not matter. Beside them, memory is that of the integers. ``mask``: as in `fit_and_round`.
    """
    hessian = _shrunk(moments.centred(biased)[0], moments.count)
    hessian = np.ldexp(hessian, -np.frexp(hessian.max())[1])  # float32 may not hold it; of what size it is does not matter
    order, upper = _spreading(hessian)
    hessian, upper = hessian.astype(np.float32), upper.astype(np.float32)
    integers = np.empty(weight.shape, np.int8)
    for part in _parts(weight):
        wanted, scale = weight[:, :, part].astype(np.float32), scales[:, part].astype(np.float32)
        free = None if mask is None else mask[:, :, part]
        q = _gptq(wanted, scale, order, upper, free)
        # of the difference: products of q and of the weights are far larger, and float32 has seven digits
        gradient = hessian @ (q * scale[:, None, :] - wanted)
        integers[:, :, part] = _descend(q, scale, hessian, gradient, sweeps, free)
    return integers


def _largest(values: Array) -> float:
    return max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))


def _parts(weight: Array) -> Iterator[slice]:
    """Of the outputs of (groups, inputs, outputs)."""
    size = max(_OUTPUTS // weight.shape[0], 1)
    yield from (slice(start, start + size) for start in range(0, weight.shape[2], size))


def _error(weight: Array, moments: Moments, biased: bool) -> float:
    xx, xy, variance = moments.centred(biased)
    power = np.einsum("gko,gko->", weight, xx @ weight - 2 * xy) + variance.sum()
    return max(float(power), 0.0) / max(float(variance.sum()), 1e-30)


def _shrunk(xx: Array, count: int) -> Array:
    """Covariances drawn to their diagonal, the more the fewer rows there were: few rows correlate by chance."""
    share = xx.shape[1] / (xx.shape[1] + 4.0 * max(count, 1))
    result: Array = xx * (1 - share)
    diagonal = np.einsum("gkk->gk", xx)
    floor = 1e-8 * diagonal.mean(1, keepdims=True) + 1e-30  # a channel that never moved rounds to nearest
    np.einsum("gkk->gk", result)[:] = diagonal * (1 + _DAMP) + floor
    return result


def _refit(weight: Array, fit: Moments, held_out: Moments, biased: bool, mask: Array | None) -> Array:
    """Weights that give the float outputs from the quantized inputs; those given, where none does better on held-out rows."""
    if not held_out.count or not fit.count:
        return weight
    xx, xy, _ = fit.centred(biased)
    # a mean of squares over n rows is known to sqrt(2 / n) of itself (outputs of one row err alike): less than that is luck
    doubt = min(np.sqrt(2.0 / held_out.count), 0.9)
    best, chosen = (1.0 - doubt) * _error(weight, held_out, biased), None
    for ridge in _RIDGES:
        candidate = _error(_ridge(weight, xx, xy, ridge, mask), held_out, biased)
        if candidate < best:
            best, chosen = candidate, ridge
    if chosen is None:
        return weight
    xx, xy, _ = fit.merged(held_out).centred(biased)
    return _ridge(weight, xx, xy, chosen, mask)


def _ridge(weight: Array, xx: Array, xy: Array, ridge: float, mask: Array | None) -> Array:
    """Least squares, drawn to ``weight``: minimises |y - W x|^2 + strength |W - weight|^2."""
    diagonal = np.einsum("gkk->gk", xx)
    strength = ridge * (diagonal + 1e-6 * diagonal.mean(1, keepdims=True) + 1e-12)
    damped = xx.copy()
    np.einsum("gkk->gk", damped)[:] += strength
    target = xy + strength[:, :, None] * weight
    solved: Array = np.linalg.solve(damped, target) if mask is None else _solve_within(damped, target, weight, mask)
    return solved


def _solve_within(matrix: Array, target: Array, start: Array, mask: Array) -> Array:
    """Conjugate gradients on each output's own inputs, those of ``mask``, from ``start``, scaled by the diagonal.

    Each output has a system of its own: to factor all of them would cost as many times more as there are outputs.
    """
    found = start * mask
    inverse = mask / np.einsum("gkk->gk", matrix)[:, :, None]
    rest = (target - matrix @ found) * mask
    step = inverse * rest
    power = (rest * step).sum(1, keepdims=True)
    least = _SOLVED**2 * power
    for _ in range(_ITERATIONS):
        if not (power > least).any():
            break
        along = (matrix @ step) * mask
        length = power / np.maximum((step * along).sum(1, keepdims=True), 1e-300)
        found += length * step
        rest -= length * along
        fresh = inverse * rest
        before, power = power, (rest * fresh).sum(1, keepdims=True)
        step = fresh + power / np.maximum(before, 1e-300) * step
    return found


def clip_scales(
    weight: Array, power: Array, tie: Array | None = None, ratios: Sequence[float] = _RATIOS, least: float | None = None
) -> Array:
    """Scale of each output (groups, outputs): the clip with the least error, inputs weighted by their ``power``.

    ``least`` of them; None: what makes dead channels zero.
    """
    if least is None:
        least = max(_DEAD * _largest(weight), MIN_SCALE)
    if tie is None and weight.shape[2] > _OUTPUTS:
        parts = [clip_scales(weight[:, :, part], power, ratios=ratios, least=least) for part in _parts(weight)]
        return np.concatenate(parts, axis=1)
    weight = weight.astype(np.float64)
    amax = np.abs(weight).max(1)
    if tie is not None:
        amax = _tied(amax, tie, np.maximum)
    best, chosen = np.full(amax.shape, np.inf), np.ones(amax.shape)
    for ratio in ratios:
        scale = np.maximum(amax * ratio / LEVELS, least)[:, None, :]
        off = np.clip(np.rint(weight / scale), -LEVELS, LEVELS) * scale - weight
        error = np.einsum("gko,gk->go", off**2, power)
        if tie is not None:
            error = _tied(error, tie, np.add)
        better = error < best
        best[better], chosen[better] = error[better], ratio
    scales = np.where(amax > 0, np.maximum(amax * chosen / LEVELS, least), 1.0 / LEVELS)
    return scales.astype(np.float32).astype(np.float64)


def weight_scales(weight: Array, axis: int, method: str) -> NDArray[np.float32]:
    """float32 scales (channels of ``axis``,), of the least squared error (``mse``) or the whole range (``minmax``)."""
    rows = np.moveaxis(weight, axis, -1).reshape(1, -1, weight.shape[axis])
    ratios = (1.0,) if method == "minmax" else _RATIOS
    scales: NDArray[np.float32] = clip_scales(rows, np.ones(rows.shape[:2]), ratios=ratios)[0].astype(np.float32)
    return scales


def _tied(values: Array, tie: Array, combine: Any) -> Array:
    result = np.zeros((values.shape[0], int(tie.max()) + 1))
    for group, row in enumerate(values):
        combine.at(result[group], tie, row)
    return result[:, tie]


def _spreading(xx: Array) -> tuple[Array, Array]:
    """The order in which inputs are rounded, and the upper Cholesky factor of the inverse, in that order."""
    order = np.argsort(-np.einsum("gkk->k", xx), kind="stable")
    hessian = xx[:, order][:, :, order]
    # Found at unit diagonal: channels' powers may lie decades apart.
    root = np.sqrt(np.einsum("gkk->gk", hessian))
    unit = hessian / (root[:, :, None] * root[:, None, :])
    return order, np.linalg.cholesky(np.linalg.inv(unit)).transpose(0, 2, 1) / root[:, None, :]


def _gptq(weight: Array, scales: Array, order: Array, upper: Array, mask: Array | None) -> Array:
    """Integers, as floats; each column's rounding error is spread over the columns that are still to be rounded."""
    groups, inputs, _ = weight.shape
    rest, q = weight[:, order].copy(), np.zeros_like(weight)
    free = None if mask is None else mask[:, order]
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = np.zeros((groups, stop - start, weight.shape[2]), weight.dtype)
        for k in range(start, stop):
            column = rest[:, k]
            q[:, k] = np.clip(np.rint(column / scales), -LEVELS, LEVELS)
            if free is not None:
                q[:, k] *= free[:, k]
            error = (column - q[:, k] * scales) / upper[:, k, k, None]
            rest[:, k + 1 : stop] -= upper[:, k, k + 1 : stop, None] * error[:, None]
            errors[:, k - start] = error
        rest[:, stop:] -= upper[:, start:stop, stop:].transpose(0, 2, 1) @ errors
    back = np.empty_like(order)
    back[order] = np.arange(inputs)
    return q[:, back]


def _sweep(q: Array, scales: Array, xx: Array, xy: Array, sweeps: int, mask: Array | None) -> Array:
    """Coordinate descent: each integer in turn to where the error is least, all others fixed."""
    return _descend(q, scales, xx, xx @ (q * scales[:, None, :]) - xy, sweeps, mask) if sweeps else q


def _descend(q: Array, scales: Array, xx: Array, gradient: Array, sweeps: int, mask: Array | None) -> Array:
    """``gradient``: half of it, (groups, inputs, outputs); it is used up."""
    q, inputs = q.copy(), q.shape[1]
    diagonal = np.maximum(np.einsum("gkk->gk", xx), 1e-30)
    for _ in range(sweeps):
        for start in range(0, inputs, _BLOCK):
            stop = min(start + _BLOCK, inputs)
            moved = np.zeros((q.shape[0], stop - start, q.shape[2]), q.dtype)
            for k in range(start, stop):
                step = gradient[:, k] / (diagonal[:, k, None] * scales)
                new = np.clip(np.rint(q[:, k] - step), -LEVELS, LEVELS)
                if mask is not None:
                    new *= mask[:, k]
                delta = (new - q[:, k]) * scales
                q[:, k] = new
                moved[:, k - start] = delta
                gradient[:, start:stop] += xx[:, start:stop, k, None] * delta[:, None]
            gradient[:, :start] += xx[:, :start, start:stop] @ moved
            gradient[:, stop:] += xx[:, stop:, start:stop] @ moved
    return q


def _rescaled(q: Array, scales: Array, xx: Array, xy: Array) -> Array:
    """The least-squares scale of each output, its integers fixed."""
    power = np.einsum("gko,gkl,glo->go", q, xx, q, optimize=True)
    cross = np.einsum("gko,gko->go", q, xy)
    usable = (power > 0) & (cross > 0)
    better = np.where(usable, cross / np.where(power > 0, power, 1.0), scales)
    better = np.clip(better, 0.5 * scales, 2.0 * scales)
    return np.maximum(better, MIN_SCALE).astype(np.float32).astype(np.float64)

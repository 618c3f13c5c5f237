"""How a tensor becomes int8: scale, and for the input of layers a shift and a factor for each channel.

The shift gives back the bit that a symmetric range wastes on a one-sided tensor; the factor moves range from the
activations into the weights (G. Xiao et al., "SmoothQuant", ICML 2023; between layers: M. Nagel et al., "Data-free
quantization through weight equalization and bias correction", ICCV 2019). Chosen by the error that they leave at the
outputs of the layers which read the tensor, to first order: each channel's squared error by the squared weights it meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .graph import Quantizer
from .rounding import clip_scales
from .statistics import LEVELS, MIN_SCALE
from .unfold import Unfolding

__all__ = ["Reader", "propose"]

Array = NDArray[Any]
_RATIOS = np.array([1.0, 0.88, 0.76, 0.65, 0.54, 0.44, 0.34, 0.25, 0.15], np.float32)
_COARSE = (1.0, 0.85, 0.7, 0.55)
_ALPHAS = (0.0, 0.5, 1.0)
_ROUNDING = 0.35  # what fitting leaves of the weights' rounding error, roughly; the choice is not sensitive to it
_FINE = np.concatenate([np.linspace(1.0, 0.4, 13), [0.33, 0.26, 0.19, 0.12]]).astype(np.float32)
_NEAR = 1.05  # a wider margin must be better by more than chance
_MARGINS = (1.0, 1.1, 1.25, 1.5, 2.0)
_FLOOR = 0.2  # of the median half range
_WORTH = 0.9  # an operator in front of Q must promise at least this


class Reader(NamedTuple):
    """A layer that reads the tensor: its geometry and float64 weights (groups, inputs, outputs)."""

    unfolding: Unfolding
    weight: Array


class Drawn(NamedTuple):
    """``rows`` (rows, channels) float32; ``low`` and ``high`` (channels,) are the range of all that they were drawn from."""

    rows: Array
    low: Array
    high: Array


def propose(halves: Sequence[Drawn], readers: Sequence[Reader], *, extra: bool) -> list[Quantizer]:
    """Quantizers worth measuring, the plain one first; ``extra`` allows shift and factor.

    ``halves``: rows of different samples, so that what is chosen on one can be judged on the other. The rows of one sample
    are alike, and new samples leave the range of the old ones: how far to widen it is judged too.
    """
    # Of a size near 1 by a power of two, which is exact: float32 bears no squares of very large or very small tensors.
    size = max(float(np.abs([half.low, half.high]).max()) for half in halves)
    exponent = int(np.frexp(size)[1])
    halves = [Drawn(*(np.ldexp(part, -exponent) for part in half)) for half in halves]
    gain: Array = np.sum([_input_gain(reader) for reader in readers], axis=0)
    both = Drawn(
        np.concatenate([half.rows for half in halves]),
        np.min([half.low for half in halves], axis=0),
        np.max([half.high for half in halves], axis=0),
    )
    folds = list(zip(halves, halves[::-1], strict=True))

    def tried(shifted: bool, alpha: float) -> tuple[float, bool, float, float]:
        """(error, shifted, alpha, margin): of the best margin."""
        errors = dict.fromkeys(_MARGINS if len(halves) > 1 else _MARGINS[:1], 0.0)
        for half, other in folds:
            found = _scaled(half, gain, readers, shifted, alpha)
            for margin, error in zip(errors, _judged(other.rows, gain, readers, found, list(errors)), strict=True):
                errors[margin] += error
        margin = next(m for m in errors if errors[m] <= _NEAR * min(errors.values()))
        return errors[margin], shifted, alpha, margin

    def made(shifted: bool, alpha: float, margin: float) -> Quantizer:
        found = _scaled(both, gain, readers, shifted, alpha)
        scale = max(float(np.ldexp(np.float32(found.scale * margin), exponent)), MIN_SCALE)
        return found._replace(scale=scale, shift=None if found.shift is None else np.ldexp(found.shift, exponent))

    plain = tried(False, 0.0)
    chosen = [plain]
    if extra:
        tied = any(reader.unfolding.layer.op == "ConvTranspose" for reader in readers)  # one bias for all taps
        for shifted in (False,) if tied else (False, True):
            best = min(tried(shifted, alpha) for alpha in _ALPHAS if shifted or alpha)
            if best[0] < _WORTH * plain[0]:
                chosen.append(best)
    return [made(*trial[1:]) for trial in chosen]


def _judged(rows: Array, gain: Array, readers: Sequence[Reader], quantizer: Quantizer, margins: list[float]) -> list[float]:
    """The error at the outputs, inputs and weights rounded, on rows that chose nothing; for each widening of the scale."""
    moved, factor = rows, quantizer.factor
    if quantizer.shift is not None:
        moved = moved - quantizer.shift
    if factor is not None:
        moved, gain = moved * factor, gain / factor.astype(np.float64) ** 2
    rounding = _ROUNDING * sum(_rounding_error(reader, moved, factor) for reader in readers)
    scales = [np.full(moved.shape[1], quantizer.scale * margin, np.float32) for margin in margins]
    return [float((_error(moved, scale) * gain).sum()) + rounding for scale in scales]


def _input_gain(reader: Reader) -> Array:
    """Squared weights that each channel meets, (channels,)."""
    squares = (reader.weight**2).sum(2)  # (groups, inputs)
    gain: Array = squares.reshape(reader.unfolding.channels, -1).sum(1)
    return gain


def _middles(rows: Array, low: Array, high: Array) -> Array:
    """The middle of each channel's range, outliers clipped where that costs less; float32."""
    best, chosen = np.full(rows.shape[1], np.inf), (low + high) / 2
    quantiles = np.quantile(rows, [0.0, 0.001, 0.01, 0.99, 0.999, 1.0], axis=0)
    for bottom, top in ((low, high), (quantiles[0], quantiles[5]), (quantiles[1], quantiles[4]), (quantiles[2], quantiles[3]),
                        (low, quantiles[4]), (low, quantiles[3]), (quantiles[1], high), (quantiles[2], high)):  # fmt: skip
        middle, half = (bottom + top) / 2, np.maximum((top - bottom) / 2, 1e-12)
        off = _error(rows - middle, half / LEVELS)
        better = off < best
        best[better], chosen[better] = off[better], middle[better]
    return chosen.astype(np.float32)


def _error(moved: Array, scale: Array) -> Array:
    """Mean squared rounding and clipping error of each channel."""
    scale = np.maximum(scale, MIN_SCALE).astype(np.float32)
    level = moved / scale
    np.rint(level, out=level)
    np.clip(level, -LEVELS - 1, LEVELS, out=level)
    level *= scale
    level -= moved
    mean: Array = np.einsum("rc,rc->c", level, level) / len(level)
    return mean


def _half_ranges(moved: Array, extreme: Array) -> Array:
    """The half range of each channel with the least squared error."""
    best, chosen = np.full(moved.shape[1], np.inf), extreme.copy()
    for ratio in _RATIOS:
        off = _error(moved, extreme * ratio / LEVELS)
        better = off < best
        best[better], chosen[better] = off[better], (extreme * ratio)[better]
    return chosen


def _scaled(drawn: Drawn, gain: Array, readers: Sequence[Reader], shifted: bool, alpha: float) -> Quantizer:
    """The best scale for one shift and one strength of the factor."""
    shift = _middles(drawn.rows, drawn.low, drawn.high) if shifted else None
    moved = drawn.rows if shift is None else drawn.rows - shift
    centre = 0.0 if shift is None else shift
    extreme = np.maximum(np.abs(drawn.low - centre), np.abs(drawn.high - centre))
    factor: Array | None = None
    if alpha:
        half = _half_ranges(moved, extreme)
        # a floor under channels that are all but dead: what a few rows never showed will come
        half = np.maximum(half, max(_FLOOR * float(np.median(half[half > 0], keepdims=True)[0]) if half.any() else 0.0, 1e-9))
        meets = np.sqrt(gain / max(sum(reader.weight.shape[2] for reader in readers), 1)) + 1e-12
        raw = meets ** (1 - alpha) / half**alpha
        raw = raw / np.exp(np.log(raw).mean())
        factor = np.clip(raw, 1e-4, 1e4).astype(np.float32)
        moved, extreme = moved * factor, extreme * factor
        gain = gain / factor.astype(np.float64) ** 2
    best, scale = np.inf, 1.0
    top = float((half * factor).max()) if factor is not None else float(extreme.max())
    tops = top * _FINE if factor is None else np.concatenate([[float(extreme.max())], top * _FINE])
    for clip in tops:
        step = max(float(clip) / LEVELS, MIN_SCALE)
        off = float((_error(moved, np.full(moved.shape[1], step)) * gain).sum())
        if off < best:
            best, scale = off, step
    return Quantizer(float(np.float32(scale)), shift, factor)


def _rounding_error(reader: Reader, moved: Array, factor: Array | None) -> float:
    """What rounding the weights to nearest adds at the outputs, for inputs of the rows' variance."""
    unfolding = reader.unfolding
    power = unfolding.per_input(moved.var(0))  # (groups, inputs)
    weight = reader.weight
    if factor is not None:
        weight = weight / unfolding.per_input(factor.astype(np.float64))[:, :, None]
    scales = clip_scales(weight, power + 1e-12, ratios=_COARSE)[:, None, :]
    off = np.clip(np.rint(weight / scales), -LEVELS, LEVELS) * scales - weight
    return float(np.einsum("gko,gk->", off**2, power))

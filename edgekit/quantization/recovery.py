"""Getting back what rounding cost, without an operator more in the graph: weight clips and bias correction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekit.progress import track

from .graph import Parameters, insert
from .placement import Layer, Placement
from .prepare import constants
from .simulate import Feeds, Simulator, exposed
from .statistics import LEVELS, MIN_SCALE

__all__ = ["WEIGHT_METHODS", "correct_biases", "weight_scales"]

Array = NDArray[Any]
_RATIOS = np.linspace(1.0, 0.3, 71)


def _minmax(rows: Array) -> Array:
    amax: Array = np.abs(rows).max(1)
    return amax


def _mse(rows: Array) -> Array:
    """The clip of each row (C, K) with the least mean squared error; wider wins a tie."""
    amax = _minmax(rows)
    best, clip = np.full(len(rows), np.inf), amax.copy()
    for ratio in _RATIOS:
        scale = np.maximum(amax * ratio / LEVELS, MIN_SCALE)[:, None]
        error = ((np.clip(np.rint(rows / scale), -LEVELS, LEVELS) * scale - rows) ** 2).sum(1)
        better = error < best
        best[better], clip[better] = error[better], amax[better] * ratio
    return clip


#: How a channel's clip is chosen: rows (channels, weights a channel) -> clips (channels,).
WEIGHT_METHODS: dict[str, Callable[[Array], Array]] = {"mse": _mse, "minmax": _minmax}


def weight_scales(weight: Array, axis: int, method: str) -> NDArray[np.float32]:
    """float32 scales (channels of ``axis``,). A channel of zeros gets 1/127."""
    rows = np.moveaxis(weight.astype(np.float64), axis, 0).reshape(weight.shape[axis], -1)
    clip = WEIGHT_METHODS[method](rows)
    clip = np.where(clip > 0, np.maximum(clip, LEVELS * MIN_SCALE), 1.0)
    return (clip / LEVELS).astype(np.float32)


def correct_biases(
    prepared: onnx.ModelProto,
    placement: Placement,
    parameters: Parameters,
    chosen: Sequence[str],
    batches: Callable[[], Iterable[Feeds]],
) -> Parameters:
    """Move each layer's bias so that its mean output, channel by channel, is the float graph's again.

    In the graph's order, each layer behind the corrected ones before it. Source: M. Nagel et al., "Data-free quantization
    through weight equalization and bias correction", ICCV 2019, section 4.2 (the empirical form).
    """
    layers = [layer for layer in placement.layers if layer.name in set(chosen) and layer.biased]
    if not layers:
        return parameters
    wanted = _means(prepared, layers, batches())
    known = constants(prepared.graph)
    for layer in track(layers, "correcting biases"):
        model = insert(prepared, placement, parameters, chosen)
        shift = wanted[layer.name] - _means(model, [layer], batches())[layer.name]  # (channels,)
        before = parameters.biases.get(layer.name)
        if before is None:
            before = numpy_helper.to_array(known[layer.bias]).ravel() if layer.bias else np.zeros(1, np.float32)
        corrected = (before.astype(np.float64) + shift).astype(np.float32)
        parameters = dataclasses.replace(parameters, biases={**parameters.biases, layer.name: corrected})
    return parameters


def _means(model: onnx.ModelProto, layers: list[Layer], batches: Iterable[Feeds]) -> dict[str, Array]:
    """Mean output of each layer, (channels,), in float64."""
    run = Simulator(exposed(model, [layer.output for layer in layers]))
    sums: dict[str, Array] = {}
    counts: dict[str, int] = {}
    for feeds in batches:
        for layer, array in zip(layers, run(feeds).values(), strict=True):
            flat = np.moveaxis(array, layer.channels, 0).reshape(array.shape[layer.channels], -1)
            sums[layer.name] = sums.get(layer.name, 0.0) + flat.sum(1, dtype=np.float64)
            counts[layer.name] = counts.get(layer.name, 0) + flat.shape[1]
    return {name: total / counts[name] for name, total in sums.items()}

"""A layer as a matrix product: which rows of inputs make which rows of outputs.

Convolutions are unfolded at sampled positions only, so that memory and time stay bounded whatever the picture's size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from .placement import Layer
from .prepare import attribute

__all__ = ["Unfolding", "unfolding"]

Array = NDArray[Any]


class Unfolding(NamedTuple):
    """Geometry of one layer: ``groups`` independent products of (rows, inputs) by (inputs, outputs).

    Inputs are channels x taps (channel first), outputs are channels, or channels x taps for a ConvTranspose.
    """

    layer: Layer
    weight_shape: tuple[int, ...]
    groups: int
    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Of the data."""
        if self.layer.op == "Conv":
            return self.weight_shape[1] * self.groups
        return self.weight_shape[1 if self.layer.op == "Gemm" and self.layer.axis == 0 else 0]

    @property
    def inputs(self) -> int:
        return self.channels // self.groups * (int(np.prod(self.taps)) if self.layer.op == "Conv" else 1)

    def matrix(self, weight: Array) -> NDArray[np.float64]:
        """Weights -> float64 (groups, inputs, outputs)."""
        wide = weight.astype(np.float64)
        if self.layer.op == "Conv":
            return wide.reshape(self.groups, -1, self.inputs).transpose(0, 2, 1)
        if self.layer.op == "ConvTranspose":
            return wide.reshape(1, self.channels, -1)
        return (wide.T if self.layer.axis == 0 else wide)[None]

    def weight(self, matrix: Array) -> Array:
        """The inverse of `matrix`, for any dtype."""
        if self.layer.op == "Conv":
            return np.ascontiguousarray(matrix.transpose(0, 2, 1)).reshape(self.weight_shape)
        if self.layer.op == "ConvTranspose":
            return matrix.reshape(self.weight_shape)
        return np.ascontiguousarray(matrix[0].T if self.layer.axis == 0 else matrix[0])

    def output_scales(self, scales: Array) -> Array:
        """Scales of the weights' channels -> (groups, outputs)."""
        if self.layer.op == "ConvTranspose":
            return np.repeat(scales, int(np.prod(self.taps)))[None]
        return scales.reshape(self.groups, -1)

    def channel_scales(self, scales: Array) -> Array:
        """The inverse: (groups, outputs) -> (channels,)."""
        if self.layer.op == "ConvTranspose":
            return scales.reshape(-1, int(np.prod(self.taps)))[:, 0]
        return scales.reshape(-1)

    def bias(self, means: Array) -> Array:
        """Output means (groups, outputs) -> (channels,): taps of a ConvTranspose share their channel's bias."""
        if self.layer.op == "ConvTranspose":
            means = means.reshape(-1, int(np.prod(self.taps))).mean(1)
        return means.reshape(-1)

    def per_input(self, values: Array) -> Array:
        """Values of the data's channels (C,) -> (groups, inputs)."""
        taps = int(np.prod(self.taps)) if self.layer.op == "Conv" else 1
        return np.repeat(values.reshape(self.groups, -1), taps, axis=1)

    def channel_rows(self, x: Array) -> Array:
        """The layer's data as rows of channels: (rows, channels), a view where possible."""
        return np.moveaxis(x, self.layer.features, -1).reshape(-1, self.channels)

    def rows(self, x: Array, y: Array, limit: int, seed: int) -> tuple[Array, Array]:
        """At most ``limit`` rows, drawn by ``seed``: inputs (groups, rows, inputs) and outputs (groups, rows, outputs)."""
        if self.layer.op == "Conv":
            return self._patches(x, y, limit, seed)
        if self.layer.op == "ConvTranspose":
            return self._spread(x, y, limit, seed)
        data = self.channel_rows(x)
        out = np.moveaxis(y, self.layer.channels, -1).reshape(len(data), -1)
        chosen = _draw(len(data), limit, seed)
        return data[chosen][None], out[chosen][None]

    def _patches(self, x: Array, y: Array, limit: int, seed: int) -> tuple[Array, Array]:
        half = len(self.pads) // 2
        widths = [(0, 0), (0, 0), *zip(self.pads[:half], self.pads[half:], strict=True)]
        last = np.moveaxis(np.pad(x, widths) if any(self.pads) else x, 1, -1)  # (N, *space, C)
        out = np.moveaxis(y, 1, -1)
        places = out.shape[:-1]
        at = np.unravel_index(_draw(int(np.prod(places)), limit, seed), places)
        patches = np.empty((len(at[0]), x.shape[1], *self.taps), x.dtype)
        for tap in np.ndindex(*self.taps):
            where = [
                at[i + 1] * stride + step * dilation
                for i, (step, stride, dilation) in enumerate(zip(tap, self.strides, self.dilations, strict=True))
            ]
            patches[(slice(None), slice(None), *tap)] = last[(at[0], *where)]
        rows = len(at[0])
        inputs = patches.reshape(rows, self.groups, self.inputs).transpose(1, 0, 2)
        return inputs, out[at].reshape(rows, self.groups, -1).transpose(1, 0, 2)

    def _spread(self, x: Array, y: Array, limit: int, seed: int) -> tuple[Array, Array]:
        """A ConvTranspose whose taps do not overlap: each pixel makes a block of its own."""
        data = np.moveaxis(x, 1, -1)
        blocks = y.reshape(*y.shape[:2], *(n for pair in zip(x.shape[2:], self.taps, strict=True) for n in pair))
        space = list(range(2, 2 + 2 * len(self.taps), 2))
        out = blocks.transpose(0, *space, 1, *(axis + 1 for axis in space)).reshape(int(np.prod(data.shape[:-1])), -1)
        data = data.reshape(len(out), -1)
        chosen = _draw(len(data), limit, seed)
        return data[chosen][None], out[chosen][None]


def _draw(count: int, limit: int, seed: int) -> Array:
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, count]).choice(count, limit, replace=False))


def unfolding(layer: Layer, node: onnx.NodeProto, weight_shape: tuple[int, ...]) -> Unfolding | None:
    """The geometry of a layer; None for one that this room only rounds: overlapping ConvTranspose, weights with batch axes."""
    space = len(weight_shape) - 2
    if layer.op not in ("Conv", "ConvTranspose"):
        simple = space == 0 and layer.position == 1 and layer.features == -1
        return Unfolding(layer, weight_shape, 1, (), (), (), ()) if simple else None
    groups = int(attribute(node, "group", 1))
    strides = tuple(attribute(node, "strides", [1] * space))
    dilations = tuple(attribute(node, "dilations", [1] * space))
    pads = tuple(attribute(node, "pads", [0] * 2 * space))
    if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or min(pads, default=0) < 0:
        return None
    taps = weight_shape[2:]
    if layer.op == "ConvTranspose":
        extra = any(pads) or any(d != 1 for d in dilations) or any(attribute(node, "output_padding", ()))
        if groups != 1 or strides != taps or extra or attribute(node, "output_shape", None) is not None:
            return None
    return Unfolding(layer, weight_shape, groups, taps, strides, dilations, pads)

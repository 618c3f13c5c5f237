"""Which layers of a graph hold 2:4 weights: for each output and kernel position, at least two zeros in every four consecutive
input channels.

That is what TensorRT asks of weights before it tries its sparse kernels (NVIDIA TensorRT documentation, "Structured sparsity"),
of convolutions and of matrix products with constant weights. Recurrences have none, nor have grouped and transposed
convolutions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from .editing import Array, attribute, constants
from .weights import folded, shaped

__all__ = ["DenseLayer", "dense_layers", "is_24"]

_MOVED = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")


class DenseLayer(NamedTuple):
    """A Conv of one group, Gemm or MatMul with constant weights. ``name`` is the node's, or its output's where it has none.

    ``weight``: the initializer, or the Constant's output, that holds them, whatever lies between; ``shape`` as the node reads
    them. ``zeros``: share of the weights that are zero. ``sparse``: whether they are 2:4 along the input channels.
    """

    name: str
    op: str
    weight: str
    shape: tuple[int, ...]
    zeros: float
    sparse: bool


def is_24(weight: Array, axis: int = 1) -> bool:
    """Whether every four consecutive weights of any type along ``axis`` hold at least two zeros; its length divides by four."""
    if not weight.size or weight.shape[axis] % 4:
        return False
    fours = np.moveaxis(weight != 0, axis, -1).reshape(-1, 4)
    return bool((np.count_nonzero(fours, axis=1) <= 2).all())


def dense_layers(model: onnx.ModelProto) -> list[DenseLayer]:
    """Every layer that sparse kernels could run, in the graph's order; subgraphs are not looked into.

    Weights are found behind DequantizeLinear, which gives 0 at its zero point, QuantizeLinear, Cast and Transpose and such;
    of any type, 4-bit integers and float8 too. Changes nothing.
    """
    weights = _Weights(model.graph)
    found: list[DenseLayer] = []
    for node in model.graph.node:
        for position, axis in _positions(node):
            read = weights.of(node.input[position]) if len(node.input) > position else None
            if read is None or read.filled.ndim < 2:
                continue
            filled = read.filled
            zeros = 1.0 - np.count_nonzero(filled) / max(filled.size, 1)
            name = node.name or node.output[0]
            found.append(DenseLayer(name, node.op_type, read.name, filled.shape, zeros, is_24(filled, axis)))
            break
    return found


def _positions(node: onnx.NodeProto) -> list[tuple[int, int]]:
    """(input, axis of its input channels) of what may be the weights of a node."""
    if node.domain not in ("", "ai.onnx"):
        return []
    if node.op_type == "Conv":
        return [(1, 1)] if attribute(node, "group", 1) == 1 else []
    if node.op_type == "Gemm":
        return [(1, 1 if attribute(node, "transB", 0) else 0)]
    return [(1, -2), (0, -1)] if node.op_type == "MatMul" else []


class _Read(NamedTuple):
    """Where weights are not zero, as the node reads them, and what holds them."""

    name: str
    filled: NDArray[np.bool_]


class _Weights:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.known = constants(graph)
        self.makers = {name: node for node in graph.node for name in node.output if node.domain in ("", "ai.onnx")}
        self.found: dict[str, _Read | None] = {}

    def of(self, name: str) -> _Read | None:
        """None for what is no constant."""
        if name not in self.found:
            self.found[name] = self._read(name)
        return self.found[name]

    def _read(self, name: str) -> _Read | None:
        if (value := self._value(name)) is not None:
            return _Read(name, value != 0)
        maker = self.makers.get(name)
        if maker is None or not maker.input:
            return None
        source = maker.input[0]
        if maker.op_type == "DequantizeLinear" and (stored := self._value(source)) is not None:
            filled = self._filled(maker, stored)
            return None if filled is None else _Read(source, filled)
        if maker.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity"):  # zero stays zero
            return self.of(source)
        read = self.of(source) if maker.op_type in _MOVED else None
        others = [self._value(other) for other in maker.input[1:] if other]
        if read is None or any(other is None for other in others):
            return None
        moved = folded(maker, [read.filled, *(other for other in others if other is not None)])
        return None if moved is None else _Read(read.name, moved)

    def _value(self, name: str) -> Array | None:
        if name in self.known:
            return np.asarray(numpy_helper.to_array(self.known[name]))
        maker = self.makers.get(name)
        return folded(maker, []) if maker is not None and maker.op_type == "Constant" else None

    def _filled(self, node: onnx.NodeProto, stored: Array) -> NDArray[np.bool_] | None:
        """Where integers are not at their zero point; None where its shape does not fit, or it is computed."""
        if len(node.input) < 3 or not node.input[2]:
            return np.asarray(stored != 0)
        zero = self._value(node.input[2])
        if zero is None:
            return None
        if not (zero != 0).any():
            return np.asarray(stored != 0)
        axis, block = int(attribute(node, "axis", 1)), int(attribute(node, "block_size", 0))
        if block and zero.ndim == stored.ndim:
            axis %= stored.ndim
            zero = np.repeat(zero, block, axis).take(range(stored.shape[axis]), axis)
        try:
            return np.asarray(stored != np.broadcast_to(shaped(zero, axis, max(stored.ndim, 1)), stored.shape))
        except (ValueError, ZeroDivisionError):
            return None

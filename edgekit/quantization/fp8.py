"""fp8: explicit Q/DQ in E4M3 (4 exponent bits, 3 of mantissa, largest value 448), for GPUs from SM 8.9 on.

The format is that of "FP8 Formats for Deep Learning" (Micikevicius et al., 2022); the placement is that of int8, without
the residual branch of an Add. E4M3 keeps 4 significant bits over 15 binades: outliers cost it nothing, and in bulk it is
coarser than int8 (about 30 dB a tensor, whatever its distribution).

TensorRT-RTX 1.7 builds it for SM 8.9 and 12.0 with Conv, depthwise Conv, ConvTranspose, Gemm and MatMul, with float32 and
with float16 around it, and stores the weights in 8 bits; for SM 7.5 to 8.6 it refuses ("Cannot compile for target").
Depthwise convolutions expand their weights there: leave those float. ONNX Runtime 1.32 simulates it on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import GraphError, MissingExtra
from edgekit.graphs.insertion import Insertion
from edgekit.graphs.opset import with_opset

from .statistics import MIN_SCALE

try:
    from ml_dtypes import float8_e4m3fn
except ImportError:
    raise MissingExtra("onnx", "ml_dtypes") from None

__all__ = ["E4M3_MAX", "FP8_OPSET", "to_fp8"]

E4M3_MAX = 448.0
#: E4M3 came with 19, but there only a zero point can name it, and ONNX Runtime 1.32 drops a Relu in front of a
#: QuantizeLinear with such a zero point. From 21 on the attribute ``output_dtype`` names it.
FP8_OPSET = 21
PARTS = ("fp8", "scale", "dequantized")  # names of what becomes of a tensor


class Quantizable(Protocol):
    """What is used of a `placement.Layer`: names of its node, its data and weight tensors, and the weights' input."""

    @property
    def name(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def weight(self) -> str: ...
    @property
    def position(self) -> int: ...


def to_fp8(prepared: onnx.ModelProto, layers: Iterable[Quantizable], amax: Mapping[str, float]) -> onnx.ModelProto:
    """A copy of a prepared float32 graph in which data and weights of the named layers are E4M3, opset 21 or later.

    ``amax``: data tensor -> largest absolute value to represent; its scale is amax / 448, one per tensor, and larger values
    saturate. Weights become FLOAT8E4M3FN initializers with one scale a tensor, max |w| / 448. Scales are float32.

    Raises `GraphError` where a tensor has no amax or one that is not finite, where weights are not finite, and where the graph
    does not convert to opset 21.
    """
    return _Inserter(with_opset(prepared, FP8_OPSET)).run(list(layers), amax)


class _Inserter(Insertion):
    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self.weights: dict[str, str] = {}  # initializer -> its dequantized form

    def run(self, layers: list[Quantizable], amax: Mapping[str, float]) -> onnx.ModelProto:
        readers: dict[str, list[Quantizable]] = {}
        for layer in layers:
            readers.setdefault(layer.data, []).append(layer)
        for tensor, those in readers.items():
            first = min((layer.name for layer in those), key=self.position.__getitem__)
            output = self._pair(tensor, _scale(amax.get(tensor), tensor), first)
            for layer in those:
                self.nodes[layer.name].input[1 - layer.position] = output
        for layer in sorted(layers, key=lambda layer: self.position[layer.name]):
            self.nodes[layer.name].input[layer.position] = self._weight(layer)
        return self.finish()

    def _pair(self, tensor: str, scale: float, first: str) -> str:
        base = self.base(tensor, *PARTS)
        stored, factor, output = (f"{base}/{part}" for part in PARTS)
        self.constant(factor, np.array(scale, np.float32))
        e4m3 = {"output_dtype": TensorProto.FLOAT8E4M3FN}
        self.before(first, "QuantizeLinear", [tensor, factor], stored, f"{base}/quantize", **e4m3)
        self.before(first, "DequantizeLinear", [stored, factor], output, f"{base}/dequantize")
        return output

    def _weight(self, layer: Quantizable) -> str:
        """FLOAT8E4M3FN initializer and DequantizeLinear; shared weights are stored once."""
        if layer.weight not in self.weights:
            values = numpy_helper.to_array(self.floats[layer.weight])
            scale = _scale(float(np.abs(values).max(initial=0.0)), layer.weight)
            base = self.base(f"{layer.name}/weight", *PARTS)
            stored, factor, output = (f"{base}/{part}" for part in PARTS)
            self.constant(stored, _stored(values / np.float32(scale), stored))
            self.constant(factor, np.array(scale, np.float32))
            self.before(layer.name, "DequantizeLinear", [stored, factor], output, f"{base}/dequantize")
            self.weights[layer.weight] = output
        return self.weights[layer.weight]


def _scale(largest: float | None, tensor: str) -> float:
    """amax / 448; 1 for a tensor of zeros."""
    if largest is None or not np.isfinite(largest) or largest < 0:
        raise GraphError(
            f"the range of {tensor!r} is {largest}, a finite number was expected", "check the calibration samples and the model"
        )
    return max(largest / E4M3_MAX, MIN_SCALE) if largest > 0 else 1.0


def _stored(values: NDArray[Any], name: str) -> onnx.TensorProto:
    """Rounded to nearest even, saturated."""
    rounded = np.clip(np.asarray(values, np.float32), -E4M3_MAX, E4M3_MAX).astype(float8_e4m3fn)
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, rounded.shape, rounded.tobytes(), raw=True)

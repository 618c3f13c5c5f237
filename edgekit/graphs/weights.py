"""What quantized constants stand for, in numpy: elementwise IEEE arithmetic, the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .editing import Array, attribute

__all__ = ["LIMITS", "clipped", "dequantized", "folded", "is_narrow", "limits_of", "shaped"]

#: Integer types of quantized tensors, by numpy's or ml_dtypes' name -> smallest and largest value.
LIMITS = {
    "int2": (-2, 1), "uint2": (0, 3), "int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255),
    "int16": (-32768, 32767), "uint16": (0, 65535),
}  # fmt: skip
MAX_FOLDED = 64 << 20  # elements of a constant that folding may make


def is_narrow(tensor_type: int) -> bool:
    """Whether an ONNX element type is an integer of at most 8 bits: what weights are stored in."""
    if tensor_type not in onnx.TensorProto.DataType.values():  # a damaged file
        return False
    return limits_of(tensor_type) is not None and not onnx.TensorProto.DataType.Name(tensor_type).endswith("16")


def limits_of(tensor_type: int) -> tuple[int, int] | None:
    """Smallest and largest value of an ONNX element type; None for float8, int32 and the like."""
    return LIMITS.get(onnx.TensorProto.DataType.Name(tensor_type).lower())


def shaped(vector: Array, axis: int, rank: int) -> Array:
    """A scale or zero point (C,) so that it broadcasts along ``axis`` of a tensor of this rank; scalars as ()."""
    if vector.size == 1:
        return vector.reshape(())
    if vector.ndim != 1:
        return vector
    return vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def dequantized(x: Array, scale: Array, zero: Array | None, axis: int = 1, block: int = 0) -> Array:
    """``(x - zero) * scale`` as DequantizeLinear defines it: per tensor, per channel of ``axis``, or in blocks along it.

    ``x``: integers of 2 to 32 bits, or float8; the result has the type of ``scale``. Raises `ValueError` where shapes differ.
    """
    rank = max(x.ndim, 1)
    if block and scale.ndim == x.ndim:
        length = x.shape[axis % rank]
        scale = np.repeat(scale, block, axis % rank).take(range(length), axis % rank)
        zero = None if zero is None else np.repeat(zero, block, axis % rank).take(range(length), axis % rank)
    factor = shaped(scale, axis, rank).astype(np.float32)
    if x.dtype.name in LIMITS or x.dtype.kind in "iu":
        shift = np.int64(0) if zero is None else shaped(zero.astype(np.int64), axis, rank)
        steps = (x.astype(np.int64) - shift).astype(np.float32)
    else:
        steps = x.astype(np.float32)
    result: Array = (steps * factor).astype(scale.dtype)
    if result.shape != x.shape:
        raise ValueError(f"scale {list(scale.shape)} does not fit {list(x.shape)}")
    return result


def clipped(x: Array, scale: Array, zero: Array | None, limits: tuple[int, int], axis: int = 1) -> Array:
    """Float weights limited to what integers from ``limits[0]`` to ``limits[1]`` can hold, without their rounding."""
    if scale.ndim > 1:
        return x
    rank = max(x.ndim, 1)
    factor = shaped(scale, axis, rank).astype(np.float32)
    shift = np.int64(0) if zero is None else shaped(zero.astype(np.int64), axis, rank)
    low, high = ((limit - shift).astype(np.float32) * factor for limit in limits)
    result: Array = np.clip(x, low, high).astype(x.dtype)
    return result


def folded(node: onnx.NodeProto, values: Sequence[Array]) -> Array | None:
    """The value of a node whose inputs are these constants; None where it is no operator that weights are behind."""
    evaluate = _EVALUATE.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if evaluate is None or sum(value.size for value in values) > MAX_FOLDED:
        return None
    try:
        return evaluate(node, *values)
    except (ValueError, TypeError, IndexError, KeyError):  # a node that ONNX Runtime would refuse as well
        return None


def _constant(node: onnx.NodeProto) -> Array | None:
    value = helper.get_attribute_value(node.attribute[0])
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if node.attribute[0].name == "value":
        return np.asarray(numpy_helper.to_array(value))
    kind = kinds.get(node.attribute[0].name)
    return None if kind is None else np.array(value, kind)


def _cast(node: onnx.NodeProto, x: Array) -> Array | None:
    wanted = np.dtype(helper.tensor_dtype_to_np_dtype(attribute(node, "to", 1)))
    if wanted.kind not in "fiu" or (x.dtype.kind == "f" and wanted.kind != "f"):
        return None
    return x.astype(wanted)


def _arithmetic(operation: Callable[[Any, Any], Any]) -> Callable[..., Array | None]:
    def evaluate(_: onnx.NodeProto, a: Array, b: Array) -> Array | None:
        if a.dtype != b.dtype or (operation is np.divide and a.dtype.kind != "f"):
            return None
        if math.prod(np.broadcast_shapes(a.shape, b.shape)) > MAX_FOLDED:
            return None
        with np.errstate(all="ignore"):
            return np.asarray(operation(a, b)).astype(a.dtype)

    return evaluate


def _transpose(node: onnx.NodeProto, x: Array) -> Array:
    return np.transpose(x, attribute(node, "perm", None))


def _reshape(node: onnx.NodeProto, x: Array, shape: Array) -> Array:
    kept = attribute(node, "allowzero", 0)
    return x.reshape([x.shape[i] if size == 0 and not kept else int(size) for i, size in enumerate(shape)])


def _squeeze(node: onnx.NodeProto, x: Array, axes: Array | None = None) -> Array:
    wanted = attribute(node, "axes", None) if axes is None else axes.tolist()
    return np.squeeze(x, None if wanted is None else tuple(wanted))


def _unsqueeze(node: onnx.NodeProto, x: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(x, tuple(attribute(node, "axes", ()) if axes is None else axes.tolist()))


_EVALUATE: dict[str, Callable[..., Array | None]] = {
    "Constant": _constant,
    "Identity": lambda _, x: x,
    "Cast": _cast,
    "Add": _arithmetic(np.add),
    "Sub": _arithmetic(np.subtract),
    "Mul": _arithmetic(np.multiply),
    "Div": _arithmetic(np.divide),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}

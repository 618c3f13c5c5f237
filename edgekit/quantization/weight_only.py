"""Weight-only formats: large tables and matrices stored as int8 or int4 behind DequantizeLinear; activations stay float.

No calibration is needed. What is gained is memory and bandwidth: the products are computed in float.

Which forms TensorRT-RTX 1.7 builds, found by building them:

    int8, a scale per channel: MatMul, Gemm           stored as int8, dequantized inside the product's kernel
    int4 in blocks of 16 to 256 along the inner axis  stored as int4, dequantized inside the product's kernel; in a kernel
                                                      before it where one block is the whole inner axis
    int8 in blocks                                    stored as int8, dequantized in a kernel before the product
    DequantizeLinear of a table, then Gather          stored as int8 or int4, one kernel that dequantizes what it gathers
    the same, then GatherND (torch's ``table[ids]``)  stored as int8 or int4
    int4 with a scale per channel or tensor           builds, dequantized before the product
    int4 in blocks as the left matrix of a MatMul     crashes the builder: int8 a channel instead
    W and R of LSTM, int8, a scale per gate row       stored as int8, in all directions
    W and R of GRU                                    most refused by the builder ("op->parent() == this"); all stored as int8
                                                      with a Gather of all directions behind DequantizeLinear
    last block shorter than the others                refused ("must divide into whole blocks"): int8 a channel instead
    Gather of an int8 table, then DequantizeLinear    refused ("Quantized constant is only allowed before DQ")

TensorRT 10 documents blocks of 64 and 128 for int4 (NVIDIA TensorRT documentation, "Working with quantized types"). ONNX
Runtime 1.32 runs all of them on the CPU; with its Q/DQ optimizations off it dequantizes once, when the graph is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import GraphError, UsageError
from edgekit.graphs.editing import free_name, tensor_names
from edgekit.graphs.opset import with_opset
from edgekit.runtime.golden import decibel, distance

from .prepare import attribute, constants, consumers
from .statistics import MIN_SCALE

__all__ = ["BLOCKS", "KINDS", "MIN_PARAMETERS", "storable", "stored_small", "weight_only"]

Array = NDArray[Any]
#: Smaller weights stay float: they are read from cache, and a scale is a large part of them.
MIN_PARAMETERS = 16_384
_RECURRENT = ("LSTM", "GRU")
#: What is stored small in graphs whose products are int8, by the operator that reads it.
KINDS = (("Gather", "GatherND"), _RECURRENT)
BLOCKS = (16, 32, 64, 128, 256)
_INT8_OPSET, _BLOCK_OPSET = 13, 21
#: Least and greatest integer a weight may become.
_RANGES = {8: (-127, 127), 4: (-8, 7)}
_SHRINKS = np.linspace(1.0, 0.5, 26)
_CHUNK = 1 << 21  # weights fitted at once


class _Weight(NamedTuple):
    """A constant matrix: the axis that is summed over (a table's: the one inside of a row), and its first reader.

    Those of LSTM and GRU have three axes, (directions, gates x hidden, inputs): a scale per row, shared by the directions.

    ``blocks``: whether every reader takes it in blocks along that axis.
    """

    name: str
    inner: int
    node: str
    op: str
    blocks: bool


def weight_only(
    model: onnx.ModelProto, *, bits: int, block: int, only: Collection[str] | None = None
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A copy of the graph whose large matrices and embedding tables are int8 or int4 initializers with DequantizeLinear.

    ``bits``: 8 or 4. ``block``: weights along the inner axis (K of a MatMul's float32 (K, N), a table's columns) that share
    a scale, one of `BLOCKS`; 0, with 8 bits only, for one scale per output channel or table row. Quantized are the constant
    float32 matrices of MatMul, Gemm, LSTM and GRU and the tables of Gather (axis 0) and GatherND, from `MIN_PARAMETERS` on.
    Where a block does not divide the inner axis, where not every reader takes blocks, and in LSTM and GRU, weights are int8
    with a scale per channel. ``only``: names of the initializers that may be stored so; None for all. Scales are float32,
    and the clip of each minimizes its squared error: a search over scales, then the least-squares one for the integers found.

    Returns the graph (opset 13 or later, 21 with blocks) and its figures: ``bits``, ``block``, ``bytes_before`` and
    ``bytes_after`` (the serialized models), ``parameters`` (quantized ones), ``layers``: name, op, tensor, shape, form,
    bytes_before, bytes_after, snr_db (of the weights). Raises `UsageError` for other bits or blocks, `GraphError` where
    nothing is large enough or the graph does not convert to the opset.
    """
    if bits not in _RANGES or (block != 0 and block not in BLOCKS) or (bits == 4 and not block):
        raise UsageError(
            f"weights of {bits} bits in blocks of {block} are no format",
            f"choose 8 bits, or 4 bits in blocks of {', '.join(map(str, BLOCKS))}",
        )
    before = model.ByteSize()
    found = [weight for weight in _weights(model.graph) if only is None or weight.name in only]
    if not found:
        among = "the graph has" if only is None else f"among the {len(only)} named initializers is"
        raise GraphError(
            f"{among} no matrix, no table and no weights of LSTM or GRU of {MIN_PARAMETERS} float32 numbers or more",
            "small weights are read from cache: build it as it is, or quantize it to int8 where it has Conv, Gemm or MatMul",
        )
    made = with_opset(model, _BLOCK_OPSET if block else _INT8_OPSET)
    layers = [_quantize(made.graph, weight, bits, block) for weight in found]
    figures: dict[str, Any] = {"bits": bits, "block": block, "bytes_before": before, "bytes_after": made.ByteSize()}
    figures |= {"parameters": sum(layer["bytes_before"] // 4 for layer in layers), "layers": layers}
    return made, figures


def storable(graph: onnx.GraphProto) -> dict[str, str]:
    """Initializers that `weight_only` takes, and the operator of their first reader."""
    return {weight.name: weight.op for weight in _weights(graph)}


def stored_small(model: onnx.ModelProto, names: Collection[str]) -> tuple[onnx.ModelProto, float]:
    """Tables and recurrent weights of these names as int8, a scale per row; kind after kind, so that the same names give the
    same bytes.

    And the lowest SNR of the weights themselves, in dB.
    """
    lowest = np.inf
    for kind in KINDS:
        if some := [name for name, op in storable(model.graph).items() if name in names and op in kind]:
            model, figures = weight_only(model, bits=8, block=0, only=some)
            lowest = min(lowest, *(layer["snr_db"] for layer in figures["layers"]))
    return model, lowest


def _weights(graph: onnx.GraphProto) -> list[_Weight]:
    """Large constant matrices in the order of their first readers, which decide the axis."""
    uses = consumers(graph)
    inputs = {value.name for value in graph.input}
    large = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in inputs and np.prod(tensor.dims) >= MIN_PARAMETERS
    }
    known = constants(graph)
    readers: dict[str, list[_Weight]] = {}
    for node in graph.node:
        for position, inner in _positions(node):
            recurrent = node.op_type in _RECURRENT
            if (name := node.input[position]) in large and len(known[name].dims) == (3 if recurrent else 2):
                blocks = not recurrent and (node.op_type != "MatMul" or position == 1)
                readers.setdefault(name, []).append(_Weight(name, inner, node.name or node.output[0], node.op_type, blocks))
    masks = {name for name in readers if np.isinf(numpy_helper.to_array(known[name])).any()}  # of attention hold -inf
    return [
        those[0]._replace(blocks=len(those) == uses[name] and all(w.blocks and w.inner == those[0].inner for w in those))
        for name, those in readers.items()
        if name not in masks
    ]


def _positions(node: onnx.NodeProto) -> list[tuple[int, int]]:
    """(input, its inner axis) of what may be a weight."""
    if node.domain not in ("", "ai.onnx"):
        return []
    if node.op_type == "MatMul":
        return [(1, 0), (0, 1)]
    if node.op_type == "Gemm":
        return [(1, 1 if attribute(node, "transB", 0) else 0)]
    if node.op_type == "Gather" and attribute(node, "axis", 0) == 0:
        return [(0, 1)]
    if node.op_type == "GatherND" and attribute(node, "batch_dims", 0) == 0:
        return [(0, 1)]
    return [(1, 2), (2, 2)] if node.op_type in _RECURRENT else []


def _quantize(graph: onnx.GraphProto, weight: _Weight, bits: int, block: int) -> dict[str, Any]:
    """Replace one initializer, in place; what is dequantized takes its name, so that every reader stays as it is."""
    tensor = constants(graph)[weight.name]
    values = numpy_helper.to_array(tensor).astype(np.float32)
    if np.isnan(values).any():
        raise GraphError(f"the weights {weight.name!r} hold NaN", "train or export the model again")
    inner, whole = weight.inner, values.shape[weight.inner]
    channel = 1 if values.ndim == 3 else 1 - inner
    size, bits = (block, bits) if block and whole % block == 0 and weight.blocks else (whole, 8)
    blocked = size != whole or bits == 4
    rows = np.moveaxis(values, channel, 0)  # (channels, inner), or (channels, directions, inner)
    groups = rows.reshape(-1, size) if blocked else rows.reshape(len(rows), -1)
    q, scale = _fit(groups, *_RANGES[bits])
    stored = np.moveaxis(q.reshape(rows.shape), 0, channel)
    scales = np.moveaxis(scale.reshape(len(rows), -1), 0, channel) if blocked else scale.ravel()
    parts = [f"int{bits}", "scale", *([] if blocked else ["zero_point"])]
    parts += ["dequantized", "directions"] if weight.op == "GRU" else []
    base = free_name(tensor_names(graph), weight.name, parts)
    graph.initializer.remove(tensor)
    graph.initializer.extend([_stored(stored, bits, f"{base}/int{bits}"), _constant(scales, f"{base}/scale")])
    inputs = [f"{base}/int{bits}", f"{base}/scale"]
    if not blocked:  # TensorRT 8.6 is used to a zero point
        graph.initializer.append(_constant(np.zeros(scales.shape, np.int8), f"{base}/zero_point"))
        inputs.append(f"{base}/zero_point")
    attributes = {"axis": inner, "block_size": size} if blocked else {"axis": channel}
    names = {node.name for node in graph.node}
    dequantized = weight.name
    if weight.op == "GRU":  # TensorRT-RTX's builder does not survive DequantizeLinear next to it
        dequantized = f"{base}/dequantized"
        graph.initializer.append(_constant(np.arange(len(values)), f"{base}/directions"))
        both = [dequantized, f"{base}/directions"]
        graph.node.insert(0, helper.make_node("Gather", both, [weight.name], name=free_name(names, f"{base}/gather"), axis=0))
    node_name = free_name(names, f"{base}/dequantize")
    graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, [dequantized], name=node_name, **attributes))
    offs = [distance(groups[part], q[part] * scale[part]) for part in _chunks(groups)]
    return {
        "name": weight.node,
        "op": weight.op,
        "tensor": weight.name,
        "shape": list(values.shape),
        "form": f"int{bits}, {f'blocks of {size}' if blocked else 'a scale per channel'}",
        "bytes_before": values.nbytes,
        "bytes_after": values.size * bits // 8 + scales.nbytes,
        "snr_db": round(decibel(sum(off.signal for off in offs), sum(off.noise for off in offs)), 2),
    }


def _fit(groups: Array, low: int, high: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """float32 (groups, n) -> int8 values of the same shape and float32 scales (groups, 1) of the least squared error."""
    fitted = [_fit_part(groups[part], low, high) for part in _chunks(groups)]
    return np.concatenate([q for q, _ in fitted]), np.concatenate([scale for _, scale in fitted])


def _chunks(groups: Array) -> Iterator[slice]:
    """Of its rows, some `_CHUNK` numbers at a time: a table may have hundreds of millions."""
    rows = max(1, _CHUNK // max(groups.shape[1], 1))
    yield from (slice(start, start + rows) for start in range(0, len(groups), rows))


def _fit_part(groups: Array, low: int, high: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    whole, exponent = groups, np.frexp(np.abs(groups).max(1, keepdims=True))[1]
    groups = np.ldexp(groups, -exponent)  # near 1, exactly: float32 bears no squares of very large or very small weights
    largest = np.abs(groups).max(1, keepdims=True)
    start = np.where(largest > 0, largest / high, 1.0).astype(np.float32)
    best, error = start, np.full(start.shape, np.inf, np.float32)

    def consider(scale: NDArray[np.float32]) -> None:
        nonlocal best, error
        noise = ((_rounded(groups, scale, low, high) * scale - groups) ** 2).sum(1, keepdims=True)
        best, error = np.where(noise < error, scale, best), np.minimum(noise, error)

    for shrink in _SHRINKS:
        consider(start * np.float32(shrink))
    for _ in range(2):
        q = _rounded(groups, best, low, high)
        power = (q**2).sum(1, keepdims=True)
        consider(np.where(power > 0, (q * groups).sum(1, keepdims=True) / np.maximum(power, 1), best).astype(np.float32))
    scale = np.maximum(np.ldexp(best, exponent), np.float32(MIN_SCALE))
    return _rounded(whole, scale, low, high).astype(np.int8), scale


def _rounded(groups: Array, scale: Array, low: int, high: int) -> Array:
    return np.clip(np.rint(groups / scale), low, high)


def _stored(q: NDArray[np.int8], bits: int, name: str) -> onnx.TensorProto:
    """An INT8 or INT4 initializer; two int4 share a byte, the first in its lower half."""
    if bits == 8:
        return _constant(q, name)
    flat = q.ravel() if q.size % 2 == 0 else np.append(q.ravel(), np.int8(0))
    nibbles = flat.view(np.uint8) & 0x0F
    return helper.make_tensor(name, TensorProto.INT4, q.shape, (nibbles[0::2] | nibbles[1::2] << 4).tobytes(), raw=True)


def _constant(value: Array, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value), name)

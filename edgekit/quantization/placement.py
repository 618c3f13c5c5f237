"""Where Q/DQ goes: a table of patterns that follows TensorRT's rules for explicit quantization.

Source: NVIDIA TensorRT documentation, "Working with quantized types", explicit quantization, and ModelOpt's defaults.

    Conv, ConvTranspose, Gemm, MatMul with constant weights   quantize the data input and the weights, never the output
    Add behind a quantized Conv                               quantize the other (residual) branch: it decides the fused type
    Concat, pooling by maximum, reshapes                      tensors on both sides share one scale, so that Q moves through
    bias; ReLU behind Conv; Softmax, Sigmoid, LayerNorm       stay float: no Q/DQ in between, fusions stay whole
    MatMul of two activations, LSTM, GRU, RNN                 stay float
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from .prepare import attribute, constants, consumers

__all__ = ["Layer", "Placement", "Unquantized", "place"]

Array = NDArray[Any]


class Pattern(NamedTuple):
    """Input positions of an operator's data, weights and bias; the channel axis of its output."""

    data: int
    weight: int
    bias: int | None
    channels: int


#: What is quantized.
WEIGHTED = {
    "Conv": Pattern(0, 1, 2, 1),
    "ConvTranspose": Pattern(0, 1, 2, 1),
    "Gemm": Pattern(0, 1, 2, -1),
    "MatMul": Pattern(0, 1, None, -1),
}
#: Operators through which TensorRT moves Q and DQ: the tensors around them share a scale where they are quantized.
TRANSPARENT = {
    "Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
#: Operators with multiply-accumulates that no rule quantizes, and why.
FLOAT = {
    "LSTM": "recurrent: TensorRT runs it in float",
    "GRU": "recurrent: TensorRT runs it in float",
    "RNN": "recurrent: TensorRT runs it in float",
}


class Layer(NamedTuple):
    """A node that can be quantized. Names are of tensors; ``axis`` is the weights' channel axis for their scales.

    ``position`` is the weights' input; ``residual`` the tensor quantized with it, read by node ``adder`` at ``branch``.
    """

    name: str
    op: str
    data: str
    weight: str
    axis: int
    position: int
    output: str
    channels: int
    bias: str | None
    biased: str  # the node that adds the bias: itself, or the Add behind a MatMul, or "" where there is none
    residual: str | None = None
    adder: str = ""
    branch: int = 0


class Unquantized(NamedTuple):
    """A node with multiply-accumulates that stays float, and why."""

    name: str
    op: str
    reason: str


class Placement(NamedTuple):
    """``layers`` in the graph's order; ``groups`` maps each tensor to quantize to the name its scale goes by."""

    layers: tuple[Layer, ...]
    unquantized: tuple[Unquantized, ...]
    groups: dict[str, str]


def place(model: onnx.ModelProto) -> Placement:
    """Apply the table to a prepared graph."""
    graph = model.graph
    known = constants(graph)
    layers: list[Layer] = []
    unquantized: list[Unquantized] = []
    for node in graph.node:
        if node.op_type in FLOAT:
            unquantized.append(Unquantized(node.name, node.op_type, FLOAT[node.op_type]))
        elif node.op_type in WEIGHTED and node.domain in ("", "ai.onnx"):
            found = _layer(node, known)
            if isinstance(found, Layer):
                layers.append(found)
            else:
                unquantized.append(Unquantized(node.name, node.op_type, found))
    layers = _with_matmul_bias(graph, known, layers)
    layers = _with_residuals(graph, known, layers)
    tensors = list(dict.fromkeys(name for layer in layers for name in (layer.data, layer.residual) if name))
    return Placement(tuple(layers), tuple(unquantized), _groups(graph, tensors))


def _layer(node: onnx.NodeProto, known: dict[str, onnx.TensorProto]) -> Layer | str:
    """The layer that a node makes, or the reason why it makes none."""
    pattern = WEIGHTED[node.op_type]
    data, position = pattern.data, pattern.weight
    if node.op_type == "MatMul" and node.input[0] in known:
        data, position = position, data
    weight = known.get(node.input[position])
    if weight is None:
        return "both inputs are activations" if node.op_type in ("MatMul", "Gemm") else "the weights are computed"
    if node.input[data] in known:
        return "its input is a constant"
    if weight.data_type != onnx.TensorProto.FLOAT:
        return f"the weights are {onnx.TensorProto.DataType.Name(weight.data_type).lower()}, not float32"
    if node.op_type == "MatMul" and len(weight.dims) != 2:
        return f"the weights have {len(weight.dims)} axes, not 2"
    if 0 in weight.dims:
        return "the weights are empty"
    name = node.input[pattern.bias] if pattern.bias is not None and len(node.input) > pattern.bias else ""
    # A bias that is computed, or that broadcasts over rows, is left as it is.
    channels = _channels(node, weight)
    own = pattern.bias is not None and (not name or (name in known and _is_vector(known[name], channels)))
    return Layer(
        node.name, node.op_type, node.input[data], node.input[position], _axis(node, position), position, node.output[0],
        pattern.channels if position else -2, name or None, node.name if own else "",
    )  # fmt: skip


def _axis(node: onnx.NodeProto, position: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1 if position else 0  # MatMul: columns of the right matrix, rows of the left one


def _channels(node: onnx.NodeProto, weight: onnx.TensorProto) -> int:
    if node.op_type == "ConvTranspose":
        return int(weight.dims[1]) * int(attribute(node, "group", 1))
    return int(weight.dims[_axis(node, 1)])


def _is_vector(tensor: onnx.TensorProto, channels: int) -> bool:
    return tensor.data_type == onnx.TensorProto.FLOAT and list(tensor.dims) in ([channels], [1], [1, channels], [])


def _with_matmul_bias(graph: onnx.GraphProto, known: dict[str, onnx.TensorProto], layers: list[Layer]) -> list[Layer]:
    """A MatMul whose only reader adds a constant vector has that vector as its bias."""
    uses = consumers(graph)
    adds = {name: node for node in graph.node if node.op_type == "Add" for name in node.input if name not in known}
    result = []
    for layer in layers:
        add = adds.get(layer.output)
        if layer.op == "MatMul" and layer.position == 1 and add is not None and uses[layer.output] == 1:
            other = next((name for name in add.input if name in known), "")
            channels = int(known[layer.weight].dims[1])
            if other and list(known[other].dims) == [channels] and known[other].data_type == onnx.TensorProto.FLOAT:
                layer = layer._replace(bias=other, biased=add.name)
        result.append(layer)
    return result


def _with_residuals(graph: onnx.GraphProto, known: dict[str, onnx.TensorProto], layers: list[Layer]) -> list[Layer]:
    """For each Add behind a Conv: TensorRT fuses the Add into the later Conv; the other branch is quantized with it."""
    order = {layer.output: i for i, layer in enumerate(layers) if layer.op in ("Conv", "ConvTranspose")}
    uses = consumers(graph)
    result = list(layers)
    for node in graph.node:
        if node.op_type != "Add" or any(name in known for name in node.input) or node.input[0] == node.input[1]:
            continue
        fused = [(order[name], branch) for branch, name in enumerate(node.input) if name in order and uses[name] == 1]
        if fused:
            index, branch = max(fused)
            result[index] = result[index]._replace(residual=node.input[1 - branch], adder=node.name, branch=1 - branch)
    return result


def _groups(graph: onnx.GraphProto, tensors: list[str]) -> dict[str, str]:
    """Union of the tensors that are joined by transparent operators; each group goes by its first quantized tensor."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.get(name, name) != name:
            name = parent[name]
        return name

    for node in graph.node:
        if node.op_type in TRANSPARENT:
            joined = [*(node.input if node.op_type == "Concat" else node.input[:1]), *node.output]
            for name in joined[1:]:
                parent[root(name)] = root(joined[0])
    leaders: dict[str, str] = {}
    return {name: leaders.setdefault(root(name), name) for name in tensors}


def multiply_accumulates(model: onnx.ModelProto, placement: Placement, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Multiply-accumulates of every layer and every unquantized node, for inputs of the measured ``shapes``."""
    known = constants(model.graph)
    names = {*(layer.name for layer in placement.layers), *(node.name for node in placement.unquantized)}

    def shape(name: str) -> tuple[int, ...]:
        return tuple(known[name].dims) if name in known else shapes[name]

    result: dict[str, int] = {}
    for node in model.graph.node:
        if node.name not in names:
            continue
        if node.op_type in ("Conv", "ConvTranspose"):
            places = shape(node.output[0]) if node.op_type == "Conv" else shape(node.input[0])
            macs = _product(places) * _product(shape(node.input[1])[1:])
        elif node.op_type in FLOAT:
            steps, batch = shape(node.input[0])[:2]
            macs = steps * batch * (_product(shape(node.input[1])) + _product(shape(node.input[2])))
        else:
            inner = shape(node.input[0])[0 if attribute(node, "transA", 0) else -1]
            macs = _product(shape(node.output[0])) * inner
        result[node.name] = macs
    return result


def shape_tensors(model: onnx.ModelProto, placement: Placement) -> list[str]:
    """The tensors whose shapes `multiply_accumulates` needs."""
    known = constants(model.graph)
    names = {*(layer.name for layer in placement.layers), *(node.name for node in placement.unquantized)}
    wanted: dict[str, None] = {}
    for node in model.graph.node:
        if node.name in names:
            wanted.update(dict.fromkeys(name for name in (*node.input[:3], node.output[0]) if name and name not in known))
    return list(wanted)


def _product(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) if shape else 1


def weights_of(model: onnx.ModelProto, placement: Placement) -> dict[str, Array]:
    """Layer name -> float32 weights."""
    known = constants(model.graph)
    return {layer.name: numpy_helper.to_array(known[layer.weight]) for layer in placement.layers}

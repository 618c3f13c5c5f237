"""Where Q/DQ goes: a table of patterns that follows TensorRT's rules for explicit quantization.

Source: NVIDIA TensorRT documentation, "Working with quantized types", explicit quantization, and ModelOpt's defaults.

    Conv, ConvTranspose, Gemm, MatMul with constant weights   quantize the data input and the weights, never the output
    MatMul of two activations (attention)                     quantize both inputs
    Add behind a quantized Conv                               quantize the other (residual) branch: it decides the fused type
    Concat, pooling by maximum, reshapes                      tensors on both sides share one scale, so that Q moves through;
                                                              fitting parts them only where that takes a fifth of the error
    Split, Slice                                              each part has a scale of its own: the query, key and value of one
                                                              product lie a decade apart
    LSTM, GRU, RNN                                            are computed in float: no backend has int8 recurrences; weights of
                                                              LSTM and GRU are stored in int8 where that costs nothing (`store`)
    bias; ReLU behind Conv; Softmax, Sigmoid, LayerNorm       stay float: no Q/DQ in between, fusions stay whole
    If, Loop, Scan                                            stay float, with all that is inside
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekit.errors import UsageError
from edgekit.graphs.editing import element_types

from .prepare import attribute, constants, consumers

__all__ = [
    "Layer", "Pair", "Placement", "Product", "Unquantized", "kept_float", "multiply_accumulates", "place", "shape_tensors",
    "weights_of", "without",
]  # fmt: skip

Array = NDArray[Any]


class Pattern(NamedTuple):
    """Input positions of an operator's data, weights and bias; the channel axis of its data and of its output."""

    data: int
    weight: int
    bias: int | None
    features: int
    channels: int


#: What is quantized with its weights.
WEIGHTED = {
    "Conv": Pattern(0, 1, 2, 1, 1),
    "ConvTranspose": Pattern(0, 1, 2, 1, 1),
    "Gemm": Pattern(0, 1, 2, -1, -1),
    "MatMul": Pattern(0, 1, None, -1, -1),
}
#: Operators through which TensorRT moves Q and DQ: the tensors around them share a scale where they are quantized.
TRANSPARENT = {"Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
RECURRENT = ("LSTM", "GRU", "RNN")
#: Operators with multiply-accumulates that no rule quantizes, and why.
FLOAT = {
    **dict.fromkeys(RECURRENT, "recurrent: computed in float"),
    "If": "a subgraph",
    "Loop": "a subgraph",
    "Scan": "a subgraph",
}


class Layer(NamedTuple):
    """A node with constant weights. Names are of tensors; ``axis`` is the weights' channel axis for their scales.

    ``position`` is the weights' input; ``features`` and ``channels`` are the channel axes of the data and of the output.
    ``biased``: the node that adds the bias: itself, the Add behind a MatMul, or "" where there is none.
    """

    name: str
    op: str
    data: str
    weight: str
    axis: int
    position: int
    output: str
    features: int
    channels: int
    bias: str | None
    biased: str
    group: int = 1

    @property
    def shares(self) -> tuple[str, str, int, int]:
        """Layers of which this is equal meet the same weights in the same way."""
        return self.weight, self.op, self.axis, self.group


class Product(NamedTuple):
    """A MatMul or Gemm of two activations."""

    name: str
    op: str
    inputs: tuple[str, str]
    output: str


class Pair(NamedTuple):
    """An input that is quantized along with a layer or product (``owner``): ``node`` reads ``tensor`` at ``position``."""

    owner: str
    node: str
    position: int
    tensor: str


class Unquantized(NamedTuple):
    """A node with multiply-accumulates that stays float, and why."""

    name: str
    op: str
    reason: str


class Placement(NamedTuple):
    """``layers`` and ``products`` in the graph's order; ``pairs`` are residual branches and the inputs of products.

    ``sites`` maps the data of each layer to its site: tensors that one quantizer serves, for they meet the same weights.
    ``groups`` maps every quantized tensor to the first of those that share its scale where nothing but Q/DQ is inserted.
    """

    layers: tuple[Layer, ...]
    products: tuple[Product, ...]
    pairs: tuple[Pair, ...]
    unquantized: tuple[Unquantized, ...]
    sites: dict[str, str]
    groups: dict[str, str]

    @property
    def names(self) -> list[str]:
        """All that can be int8, layers first."""
        return [*self.ops]

    @property
    def ops(self) -> dict[str, str]:
        """Operators of all that can be int8, by name."""
        return {layer.name: layer.op for layer in self.layers} | {product.name: product.op for product in self.products}


def place(model: onnx.ModelProto) -> Placement:
    """Apply the table to a prepared graph."""
    graph = model.graph
    known, types = constants(graph), element_types(model)
    layers: list[Layer] = []
    products: list[Product] = []
    unquantized: list[Unquantized] = []
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in FLOAT:
            unquantized.append(Unquantized(node.name, node.op_type, FLOAT[node.op_type]))
        elif node.op_type in WEIGHTED:
            found = _layer(node, known, types)
            if isinstance(found, Layer):
                layers.append(found)
            elif isinstance(found, Product):
                products.append(found)
            else:
                unquantized.append(Unquantized(node.name, node.op_type, found))
    layers = _with_matmul_bias(graph, known, layers)
    pairs = [*_residuals(graph, known, layers), *(Pair(p.name, p.name, i, t) for p in products for i, t in enumerate(p.inputs))]
    tensors = list(dict.fromkeys([*(layer.data for layer in layers), *(pair.tensor for pair in pairs)]))
    return Placement(tuple(layers), tuple(products), tuple(pairs), tuple(unquantized), _sites(layers), _groups(graph, tensors))


def kept_float(placement: Placement, patterns: Sequence[str]) -> Placement:
    """Without what bears one of these names, in which ``*`` and ``?`` stand for some or one character, or operators.

    Raises `UsageError` for a pattern that names nothing.
    """
    ops, gone = placement.ops, dict[str, str]()
    for pattern in patterns:
        found = [name for name, op in ops.items() if fnmatch.fnmatchcase(name, pattern.replace("[", "[[]")) or op == pattern]
        if not found:
            some = ", ".join(list(ops)[:5])
            raise UsageError(
                f"--keep-float {pattern!r} names no layer that would be quantized",
                f"give a name, a pattern as '/head/*' or an operator; layers here: {some}{' ...' if len(ops) > 5 else ''}",
            )
        gone |= dict.fromkeys(found, "kept float, as stated")
    return without(placement, gone)


def without(placement: Placement, gone: Mapping[str, str], tensors: Collection[str] = ()) -> Placement:
    """What is left of the table without these layers and products (name -> why), and without pairs that quantize ``tensors``.

    Groups stay as they are: they are the graph's.
    """
    return placement._replace(
        layers=tuple(layer for layer in placement.layers if layer.name not in gone),
        products=tuple(product for product in placement.products if product.name not in gone),
        pairs=tuple(pair for pair in placement.pairs if pair.owner not in gone and pair.tensor not in tensors),
        unquantized=(*placement.unquantized, *(Unquantized(name, placement.ops[name], why) for name, why in gone.items())),
    )


def _layer(node: onnx.NodeProto, known: dict[str, onnx.TensorProto], types: dict[str, int]) -> Layer | Product | str:
    """The layer or product that a node makes, or the reason why it makes none."""
    pattern = WEIGHTED[node.op_type]
    data, position, features = pattern.data, pattern.weight, pattern.features
    if node.op_type == "MatMul" and node.input[0] in known:
        data, position, features = position, data, -2
    weight = known.get(node.input[position])
    if node.op_type == "Gemm" and node.input[0] in known and weight is None:
        return "its weights are on the left"
    if weight is None:
        if node.op_type not in ("MatMul", "Gemm") or any(node.input[2:]):
            return "the weights are computed"
        # What inference cannot tell, behind operators that ONNX lacks, is taken for float32.
        other = {types.get(name, onnx.TensorProto.FLOAT) for name in node.input[:2]} - {onnx.TensorProto.FLOAT}
        if other:
            return f"its inputs are {' and '.join(sorted(onnx.TensorProto.DataType.Name(kind).lower() for kind in other))}"
        return Product(node.name, node.op_type, (node.input[0], node.input[1]), node.output[0])
    if node.input[data] in known:
        return "its input is a constant"
    if weight.data_type != onnx.TensorProto.FLOAT:
        return f"the weights are {onnx.TensorProto.DataType.Name(weight.data_type).lower()}, not float32"
    if node.op_type == "MatMul" and len(weight.dims) < 2:
        return "the weights are a vector"
    if 0 in weight.dims:
        return "the weights are empty"
    name = node.input[pattern.bias] if pattern.bias is not None and len(node.input) > pattern.bias else ""
    # A bias that is computed, or that broadcasts over rows, is left as it is.
    channels = _channels(node, weight)
    own = pattern.bias is not None and (not name or (name in known and _is_vector(known[name], channels)))
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        features = 0
    return Layer(
        node.name, node.op_type, node.input[data], node.input[position], _axis(node, position, len(weight.dims)), position,
        node.output[0], features, pattern.channels if position else -2, name or None, node.name if own else "",
        int(attribute(node, "group", 1)),
    )  # fmt: skip


def _axis(node: onnx.NodeProto, position: int, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return rank - 1 if position else rank - 2  # MatMul: columns of the right matrix, rows of the left one


def _channels(node: onnx.NodeProto, weight: onnx.TensorProto) -> int:
    if node.op_type == "ConvTranspose":
        return int(weight.dims[1]) * int(attribute(node, "group", 1))
    return int(weight.dims[_axis(node, 1, len(weight.dims))])


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
            channels = int(known[layer.weight].dims[-1])
            if other and list(known[other].dims) == [channels] and known[other].data_type == onnx.TensorProto.FLOAT:
                layer = layer._replace(bias=other, biased=add.name)
        result.append(layer)
    return result


def _residuals(graph: onnx.GraphProto, known: dict[str, onnx.TensorProto], layers: list[Layer]) -> list[Pair]:
    """For each Add behind a Conv: TensorRT fuses the Add into the later Conv; the other branch is quantized with it."""
    order = {layer.output: i for i, layer in enumerate(layers) if layer.op in ("Conv", "ConvTranspose")}
    uses = consumers(graph)
    result = []
    for node in graph.node:
        if node.op_type != "Add" or any(name in known for name in node.input) or node.input[0] == node.input[1]:
            continue
        fused = [(order[name], branch) for branch, name in enumerate(node.input) if name in order and uses[name] == 1]
        if fused:
            index, branch = max(fused)
            result.append(Pair(layers[index].name, node.name, 1 - branch, node.input[1 - branch]))
    return result


class _Union:
    """Names joined into sets."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while self.parent.get(name, name) != name:
            name = self.parent[name]
        return name

    def join(self, one: str, other: str) -> None:
        self.parent[self.root(other)] = self.root(one)

    def leaders(self, names: list[str]) -> dict[str, str]:
        """Each name's set, by the first of ``names`` in it."""
        found: dict[str, str] = {}
        return {name: found.setdefault(self.root(name), name) for name in names}


def _sites(layers: list[Layer]) -> dict[str, str]:
    """Layers that share weights (an unrolled recurrence) need one quantizer for all their inputs."""
    union, first = _Union(), dict[tuple[str, str, int, int], str]()
    for layer in layers:
        union.join(first.setdefault(layer.shares, layer.data), layer.data)
    return union.leaders(list(dict.fromkeys(layer.data for layer in layers)))


def _groups(graph: onnx.GraphProto, tensors: list[str]) -> dict[str, str]:
    """Union of the tensors that are joined by transparent operators."""
    union = _Union()
    for node in graph.node:
        if node.op_type in TRANSPARENT:
            joined = [*(node.input if node.op_type == "Concat" else node.input[:1]), *node.output]
            for name in joined[1:]:
                union.join(joined[0], name)
    return union.leaders(tensors)


def multiply_accumulates(model: onnx.ModelProto, placement: Placement, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Multiply-accumulates of everything that the table names, for inputs of the measured ``shapes``; recurrences have none.

    Recurrent layers count nothing: shares are of convolutions and products, as users and peers count them.
    """
    known = constants(model.graph)
    names = _counted(placement)

    def shape(name: str) -> tuple[int, ...]:
        return tuple(known[name].dims) if name in known else shapes[name]

    result = {node.name: 0 for node in placement.unquantized}
    for node in model.graph.node:
        if node.name not in names:
            continue
        if node.op_type in ("Conv", "ConvTranspose"):
            places = shape(node.output[0]) if node.op_type == "Conv" else shape(node.input[0])
            result[node.name] = _product(places) * _product(shape(node.input[1])[1:])
        else:
            inner = shape(node.input[0])[0 if attribute(node, "transA", 0) else -1]
            result[node.name] = _product(shape(node.output[0])) * inner
    return result


def _counted(placement: Placement) -> set[str]:
    return {*placement.names, *(node.name for node in placement.unquantized if node.op in WEIGHTED)}


def shape_tensors(model: onnx.ModelProto, placement: Placement) -> list[str]:
    """The tensors whose shapes `multiply_accumulates` needs."""
    known, names = constants(model.graph), _counted(placement)
    wanted: dict[str, None] = {}
    for node in model.graph.node:
        if node.name in names:
            wanted.update(dict.fromkeys(name for name in (*node.input[:2], node.output[0]) if name and name not in known))
    return list(wanted)


def _product(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) if shape else 1


def weights_of(model: onnx.ModelProto, placement: Placement) -> dict[str, Array]:
    """Layer name -> float32 weights."""
    known = constants(model.graph)
    return {layer.name: numpy_helper.to_array(known[layer.weight]) for layer in placement.layers}

"""What a graph costs, layer by layer: multiply-accumulates, parameters, bytes moved. Shared by `estimate` and `inspect`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from edgekit.errors import GraphError, MissingExtra, first_line

try:
    import onnx.shape_inference
    from onnx import TensorProto
except ImportError:
    raise MissingExtra("onnx", "onnx") from None

from edgekit.graphs.editing import all_nodes, subgraphs

__all__ = ["GraphCost", "LayerCost", "Tensor", "graph_cost"]

#: Operators that only rename or retype a tensor; TensorRT gives them no kernel of their own.
_FREE = frozenset("Reshape Flatten Squeeze Unsqueeze Identity Dropout DequantizeLinear Cast".split())  # noqa: SIM905
_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}  # operator -> which input holds the weights
_PRODUCTS = {"MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3)}
_RECURRENT = frozenset(("LSTM", "GRU", "RNN"))


class Tensor(NamedTuple):
    """A tensor as it lies in memory: ``bits`` are those of its stored type; ``elements`` is 0 where the shape is unknown."""

    name: str
    elements: int
    bits: int
    is_float32: bool
    shape: tuple[int, ...] | None = None

    @property
    def size_bytes(self) -> int:
        return -(-self.elements * self.bits // 8)


class LayerCost(NamedTuple):
    """One node. ``reads`` and ``writes`` are activations; views, casts and DequantizeLinear are looked through.

    ``int8``: activations and weights both arrive as 8-bit integers, so the tensor cores multiply int8. ``channels``: what the
    weights join, (inputs, outputs), of one group; None where nothing is joined.
    """

    name: str
    op: str
    macs: int
    parameters: int
    int8: bool
    weights: tuple[Tensor, ...]
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    channels: tuple[int, int] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes moved if nothing were fused: weights, activations in, activations out."""
        return sum(tensor.size_bytes for tensor in (*self.weights, *self.reads, *self.writes))


class GraphCost(NamedTuple):
    """All layers in order. ``unknown`` names nodes that could not be counted (no shape, or a subgraph)."""

    layers: tuple[LayerCost, ...]
    parameters: int
    unknown: tuple[str, ...]

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    def by_op(self) -> dict[str, dict[str, int]]:
        """Operator -> how many, their MACs, parameters and bytes moved unfused; heaviest first."""
        found: dict[str, dict[str, int]] = {}
        for layer in self.layers:
            row = found.setdefault(layer.op, {"layers": 0, "macs": 0, "parameters": 0, "bytes": 0})
            row["layers"] += 1
            row["macs"] += layer.macs
            row["parameters"] += layer.parameters
            row["bytes"] += layer.size_bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]["macs"]))


def graph_cost(model: onnx.ModelProto, sizes: Mapping[str, int] | None = None) -> GraphCost:
    """Count a graph at static shapes: every symbolic axis becomes ``sizes[symbol]``, or 1.

    One MAC is a multiply and an add. Convolutions, products and recurrent layers count; element-wise work does not, it
    costs memory traffic only. Raises `GraphError` where shape inference fails.
    """
    counter = _Counter(_at(model, sizes or {}))
    return counter.count()


def _at(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """A copy with numbers for all symbols and shapes inferred for all tensors."""
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    del bound.graph.value_info[:]
    for value in bound.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value") or dim.dim_value < 1:
                dim.dim_value = sizes.get(dim.dim_param, 1)
    for value in bound.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    try:
        return onnx.shape_inference.infer_shapes(bound, data_prop=True)
    except Exception as error:  # noqa: BLE001  onnx raises several types
        reason = first_line(error)[:200]
        raise GraphError(f"the graph's shapes cannot be inferred: {reason}", "import it with fixed shapes: --shape") from None


class _Counter:
    def __init__(self, model: onnx.ModelProto) -> None:
        graph = self.graph = model.graph
        self.shapes: dict[str, list[int] | None] = {}
        self.types: dict[str, int] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            axes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
            known = tensor.HasField("shape") and None not in axes
            self.shapes[value.name] = [a for a in axes if a is not None] if known else None
            self.types[value.name] = tensor.elem_type
        self.weights = {i.name for i in graph.initializer}
        self.seen: set[str] = set()
        for weight in graph.initializer:
            self.shapes[weight.name], self.types[weight.name] = list(weight.dims), weight.data_type
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                self.weights.add(node.output[0])
                tensor_value = node.attribute[0].t
                self.shapes[node.output[0]], self.types[node.output[0]] = list(tensor_value.dims), tensor_value.data_type
        self.source: dict[str, str] = {}  # output of a free node -> what it is a view of
        self.dequantized: set[str] = set()

    def count(self) -> GraphCost:
        layers: list[LayerCost] = []
        unknown: list[str] = []
        for node in self.graph.node:
            if node.op_type == "Constant":
                continue
            if node.op_type in _FREE and node.input:
                self._view(node)
                continue
            layers.append(self._layer(node, unknown))
        return GraphCost(tuple(layers), sum(layer.parameters for layer in layers), tuple(unknown))

    def _view(self, node: onnx.NodeProto) -> None:
        root = self.source.get(node.input[0], node.input[0])
        self.source[node.output[0]] = root
        if root in self.weights:
            self.weights.add(node.output[0])
        if node.op_type == "DequantizeLinear" or node.input[0] in self.dequantized:
            self.dequantized.add(node.output[0])

    def _tensor(self, name: str) -> Tensor:
        root = self.source.get(name, name)
        shape = self.shapes.get(root)
        kind = self.types.get(root, TensorProto.FLOAT)
        elements = math.prod(shape) if shape is not None else 0
        return Tensor(root, elements, _bits(kind), kind == TensorProto.FLOAT, None if shape is None else tuple(shape))

    def _layer(self, node: onnx.NodeProto, unknown: list[str]) -> LayerCost:
        name = node.name or (node.output[0] if node.output else node.op_type)
        inputs = [n for n in node.input if n]
        weights = {t.name: t for t in (self._tensor(n) for n in inputs if n in self.weights)}
        reads = {t.name: t for t in (self._tensor(n) for n in inputs if n not in self.weights)}
        writes = tuple(self._tensor(n) for n in node.output if n)
        macs = self._macs(node)
        if macs is None or any(a.HasField("g") for a in node.attribute):
            unknown.append(f"{node.op_type} ({name})")
        fresh = [t for t in weights.values() if t.name not in self.seen and self.types.get(t.name) != TensorProto.INT64]
        scales = node.op_type == "QuantizeLinear"  # scales and zero points are no parameters of the model
        self.seen |= {t.name for t in fresh}
        parameters = 0 if scales else sum(t.elements for t in fresh) + sum(map(_held, subgraphs(node)))
        used = tuple(self.dequantized & set(inputs[:2]))
        int8 = len(used) == 2 or node.op_type in ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
        kept = () if scales else tuple(weights.values())
        moved = kept, tuple(reads.values()), writes
        return LayerCost(name, node.op_type, macs or 0, parameters, bool(int8 and macs), *moved, self._channels(node))

    def _channels(self, node: onnx.NodeProto) -> tuple[int, int] | None:
        index = _CONVOLUTIONS.get(node.op_type, 1 if node.op_type in ("ConvTranspose", "Gemm", "MatMul") else 0)
        weight = self.shapes.get(node.input[index]) if 0 < index < len(node.input) else None
        if weight is None or len(weight) < 2 or self.source.get(node.input[index], node.input[index]) not in self.weights:
            return None
        attributes = {a.name: a.i for a in node.attribute}
        if node.op_type in _CONVOLUTIONS:
            return weight[1], weight[0] // max(attributes.get("group", 1), 1)
        if node.op_type == "ConvTranspose":
            return weight[0] // max(attributes.get("group", 1), 1), weight[1]
        inputs, outputs = weight[-2:]
        return (outputs, inputs) if attributes.get("transB") else (inputs, outputs)

    def _macs(self, node: onnx.NodeProto) -> int | None:
        """Multiply-accumulates of a node; None where a shape that decides them is unknown."""

        def shape(index: int) -> list[int] | None:
            return self.shapes.get(node.input[index]) if index < len(node.input) else None

        out = self.shapes.get(node.output[0]) if node.output else None
        op = node.op_type
        if op in _CONVOLUTIONS:
            weight = shape(_CONVOLUTIONS[op])
            return None if weight is None or out is None else math.prod(out) * math.prod(weight[1:])
        if op == "ConvTranspose":
            data, weight = shape(0), shape(1)
            return None if weight is None or data is None else math.prod(data) * math.prod(weight[1:])
        if op == "Gemm":
            data = shape(0)
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            return None if data is None or out is None else math.prod(out) * data[0 if transposed else 1]
        if op in _PRODUCTS:
            data = shape(_PRODUCTS[op][0])
            return None if data is None or out is None or not data else math.prod(out) * data[-1]
        if op in _RECURRENT:
            data, weight, recurrent = shape(0), shape(1), shape(2)
            if data is None or weight is None or recurrent is None:
                return None
            return data[0] * data[1] * (math.prod(weight) + math.prod(recurrent))
        return None if op in ("Einsum", "Attention") else 0


def _held(graph: onnx.GraphProto) -> int:
    """Parameters that a branch or a loop's body holds, those of graphs inside it as well."""
    nodes = list(all_nodes(graph))
    weights = [tensor for held in (graph, *(g for node in nodes for g in subgraphs(node))) for tensor in held.initializer]
    weights += [a.t for node in nodes if node.op_type == "Constant" for a in node.attribute if a.HasField("t")]
    return sum(int(math.prod(tensor.dims)) for tensor in weights if tensor.data_type != TensorProto.INT64)


def _bits(kind: int) -> int:
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        return 4
    try:
        return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
    except (KeyError, TypeError):
        return 32

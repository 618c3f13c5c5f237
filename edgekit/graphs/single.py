"""Graphs of float16, bfloat16 or float64 computed in float32; what goes in and comes out keeps its type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .editing import Array, all_nodes, attribute, constants, element_types, free_name, subgraphs, tensor_names

__all__ = ["to_single"]

_OTHER: dict[int, str] = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.DOUBLE: "float64"}
_FLOATS: set[int] = {TensorProto.FLOAT, *_OTHER}
#: Attributes that name an element type, in the ONNX standard.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype", "precision", "softmax_precision", "stash_type")
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"}
_LIMITS = np.finfo(np.float32)


def to_single(model: onnx.ModelProto) -> tuple[bool, list[str]]:
    """Every float16, bfloat16 and float64 tensor becomes float32, in place. Returns (changed, notes); float32 graphs stay.

    So do those that only count in float64, sizes and indices, which float32 could get wrong by one.

    Initializers, constants, attributes that name a type, and subgraphs are converted. Casts between floats go. The graph's
    inputs and outputs keep their names and types, by a Cast behind or in front of them. float64 constants outside of
    float32's range become its largest or smallest number: a mask of -1e300 would otherwise be infinite, and an epsilon of
    1e-300 zero. The answers differ from the original's by the rounding of the coarser type.
    """
    stated = sorted({_OTHER[kind] for kind in _types(model.graph) if kind in _OTHER})
    if not stated or (stated == ["float64"] and not _computes_in_double(model)):
        return False, []
    count = sum(tensor.data_type in _OTHER and bool(tensor.dims) for tensor in _tensors(model.graph))
    behind, ahead = _rename(model)
    _convert(model.graph)
    nodes = [*behind, *(onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node), *ahead]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return True, [f"{' and '.join(stated)} tensors are computed in float32: {count} weight{'' if count == 1 else 's'}"]


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Constants of every kind, those of subgraphs too."""
    yield from graph.initializer
    yield from (sparse.values for sparse in graph.sparse_initializer)
    for node in graph.node:
        for stated in node.attribute:
            yield from (*([stated.t] if stated.HasField("t") else []), *stated.tensors)
            yield from (sparse.values for sparse in ([stated.sparse_tensor] if stated.HasField("sparse_tensor") else []))
        for inner in subgraphs(node):
            yield from _tensors(inner)


def _types(graph: onnx.GraphProto) -> Iterator[int]:
    """Element types that constants, inputs, outputs and attributes state: no tensor has one that none of these brings."""
    yield from (tensor.data_type for tensor in _tensors(graph))
    yield from (value.type.tensor_type.elem_type for value in (*graph.input, *graph.output))
    for node in all_nodes(graph):
        yield from (stated.i for stated in node.attribute if stated.name in _TYPE_ATTRIBUTES)


def _computes_in_double(model: onnx.ModelProto) -> bool:
    """Whether a layer, or the graph itself, has float64 inputs or outputs, as a whole model of that type has."""
    if any(value.type.tensor_type.elem_type == TensorProto.DOUBLE for value in (*model.graph.input, *model.graph.output)):
        return True
    layers = [node for node in all_nodes(model.graph) if node.op_type in _LAYERS]
    types = element_types(model)
    return any(types.get(name) == TensorProto.DOUBLE for node in layers for name in node.input)


class _Names:
    """New names of tensors. Followed to the end: a cast's output is its source, which may be renamed as well."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.new: dict[str, str] = {}
        self._taken = tensor_names(graph)

    def __getitem__(self, name: str) -> str:
        while name in self.new:
            name = self.new[name]
        return name

    def move(self, name: str) -> None:
        self.new[name] = free_name(self._taken, f"{name}/float32")
        self._taken.add(self.new[name])


def _rename(model: onnx.ModelProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Drop casts between floats and free the names of inputs and outputs, in place.

    Returns the casts behind the inputs and those in front of the outputs.
    """
    graph, types, names = model.graph, element_types(model), _Names(model.graph)
    inputs = {value.name for value in graph.input} - set(constants(graph))
    outputs = {value.name: types.get(value.name, 0) for value in graph.output if value.name not in inputs}
    makers = {name for node in graph.node for name in node.output}
    casts = {node.output[0]: node.input[0] for node in graph.node if _is_between_floats(node, types)}
    dropped = {name: source for name, source in casts.items() if outputs.get(name) != TensorProto.FLOAT}
    names.new.update(dropped)
    for name in [*sorted(inputs), *outputs]:
        if types.get(name) in _OTHER and name not in dropped:
            names.move(name)
    for name in casts.keys() - dropped.keys():  # a float32 output: what makes it takes its name
        root = names[casts[name]]
        if root in makers and root not in outputs:
            names.new[root] = dropped[name] = name
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node if not dropped.keys() & set(n.output)]
    del graph.node[:]
    graph.node.extend(kept)
    _apply(graph, names)
    known = {node.name for node in graph.node}

    def cast(source: str, name: str, kind: int) -> onnx.NodeProto:
        known.add(called := free_name(known, f"{name}/cast"))
        return helper.make_node("Cast", [source], [name], name=called, to=kind)

    behind = [cast(name, names[name], TensorProto.FLOAT) for name in sorted(inputs) if types.get(name) in _OTHER]
    return behind, [cast(names[name], name, kind) for name, kind in outputs.items() if kind in _OTHER]


def _is_between_floats(node: onnx.NodeProto, types: dict[str, int]) -> bool:
    """Whether a node casts from one of the types to another: they will all be the same."""
    if node.op_type != "Cast" or node.domain not in ("", "ai.onnx"):
        return False
    return types.get(node.input[0]) in _FLOATS and attribute(node, "to", 0) in _FLOATS


def _apply(graph: onnx.GraphProto, names: _Names) -> None:
    """Rename tensors, those that subgraphs read from outside too. The graph's own inputs and outputs stay."""
    for node in graph.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                values[i] = names[name]
        for inner in subgraphs(node):
            _apply(inner, names)
            for value in inner.output:
                value.name = names[value.name]
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        tensor.name = names[tensor.name]


def _convert(graph: onnx.GraphProto, inner: bool = False) -> None:
    """float32 for all types that tensors, attributes and values state, but for those of the graph's own inputs and outputs."""
    for tensor in [tensor for tensor in _tensors(graph) if tensor.data_type in _OTHER]:
        tensor.CopyFrom(numpy_helper.from_array(_single(numpy_helper.to_array(tensor)), tensor.name))
    for values in (graph.value_info, *([graph.input, graph.output] if inner else [])):
        for value in values:
            _convert_type(value.type)
    for node in graph.node:
        for stated in node.attribute:
            if stated.name in _TYPE_ATTRIBUTES and stated.i in _OTHER:
                stated.i = TensorProto.FLOAT
            for kind in (*([stated.tp] if stated.HasField("tp") else []), *stated.type_protos):
                _convert_type(kind)
        for part in subgraphs(node):
            _convert(part, inner=True)


def _convert_type(kind: onnx.TypeProto) -> None:
    """The element type of a tensor, or of the tensors in a sequence or an optional."""
    field = kind.WhichOneof("value")
    if field in ("tensor_type", "sparse_tensor_type") and (stated := getattr(kind, field)).elem_type in _OTHER:
        stated.elem_type = TensorProto.FLOAT
    elif field in ("sequence_type", "optional_type"):
        _convert_type(getattr(kind, field).elem_type)


def _single(values: Array) -> Array:
    """float32, within its range: what is finite stays finite, and what is not 0 does not become 0."""
    with np.errstate(all="ignore"):
        made = values.astype(np.float32)
        wide = values.astype(np.float64)
    made = np.where(np.isfinite(wide) & np.isinf(made), np.copysign(_LIMITS.max, made), made)
    made = np.where((wide != 0) & (made == 0), np.copysign(_LIMITS.tiny, made), made)
    return np.asarray(made, np.float32)

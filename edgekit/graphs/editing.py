"""Small tools that every pass uses: attributes, constants, names, element types, who reads what, pruning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = [
    "Array",
    "all_nodes",
    "attribute",
    "constants",
    "consumers",
    "element_types",
    "exposed",
    "free_name",
    "prune",
    "reads",
    "set_constant",
    "subgraphs",
    "tensor_names",
]

Array = NDArray[Any]


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or ``default``."""
    for found in node.attribute:
        if found.name == name:
            return helper.get_attribute_value(found)
    return default


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs that a node holds: branches of If, bodies of Loop and Scan."""
    return [g for a in node.attribute for g in (*a.graphs, *([a.g] if a.HasField("g") else []))]


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph or function, those of subgraphs too."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every tensor that a node reads, once for each time; in its subgraphs too, whose outputs count as read."""
    yield from filter(None, node.input)
    for inner in subgraphs(node):
        for part in inner.node:
            yield from reads(part)
        yield from (value.name for value in inner.output)


def consumers(graph: onnx.GraphProto) -> Counter[str]:
    """How often each tensor is read: by nodes (subgraphs included) and as a graph output."""
    uses = Counter(value.name for value in graph.output)
    for node in graph.node:
        uses.update(reads(node))
    return uses


def tensor_names(graph: onnx.GraphProto) -> set[str]:
    """Every name that a new tensor must not have: ONNX wants those of subgraphs to be unique with them."""
    found = {value.name for values in (graph.input, graph.output, graph.initializer) for value in values}
    found.update(tensor.values.name for tensor in graph.sparse_initializer)
    for node in graph.node:
        found.update(node.input, node.output)
        for inner in subgraphs(node):
            found |= tensor_names(inner)
    return found


def free_name(taken: Container[str], wanted: str, parts: Collection[str] = ()) -> str:
    """``wanted``, with as many underscores behind it as it takes to be free: the same names for the same graph.

    ``parts``: the names needed are ``wanted/part`` instead, and all of them are free.
    """
    while any(name in taken for name in ([f"{wanted}/{part}" for part in parts] or [wanted])):
        wanted += "_"
    return wanted


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX element type of every tensor that shape inference can tell; outputs of operators that ONNX lacks are missing."""
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    found = {tensor.name: int(tensor.data_type) for tensor in model.graph.initializer}
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(value for value in model.graph.input if value.name not in found)
    for tensor in model.graph.initializer:  # types need no values, which may be large
        bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        inferred = onnx.shape_inference.infer_shapes(bare).graph
    except Exception:  # noqa: BLE001  inference fails on graphs that run
        inferred = bare.graph
    values = (*inferred.value_info, *model.graph.output, *model.graph.input)
    return found | {v.name: v.type.tensor_type.elem_type for v in values if v.type.tensor_type.elem_type}


def set_constant(graph: onnx.GraphProto, name: str, value: Array) -> None:
    """Add an initializer, or replace the one of that name."""
    tensor = numpy_helper.from_array(np.asarray(value, order="C"), name)
    for existing in graph.initializer:
        if existing.name == name:
            existing.CopyFrom(tensor)
            return
    graph.initializer.append(tensor)


def prune(model: onnx.ModelProto, outputs: list[str]) -> None:
    """Cut the graph, in place, to what ``outputs`` (tensor names) need. Graph inputs stay."""
    graph = model.graph
    known = {value.name: value for value in graph.output}
    needed = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(reads(node))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    if len(nodes) != len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    if len(tensors) != len(graph.initializer):
        copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
        del graph.initializer[:]
        graph.initializer.extend(copies)
    if list(known) != outputs:
        values = [known.get(name) or helper.make_empty_tensor_value_info(name) for name in outputs]
        copies_out = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in values]
        del graph.output[:]
        graph.output.extend(copies_out)


def exposed(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """A copy of the graph, cut to what the named tensors need, with them as its outputs, in their order.

    A graph input goes by another name there (``NAME/seen``, or as `free_name` has it), and so may not stand for itself.
    """
    copy: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    names = list(dict.fromkeys(tensors))
    inputs = {value.name for value in copy.graph.input}
    # A graph input cannot be an output at once everywhere; an Identity is.
    taken = tensor_names(copy.graph) if inputs & set(names) else set()
    shown = {name: free_name(taken, f"{name}/seen") for name in names if name in inputs}
    copy.graph.node.extend(helper.make_node("Identity", [name], [other]) for name, other in shown.items())
    prune(copy, [shown.get(name, name) for name in names])
    return copy

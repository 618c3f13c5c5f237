"""Small tools that every pass uses: attributes, constants, who reads what, pruning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
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
    "exposed",
    "prune",
    "reads",
    "set_constant",
    "subgraphs",
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


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of subgraphs too."""
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
    """A copy of the graph, cut to what the named tensors need, with them as its outputs; ``NAME/seen`` for a graph input."""
    copy: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    names = list(dict.fromkeys(tensors))
    inputs = {value.name for value in copy.graph.input}
    # A graph input cannot be an output at once everywhere; an Identity is.
    for name in [name for name in names if name in inputs]:
        copy.graph.node.append(helper.make_node("Identity", [name], [f"{name}/seen"]))
    prune(copy, [f"{name}/seen" if name in inputs else name for name in names])
    return copy

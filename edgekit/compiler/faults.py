"""What is wrong with an ONNX graph, by node, operator, attribute and tensor, where `onnx.checker` says that something is."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import onnx

from edgekit.errors import GraphError
from edgekit.graphs.editing import all_nodes, subgraphs
from edgekit.graphs.light import without_weights

from .passes import opset
from .shapes import MAX_AXIS, shape_text

__all__ = ["check_structure", "inference_fault", "node_text", "stated_attributes"]

MAX_TENSOR_BYTES = 2 << 30
_SHOWN = 8  # nodes of a cycle, values of an attribute
_TELLING = 8  # letters: "transformationMode" means coordinate_transformation_mode, "mode" alone does not
_EXPORT = "export the model again"
_KINDS = {value: name.lower() for name, value in onnx.AttributeProto.AttributeType.items()}
_ITEM_BYTES = {
    getattr(onnx.TensorProto, name): size
    for size, names in ((8, "DOUBLE INT64 UINT64"), (2, "FLOAT16 BFLOAT16 INT16 UINT16"), (1, "INT8 UINT8 BOOL"))
    for name in names.split()
}
_BY_NODE = re.compile(r"\(op_type:(\w+)(?:, node name: (.*?))?\): (?:\[\w+\] )*(.*)")


def check_structure(model: onnx.ModelProto) -> None:
    """Raise `GraphError` for a graph that nothing could run: absurd sizes, names made twice or never, cycles, nodes out of
    order, attributes that their operator lacks or that have another type. The node and the tensor at fault are named."""
    graph = model.graph
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            _check_size(f"{kind} {value.name}", [d.dim_value for d in value.type.tensor_type.shape.dim], value)
        if twice := _repeated(value.name for value in values):
            raise GraphError(f"{kind} {twice!r} is there twice", _EXPORT)
    if opset(model) > onnx.defs.onnx_opset_version():
        newest = onnx.defs.onnx_opset_version()
        raise GraphError(
            f"opset {opset(model)} is newer than what onnx {onnx.__version__} knows: {newest}", "export with opset 17"
        )
    for weight in graph.initializer:
        _check_weight(weight)
    if twice := _repeated(weight.name for weight in graph.initializer):
        raise GraphError(f"weight {twice!r} is there twice", _EXPORT)
    _check_names(graph, set())
    for node in all_nodes(graph):
        _check_attributes(node, opset(model))
    _check_inferred(model)


def inference_fault(model: onnx.ModelProto) -> str:
    """The first node that contradicts its operator's definition by type and shape inference, in one line; "" where none does.

    What the file states of the outputs' shapes does not count: exporters get that wrong, and nothing depends on it.
    """
    found = _inferred(model)
    if not isinstance(found, str):
        return ""
    by_node = _BY_NODE.search(found)
    if by_node is None:
        return " ".join(found.split())[:300]
    op, name, reason = by_node[1], by_node[2] or "", by_node[3].strip().rstrip(".")
    node = next((n for n in all_nodes(model.graph) if n.op_type == op and n.name == name), None)
    stated = stated_attributes(node, reason) if node is not None else ""
    return f"node {name or '?'} ({op}): {reason}{f' ({stated})' if stated else ''}"[:400]


def node_text(node: onnx.NodeProto) -> str:
    """NAME (OPERATOR); a node without a name goes by what it makes."""
    return f"{node.name or next(iter(node.output), '') or '?'} ({node.op_type})"


def stated_attributes(node: onnx.NodeProto, about: str, *, others: bool = True) -> str:
    """The attributes of a node that a text speaks of: ``pads=[1, 1, 1], group=7``; of none: all (``others``)."""
    plain = {attribute.name: _value(attribute) for attribute in node.attribute if not attribute.ref_attr_name}
    short = {name: value for name, value in plain.items() if value is not None}
    words = {word.replace("_", "") for word in re.findall(r"[a-z0-9_]+", about.lower())}  # inputForget is input_forget
    squeezed = {name: name.lower().replace("_", "") for name in short}
    named = {
        name: value
        for name, value in short.items()
        if any(word == squeezed[name] or (len(word) >= _TELLING and word in squeezed[name]) for word in words)
    }
    return ", ".join(f"{name}={value}" for name, value in (named or (short if others else {})).items())


def _value(attribute: onnx.AttributeProto) -> str | None:
    """As Python writes it; None for tensors and graphs."""
    value: Any = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return repr(value[:40].decode(errors="replace"))
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, list) and value and all(isinstance(item, int | float | bytes) for item in value):
        items = [item.decode(errors="replace") if isinstance(item, bytes) else item for item in value[:_SHOWN]]
        return f"[{', '.join(map(str, items))}{', ...' if len(value) > _SHOWN else ''}]"
    return None


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1 and name), None)


def _check_size(what: str, axes: list[int], value: onnx.ValueInfoProto) -> None:
    elements = math.prod(axis for axis in axes if axis > 0)
    size = elements * _ITEM_BYTES.get(value.type.tensor_type.elem_type, 4)
    largest = max(axes, default=0)
    if largest > MAX_AXIS or size > MAX_TENSOR_BYTES:
        over = f"an axis has {MAX_AXIS} at most" if largest > MAX_AXIS else f"{size} bytes, {MAX_TENSOR_BYTES} at most"
        raise GraphError(f"{what} is {shape_text(axes)}: {over}", "export the model with the sizes that it is used at")


def _check_weight(weight: onnx.TensorProto) -> None:
    """A known type, no negative axis, and as many bytes as its shape takes."""
    if negative := [axis for axis in weight.dims if axis < 0]:
        raise GraphError(f"weight {weight.name!r} has an axis of {negative[0]}: {shape_text(weight.dims)}", _EXPORT)
    if weight.data_type not in onnx.TensorProto.DataType.values() or not weight.data_type:
        raise GraphError(f"weight {weight.name!r} has the type {weight.data_type}, which ONNX does not know", _EXPORT)
    item = 4 if weight.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT32) else _ITEM_BYTES.get(weight.data_type)
    if item and weight.HasField("raw_data") and len(weight.raw_data) != (wanted := item * math.prod(weight.dims)):
        raise GraphError(
            f"weight {weight.name!r} of shape {shape_text(weight.dims) or 'scalar'} has {len(weight.raw_data)} bytes, "
            f"{wanted} were expected",
            _EXPORT,
        )


def _check_names(graph: onnx.GraphProto, outer: set[str]) -> None:
    """Every name is made once, and before it is read; ``outer``: what the graph around a subgraph has made by then."""
    known = outer | {"", *(value.name for value in graph.input), *(weight.name for weight in graph.initializer)}
    known |= {sparse.values.name for sparse in graph.sparse_initializer}
    maker: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in filter(None, node.output):
            if name in maker or name in known:
                first = f"node {node_text(maker[name])}" if name in maker else "an input or a weight"
                raise GraphError(f"{name!r} is made twice: by {first} and by node {node_text(node)}", _EXPORT)
            maker[name] = node
    for node in graph.node:
        for name in (*node.input, *_read_inside(node)):
            if name not in known:
                raise GraphError(_unmade(node, name, maker), _EXPORT)
        for inner in subgraphs(node):
            _check_names(inner, known)
        known.update(node.output)
    for value in graph.output:
        if value.name not in known:
            raise GraphError(f"output {value.name!r} is made by no node", _EXPORT)


def _read_inside(node: onnx.NodeProto) -> set[str]:
    """What the subgraphs of a node take from around it."""
    found: set[str] = set()
    for graph in subgraphs(node):
        own = {
            *(v.name for v in graph.input),
            *(w.name for w in graph.initializer),
            *(s.values.name for s in graph.sparse_initializer),
        }
        own |= {name for inner in graph.node for name in inner.output}
        read = {name for inner in graph.node for name in (*inner.input, *_read_inside(inner))}
        found |= (read | {value.name for value in graph.output}) - own
    return found - {""}


def _unmade(node: onnx.NodeProto, name: str, maker: dict[str, onnx.NodeProto]) -> str:
    """Why ``name`` is not there when ``node`` reads it: nobody makes it, a cycle, or nodes out of order."""
    if name not in maker:
        return f"node {node_text(node)} reads {name!r}, which nothing makes"
    path = _cycle(node, name, maker)
    if not path:
        later = node_text(maker[name])
        return f"node {node_text(node)} reads {name!r}, which node {later} makes only after it: nodes out of order"
    listed = " -> ".join(map(node_text, path[:_SHOWN])) + (" -> ..." if len(path) > _SHOWN else "")
    return f"the graph has a cycle: {listed} -> {node_text(node)}; it goes through {name!r}"


def _cycle(node: onnx.NodeProto, name: str, maker: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes from ``node`` to the maker of ``name``, each reading what the one before makes; empty where no path leads there."""
    came: dict[int, onnx.NodeProto | None] = {id(maker[name]): None}
    waiting = [maker[name]]
    while waiting:
        current = waiting.pop()
        if current is node:
            path: list[onnx.NodeProto] = []
            step: onnx.NodeProto | None = current
            while step is not None:
                path.append(step)
                step = came[id(step)]
            return path
        for source in (*current.input, *_read_inside(current)):
            if source in maker and id(maker[source]) not in came:
                came[id(maker[source])] = current
                waiting.append(maker[source])
    return []


def _check_attributes(node: onnx.NodeProto, version: int) -> None:
    """Attributes of the operator's definition only, each of its type; all that it needs."""
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, max_inclusive_version=version):
        return
    schema: Any = onnx.defs.get_schema(node.op_type, max_inclusive_version=version)
    for attribute in node.attribute:
        known = schema.attributes.get(attribute.name)
        if known is None:
            have = ", ".join(sorted(schema.attributes)) or "none"
            raise GraphError(
                f"node {node_text(node)} has the attribute {attribute.name!r}, which {node.op_type} of opset {version} lacks",
                f"it has: {have}; export the model again with the opset that has it"[:300],
            )
        if not attribute.ref_attr_name and attribute.type != known.type.value:  # the schema's enumeration has its numbers
            raise GraphError(
                f"node {node_text(node)}: the attribute {attribute.name} is of type {_KINDS.get(attribute.type)}, "
                f"{_KINDS.get(known.type.value)} was expected",
                _EXPORT,
            )
    stated = {attribute.name for attribute in node.attribute}
    if missing := sorted(name for name, known in schema.attributes.items() if known.required and name not in stated):
        raise GraphError(f"node {node_text(node)} lacks the attribute {missing[0]!r}", _EXPORT)


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto | str:
    """The model with inferred shapes, or why inference fails."""
    bare = without_weights(model)
    del bare.graph.value_info[:]
    for value in bare.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    try:
        return onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # noqa: BLE001  InferenceError, and protobuf's for a model above 2 GiB
        return str(error)


def _check_inferred(model: onnx.ModelProto) -> None:
    """Raise `GraphError` for a node whose output, by its definition, would fill the memory."""
    found = _inferred(model)
    if isinstance(found, str):
        return
    sizes = {value.name: value for value in (*found.graph.value_info, *found.graph.output)}
    for node in found.graph.node:
        for name in node.output:
            if name in sizes:
                axes = [d.dim_value for d in sizes[name].type.tensor_type.shape.dim]
                _check_size(f"{name!r}, which node {node_text(node)} makes,", axes, sizes[name])

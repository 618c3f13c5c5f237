"""Rewriting a graph without changing what it computes. Each pass works in place and says whether it changed anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgekit.errors import BackendError
from edgekit.graphs.control import inline_constant_branches
from edgekit.graphs.editing import all_nodes, prune, subgraphs
from edgekit.graphs.light import without_weights
from edgekit.graphs.opset import MIN_OPSET, opset
from edgekit.graphs.opset import raise_opset as raise_to_wanted
from edgekit.runtime.onnxruntime import session

__all__ = [
    "WEIGHT_TYPES",
    "dims",
    "drop_dead",
    "fold_constants",
    "infer_shapes",
    "loads",
    "opset",
    "raise_opset",
    "simplify",
]

MAX_FOLDED_BYTES = 64 << 20  # a constant that is larger stays computed
MAX_ROUNDS = 4
WEIGHT_TYPES = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT8,
    TensorProto.UINT8,
)
#: Never folded: random ones, and Q/DQ, which keep int8 weights int8.
_KEPT = frozenset("RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli".split()) | {  # noqa: SIM905
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
}
#: Their outputs can be far larger than their inputs: folded only where the size is known to be small.
_GROWING = frozenset("ConstantOfShape Expand Tile Range Resize Upsample Pad OneHot EyeLike GatherND Gather".split())  # noqa: SIM905


def dims(value: onnx.ValueInfoProto) -> list[int | str | None]:
    """Axes of a tensor: a number, a symbol, or None for one that says nothing (also 0, -1 and "?", as some exporters write)."""
    return [
        int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param.strip("?") or None)
        for d in value.type.tensor_type.shape.dim
    ]


def _used(graph: onnx.GraphProto) -> set[str]:
    """Names that anything reads: nodes, subgraphs and the graph's outputs."""
    names = {name for node in all_nodes(graph) for name in node.input} | {o.name for o in graph.output}
    return names | {o.name for node in all_nodes(graph) for inner in subgraphs(node) for o in inner.output}


def simplify(model: onnx.ModelProto) -> tuple[bool, list[str]]:
    """Raise the opset, infer shapes, fold constants, drop what is dead. Returns (changed, notes)."""
    notes: list[str] = []
    changed = raise_opset(model, notes)
    changed |= not all(output.type.tensor_type.HasField("shape") for output in model.graph.output)
    infer_shapes(model)
    for _ in range(MAX_ROUNDS):
        if not (fold_constants(model) | inline_constant_branches(model)):
            break
        changed = True
        infer_shapes(model)
    return drop_dead(model) or changed, notes


def loads(model: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime takes the graph; its type and shape inference is strict."""
    try:
        session(model.SerializeToString())
    except BackendError:
        return False
    return True


def raise_opset(model: onnx.ModelProto, notes: list[str]) -> bool:
    """Opsets below 13 become 17, else 13; one that does not convert stays. Both with a note."""
    before = opset(model)
    changed, reason = raise_to_wanted(model)
    if changed:
        notes.append(f"opset {before} was raised to {opset(model)}")
    elif reason:
        notes.append(f"opset {before} stays, for it does not convert ({reason}); quantize needs {MIN_OPSET}")
    return changed


def infer_shapes(model: onnx.ModelProto) -> None:
    """Add what shape inference finds; a graph that it fails on stays as it is."""
    graph = model.graph
    try:
        found = onnx.shape_inference.infer_shapes(without_weights(model), data_prop=True).graph
    except Exception:  # noqa: BLE001  an inference error is no proof against a graph that ONNX Runtime runs
        return
    parts = [(graph.value_info, found.value_info), (graph.output, found.output)]
    if any(map(subgraphs, graph.node)):
        parts.append((graph.node, found.node))
    for old, new in parts:
        del old[:]
        old.extend(new)


def fold_constants(model: onnx.ModelProto) -> bool:
    """Replace every node whose inputs are all constants, and ``Shape`` of known shapes, by its value.

    ONNX Runtime evaluates them all in one session. Q/DQ, random operators, subgraphs and constants above
    `MAX_FOLDED_BYTES` stay.
    """
    graph = model.graph
    known = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    outputs = {o.name for o in graph.output}
    constant = {i.name for i in graph.initializer}
    shapes: dict[str, NDArray[np.int64]] = {}
    folded: list[onnx.NodeProto] = []
    rest: list[onnx.NodeProto] = []
    for node in graph.node:
        shape = _static_shape(node, known)
        if shape is not None and not outputs & set(node.output):
            shapes[node.output[0]] = shape
            constant.add(node.output[0])
        elif not outputs & set(node.output) and _foldable(node, constant, known):
            folded.append(node)
            constant |= set(node.output)
        else:
            rest.append(node)
    if len(rest) == len(graph.node):
        return False
    made = {name for node in folded for name in node.output if name}
    needed = {n for node in rest for n in node.input} | {n for node in rest for g in subgraphs(node) for n in _used(g)}
    wanted = sorted(made & needed)
    values = _evaluate(model, folded, wanted, shapes)
    if values is None:
        return False  # nothing was touched yet
    rest = [onnx.NodeProto.FromString(node.SerializeToString()) for node in rest]
    del graph.node[:]
    graph.node.extend(rest)
    found = {**shapes, **dict(zip(wanted, values, strict=True))}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in found.items())
    drop_dead(model)
    return True


def _static_shape(node: onnx.NodeProto, known: dict[str, onnx.ValueInfoProto]) -> NDArray[np.int64] | None:
    """The value of a ``Shape`` node of a tensor whose axes are all known."""
    if node.op_type != "Shape" or node.input[0] not in known or not known[node.input[0]].type.tensor_type.HasField("shape"):
        return None
    axes = dims(known[node.input[0]])
    if not all(isinstance(axis, int) for axis in axes):
        return None
    bounds = {a.name: a.i for a in node.attribute}
    return np.array(axes[bounds.get("start", 0) : bounds.get("end", len(axes))], np.int64)


def _foldable(node: onnx.NodeProto, constant: set[str], known: dict[str, onnx.ValueInfoProto]) -> bool:
    if node.op_type in _KEPT or node.domain not in ("", "ai.onnx") or subgraphs(node):
        return False
    if node.op_type != "Constant" and (not node.input or any(n and n not in constant for n in node.input)):
        return False
    for name in node.output:
        axes = dims(known[name]) if name in known and known[name].type.tensor_type.HasField("shape") else [None]
        if all(isinstance(axis, int) for axis in axes):
            if (
                8 * int(np.prod([float(a) for a in axes if isinstance(a, int)])) > MAX_FOLDED_BYTES
                and node.op_type != "Constant"
            ):
                return False
        elif node.op_type in _GROWING:
            return False
    return True


def _evaluate(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], wanted: list[str], shapes: dict[str, NDArray[np.int64]]
) -> list[NDArray[Any]] | None:
    """Values of ``wanted`` by ONNX Runtime, None where it cannot run the nodes. ``shapes``: constants beside the graph's."""
    if not wanted:
        return []
    read = {name for node in nodes for name in node.input}
    part = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "fold",
            [],
            [onnx.ValueInfoProto(name=n) for n in wanted],
            [
                *(i for i in model.graph.initializer if i.name in read),
                *(numpy_helper.from_array(value, name) for name, value in shapes.items() if name in read),
            ],
        ),
        opset_imports=model.opset_import,
        ir_version=max(model.ir_version, 8),
    )
    try:
        values: list[NDArray[Any]] = session(part.SerializeToString()).run(wanted, {})
    except Exception:  # noqa: BLE001  ONNX Runtime's Fail and InvalidArgument derive from Exception alone
        return None
    return values if all(isinstance(value, np.ndarray) for value in values) else None


def drop_dead(model: onnx.ModelProto) -> bool:
    """Remove nodes and initializers that nothing reads."""
    graph = model.graph
    before = len(graph.node) + len(graph.initializer)
    prune(model, [value.name for value in graph.output])
    gone = {v.name for v in graph.value_info} - _used(graph)
    if gone:
        infos = [v for v in graph.value_info if v.name not in gone]
        copies_info = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in infos]
        del graph.value_info[:]
        graph.value_info.extend(copies_info)
    return len(graph.node) + len(graph.initializer) != before

"""Control flow made straight: branches of `If` and rounds of `Loop` and `Scan` as plain nodes of the graph around them.

TensorRT takes only some of them: not a branch that reads shapes of its own, not a loop whose tensors grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from .editing import attribute, constants, free_name, subgraphs, tensor_names
from .opset import MIN_OPSET, opset

__all__ = ["both_branches", "drop_branches", "inline_constant_branches", "rename", "unroll"]

MAX_KNOWN = 1024  # elements of a constant that a loop's rounds may follow from
MAX_UNROLLED = 4096  # nodes that loops may become; a dilated pool as a Loop became 153,601 layers
Nodes = list[onnx.NodeProto]
MAX_BRANCHES = 32  # Ifs of which each branch is tried
_BRANCHES = ("then_branch", "else_branch")
#: What counts rounds and decides whether to go on; none makes much of little.
_COUNTING = frozenset(
    """Constant Identity Cast Add Sub Mul Div Mod Min Max Equal Less LessOrEqual Greater GreaterOrEqual And Or Not Squeeze
    Unsqueeze Concat Gather Slice""".split()  # noqa: SIM905
)


class _Inliner:
    """Copies subgraphs into the graph ``model`` has around them, under free names."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.taken = tensor_names(model.graph)
        self.added: list[onnx.TensorProto] = []  # constants since somebody looked

    def fresh(self, wanted: str) -> str:
        name = free_name(self.taken, wanted)
        self.taken.add(name)
        return name

    def constant(self, wanted: str, value: Any) -> str:
        name = self.fresh(wanted)
        self.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def append(self, tensor: onnx.TensorProto) -> None:
        self.graph.initializer.append(tensor)
        self.added.append(tensor)

    def constants_of(self, inner: onnx.GraphProto, prefix: str) -> dict[str, str]:
        """Copies the constants of ``inner``; its names for them -> theirs around it."""
        names = {}
        for tensor in inner.initializer:
            names[tensor.name] = self.fresh(f"{prefix}/{tensor.name}")
            copy = onnx.TensorProto.FromString(tensor.SerializeToString())
            copy.name = names[tensor.name]
            self.append(copy)
        return names

    def copied(self, inner: onnx.GraphProto, prefix: str, given: Mapping[str, str]) -> tuple[Nodes, list[str]]:
        """(the nodes of ``inner``, the names of its outputs); ``given``: its inputs and constants -> tensors around it."""
        names = dict(given)
        for node in inner.node:
            names |= {name: self.fresh(f"{prefix}/{name}") for name in node.output if name}
        nodes = []
        for node in inner.node:
            copy_node = onnx.NodeProto.FromString(node.SerializeToString())
            copy_node.name = f"{prefix}/{node.name or node.output[0]}"
            rename(copy_node, names)
            nodes.append(copy_node)
        return nodes, [names.get(value.name, value.name) for value in inner.output]

    def replaced(self, change: Callable[[onnx.NodeProto], Nodes | None]) -> bool:
        """Put what ``change`` returns in a node's place, where it returns anything."""
        made: Nodes = []
        changed = False
        for node in [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.graph.node]:
            nodes = change(node)
            changed |= nodes is not None
            made += [node] if nodes is None else nodes
        if changed:
            del self.graph.node[:]
            self.graph.node.extend(made)
        return changed


def rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """In place, in subgraphs too, but for names that these define themselves."""
    for values in (node.input, node.output):
        for index, name in enumerate(values):
            values[index] = names.get(name, name)
    for inner in subgraphs(node):
        own = {value.name for value in (*inner.input, *inner.initializer)} | {n for part in inner.node for n in part.output}
        outer = {name: new for name, new in names.items() if name not in own}
        for part in inner.node:
            rename(part, outer)
        for value in inner.output:
            value.name = outer.get(value.name, value.name)


def _bound(outputs: list[str], names: list[str]) -> Nodes:
    """Identities that give ``names`` the values of ``outputs``."""
    return [helper.make_node("Identity", [a], [b], name=f"{b}/bound") for a, b in zip(outputs, names, strict=True) if b]


def inline_constant_branches(model: onnx.ModelProto) -> bool:
    """Every `If` of the main graph whose condition is a constant becomes its branch, in place; whether there was any."""
    inliner, known = _Inliner(model), constants(model.graph)

    def taken(node: onnx.NodeProto) -> Nodes | None:
        if node.op_type != "If" or node.input[0] not in known or not _plain(node):
            return None
        condition = bool(numpy_helper.to_array(known[node.input[0]]).ravel()[0])
        return _branch(inliner, node, "then_branch" if condition else "else_branch")

    return inliner.replaced(taken)


def _branch(inliner: _Inliner, node: onnx.NodeProto, which: str) -> Nodes:
    nodes, outputs = _body(inliner, node, which, node.name or node.output[0])
    return nodes + _bound(outputs, list(node.output))


def _body(inliner: _Inliner, node: onnx.NodeProto, which: str, prefix: str) -> tuple[Nodes, list[str]]:
    inner = attribute(node, which, None)
    return inliner.copied(inner, prefix, inliner.constants_of(inner, prefix))


def _plain(node: onnx.NodeProto) -> bool:
    """Whether a node's subgraphs hold nothing that cannot be moved."""
    return not any(inner.sparse_initializer for inner in subgraphs(node))


def drop_branches(model: onnx.ModelProto, loads: Callable[[onnx.ModelProto], bool]) -> bool:
    """Every `If` of which only one branch ``loads`` becomes it, in place; whether there was any.

    A branch that type and shape inference rejects cannot be taken at the stated shapes, whatever the inputs are. What fails
    at run time only proves nothing: it may be right for other inputs.
    """
    if sum(node.op_type == "If" for node in model.graph.node) > MAX_BRANCHES:
        return False
    inliner = _Inliner(model)

    def fitting(node: onnx.NodeProto) -> Nodes | None:
        if node.op_type != "If" or not _plain(node):
            return None
        able = [which for which in _BRANCHES if loads(_with_branch(model, node, which))]
        return _branch(inliner, node, able[0]) if len(able) == 1 else None

    return inliner.replaced(fitting)


def _with_branch(model: onnx.ModelProto, node: onnx.NodeProto, which: str) -> onnx.ModelProto:
    """A copy of the graph with one branch in the place of its `If`."""
    trial: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    inliner = _Inliner(trial)
    inliner.replaced(lambda one: _branch(inliner, one, which) if list(one.output) == list(node.output) else None)
    return trial


def both_branches(model: onnx.ModelProto) -> bool:
    """Every other `If` computes both branches and chooses by `Where`, in place; whether there was any.

    Left alone: where the branches' outputs are not known to be tensors of the same type and the same fixed shape.
    """
    trial: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    inliner, pairs = _Inliner(trial), list[tuple[str, str]]()

    def chosen(node: onnx.NodeProto) -> Nodes | None:
        if node.op_type != "If" or not _plain(node):
            return None
        prefix = node.name or node.output[0]
        then, ours = _body(inliner, node, "then_branch", f"{prefix}/then")
        other, theirs = _body(inliner, node, "else_branch", f"{prefix}/else")
        pairs.extend(zip(ours, theirs, strict=True))
        wheres = [
            helper.make_node("Where", [node.input[0], a, b], [name], name=f"{name}/chosen")
            for a, b, name in zip(ours, theirs, node.output, strict=True)
            if name
        ]
        return [*then, *other, *wheres]

    if not inliner.replaced(chosen):
        return False
    kinds = _kinds(trial)
    if any(kinds.get(a) is None or kinds.get(a) != kinds.get(b) for a, b in pairs):
        return False
    model.CopyFrom(trial)
    return True


def _kinds(model: onnx.ModelProto) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Element type and shape of the tensors of which both are known."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {tensor.name: (int(tensor.data_type), tuple(tensor.dims)) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(axis.HasField("dim_value") for axis in kind.shape.dim):
            found[value.name] = (kind.elem_type, tuple(axis.dim_value for axis in kind.shape.dim))
    return found


def unroll(model: onnx.ModelProto) -> bool:
    """Every `Loop` whose rounds follow from constants, and every `Scan` over a known length, becomes so many copies of its
    body, in place, as long as they are at most `MAX_UNROLLED` nodes together; whether there was any. From opset 13 on."""
    if opset(model) < MIN_OPSET or not any(node.op_type in ("Loop", "Scan") for node in model.graph.node):
        return False
    trial: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    inliner, made = _Inliner(trial), 0
    shapes = {name: shape for name, (_, shape) in _kinds(trial).items()}

    def straight(node: onnx.NodeProto) -> Nodes | None:
        nonlocal made
        body, nodes = attribute(node, "body", None), None
        if node.op_type in ("Loop", "Scan") and _plain(node):
            budget = MAX_UNROLLED - made
            rounds = _length(node, shapes) if node.op_type == "Scan" else None
            if rounds is not None and rounds * (len(body.node) + len(node.input) + len(node.output)) <= budget:
                nodes = _scan(inliner, node, body, rounds)
            elif node.op_type == "Loop":
                nodes = _loop(inliner, node, body, budget)
        made += len(nodes or [])
        return nodes

    if not inliner.replaced(straight):
        return False
    model.CopyFrom(trial)
    return True


class _Known:
    """Small constants by name, and what follows from them: a loop's counter, and whether it goes on."""

    def __init__(self, inliner: _Inliner) -> None:
        self.inliner = inliner
        self.values = {t.name: numpy_helper.to_array(t) for t in inliner.graph.initializer if np.prod(t.dims) <= MAX_KNOWN}

    def add(self, wanted: str, value: Any) -> str:
        name = self.inliner.constant(wanted, value)
        self.values[name] = np.asarray(value)
        return name

    def evaluated(self, nodes: Nodes) -> Nodes:
        """``nodes`` without those that count and compare small constants, whose outputs become constants."""
        left = []
        for tensor in self.inliner.added:
            if np.prod(tensor.dims) <= MAX_KNOWN:
                self.values[tensor.name] = numpy_helper.to_array(tensor)
        self.inliner.added.clear()
        for node in nodes:
            if node.op_type not in _COUNTING or not all(name in self.values for name in node.input if name):
                left.append(node)
                continue
            try:
                found = ReferenceEvaluator(node).run(None, {name: self.values[name] for name in node.input if name})
            except Exception:  # noqa: BLE001  what it does not know stays
                left.append(node)
                continue
            for name, value in zip(node.output, found, strict=False):
                self.inliner.append(numpy_helper.from_array(np.asarray(value), name))
                self.values[name] = np.asarray(value)
        return left

    def true(self, name: str) -> bool | None:
        """None where it is not known."""
        return bool(np.all(self.values[name])) if name in self.values else None


def _loop(inliner: _Inliner, node: onnx.NodeProto, body: onnx.GraphProto, budget: int) -> Nodes | None:
    """None where the rounds do not follow from constants, are none, or need more than ``budget`` nodes."""
    known, prefix, count = _Known(inliner), node.name or node.output[0], len(node.input) - 2
    if node.input[0] and node.input[0] not in known.values:
        return None
    most = int(known.values[node.input[0]].ravel()[0]) if node.input[0] else None
    going = node.input[1] or known.add(f"{prefix}/true", True)
    constants_of = inliner.constants_of(body, prefix)
    states, scanned, nodes, index = list(node.input[2:]), [list[str]() for _ in body.output[1 + count :]], Nodes(), 0
    while most is None or index < most:
        goes = known.true(going)
        if goes is None or index > budget or len(nodes) + index * len(scanned) > budget:
            return None
        if not goes:
            break
        given = [known.add(f"{prefix}/{index}/i", np.int64(index)), going, *states]
        names = {value.name: name for value, name in zip(body.input, given, strict=True)}
        made, outputs = inliner.copied(body, f"{prefix}/{index}", {**constants_of, **names})
        nodes, going, states, index = nodes + known.evaluated(made), outputs[0], outputs[1 : 1 + count], index + 1
        for found, name in zip(scanned, outputs[1 + count :], strict=True):
            found.append(name)
    if not index:
        return None
    stacked, nodes = _stacked(inliner, prefix, scanned, [0] * len(scanned), nodes)
    return nodes + _bound([*states, *stacked], _outputs(node, body, 1))


def _outputs(node: onnx.NodeProto, body: onnx.GraphProto, skipped: int) -> list[str]:
    """The node's outputs, "" for those that it leaves out at the end."""
    return [*node.output, *[""] * (len(body.output) - skipped - len(node.output))]


def _stacked(
    inliner: _Inliner, prefix: str, scanned: list[list[str]], axes: list[int], nodes: Nodes
) -> tuple[list[str], Nodes]:
    """What each round gave, along a new axis."""
    found = []
    for parts, axis in zip(scanned, axes, strict=True):
        name = inliner.constant(f"{prefix}/axis", np.array([axis], np.int64))
        rows = [inliner.fresh(f"{part}/row") for part in parts]
        nodes = nodes + [helper.make_node("Unsqueeze", [part, name], [row]) for part, row in zip(parts, rows, strict=True)]
        found.append(inliner.fresh(f"{prefix}/stacked"))
        nodes.append(helper.make_node("Concat", rows, [found[-1]], axis=axis))
    return found, nodes


def _length(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Rounds of a `Scan`; None where they are not known, or a direction or a negative axis is stated."""
    count = attribute(node, "num_scan_inputs", 0)
    axes = attribute(node, "scan_input_axes", [0] * count)
    stated = [*axes, *attribute(node, "scan_output_axes", [])]
    turned = [*attribute(node, "scan_input_directions", []), *attribute(node, "scan_output_directions", [])]
    shape = shapes.get(node.input[len(node.input) - count], ())
    if any(turned) or any(axis < 0 for axis in stated) or len(shape) <= axes[0]:
        return None
    return shape[axes[0]] or None


def _scan(inliner: _Inliner, node: onnx.NodeProto, body: onnx.GraphProto, rounds: int) -> Nodes:
    prefix, scans = node.name or node.output[0], attribute(node, "num_scan_inputs", 0)
    count = len(node.input) - scans
    axes = attribute(node, "scan_input_axes", [0] * scans)
    constants_of = inliner.constants_of(body, prefix)
    states, scanned, nodes = list(node.input[:count]), [list[str]() for _ in body.output[count:]], Nodes()
    for index in range(rounds):
        at = inliner.constant(f"{prefix}/{index}/i", np.int64(index))
        rows = [inliner.fresh(f"{prefix}/{index}/{name}") for name in node.input[count:]]
        for source, row, axis in zip(node.input[count:], rows, axes, strict=True):
            nodes.append(helper.make_node("Gather", [source, at], [row], axis=axis))
        names = {value.name: name for value, name in zip(body.input, [*states, *rows], strict=True)}
        made, outputs = inliner.copied(body, f"{prefix}/{index}", {**constants_of, **names})
        nodes, states = nodes + made, outputs[:count]
        for found, name in zip(scanned, outputs[count:], strict=True):
            found.append(name)
    given = attribute(node, "scan_output_axes", [0] * len(scanned))
    stacked, nodes = _stacked(inliner, prefix, scanned, list(given), nodes)
    return nodes + _bound([*states, *stacked], _outputs(node, body, 0))

"""TensorRT's refusals in words: the node, its operator, and which of its attributes stands against it."""

from __future__ import annotations

import re

import onnx

from edgekit.graphs.editing import all_nodes

from .faults import stated_attributes
from .reading import UNBUILDABLE, UNBUILDABLE_BY_RTX

__all__ = ["cure", "explained"]

LONGEST = 500  # characters of a message
_PARSER = re.compile(r"^(\w+) \(node (.+?)\): (.*)$", re.DOTALL)
_AFTERMATH = re.compile(r"\s*\[checkMacros\.cpp.*$", re.DOTALL)  # that there is no GPU here, which nobody needs
_SHAPES = re.compile(r"^(.+?) decides shapes: ")
_OF_BRANCHES = re.compile(r"graphScope|[Cc]onditional|IIf|ILoop")  # it tells of such nodes without their names
_LAYER = re.compile(r"\bI\w*Layer (.+?): ")
_FUSED = re.compile(r"\{ForeignNode\[(.+?)(?:\.\.\.|\])")


def explained(graph: bytes, refusal: str) -> str:
    """A refusal of TensorRT, with the attributes of the node at fault where it has any. It begins as the refusal did.

    The parser answers a bare ``false`` for an operator that it has no converter for: that is said instead.
    """
    refusal = _AFTERMATH.sub("", refusal)
    model = onnx.load_model_from_string(graph)
    node = _node(model, refusal)
    parsed = _PARSER.match(refusal)
    if parsed and parsed[3].strip() in ("false", ""):
        refusal = f"{parsed[1]} (node {parsed[2]}): TensorRT has no such operator"
        return refusal[:LONGEST]
    stated = stated_attributes(node, refusal) if node is not None else ""
    if node is not None and stated:
        known = f"node {node.name or node.output[0]} has {stated}"
    elif node is None and (branch := _undecided(model, refusal)) is not None:
        known = f"the graph holds {branch.op_type} ({branch.name or branch.output[0]}), decided at run time"
    else:
        return refusal[:LONGEST]
    return f"{refusal[: LONGEST - len(known) - 2]}; {known}"[:LONGEST]


def cure(graph: bytes, refusal: str) -> str:
    """What a user can do about it."""
    if found := _SHAPES.match(refusal):
        values = " ".join(f"--constant {name}:V,V" for name in found[1].split(", "))
        return f"import it again with its values: {values}; ONNX Runtime takes them at run time"[:300]
    model = onnx.load_model_from_string(graph)
    node = _node(model, refusal)
    operator = node.op_type if node is not None else refusal.split(" ", 1)[0]
    if operator in UNBUILDABLE | UNBUILDABLE_BY_RTX or refusal.endswith(": false"):
        return f"cut {operator} off before the export and do it outside of the graph; ONNX Runtime runs the graph as it is"
    if node is not None and (stated := stated_attributes(node, refusal, others=False)):
        return f"export {operator} without {stated}; or import it again with fixed shapes (--shape)"[:300]
    if "changes volume" in refusal:
        return "build it for the samples that it was traced with: --batch N; or export it with a dynamic batch"
    if node is None and (branch := _undecided(model, refusal)) is not None:
        values = " ".join(f"--constant {name}:V" for name in _deciding(model.graph, branch))
        if values:
            return f"import it again with what decides {branch.op_type}: {values}; or with fixed shapes (--shape)"[:300]
    return "import it again with fixed shapes (--shape), or change this node"


def _undecided(model: onnx.ModelProto, refusal: str) -> onnx.NodeProto | None:
    """The first branch or loop of a graph, where a refusal is of that kind."""
    if not _OF_BRANCHES.search(refusal):
        return None
    return next((node for node in model.graph.node if node.op_type in ("If", "Loop")), None)


def _deciding(graph: onnx.GraphProto, branch: onnx.NodeProto) -> list[str]:
    """The inputs of the graph from whose values, not shapes, it is computed what decides a branch."""
    inputs, makers = {value.name for value in graph.input}, {name: node for node in graph.node for name in node.output}
    waiting, seen = list(branch.input[: 1 if branch.op_type == "If" else 2]), set[str]()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            made = makers.get(name)
            waiting += made.input if made is not None and made.op_type not in ("Shape", "Size") else []
    return sorted(seen & inputs)


def _node(model: onnx.ModelProto, refusal: str) -> onnx.NodeProto | None:
    """The node that a refusal names: the parser by operator and name or number, the builder by its layer."""
    nodes = list(all_nodes(model.graph))
    parsed = _PARSER.match(refusal)
    if parsed:
        if number := re.fullmatch(r"number (\d+)", parsed[2]):
            index = int(number[1])
            return model.graph.node[index] if index < len(model.graph.node) else None
        named = parsed[2]
    else:
        found = _LAYER.search(refusal) or _FUSED.search(refusal)
        if found is None:
            return max((n for n in nodes if _derived(refusal, n.name)), key=lambda n: len(n.name), default=None)
        named = found[1].split(" ")[0]
    matches = (node for node in nodes if named in (node.name, *node.output) or _derived(named, node.name))
    return next((node for node in matches if parsed is None or node.op_type == parsed[1]), None)


def _derived(text: str, name: str) -> bool:
    """Whether ``text`` speaks of a layer that TensorRT made of the node ``name``: it appends numbers, as in my_nms_0."""
    return len(name) > 2 and re.search(rf"(?<![\w./]){re.escape(name)}(_\d+)?(?![\w./])", text) is not None

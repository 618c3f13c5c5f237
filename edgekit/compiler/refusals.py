"""TensorRT's refusals in words: the node, its operator, and which of its attributes stands against it."""

from __future__ import annotations

import re

import onnx

from edgekit.graphs.editing import all_nodes

from .faults import stated_attributes
from .reading import UNBUILDABLE

__all__ = ["cure", "explained"]

LONGEST = 500  # characters of a message
_PARSER = re.compile(r"^(\w+) \(node (.+?)\): (.*)$", re.DOTALL)
_AFTERMATH = re.compile(r"\s*\[checkMacros\.cpp.*$", re.DOTALL)  # that there is no GPU here, which nobody needs
_SHAPES = re.compile(r"^(.+?)(?:, .+)? decides shapes: ")
_LAYER = re.compile(r"\bI\w*Layer (.+?): ")
_FUSED = re.compile(r"\{ForeignNode\[(.+?)(?:\.\.\.|\])")


def explained(graph: bytes, refusal: str) -> str:
    """A refusal of TensorRT, with the attributes of the node at fault where it has any. It begins as the refusal did.

    The parser answers a bare ``false`` for an operator that it has no converter for: that is said instead.
    """
    refusal = _AFTERMATH.sub("", refusal)
    node = _node(onnx.load_model_from_string(graph), refusal)
    parsed = _PARSER.match(refusal)
    if parsed and parsed[3].strip() in ("false", ""):
        refusal = f"{parsed[1]} (node {parsed[2]}): TensorRT has no such operator"
        return refusal[:LONGEST]
    stated = stated_attributes(node, refusal) if node is not None else ""
    if node is None or not stated:
        return refusal[:LONGEST]
    known = f"node {node.name or node.output[0]} has {stated}"
    return f"{refusal[: LONGEST - len(known) - 2]}; {known}"[:LONGEST]


def cure(graph: bytes, refusal: str) -> str:
    """What a user can do about it."""
    if found := _SHAPES.match(refusal):
        return f"import it again with its values: --constant {found[1]}:V,V; ONNX Runtime takes them at run time"
    node = _node(onnx.load_model_from_string(graph), refusal)
    operator = node.op_type if node is not None else refusal.split(" ", 1)[0]
    if operator in UNBUILDABLE or refusal.endswith(": false"):
        return f"cut {operator} off before the export and do it outside of the graph; ONNX Runtime runs the graph as it is"
    if node is not None and (stated := stated_attributes(node, refusal, others=False)):
        return f"export {operator} without {stated}; or import it again with fixed shapes (--shape)"[:300]
    return "import it again with fixed shapes (--shape), or change this node"


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
            return None
        named = found[1].split(" ")[0]
    matches = (node for node in nodes if named in (node.name, *node.output))
    return next((node for node in matches if parsed is None or node.op_type == parsed[1]), None)

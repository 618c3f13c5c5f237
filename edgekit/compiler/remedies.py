"""What to change in a graph that TensorRT refuses: rewrites that compute the same, tried in turn, after a refusal only.

A native operator is mostly faster than the same thing written out, so nothing is rewritten that was not refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import onnx
import onnx.inliner

from edgekit.graphs.control import both_branches, drop_branches, unroll
from edgekit.graphs.editing import all_nodes
from edgekit.graphs.pools import expand_dilated_pools

from .recurrences import reverse_forward_layers
from .shapes import Profiles

__all__ = ["Refusal", "remedies"]


class Refusal(NamedTuple):
    """``text`` of TensorRT, of a graph with ``profiles``; ``loads``: whether ONNX Runtime takes a graph."""

    text: str
    profiles: Profiles
    loads: Callable[[onnx.ModelProto], bool]


#: (model, in place; the refusal) -> whether it changed anything
Remedy = Callable[[onnx.ModelProto, Refusal], bool]


def remedies() -> Iterator[tuple[Remedy, str]]:
    """Each with the note that it leaves, the likeliest to help first."""
    yield _bind, "axes of one size are fixed in the graph, because TensorRT refuses it with dynamic ones"
    yield _expand_refused, "{} written out by its ONNX definition, because TensorRT refuses the operator"
    yield _reverse, "recurrences run in reverse over the reversed sequence, which is the same"
    yield _both, "both branches of If are computed and one is chosen, because TensorRT refuses the graph"
    yield _unroll, "loops are unrolled, because TensorRT refuses the graph"
    yield _pools, "dilated pools are written as slices, because TensorRT refuses their operator"
    yield _expand_all, "operators are written out by their ONNX definitions, because TensorRT refuses the graph"


def _reverse(model: onnx.ModelProto, refusal: Refusal) -> bool:
    return reverse_forward_layers(model) > 0


def _bind(model: onnx.ModelProto, refusal: Refusal) -> bool:
    """What the profiles fix anyway."""
    symbols: dict[str, int] = {}
    for value in model.graph.input:
        low, _, high = refusal.profiles.get(value.name, [[], [], []])
        for axis, least, most in zip(value.type.tensor_type.shape.dim, low, high, strict=False):
            if axis.dim_param and least == most:
                symbols[axis.dim_param] = most
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in symbols:
                axis.dim_value = symbols[axis.dim_param]
    if symbols:
        del model.graph.value_info[:]  # stated for the symbols
        if not refusal.loads(model):
            drop_branches(model, refusal.loads)
    return bool(symbols)


def _both(model: onnx.ModelProto, refusal: Refusal) -> bool:
    return both_branches(model)


def _unroll(model: onnx.ModelProto, refusal: Refusal) -> bool:
    return unroll(model)


def _pools(model: onnx.ModelProto, refusal: Refusal) -> bool:
    return expand_dilated_pools(model)


def _expand_refused(model: onnx.ModelProto, refusal: Refusal) -> bool:
    """The operator that the refusal starts with."""
    operator = refusal.text.split(" ", 1)[0]
    return _expand(model, {operator} if operator in _composed(model) else set())


def _expand_all(model: onnx.ModelProto, refusal: Refusal) -> bool:
    return _expand(model, _composed(model))


def _composed(model: onnx.ModelProto) -> set[str]:
    """Operators of the graph that ONNX itself defines by simpler ones."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    found = set()
    for node in all_nodes(model.graph):
        if node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type, max_inclusive_version=versions.get("", 1)):
            schema: Any = onnx.defs.get_schema(node.op_type, max_inclusive_version=versions.get("", 1))
            if schema.has_function or schema.has_context_dependent_function:
                found.add(node.op_type)
    return found


def _expand(model: onnx.ModelProto, operators: set[str]) -> bool:
    if not operators:
        return False
    chosen = [("", name) for name in sorted(operators)]
    known = {value.name for value in (*model.graph.input, *model.graph.value_info)}
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, None))  # inputs left out
    model.graph.value_info.extend(  # the inliner asks for the types of constants, too
        onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims)
        for one in model.graph.initializer
        if one.name not in known
    )
    model.CopyFrom(onnx.inliner.inline_selected_functions(model, chosen, inline_schema_functions=True))
    kept = [value for value in model.graph.value_info if value.name]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return not operators & {node.op_type for node in all_nodes(model.graph)}

"""Reading an ONNX file that nobody vouches for."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx.inliner
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_model

from edgekit.errors import GraphError, first_line
from edgekit.files import read_file
from edgekit.graphs import MICROSOFT_OPERATORS
from edgekit.graphs.editing import all_nodes, free_name, subgraphs
from edgekit.graphs.light import without_weights
from edgekit.graphs.narrow import plain_border
from edgekit.runtime.operators import STANDARD

from .passes import dims, opset

__all__ = ["UNBUILDABLE", "UNBUILDABLE_BY_RTX", "Source", "check_model", "drop_unproven", "read_model"]

MAX_BYTES = 2 << 30
#: TensorRT's parser refuses these (seen on TensorRT-RTX 1.7, and as onnx-tensorrt's docs/operators.md has it): ONNX Runtime
#: runs them.
UNBUILDABLE = frozenset(
    """BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Compress CumProd DFT DeformConv Det MaxUnpool
    STFT TfIdfVectorizer Unique""".split()  # noqa: SIM905
)
#: Classic TensorRT has these from 8.5 on by the same table; TensorRT-RTX 1.7 parses them and has no kernel.
UNBUILDABLE_BY_RTX = frozenset(("NonMaxSuppression", "NonZero", "RoiAlign"))
_TENSOR_TYPES = frozenset(
    getattr(TensorProto, name)
    for name in "FLOAT FLOAT16 DOUBLE INT64 INT32 INT16 INT8 UINT8 UINT16 UINT32 UINT64 BOOL".split()  # noqa: SIM905
)


class Source(NamedTuple):
    """``model`` holds all its weights. ``changed``: it is not what the file holds."""

    model: onnx.ModelProto
    changed: bool
    notes: list[str]


def read_model(path: Path) -> Source:
    """Parse, load external data from inside the file's folder only, inline functions, refuse what edgekit cannot take.

    Raises `GraphError` that names the operators, tensors or inputs at fault.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(read_file(path))
    except Exception as error:  # noqa: BLE001  protobuf's exception type depends on its backend
        raise GraphError(f"{path.name} is not an ONNX file: {first_line(error)[:300]}", "export the model again") from None
    if not model.HasField("graph") or not model.graph.output or not model.opset_import:
        raise GraphError(f"{path.name} is not an ONNX file: it holds no graph", "export the model again")
    if (odd := _no_text(model)) is not None:
        raise GraphError(f"{path.name} is damaged: {odd!r} is no name", "export the model again")
    _check_operators(model)  # in the file's own names, and before anything follows its paths
    external = _load_external(model, path)
    changed = external or bool(model.functions)
    if model.functions:
        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as error:  # noqa: BLE001  its own ValidationError, and what its C++ raises
            raise GraphError(
                f"the functions of {path.name} cannot be inlined: {first_line(error)[:300]}",
                "export the model without functions",
            ) from None
        _check_operators(model)
    weights = {i.name for i in model.graph.initializer}
    real = [i for i in model.graph.input if i.name not in weights]  # before IR 4 weights were listed as inputs too
    if len(real) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(real)
        model.ir_version = max(model.ir_version, 8)
        changed = True
    border = plain_border(model)
    opened = _opened(model.graph)
    changed = _renamed(model.graph) or changed or bool(border) or bool(opened)
    _check_types(model)
    return Source(model, changed, [*border, *opened])


def check_model(model: onnx.ModelProto) -> None:
    """`onnx.checker`, in one line; inputs and outputs may leave their shapes open. Raises `GraphError`."""
    shaped = without_weights(model)
    for value in (*shaped.graph.input, *shaped.graph.output):
        value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(shaped)
    except Exception as error:  # noqa: BLE001  ValidationError, and protobuf's for a model above 2 GiB
        raise GraphError(f"the file is not valid ONNX: {first_line(error)[:300]}", "export the model again") from None


def _renamed(graph: onnx.GraphProto) -> bool:
    """Give nodes that share a name others, in place; whether there were any. ONNX Runtime and TensorRT's reports tell nodes
    apart by name; to ONNX names of nodes mean nothing."""
    taken = {node.name for node in all_nodes(graph)}
    seen, changed = set[str](), False
    for node in all_nodes(graph):
        if node.name and node.name in seen:
            node.name = free_name(taken, node.name)
            taken.add(node.name)
            changed = True
        seen.add(node.name)
    return changed


def _opened(graph: onnx.GraphProto) -> list[str]:
    """Clear the axes of 0, in place, which some exporters write for open ones, and note in which inputs: ONNX Runtime would
    take no tensor with elements for them."""
    notes = []
    for value in (*graph.input, *graph.output, *graph.value_info):
        empty = [d for d in value.type.tensor_type.shape.dim if d.HasField("dim_value") and d.dim_value == 0]
        for dim in empty:
            dim.Clear()
        if empty and value in graph.input:
            notes.append(f"input {value.name} states an axis of 0: it is taken for an open one")
    return notes


def drop_unproven(model: onnx.ModelProto) -> tuple[bool, list[str]]:
    """Leave out, in place, the shapes that a graph with open axes states and that do not follow from its inputs: a graph that
    was traced at one size and opened afterwards still holds them, and whoever folds constants would take them for true.

    Returns whether there were any, and a note where some contradict its inputs.
    """
    graph = model.graph
    if all(isinstance(axis, int) for value in graph.input for axis in dims(value)):
        return False, []
    bare = without_weights(model)
    _forget(bare.graph)
    try:
        bare = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except Exception:  # noqa: BLE001  InferenceError and others: nothing is proven then
        bare = without_weights(model)
        _forget(bare.graph)
    known = {value.name: dims(value) for value in (*bare.graph.input, *bare.graph.value_info, *bare.graph.output)}
    dropped, wrong = _drop_unproven_of(graph, known)
    for node in all_nodes(graph):
        for inner in subgraphs(node):
            dropped |= bool(inner.value_info)
            del inner.value_info[:]
    more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
    said = f"shapes that the file states for {', '.join(wrong[:3])}{more} contradict its inputs: they were left out"
    return dropped, [said] if wrong else []


def _forget(graph: onnx.GraphProto) -> None:
    """Drop what is stated of tensors inside, and the sizes of outputs."""
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")


def _drop_unproven_of(graph: onnx.GraphProto, known: dict[str, list[int | str | None]]) -> tuple[bool, list[str]]:
    """(whether sizes were dropped, the tensors whose sizes are known to be others)."""
    unproven, wrong = set[str](), list[str]()
    for value in (*graph.value_info, *graph.output):
        stated, found = dims(value), known.get(value.name, [])
        found = found if len(found) == len(stated) else [None] * len(stated)
        for axis, own, inferred in zip(value.type.tensor_type.shape.dim, stated, found, strict=True):
            if isinstance(own, int) and own != inferred:
                axis.Clear()
                unproven.add(value.name)
                if inferred is not None and value.name not in wrong:
                    wrong.append(value.name)
    kept = [value for value in graph.value_info if value.name not in unproven]
    if len(kept) != len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(kept)
    return bool(unproven), wrong


def _no_text(message: Any) -> bytes | None:
    """What should be text and is not UTF-8, if anything: protobuf gives it as bytes."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        several = list(value) if hasattr(value, "extend") else [value]
        if field.type == field.TYPE_STRING:
            found = next((one for one in several if not isinstance(one, str)), None)
        else:
            found = next((odd for one in several if (odd := _no_text(one)) is not None), None)
        if found is not None:
            return bytes(found)
    return None


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in all_nodes(graph):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from inner.initializer


def _load_external(model: onnx.ModelProto, path: Path) -> bool:
    """Load external data; True where there was some. Locations must be plain files inside the model's folder."""
    folder, sizes = path.parent.resolve(), {}
    tensors = [t for t in _tensors(model.graph) if t.data_location == TensorProto.EXTERNAL]
    tensors += [t for f in model.functions for n in f.node for a in n.attribute for t in (a.t, *a.tensors) if t.data_location]
    for tensor in tensors:
        location = next((entry.value for entry in reversed(tensor.external_data) if entry.key == "location"), "")
        file = folder / location
        inside = location and "\0" not in location and not Path(location).is_absolute() and ".." not in Path(location).parts
        if inside and file.is_symlink():
            raise GraphError(
                f"the external data {location!r} is a symbolic link, which may lead anywhere",
                f"copy the files themselves, as cp -L {path.parent}/* FOLDER does, and import the copy",
            )
        if not inside or not file.resolve().is_relative_to(folder) or file.resolve() != file:
            raise GraphError(
                f"the weights of {tensor.name!r} lie outside the model's folder: {location!r}",
                "keep external data beside the .onnx file; do not trust this file otherwise",
            )
        if not file.is_file():
            raise GraphError(f"the external data {location!r} is missing", f"put it beside {path.name}")
        sizes[file] = file.stat().st_size
    if sum(sizes.values()) > MAX_BYTES:
        raise GraphError(
            f"the external data holds {sum(sizes.values())} bytes, at most {MAX_BYTES}", "edgekit is for compact models"
        )
    if tensors:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of keys that onnx does not know
                load_external_data_for_model(model, str(folder))
        except Exception as error:  # noqa: BLE001  onnx raises several types for wrong offsets and lengths
            raise GraphError(
                f"the external data of {path.name} cannot be read: {first_line(error)[:300]}", "export the model again"
            ) from None
    return bool(tensors)


def _check_operators(model: onnx.ModelProto) -> None:
    """Refuse operators that are neither ONNX standard nor brought back to float, ones that the stated opset does not have, and
    ones that no device runs.

    All are named.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for node, where, version in _called(model):
        if node.domain == "com.microsoft" and node.op_type in MICROSOFT_OPERATORS:
            continue
        if node.domain not in ("", "ai.onnx"):
            found[f"{node.domain}.{node.op_type}"].append(where)
        elif node.op_type not in STANDARD or not onnx.defs.has(node.op_type, max_inclusive_version=version):
            found[node.op_type].append(where)
    if found:
        listed = ", ".join(
            f"{op} ({nodes[0]}{f' and {len(nodes) - 1} more' if nodes[1:] else ''})" for op, nodes in found.items()
        )
        raise GraphError(
            f"operators outside ONNX opset {opset(model)}: {listed}"[:500],
            "EPContext carries a compiled engine: import the file that it was compiled from"
            if any(op.endswith(".EPContext") for op in found)
            else "export with standard operators only (no fused or custom ones), opset 17",
        )


def _called(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str, int]]:
    """(node, its name, its opset) for all that run: those of functions that are called too, the calls themselves not."""
    functions = {(f.domain, f.name): f for f in model.functions}
    parts: list[tuple[onnx.GraphProto | onnx.FunctionProto, str, int]] = [(model.graph, "", opset(model))]
    seen = set[tuple[str, str]]()
    for part, where, version in parts:  # which grows
        for node in all_nodes(part):
            key = (node.domain, node.op_type)
            if key not in functions:
                yield node, (node.name or (node.output[0] if node.output else "?")) + where, version
            elif key not in seen:
                seen.add(key)
                parts.append((functions[key], f" in function {node.op_type}", opset(functions[key]) or version))


def _check_types(model: onnx.ModelProto) -> None:
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            what = value.type.WhichOneof("value") or "nothing"
            if what == "tensor_type" and value.type.tensor_type.elem_type in _TENSOR_TYPES:
                continue
            what = what.removesuffix("_type")
            if what == "tensor" and (held := value.type.tensor_type.elem_type) in TensorProto.DataType.values():
                what = f"tensor of {TensorProto.DataType.Name(held)}"
            raise GraphError(
                f"{kind} {value.name} is not a tensor of numbers or bools that numpy has: {what}",
                "cut strings, sequences and optionals off before the export; other types that numpy lacks stay inside",
            )
    if not model.graph.input:
        raise GraphError("the graph has no inputs", "give it one; a constant needs no model")

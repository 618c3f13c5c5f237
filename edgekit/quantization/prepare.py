"""A float graph made ready for Q/DQ: opset 13 or later, weights as initializers, BatchNormalization folded.

A graph that is quantized already comes back to float first. Every step is elementwise IEEE arithmetic in a fixed order, so
that the same file gives the same graph on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from edgekit.errors import GraphError
from edgekit.graphs import raise_opset, to_float, to_single
from edgekit.graphs.editing import (
    Array,
    all_nodes,
    attribute,
    constants,
    consumers,
    element_types,
    free_name,
    prune,
    reads,
    set_constant,
    subgraphs,
    tensor_names,
)
from edgekit.graphs.opset import MIN_OPSET, WANTED_OPSET, opset
from edgekit.graphs.weights import folded
from edgekit.progress import say

__all__ = ["MIN_OPSET", "attribute", "constants", "consumers", "prepare", "prune", "set_constant"]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
#: Operators whose outputs are as long as the data makes them.
_CHOOSING = ("Compress", "NonMaxSuppression", "NonZero", "Unique")
MAX_BYTES = 2 << 30  # what one protobuf message can hold


def prepare(data: bytes, *, quiet: bool = False) -> onnx.ModelProto:
    """ONNX bytes -> the float graph that is quantized. Quantized graphs are brought back to float, and float16
    and float64 are computed in float32, behind Casts of the graph's inputs and in front of those of its outputs; both is said.

    Operators of other domains and subgraphs (If, Loop, Scan) stay as they are, which is said too. Raises `GraphError` where
    the bytes are no ONNX graph that holds its weights, cannot be brought back to float, or not to opset 13, and where all its
    outputs are integers whose number depends on the data: nothing could be measured. ``quiet``: it is said elsewhere.
    """
    model = _parsed(data)
    _, notes = to_float(model)
    if not quiet:
        _say([*notes, *_what_stays(model)])
    _raise(model)
    _check_measurable(model)
    graph = model.graph
    _constants_to_initializers(graph)
    _name_nodes(graph)
    _, notes = to_single(model)
    if not quiet:
        _say(notes)
    _fold_batchnorm(graph)
    _fold_gemm_factors(graph)
    prune(model, [value.name for value in graph.output])
    # Exporters leave source paths and stale shapes here; both would travel to the device.
    del graph.value_info[:]
    for part in (model, graph, *graph.node):
        part.doc_string = ""
        del part.metadata_props[:]
    model.producer_name, model.producer_version = "edgekit", ""
    return model


def _parsed(data: bytes) -> onnx.ModelProto:
    again = "import it again: edgekit import MODEL.onnx"
    if len(data) >= MAX_BYTES:
        raise GraphError(
            f"the float graph holds {len(data)} bytes, less than {MAX_BYTES} can be quantized", "use a smaller model"
        )
    try:
        model: onnx.ModelProto = onnx.load_model_from_string(data)
    except Exception as error:  # noqa: BLE001  protobuf raises types of its own
        raise GraphError(f"the float graph cannot be read: {error}", again) from None
    outside = [tensor.name for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    if outside:
        raise GraphError(f"the float graph keeps {len(outside)} weights in other files, as {outside[0]!r}", again)
    return model


def _say(notes: Iterable[str]) -> None:
    for note in notes:
        say(f"note: {note}")


def _what_stays(model: onnx.ModelProto) -> Iterator[str]:
    foreign = Counter(f"{n.domain}.{n.op_type}" for n in all_nodes(model.graph) if n.domain not in ("", "ai.onnx"))
    if foreign:
        named = ", ".join(f"{name} ({count})" for name, count in sorted(foreign.items())[:6])
        yield f"operators outside the ONNX standard stay float: {named}"
    inner = sum(len(subgraphs(node)) for node in model.graph.node)
    if inner:
        yield f"{inner} subgraph{'s' if inner > 1 else ''} (If, Loop, Scan) stay{'' if inner > 1 else 's'} float"


def _check_measurable(model: onnx.ModelProto) -> None:
    """Raise `GraphError` where every output is chosen from the data, and has as many entries as were chosen."""
    types = element_types(model)
    if any(types.get(value.name, TensorProto.FLOAT) in _FLOATS for value in model.graph.output):
        return
    data = {value.name for value in model.graph.input}  # what depends on the values, not only the shape, of an input
    chosen: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        read = set(reads(node))
        if not data & read or _is(node, "Shape", "Size"):
            continue
        data.update(node.output)
        cause = node if _is(node, *_CHOOSING) else next((chosen[name] for name in sorted(read) if name in chosen), None)
        chosen.update(dict.fromkeys(node.output, cause) if cause is not None else {})
    found = next((chosen[value.name] for value in model.graph.output if value.name in chosen), None)
    if found is not None:
        read_floats = [name for name in found.input if name in data and types.get(name) in _FLOATS]
        raise GraphError(
            f"all outputs are integers, as many as {found.op_type} chooses: how near int8 comes cannot be measured",
            f"make float tensors outputs too, as {' and '.join(map(repr, read_floats)) or 'the scores'}, and import it again; "
            f"or cut the graph in front of {found.op_type}",
        )


def _raise(model: onnx.ModelProto) -> None:
    before = opset(model)
    _, reason = raise_opset(model)
    if reason:
        raise GraphError(
            f"the graph has opset {before}, int8 needs {MIN_OPSET} or later, and it cannot be converted: {reason}",
            f"export the model again with opset {WANTED_OPSET}",
        )
    model.ir_version = max(model.ir_version, 8)
    # Before IR 4 every initializer was an input too; then a weight would not be a constant.
    names = set(constants(model.graph))
    inputs = [value for value in model.graph.input if value.name not in names]
    if len(inputs) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)


def _replace_nodes(graph: onnx.GraphProto, drop: set[int]) -> None:
    kept = [node for i, node in enumerate(graph.node) if i not in drop]
    del graph.node[:]
    graph.node.extend(kept)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Constant nodes, and Identity of an initializer, become initializers."""
    drop: set[int] = set()
    known = constants(graph)
    outputs = {value.name for value in graph.output}
    for i, node in enumerate(graph.node):
        tensor = _constant(node, known)
        if tensor is not None and node.output[0] not in outputs:
            copy = onnx.TensorProto.FromString(tensor.SerializeToString())
            copy.name = node.output[0]
            graph.initializer.append(copy)
            known[copy.name] = copy
            drop.add(i)
    _replace_nodes(graph, drop)


def _constant(node: onnx.NodeProto, known: dict[str, TensorProto]) -> TensorProto | None:
    """The value of a Constant, or of an Identity of one; tensors as they are stored, so that their bytes stay."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Constant", "Identity"):
        return None
    if node.op_type == "Identity":
        return known.get(node.input[0])
    stored = attribute(node, "value", None)
    value = None if stored is not None else folded(node, [])
    return stored if value is None else numpy_helper.from_array(value)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Every node gets a name of its own: the calibration refers to it."""
    seen: set[str] = set()
    for i, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = free_name(seen, f"{node.op_type}_{i}")
        seen.add(node.name)


def _fold_batchnorm(graph: onnx.GraphProto) -> None:
    """BatchNormalization after Conv, ConvTranspose or Gemm goes into its weights and bias."""
    known, uses = constants(graph), consumers(graph)
    makers = {name: node for node in graph.node for name in node.output}
    drop: set[int] = set()
    for i, node in enumerate(graph.node):
        maker = makers.get(node.input[0]) if _is(node, "BatchNormalization") else None
        if (
            maker is None
            or not _is(maker, "Conv", "ConvTranspose", "Gemm")
            or uses[node.input[0]] != 1
            or len([name for name in node.output if name]) != 1
            or any(name not in known for name in [*node.input[1:], *maker.input[1:]] if name)
            or attribute(maker, "alpha", 1.0) != 1.0
            or attribute(maker, "beta", 1.0) != 1.0
        ):
            continue
        gamma, beta, mean, variance = (numpy_helper.to_array(known[name]).astype(np.float64) for name in node.input[1:5])
        factor = gamma / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))
        weight = numpy_helper.to_array(known[maker.input[1]])
        bias = numpy_helper.to_array(known[maker.input[2]]) if len(maker.input) > 2 and maker.input[2] else np.zeros(1)
        if not _set_weight(graph, maker, _scaled(maker, weight, factor), (bias.astype(np.float64) - mean) * factor + beta):
            continue
        known = constants(graph)
        maker.output[0] = node.output[0]
        makers[node.output[0]] = maker
        drop.add(i)
    _replace_nodes(graph, drop)


def _is(node: onnx.NodeProto, *operators: str) -> bool:
    return node.op_type in operators and node.domain in ("", "ai.onnx")


def _scaled(node: onnx.NodeProto, weight: Array, factor: Array) -> Array:
    """``weight`` times a factor for each output channel (C,), in float64."""
    wide = weight.astype(np.float64)
    if node.op_type == "Conv":
        return wide * factor.reshape(-1, *[1] * (wide.ndim - 1))
    if node.op_type == "Gemm":
        return wide * (factor[:, None] if attribute(node, "transB", 0) else factor[None, :])
    groups = int(attribute(node, "group", 1))
    # ConvTranspose: (inputs, outputs a group, ...), so the output channels lie on axes 0 and 2 of this view
    view = wide.reshape(groups, wide.shape[0] // groups, *wide.shape[1:])
    return (view * factor.reshape(groups, 1, -1, *[1] * (view.ndim - 3))).reshape(wide.shape)


def _set_weight(graph: onnx.GraphProto, node: onnx.NodeProto, weight: Array, bias: Array) -> bool:
    """float64 weights and bias, in the type that the weights had. False, and nothing is done, where they overflow it."""
    dtype = numpy_helper.to_array(constants(graph)[node.input[1]]).dtype
    with np.errstate(over="ignore"):
        values = [array.astype(dtype) for array in (weight, bias)]
    if not all(np.isfinite(value).all() for value in values):
        return False
    uses = consumers(graph)
    own = {name for name in node.input[1:] if uses[name] == 1}
    taken = tensor_names(graph) - own
    names = [free_name(taken, f"{node.name}.{part}") for part in ("weight", "bias")]
    for name, value in zip(names, values, strict=True):
        set_constant(graph, name, value)
    node.input[1:] = names
    return True


def _fold_gemm_factors(graph: onnx.GraphProto) -> None:
    """``alpha`` and ``beta`` of Gemm go into its constants, so that it is a plain fully connected layer."""
    known = constants(graph)
    for node in graph.node:
        alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
        if not _is(node, "Gemm") or (alpha == 1.0 and beta == 1.0):
            continue
        if any(name not in known for name in node.input[1:] if name):
            continue
        weight = numpy_helper.to_array(known[node.input[1]]).astype(np.float64) * alpha
        has_bias = len(node.input) > 2 and bool(node.input[2])
        bias = numpy_helper.to_array(known[node.input[2]]).astype(np.float64) * beta if has_bias else np.zeros(1)
        if not _set_weight(graph, node, weight, bias):
            continue
        kept = [found for found in node.attribute if found.name not in ("alpha", "beta")]
        del node.attribute[:]
        node.attribute.extend(kept)

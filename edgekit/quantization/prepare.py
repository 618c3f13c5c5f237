"""A float graph made ready for Q/DQ: opset 13 or later, weights as initializers, BatchNormalization folded.

Every step is elementwise IEEE arithmetic in a fixed order, so that the same file gives the same graph on every machine.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, version_converter

from edgekit.errors import GraphError

__all__ = ["MIN_OPSET", "attribute", "constants", "consumers", "prepare", "prune", "set_constant"]

Array = NDArray[Any]
MIN_OPSET = 13  # the first with a scale per channel
TARGET_OPSET = 17
_QUANTIZED = {
    "QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
    "QLinearAdd", "QGemm", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
}  # fmt: skip


def prepare(data: bytes) -> onnx.ModelProto:
    """ONNX bytes -> the graph that is quantized.

    Raises `GraphError` where the bytes are no ONNX graph, hold quantized operators, or cannot be brought to opset 13.
    """
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # noqa: BLE001  protobuf raises types of its own
        raise GraphError(f"the float graph cannot be read: {error}", "import it again: edgekit import MODEL.onnx") from None
    _refuse_quantized(model)
    model = _raise_opset(model)
    graph = model.graph
    _constants_to_initializers(graph)
    _dequantize_weights(graph)
    _name_nodes(graph)
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


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for found in node.attribute:
        if found.name == name:
            return helper.get_attribute_value(found)
    return default


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def consumers(graph: onnx.GraphProto) -> Counter[str]:
    """How often each tensor is read: by nodes (subgraphs included) and as a graph output."""
    uses = Counter(value.name for value in graph.output)
    for node in graph.node:
        uses.update(node.input)
        for found in node.attribute:
            for inner in (found.g, *found.graphs):
                uses.update(consumers(inner))
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
            needed.update(name for name in node.input if name)
            for found in node.attribute:
                for inner in (found.g, *found.graphs):
                    needed.update(consumers(inner))
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


def _refuse_quantized(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type in _QUANTIZED:
            raise GraphError(
                f"node {node.name or node.output[0]!r} is {node.op_type}: the graph is quantized already",
                "import and quantize the float model it was made from",
            )


def _raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        try:
            model = version_converter.convert_version(model, TARGET_OPSET)
        except Exception as error:  # noqa: BLE001  the converter raises bare RuntimeErrors
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise GraphError(
                f"the graph has opset {opset}, int8 needs {MIN_OPSET} or later, and it cannot be converted: {reason}",
                f"export the model again with opset {TARGET_OPSET}",
            ) from None
    model.ir_version = max(model.ir_version, 8)
    # Before IR 4 every initializer was an input too; then a weight would not be a constant.
    names = set(constants(model.graph))
    inputs = [value for value in model.graph.input if value.name not in names]
    if len(inputs) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
    return model


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
        tensor = None
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in known:
            tensor = known[node.input[0]]
        if tensor is not None and node.output[0] not in outputs:
            copy = onnx.TensorProto.FromString(tensor.SerializeToString())
            copy.name = node.output[0]
            graph.initializer.append(copy)
            known[copy.name] = copy
            drop.add(i)
    _replace_nodes(graph, drop)


def _dequantize_weights(graph: onnx.GraphProto) -> None:
    """A weight stored as DequantizeLinear of constants becomes float: it gets a scale of this room's own."""
    drop: set[int] = set()
    known = constants(graph)
    for i, node in enumerate(graph.node):
        if node.op_type != "DequantizeLinear":
            continue
        if any(name not in known for name in node.input if name) or attribute(node, "block_size", 0):
            raise GraphError(
                f"node {node.name or node.output[0]!r} is DequantizeLinear of an activation: the graph is quantized already",
                "import and quantize the float model it was made from",
            )
        values = [numpy_helper.to_array(known[name]) for name in node.input if name]
        x, scale = values[0], values[1].astype(np.float32)
        shape = [-1 if axis == attribute(node, "axis", 1) % max(x.ndim, 1) else 1 for axis in range(x.ndim)]
        shift = values[2].astype(np.int32) if len(values) > 2 else np.zeros_like(scale, np.int32)
        spread = (scale.reshape(shape), shift.reshape(shape)) if scale.size > 1 else (scale.reshape(()), shift.reshape(()))
        set_constant(graph, node.output[0], (x.astype(np.int32) - spread[1]).astype(np.float32) * spread[0])
        drop.add(i)
    _replace_nodes(graph, drop)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Every node gets a name of its own: the calibration refers to it."""
    seen: set[str] = set()
    for i, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{i}"
        seen.add(node.name)


def _fold_batchnorm(graph: onnx.GraphProto) -> None:
    """BatchNormalization after Conv, ConvTranspose or Gemm goes into its weights and bias."""
    known, uses = constants(graph), consumers(graph)
    makers = {name: node for node in graph.node for name in node.output}
    drop: set[int] = set()
    for i, node in enumerate(graph.node):
        maker = makers.get(node.input[0])
        if (
            node.op_type != "BatchNormalization"
            or maker is None
            or maker.op_type not in ("Conv", "ConvTranspose", "Gemm")
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
        _set_weight(graph, maker, _scaled(maker, weight, factor), (bias.astype(np.float64) - mean) * factor + beta)
        known = constants(graph)
        maker.output[0] = node.output[0]
        makers[node.output[0]] = maker
        drop.add(i)
    _replace_nodes(graph, drop)


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


def _set_weight(graph: onnx.GraphProto, node: onnx.NodeProto, weight: Array, bias: Array) -> None:
    names = [node.input[0], *(_free_name(graph, node, f"{node.name}.{part}") for part in ("weight", "bias"))]
    set_constant(graph, names[1], weight.astype(np.float32))
    set_constant(graph, names[2], bias.astype(np.float32))
    del node.input[:]
    node.input.extend(names)


def _free_name(graph: onnx.GraphProto, node: onnx.NodeProto, name: str) -> str:
    """``name``, with underscores where the graph uses it for something that is not this node's alone."""
    uses = consumers(graph)
    values = {*(i.name for i in graph.initializer), *(i.name for i in graph.input), *(o for n in graph.node for o in n.output)}
    while name in values and not (name in node.input and uses[name] == 1):
        name += "_"
    return name


def _fold_gemm_factors(graph: onnx.GraphProto) -> None:
    """``alpha`` and ``beta`` of Gemm go into its constants, so that it is a plain fully connected layer."""
    known = constants(graph)
    for node in graph.node:
        alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
        if node.op_type != "Gemm" or (alpha == 1.0 and beta == 1.0):
            continue
        if any(name not in known for name in node.input[1:] if name):
            continue
        weight = numpy_helper.to_array(known[node.input[1]]).astype(np.float64) * alpha
        has_bias = len(node.input) > 2 and bool(node.input[2])
        bias = numpy_helper.to_array(known[node.input[2]]).astype(np.float64) * beta if has_bias else np.zeros(1)
        _set_weight(graph, node, weight, bias)
        kept = [found for found in node.attribute if found.name not in ("alpha", "beta")]
        del node.attribute[:]
        node.attribute.extend(kept)

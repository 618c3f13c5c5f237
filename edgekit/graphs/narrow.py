"""Element types that TensorRT lacks, or that numpy does: wider integers inside, plain floats at the border."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper, numpy_helper

from .control import rename
from .editing import free_name, subgraphs, tensor_names

__all__ = ["plain_border", "to_signed"]

#: TensorRT has int8, uint8, int32 and int64; the next type that holds all their values (of uint64: those below 2**63).
_SIGNED: dict[int, int] = {
    TensorProto.INT16: TensorProto.INT32,
    TensorProto.UINT16: TensorProto.INT32,
    TensorProto.UINT32: TensorProto.INT64,
    TensorProto.UINT64: TensorProto.INT64,
}
#: TensorRT has them; numpy, and so a runtime's caller, does not.
_NO_NUMPY: dict[int, str] = {TensorProto.BFLOAT16: "bfloat16", TensorProto.FLOAT8E4M3FN: "float8_e4m3fn"}
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def to_signed(model: onnx.ModelProto) -> bool:
    """Tensors of 16-bit and unsigned 32- and 64-bit integers become int32 or int64, in place; whether there were any.

    Inputs and outputs, too: the caller has to compare, for what wrapped around does not any more.
    """
    changed = False
    for tensor in _tensors(model.graph):
        if tensor.data_type in _SIGNED:
            wide = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(_SIGNED[tensor.data_type]))
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
            changed = True
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type.tensor_type
            if kind.elem_type in _SIGNED:
                kind.elem_type = _SIGNED[kind.elem_type]
                changed = True
        for node in graph.node:
            for stated in node.attribute:
                if stated.name in _TYPE_ATTRIBUTES and stated.i in _SIGNED:
                    stated.i = _SIGNED[stated.i]
                    changed = True
    return changed


def plain_border(model: onnx.ModelProto) -> list[str]:
    """Inputs and outputs of bfloat16 become float32, in place, with a Cast inside; those of float8 (E4M3FN, the only one that
    TensorRT has) with a quantization by 1, for TensorRT casts nothing to or from it. Returns notes."""
    graph, taken, notes = model.graph, tensor_names(model.graph), list[str]()
    behind, ahead = list[onnx.NodeProto](), list[onnx.NodeProto]()
    inputs, outputs = ({value.name for value in values} for values in (graph.input, graph.output))
    for value in (*graph.input, *graph.output):
        kind, is_input = value.type.tensor_type.elem_type, value.name in inputs
        if kind not in _NO_NUMPY or (is_input and value.name in outputs):
            continue
        inner = free_name(taken, f"{value.name}/{_NO_NUMPY[kind]}")
        taken.add(inner)
        for node in graph.node:
            rename(node, {value.name: inner})
        source, result = (value.name, inner) if is_input else (inner, value.name)
        if kind == TensorProto.BFLOAT16:
            cast = helper.make_node("Cast", [source], [result], f"{inner}/cast", to=kind if is_input else TensorProto.FLOAT)
        else:
            graph.initializer.append(helper.make_tensor(f"{inner}/one", TensorProto.FLOAT, [], [1.0]))
            graph.initializer.append(helper.make_tensor(f"{inner}/zero", kind, [], [0.0]))
            operator = "QuantizeLinear" if is_input else "DequantizeLinear"
            cast = helper.make_node(operator, [source, f"{inner}/one", f"{inner}/zero"], [result], f"{inner}/cast")
        (behind if is_input else ahead).append(cast)
        value.type.tensor_type.elem_type = TensorProto.FLOAT
        notes.append(f"{value.name} is float32 at the border: numpy has no {_NO_NUMPY[kind]}")
    if notes:
        nodes = [*behind, *(onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node), *ahead]
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.value_info[:]
    return notes


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for part in _graphs(graph):
        yield from part.initializer
        for node in part.node:
            yield from (stated.t for stated in node.attribute if stated.HasField("t"))

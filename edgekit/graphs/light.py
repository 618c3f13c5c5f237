"""Handling a model without copying its weights, which are nearly all of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

__all__ = ["refit", "store", "without_weights"]

_LARGE = 1024  # elements; below are shapes, axes and scales
_GRAPH, _INITIALIZER = onnx.ModelProto.GRAPH_FIELD_NUMBER, onnx.GraphProto.INITIALIZER_FIELD_NUMBER


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the data of large weights, which become inputs of their type and shape: all that shape inference and
    onnx's checker see of them, and both copy a model several times."""
    graph = model.graph
    stated = {value.name for value in graph.input}
    small, large = list[onnx.TensorProto](), list[onnx.ValueInfoProto]()
    for weight in graph.initializer:
        if math.prod(weight.dims) <= _LARGE:
            small.append(weight)
        elif weight.name not in stated:
            large.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    body = helper.make_graph(
        graph.node,
        graph.name,
        [*graph.input, *large],
        graph.output,
        small,
        value_info=graph.value_info,
        sparse_initializer=graph.sparse_initializer,
    )
    return helper.make_model(body, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version)


def refit(model: onnx.ModelProto, changed: onnx.ModelProto) -> None:
    """Give ``model``, in place, the nodes, tensors and opset of what `without_weights` of it became; its large weights stay."""
    graph, new = model.graph, changed.graph
    large = {weight.name for weight in graph.initializer if math.prod(weight.dims) > _LARGE}
    added = large - {value.name for value in graph.input}  # before IR 4 weights were inputs, too
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in large:
            del graph.initializer[index]
    graph.initializer.extend(new.initializer)
    fields = {
        "node": new.node,
        "input": [value for value in new.input if value.name not in added],
        "output": new.output,
        "value_info": new.value_info,
    }
    for name, values in fields.items():
        graph.ClearField(name)
        getattr(graph, name).extend(values)
    for name in ("opset_import", "functions"):
        model.ClearField(name)
        getattr(model, name).extend(getattr(changed, name))
    model.ir_version = changed.ir_version


def store(model: onnx.ModelProto, file: Path) -> None:
    """Write ``model`` weight by weight, where `SerializeToString` takes twice its size. One model, the same bytes each time.

    Field numbers, tags and lengths are those of protobuf's wire format.
    """
    head, graph, weights = onnx.ModelProto(), onnx.GraphProto(), model.graph.initializer
    _copy(model, head, but="graph")
    _copy(model.graph, graph, but="initializer")
    body = graph.SerializeToString(deterministic=True)
    sizes = [weight.ByteSize() for weight in weights]
    openings = [_opening(_INITIALIZER, size) for size in sizes]
    with file.open("wb") as out:
        out.write(head.SerializeToString(deterministic=True))
        out.write(_opening(_GRAPH, len(body) + sum(sizes) + sum(map(len, openings))))
        out.write(body)
        for opening, weight in zip(openings, weights, strict=True):
            out.write(opening)
            out.write(weight.SerializeToString(deterministic=True))


def _copy(source: Any, target: Any, *, but: str) -> None:
    """All fields of a message but one."""
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


def _opening(number: int, size: int) -> bytes:
    """Tag and length of a field that is ``size`` bytes long."""
    found = bytearray()
    for value in (number << 3 | 2, size):
        while value > 0x7F:
            found.append(value & 0x7F | 0x80)
            value >>= 7
        found.append(value)
    return bytes(found)

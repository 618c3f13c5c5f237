"""What torch's exporter leaves around recurrences, taken away: builders want an LSTM or GRU with constant weights.

The exporter slices gates out of the weights in the graph, expands a zero initial state and computes shapes that it knows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

__all__ = ["tidy"]

_RECURRENT = {"LSTM", "GRU", "RNN"}
_FOLDED_BYTES = 64 << 20  # a constant larger than this is not worth unrolling


def tidy(model: onnx.ModelProto) -> None:
    """Fold constants, drop zero initial states, and make the reshapes behind recurrences constant; in place.

    The graph computes what it did before; `write_model` holds it against torch after this.
    """
    if not any(node.op_type in _RECURRENT for node in model.graph.node):
        return
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in _RECURRENT:
            _drop_zero_states(node, made, constants)
        elif node.op_type == "Reshape":
            _fix_shape(node, made, graph)
    _fold(model, constants)
    _drop_unused(graph)


def _drop_zero_states(node: onnx.NodeProto, made: dict[str, onnx.NodeProto], constants: dict[str, np.ndarray]) -> None:
    """Inputs 5 (and of an LSTM 6) are the initial states; left out they are zero."""

    def is_zero(name: str) -> bool:
        source = made.get(name)
        while source is not None and source.op_type in ("Slice", "Expand", "Unsqueeze", "Squeeze", "Transpose"):
            name = source.input[0]
            source = made.get(name)
        return name in constants and not constants[name].any()

    for place in (5, 6):
        if len(node.input) > place and node.input[place] and is_zero(node.input[place]):
            node.input[place] = ""
    while node.input and not node.input[-1]:
        del node.input[-1]


def _fix_shape(node: onnx.NodeProto, made: dict[str, onnx.NodeProto], graph: onnx.GraphProto) -> None:
    """(T, D, N, H) -> (T, N, D, H) -> (T, N, D H), by a shape that is computed from its own input.

    The shape is the constant (0, 0, -1); where D is 1, both steps are one Squeeze, without which TensorRT-RTX 1.7 loses T.
    """
    source = made.get(node.input[0])
    shape = made.get(node.input[1])
    if source is None or source.op_type != "Transpose" or shape is None or shape.op_type != "Concat" or len(shape.input) != 3:
        return
    recurrent = made.get(source.input[0])
    if recurrent is None or recurrent.op_type not in _RECURRENT or recurrent.output[0] != source.input[0]:
        return
    name = f"{node.output[0]}_shape"
    direction = next((helper.get_attribute_value(a) for a in recurrent.attribute if a.name == "direction"), b"forward")
    if direction != b"bidirectional":
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), name))
        squeeze = helper.make_node("Squeeze", [source.input[0], name], [node.output[0]], node.name)
        node.CopyFrom(squeeze)
        return
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, -1], np.int64), name))
    node.input[1] = name


def _fold(model: onnx.ModelProto, constants: dict[str, np.ndarray]) -> None:
    """Nodes whose inputs are all constants become constants."""
    graph = model.graph
    for node in list(graph.node):
        inputs = [name for name in node.input if name]
        if not inputs or any(name not in constants for name in inputs) or len(node.output) != 1:
            continue
        feeds = {name: constants[name] for name in inputs}
        (value,) = _evaluator(node, model)(feeds)
        if value.nbytes > _FOLDED_BYTES:
            continue
        constants[node.output[0]] = value
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), node.output[0]))
        graph.node.remove(node)


def _evaluator(node: onnx.NodeProto, model: onnx.ModelProto) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_value_info(name, onnx.TypeProto()) for name in dict.fromkeys(node.input) if name],
        [helper.make_value_info(node.output[0], onnx.TypeProto())],
    )
    one = helper.make_model(graph, opset_imports=list(model.opset_import))
    return lambda feeds: ReferenceEvaluator(one).run(None, feeds)  # type: ignore[return-value]


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Nodes and initializers that nothing reads."""
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        idle = [node for node in graph.node if not read & set(node.output)]
        if not idle:
            break
        for node in idle:
            graph.node.remove(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)

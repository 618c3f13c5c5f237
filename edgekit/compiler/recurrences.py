"""TensorRT-RTX 1.7 refuses LSTM and GRU layers that run forward, and takes the same layers running in reverse.

Found by trying: its optimizer gives a forward loop's steps the shape of the whole sequence. So a refused graph is tried
again with each forward layer as a reverse one over the reversed sequence, which computes the same.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekit.graphs.editing import free_name, tensor_names

__all__ = ["reverse_forward_layers"]

_NAMES = ("edgekit_first", "edgekit_last", "edgekit_axis", "edgekit_back")


def reverse_forward_layers(model: onnx.ModelProto) -> int:
    """Rewrite forward LSTM, GRU and RNN nodes of the main graph in place; returns how many.

    Left alone: layers of other directions, with ``sequence_lens``, and batch-first layouts.
    """
    graph = model.graph
    changed: list[onnx.NodeProto] = []
    taken, count = tensor_names(graph), 0
    names = [free_name(taken, name) for name in _NAMES]
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        lengths = len(node.input) > 4 and node.input[4]
        forward = attributes.get("direction", b"forward") == b"forward" and not attributes.get("layout", 0)
        if node.op_type not in ("LSTM", "GRU", "RNN") or not forward or lengths:
            changed.append(node)
            continue
        changed += _reversed(node, free_name(taken, f"edgekit_{count}", ("in", "out")), names)
        count += 1
    if count:
        del graph.node[:]
        graph.node.extend(changed)
        # Slice from the last step to before the first, backwards.
        for name, value in zip(names, (-1, np.iinfo(np.int64).min, 0, -1), strict=True):
            graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    return count


def _reversed(node: onnx.NodeProto, prefix: str, names: list[str]) -> list[onnx.NodeProto]:
    """Slice - layer in reverse - Slice, for one forward layer; its last states are the same tensors."""
    layer = onnx.NodeProto()
    layer.CopyFrom(node)
    del layer.attribute[:]
    layer.attribute.extend(a for a in node.attribute if a.name != "direction")
    layer.attribute.append(helper.make_attribute("direction", "reverse"))
    layer.input[0] = f"{prefix}/in"
    nodes = [helper.make_node("Slice", [node.input[0], *names], [layer.input[0]], f"{node.name}_backwards"), layer]
    if node.output[0]:
        layer.output[0] = f"{prefix}/out"
        nodes.append(helper.make_node("Slice", [layer.output[0], *names], [node.output[0]], f"{node.name}_again"))
    return nodes

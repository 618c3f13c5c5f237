"""New nodes and constants in a graph, under names that it does not use yet."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .editing import Array, constants, free_name, prune, tensor_names

__all__ = ["Insertion"]


class Insertion:
    """Collects new nodes and adds new constants, in place; `finish` puts the nodes where they belong.

    Names are the wanted ones, with underscores where the graph has them already (`free_name`). Nodes have unique names.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.nodes = {node.name: node for node in model.graph.node}
        self.position = {node.name: i for i, node in enumerate(model.graph.node)}
        self.floats = constants(model.graph)  # those that were there before
        self._tensors, self._nodes = tensor_names(model.graph), set(self.nodes)
        self._before: dict[str, list[onnx.NodeProto]] = {}
        self._after: dict[str, list[onnx.NodeProto]] = {}

    def tensor(self, wanted: str) -> str:
        """A name for a new tensor."""
        name = free_name(self._tensors, wanted)
        self._tensors.add(name)
        return name

    def base(self, wanted: str, *parts: str) -> str:
        """What the names of tensors that belong together, ``base/part``, begin with."""
        base = free_name(self._tensors, wanted, parts)
        self._tensors.update(f"{base}/{part}" for part in parts)
        return base

    def constant(self, name: str, value: Array | onnx.TensorProto) -> None:
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value, order="C"), name)
        self.graph.initializer.append(tensor)

    def before(self, where: str, op: str, inputs: list[str], output: str, name: str, **attributes: Any) -> None:
        """A new node in front of the node ``where``, behind those that were put there before."""
        self._before.setdefault(where, []).append(self._node(op, inputs, output, name, attributes))

    def after(self, where: str, op: str, inputs: list[str], output: str, name: str) -> None:
        self._after.setdefault(where, []).append(self._node(op, inputs, output, name, {}))

    def _node(self, op: str, inputs: list[str], output: str, name: str, attributes: dict[str, Any]) -> onnx.NodeProto:
        name = free_name(self._nodes, name)
        self._nodes.add(name)
        return helper.make_node(op, inputs, [output], name=name, **attributes)

    def finish(self) -> onnx.ModelProto:
        """The graph with its new nodes, without what nothing reads any more."""
        nodes = [
            onnx.NodeProto.FromString(new.SerializeToString())
            for node in self.graph.node
            for new in (*self._before.get(node.name, ()), node, *self._after.get(node.name, ()))
        ]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        prune(self.model, [value.name for value in self.graph.output])
        return self.model

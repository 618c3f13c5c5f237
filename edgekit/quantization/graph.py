"""Insert explicit Q/DQ: signed symmetric int8, zero point 0, weights stored as int8."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgekit.errors import GraphError

from .placement import Layer, Placement
from .prepare import constants, prune
from .statistics import LEVELS

__all__ = ["Parameters", "check", "insert", "quantized_weight"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Parameters:
    """All numbers of an int8 graph, float32.

    ``scales``: group -> activation scale; ``weights``: layer -> scales (channels,); ``biases``: layer -> corrected bias.
    """

    scales: dict[str, float]
    weights: dict[str, Array]
    biases: dict[str, Array] = field(default_factory=dict)


def quantized_weight(weight: Array, scale: Array, axis: int) -> NDArray[np.int8]:
    """float32 weights -> int8 in [-127, 127]; one scale a channel of ``axis``, ties to even as QuantizeLinear."""
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    q = np.rint(weight / scale.astype(np.float32).reshape(shape))
    return np.clip(q, -LEVELS, LEVELS).astype(np.int8)


def insert(
    prepared: onnx.ModelProto,
    placement: Placement,
    parameters: Parameters,
    layers: Collection[str],
    *,
    weights: bool = True,
    activations: bool = True,
) -> onnx.ModelProto:
    """A copy of the graph in which the named layers are quantized; ``weights`` or ``activations`` alone, to tell causes."""
    model = onnx.ModelProto.FromString(prepared.SerializeToString())
    return _Inserter(model, placement, parameters).run(set(layers), weights, activations)


class _Inserter:
    def __init__(self, model: onnx.ModelProto, placement: Placement, parameters: Parameters) -> None:
        self.model, self.graph = model, model.graph
        self.placement, self.parameters = placement, parameters
        self.nodes = {node.name: node for node in model.graph.node}
        self.floats = {name: numpy_helper.to_array(tensor) for name, tensor in constants(model.graph).items()}
        self.before: dict[str, list[onnx.NodeProto]] = {}  # node name -> new nodes that go in front of it
        self.done: dict[tuple[object, ...], str] = {}  # what is quantized already -> its dequantized name
        self.position = {node.name: i for i, node in enumerate(model.graph.node)}

    def run(self, names: set[str], weights: bool, activations: bool) -> onnx.ModelProto:
        chosen = [layer for layer in self.placement.layers if layer.name in names]
        if activations:
            self._activations(chosen)
        for layer in chosen:
            if weights:
                self._weight(layer)
            if layer.name in self.parameters.biases:
                self._bias(layer, self.parameters.biases[layer.name])
        nodes = [new for node in self.graph.node for new in (*self.before.get(node.name, ()), node)]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        prune(self.model, [value.name for value in self.graph.output])
        return self.model

    def _activations(self, chosen: list[Layer]) -> None:
        """One Q/DQ pair a tensor, in front of its first quantized reader."""
        readers: dict[str, list[tuple[str, int]]] = {}
        for layer in chosen:
            readers.setdefault(layer.data, []).append((layer.name, 1 - layer.position))
            if layer.residual:
                readers.setdefault(layer.residual, []).append((layer.adder, layer.branch))
        for tensor, ends in readers.items():
            first = min((name for name, _ in ends), key=self.position.__getitem__)
            scale = np.array(self.parameters.scales[self.placement.groups[tensor]], np.float32)
            output = self._pair(tensor, scale, first)
            for name, end in ends:
                self.nodes[name].input[end] = output

    def _pair(self, tensor: str, scale: Array, first: str) -> str:
        names = [f"{tensor}/{part}" for part in ("scale", "int8", "dequantized")]
        self._constant(names[0], scale)
        shared = [names[0], self._zero_point(())]
        self.before.setdefault(first, []).extend(
            [
                helper.make_node("QuantizeLinear", [tensor, *shared], [names[1]], name=f"{tensor}/quantize"),
                helper.make_node("DequantizeLinear", [names[1], *shared], [names[2]], name=f"{tensor}/dequantize"),
            ]
        )
        return names[2]

    def _weight(self, layer: Layer) -> None:
        """int8 initializer and DequantizeLinear; equal weights (shared, or copied) are stored once."""
        value, scale = self.floats[layer.weight], self.parameters.weights[layer.name].astype(np.float32)
        q = quantized_weight(value, scale, layer.axis)
        key = (q.shape, layer.axis, q.tobytes(), scale.tobytes())
        if key not in self.done:
            base = f"{layer.name}/weight"
            self._constant(f"{base}/int8", q)
            self._constant(f"{base}/scale", scale)
            inputs = [f"{base}/int8", f"{base}/scale", self._zero_point(scale.shape)]
            node = helper.make_node(
                "DequantizeLinear", inputs, [f"{base}/dequantized"], name=f"{base}/dequantize", axis=layer.axis
            )
            self.before.setdefault(layer.name, []).append(node)
            self.done[key] = node.output[0]
        self.nodes[layer.name].input[layer.position] = self.done[key]

    def _bias(self, layer: Layer, bias: Array) -> None:
        name = f"{layer.name}/bias"
        self._constant(name, bias.astype(np.float32))
        node = self.nodes[layer.biased]
        if layer.biased != layer.name:  # the Add behind a MatMul
            node.input[list(node.input).index(layer.bias or "")] = name
        elif len(node.input) > 2:
            node.input[2] = name
        else:
            node.input.append(name)

    def _constant(self, name: str, value: Array) -> None:
        if name in self.floats:  # a graph that was quantized here before, or one that happens to use the name
            raise GraphError(f"the graph has a tensor {name!r}, a name that quantization needs", "rename it in the exporter")
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), name))

    def _zero_point(self, shape: tuple[int, ...]) -> str:
        name = f"edgekit/zero_point/{'x'.join(map(str, shape)) or 'scalar'}"
        if name not in self.done.values():
            self._constant(name, np.zeros(shape, np.int8))
            self.done[("zero", shape)] = name
        return name


def check(model: onnx.ModelProto) -> None:
    """ONNX's checker and strict shape inference. Raises `GraphError`: a defect, or an operator ONNX does not know."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # noqa: BLE001  checker and inference raise types of their own
        reason = " ".join(str(error).split())[:300]
        raise GraphError(
            f"the int8 graph fails ONNX's checker: {reason}", "import the model again: edgekit import MODEL.onnx"
        ) from None

"""Insert explicit Q/DQ: signed symmetric int8, zero point 0, weights stored as int8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekit.errors import GraphError
from edgekit.graphs.insertion import Insertion
from edgekit.progress import say

from .placement import Layer, Placement
from .prepare import attribute
from .statistics import LEVELS

__all__ = ["Parameters", "Quantizer", "check", "difference", "insert", "merged", "quantized_weight", "scaled_weight"]

Array = NDArray[Any]


class Quantizer(NamedTuple):
    """How a layer's input becomes int8: ``round((x - shift) * factor / scale)``; float32, (channels,) or None."""

    scale: float
    shift: Array | None = None
    factor: Array | None = None

    @property
    def plain(self) -> bool:
        return self.shift is None and self.factor is None


@dataclass(frozen=True)
class Parameters:
    """All numbers of an int8 graph, float32.

    ``scales``: group -> activation scale. ``quantizers``: site -> what its layers use instead. By layer: ``weights`` has the
    scales (channels,), ``integers`` the rounded weights (absent: rounded to nearest), ``biases`` the corrected bias.
    """

    scales: dict[str, float]
    weights: dict[str, Array]
    biases: dict[str, Array] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    integers: dict[str, NDArray[np.int8]] = field(default_factory=dict)

    def quantizer(self, placement: Placement, tensor: str) -> Quantizer:
        """Of a layer's data."""
        return self.quantizers.get(placement.sites[tensor]) or Quantizer(self.scales[placement.groups[tensor]])


def difference(before: Parameters, after: Parameters) -> dict[str, Array]:
    """What is new or other in ``after``, as arrays: ``kind/name``, for a quantizer ``kind/part/name``."""
    found: dict[str, Array] = {}
    for name, scale in after.scales.items():
        if before.scales.get(name) != scale:
            found[f"scales/{name}"] = np.array(scale)
    for kind in ("weights", "biases", "integers"):
        old, new = getattr(before, kind), getattr(after, kind)
        found |= {f"{kind}/{name}": array for name, array in new.items() if old.get(name) is not array}
    for site, quantizer in after.quantizers.items():
        if before.quantizers.get(site) is not quantizer:
            parts = {part: value for part, value in quantizer._asdict().items() if value is not None}
            found |= {f"quantizers/{part}/{site}": np.array(value) for part, value in parts.items()}
    return found


def merged(parameters: Parameters, found: Mapping[str, Array]) -> Parameters:
    """The inverse of `difference`."""
    kinds = {kind: dict(getattr(parameters, kind)) for kind in ("scales", "weights", "biases", "integers")}
    parts: dict[str, dict[str, Any]] = {}
    for key, array in found.items():
        kind, _, name = key.partition("/")
        if kind == "quantizers":
            part, _, site = name.partition("/")
            parts.setdefault(site, {})[part] = float(array) if part == "scale" else array
        else:
            kinds[kind][name] = float(array) if kind == "scales" else array
    quantizers = {**parameters.quantizers, **{site: Quantizer(**values) for site, values in parts.items()}}
    return Parameters(**kinds, quantizers=quantizers)


def quantized_weight(weight: Array, scale: Array, axis: int) -> NDArray[np.int8]:
    """float32 weights -> int8 in [-127, 127]; one scale a channel of ``axis``, ties to even as QuantizeLinear."""
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    q = np.rint(weight / scale.astype(np.float32).reshape(shape))
    return np.clip(q, -LEVELS, LEVELS).astype(np.int8)


def scaled_weight(weight: Array, layer: Layer, factor: Array | None) -> Array:
    """float32 weights that meet inputs multiplied by ``factor`` (channels of the data,), and so are divided by it."""
    if factor is None:
        return weight
    divided: Array = weight.astype(np.float32) / _spread(weight, layer, factor.astype(np.float32))
    return divided


def _spread(weight: Array, layer: Layer, factor: Array) -> Array:
    """``factor`` in a shape that multiplies the weights along their input channels."""
    if layer.op == "Conv":
        groups = factor.size // weight.shape[1]
        rows: Array = np.repeat(factor.reshape(groups, -1), weight.shape[0] // groups, axis=0)
        return rows.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))
    if layer.op == "ConvTranspose":
        return factor.reshape(-1, *[1] * (weight.ndim - 1))
    return factor[None, :] if layer.axis == 0 else factor[:, None]  # Gemm with transB: (outputs, inputs)


class _Reading(NamedTuple):
    """Who reads a quantized tensor in the same form: (node, input index) each."""

    tensor: str
    quantizer: Quantizer
    shape: tuple[int, ...]  # of shift and factor, to broadcast
    pads: tuple[int, ...]  # applied before the shift: (before..., after...) of the spatial axes
    ends: list[tuple[str, int]]


def insert(
    prepared: onnx.ModelProto,
    placement: Placement,
    parameters: Parameters,
    chosen: Collection[str],
    *,
    weights: bool = True,
    activations: bool = True,
) -> onnx.ModelProto:
    """A copy of the graph in which the named layers and products are quantized.

    ``weights`` or ``activations`` alone, to tell causes: then nothing is shifted or scaled, and no weight is fitted.
    """
    model = onnx.ModelProto.FromString(prepared.SerializeToString())
    model.producer_name = "edgekit"  # a stretch of a graph states none
    if not (weights and activations):
        parameters = Parameters(parameters.scales, parameters.weights)
    return _Inserter(model, placement, parameters).run(set(chosen), weights, activations)


class _Inserter(Insertion):
    def __init__(self, model: onnx.ModelProto, placement: Placement, parameters: Parameters) -> None:
        super().__init__(model)
        self.placement, self.parameters = placement, parameters
        self.done: dict[tuple[object, ...], str] = {}  # what is quantized already -> its dequantized name
        self.forms: Counter[str] = Counter()  # of each tensor

    def run(self, names: set[str], weights: bool, activations: bool) -> onnx.ModelProto:
        named = [layer for layer in self.placement.layers if layer.name in names]
        chosen = [layer for layer in named if layer.name in self.nodes]
        if activations:
            for reading in self._readings(chosen, names):
                self._pair(reading)
        for layer in named:  # in a stretch of a graph, a MatMul and the Add of its bias may lie apart
            if weights and layer.name in self.nodes:
                self._weight(layer)
            if layer.name in self.parameters.biases and (layer.biased or layer.name) in self.nodes:
                self._bias(layer, self.parameters.biases[layer.name])
        return self.finish()

    def _readings(self, chosen: list[Layer], names: set[str]) -> list[_Reading]:
        """One for each form of each tensor."""
        found: dict[tuple[object, ...], _Reading] = {}

        def add(tensor: str, quantizer: Quantizer, shape: tuple[int, ...], pads: tuple[int, ...], end: tuple[str, int]) -> None:
            parts = [None if part is None else part.tobytes() for part in (quantizer.shift, quantizer.factor)]
            key = (tensor, quantizer.scale, *parts, pads)
            found.setdefault(key, _Reading(tensor, quantizer, shape, pads, [])).ends.append(end)

        for layer in chosen:
            node, quantizer = self.nodes[layer.name], self.parameters.quantizer(self.placement, layer.data)
            pads = self._freed_pads(node) if quantizer.shift is not None else ()
            ones = len(self.floats[layer.weight].dims) - 2 if layer.features == 1 else 0
            add(layer.data, quantizer, (-1, *[1] * ones), pads, (layer.name, 1 - layer.position))
        for pair in self.placement.pairs:
            if pair.owner in names and pair.node in self.nodes:
                scale = self.parameters.scales[self.placement.groups[pair.tensor]]
                add(pair.tensor, Quantizer(scale), (), (), (pair.node, pair.position))
        return list(found.values())

    def _freed_pads(self, node: onnx.NodeProto) -> tuple[int, ...]:
        """The padding of a convolution, taken out of it: padded zeros must be there before the shift."""
        pads = tuple(attribute(node, "pads", ()))
        if not any(pads):
            return ()
        kept = [found for found in node.attribute if found.name != "pads"]
        del node.attribute[:]
        node.attribute.extend(kept)
        return pads

    def _pair(self, reading: _Reading) -> None:
        """[Pad,] [Sub,] [Mul,] QuantizeLinear, DequantizeLinear in front of the tensor's first reader of this form."""
        tensor, quantizer = reading.tensor, reading.quantizer
        steps: list[tuple[str, str, Array]] = []
        if reading.pads:
            half = len(reading.pads) // 2
            steps.append(("Pad", "pad", np.array([0, 0, *reading.pads[:half], 0, 0, *reading.pads[half:]], np.int64)))
        if quantizer.shift is not None:
            steps.append(("Sub", "shift", quantizer.shift.astype(np.float32).reshape(reading.shape)))
        if quantizer.factor is not None:
            steps.append(("Mul", "factor", quantizer.factor.astype(np.float32).reshape(reading.shape)))
        self.forms[tensor] += 1
        wanted = tensor if self.forms[tensor] == 1 else f"{tensor}/{self.forms[tensor]}"
        parts = [part for _, step, _ in steps for part in (step, f"{step}ed")]
        base = self.base(wanted, *parts, "scale", "int8", "dequantized")
        first = min((name for name, _ in reading.ends), key=self.position.__getitem__)
        for op, step, operand in steps:
            self.constant(f"{base}/{step}", operand)
            self.before(first, op, [tensor, f"{base}/{step}"], f"{base}/{step}ed", f"{base}/{op.lower()}")
            tensor = f"{base}/{step}ed"
        self.constant(f"{base}/scale", np.array(quantizer.scale, np.float32))
        shared = [f"{base}/scale", self._zero_point(())]
        self.before(first, "QuantizeLinear", [tensor, *shared], f"{base}/int8", f"{base}/quantize")
        self.before(first, "DequantizeLinear", [f"{base}/int8", *shared], f"{base}/dequantized", f"{base}/dequantize")
        for name, end in reading.ends:
            self.nodes[name].input[end] = f"{base}/dequantized"

    def _weight(self, layer: Layer) -> None:
        """int8 initializer and DequantizeLinear; equal weights (shared, or copied) are stored once."""
        scale = self.parameters.weights[layer.name].astype(np.float32)
        q = self.parameters.integers.get(layer.name)
        if q is None:
            factor = self.parameters.quantizer(self.placement, layer.data).factor
            value = numpy_helper.to_array(self.floats[layer.weight])
            q = quantized_weight(scaled_weight(value, layer, factor), scale, layer.axis)
        key = (q.shape, layer.axis, q.tobytes(), scale.tobytes())
        if key not in self.done:
            base = self.base(f"{layer.name}/weight", "int8", "scale", "dequantized")
            self.constant(f"{base}/int8", q)
            self.constant(f"{base}/scale", scale)
            inputs = [f"{base}/int8", f"{base}/scale", self._zero_point(scale.shape)]
            self.done[key] = f"{base}/dequantized"
            self.before(layer.name, "DequantizeLinear", inputs, self.done[key], f"{base}/dequantize", axis=layer.axis)
        self.nodes[layer.name].input[layer.position] = self.done[key]

    def _bias(self, layer: Layer, bias: Array) -> None:
        name = self.tensor(f"{layer.name}/bias")
        self.constant(name, bias.astype(np.float32))
        if not layer.biased:  # none so far: an Add of its own
            raw = self.nodes[layer.name].output[0] = self.tensor(f"{layer.output}/unbiased")
            self.after(layer.name, "Add", [raw, name], layer.output, f"{layer.name}/add_bias")
            return
        node = self.nodes[layer.biased]
        if layer.biased != layer.name:  # the Add behind a MatMul
            node.input[list(node.input).index(layer.bias or "")] = name
        elif len(node.input) > 2:
            node.input[2] = name
        else:
            node.input.append(name)

    def _zero_point(self, shape: tuple[int, ...]) -> str:
        if ("zero", shape) not in self.done:
            name = self.tensor(f"edgekit/zero_point/{'x'.join(map(str, shape)) or 'scalar'}")
            self.constant(name, np.zeros(shape, np.int8))
            self.done["zero", shape] = name
        return self.done["zero", shape]


def check(model: onnx.ModelProto, source: onnx.ModelProto | None = None) -> None:
    """ONNX's checker and strict shape inference. Raises `GraphError`: a defect, or an operator ONNX does not know.

    Where it refuses the ``source`` already, the float graph that ONNX Runtime ran, both are said and no error.
    """
    if reason := _held_against(model):
        if source is not None and (already := _held_against(source)):
            say(f"note: ONNX's checker refuses the float graph already ({already}), and the int8 graph: {reason}")
            return
        raise GraphError(
            f"the int8 graph fails ONNX's checker: {reason}",
            "edgekit made this graph, and the float graph passes: report it as a defect of edgekit",
        )


def _held_against(model: onnx.ModelProto) -> str:
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # noqa: BLE001  checker and inference raise types of their own
        return " ".join(str(error).split())[:300]
    return ""

"""A Q/DQ graph as a PyTorch module: the same nodes, with weights, biases and quantization steps that can be trained.

Nothing is placed anew: each QuantizeLinear/DequantizeLinear pair of the graph rounds here as it does there, so what is
trained is what the device will run. Steps are learned as in S. K. Esser et al., "Learned step size quantization", ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgekit.errors import GraphError, MissingExtra, first_line
from edgekit.graphs.sparsity import dense_layers

from .prepare import attribute, constants, consumers
from .statistics import LEVELS
from .torch_operators import OPERATORS, READS_SHAPES, Call, Operator, tensor_of
from .torch_recurrent import RECURRENT
from .torch_resize import resize

try:
    import torch
    from torch import Tensor, nn
except ImportError:
    raise MissingExtra("train", "torch") from None

__all__ = ["ActivationStep", "QuantizedWeight", "Shifted", "TorchGraph"]

Array = NDArray[Any]
_ACTIVATIONS = (-128.0, 127.0)  # where QuantizeLinear saturates
_WEIGHTS = (-float(LEVELS), float(LEVELS))
_LEAST = 0.01  # a step does not shrink below this share of where it began
_INSIDE = 0.49  # how far from its level a float weight may begin: half a step would round to the neighbour
_TABLE: dict[str, Operator] = {**OPERATORS, **RECURRENT, "Resize": resize}
#: Input positions of weights, scales and biases, by operator; the vector of an Add is a bias too.
_TRAINED = {
    "BatchNormalization": (1, 2), "Conv": (1, 2), "ConvTranspose": (1, 2), "GRU": (1, 2, 3), "Gemm": (1, 2),
    "LSTM": (1, 2, 3), "LayerNormalization": (1, 2), "MatMul": (0, 1),
}  # fmt: skip


class _Round(torch.autograd.Function):
    """clamp(round(x / step)) * step * unit; straight through the rounding, and LSQ's gradient of the step (equation 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, unit: Tensor | None, limits: tuple[float, float], factor: float) -> Tensor:
        levels = x / step
        ctx.save_for_backward(levels, step, unit)
        ctx.limits, ctx.factor = limits, factor
        return levels.round().clamp_(*limits).mul_(step if unit is None else step * unit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        levels, step, unit = ctx.saved_tensors
        gradient = gradients[0] if unit is None else gradients[0] * unit
        clamped = levels.clamp(*ctx.limits)
        inside = clamped.eq(levels)
        of_step = clamped.round_().sub_(levels * inside).mul_(gradient)
        return gradient * inside, of_step.sum_to_size(step.shape) * ctx.factor, None, None, None


class ActivationStep(nn.Module):
    """The step of one or more Q/DQ pairs: scale = ``start`` * ``ratio``; the ratio is learned, and begins at 1."""

    start: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", scale)
        self.ratio = nn.Parameter(torch.ones_like(scale))

    def scale(self) -> Tensor:
        return self.start * self.ratio.clamp(min=_LEAST)

    def forward(self, x: Tensor) -> Tensor:
        factor = 1 / (max(x.numel() // max(x.shape[0], 1), 1) * LEVELS) ** 0.5 if x.ndim else 1.0
        rounded: Tensor = _Round.apply(x, self.scale(), None, _ACTIVATIONS, factor)  # type: ignore[no-untyped-call]
        return rounded


class QuantizedWeight(nn.Module):
    """A float master weight behind an int8 one, in units of the step where it begins, and a learned step a channel.

    The master lies where the float weight lies, but no further from its int8 level than rounds back to it: training begins
    at the graph that it was given, whatever chose its levels. ``sparse``: what is 0 in both stays 0.
    """

    unit: Tensor
    mask: Tensor | None

    def __init__(self, levels: Array, scale: Array, axis: int, original: Array | None, sparse: bool = False) -> None:
        super().__init__()
        self.shape = scale.shape
        spread = [-1 if i == axis % levels.ndim else 1 for i in range(levels.ndim)] if scale.ndim and levels.ndim else []
        unit = torch.tensor(scale.reshape(spread))
        begin = torch.tensor(levels.astype(np.float32))
        filled = levels != 0
        if original is not None and original.shape == levels.shape:
            filled = filled | (original != 0)
            away = torch.tensor(original.astype(np.float32)) / unit - begin
            beyond = (begin.abs() >= LEVELS) & (away * begin > 0)  # clipped: as far out as it was
            begin = begin + torch.where(beyond, away, torch.where(away.abs() <= 1, away.clamp(-_INSIDE, _INSIDE), 0.0))
        self.register_buffer("unit", unit)
        self.register_buffer("mask", torch.tensor(filled) if sparse else None)
        self.master = nn.Parameter(begin)
        self.ratio = nn.Parameter(torch.ones_like(unit))

    def forward(self) -> Tensor:
        factor = (self.ratio.numel() / (self.master.numel() * LEVELS)) ** 0.5
        weight: Tensor = _Round.apply(self._masked(), self.ratio.clamp(min=_LEAST), self.unit, _WEIGHTS, factor)  # type: ignore[no-untyped-call]
        return weight

    def _masked(self) -> Tensor:
        return self.master if self.mask is None else self.master * self.mask

    def quantized(self) -> tuple[NDArray[np.int8], Array]:
        """int8 levels and their float32 scales, of the shapes that the graph has."""
        with torch.no_grad():
            ratio = self.ratio.clamp(min=_LEAST)
            levels = (self._masked() / ratio).round().clamp(*_WEIGHTS).to(torch.int8)
            return levels.cpu().numpy(), (ratio * self.unit).cpu().numpy().reshape(self.shape)


class Shifted(nn.Module):
    """A float weight or bias: ``start`` + ``unit`` * ``shift``; the unit is its root mean square, so one rate suits all.

    ``sparse``: what is 0 stays 0.
    """

    start: Tensor
    unit: Tensor

    def __init__(self, value: Tensor, sparse: bool = False) -> None:
        super().__init__()
        size = value.square().mean().sqrt()
        self.register_buffer("start", value)
        unit = torch.where(size > 0, size, 0.01)
        self.register_buffer("unit", unit * (value != 0) if sparse else unit)
        self.shift = nn.Parameter(torch.zeros_like(value))

    def forward(self) -> Tensor:
        return self.start + self.unit * self.shift


class TorchGraph(nn.Module):
    """Runs an ONNX graph, Q/DQ or float, in PyTorch. Raises `GraphError` that names a node that it cannot run.

    ``originals``: name of an int8 initializer -> the float32 weights that it was rounded from, where they are known.
    ``weights``, ``steps`` and ``floats`` hold what is trained; zeros of weights with the 2:4 pattern stay zero.
    """

    def __init__(self, model: onnx.ModelProto, originals: Mapping[str, Array] | None = None) -> None:
        super().__init__()
        self._model = onnx.ModelProto.FromString(model.SerializeToString())
        graph = self._model.graph
        self._known, self._uses = constants(graph), consumers(graph)
        self._integers: dict[str, Tensor] = {}
        self._buffer_of: dict[str, str] = {}  # float constant -> buffer
        self.weights, self.steps, self.floats = nn.ModuleDict(), nn.ModuleList(), nn.ModuleDict()
        self._weight_of: dict[str, tuple[str, str]] = {}  # int8 initializer -> its key in ``weights``, its scale
        self._step_of: dict[str, ActivationStep] = {}  # scale initializer -> step
        self._float_of: dict[str, str] = {}  # float initializer -> its key in ``floats``
        self._inputs = {value.name for value in graph.input}
        self._outputs = [value.name for value in graph.output]
        self._originals = dict(originals or {})
        self._sparse = {layer.weight for layer in dense_layers(self._model) if layer.sparse}
        pairs = self._pairs()
        self._steps = [(node, self._compile(node, pairs)) for node in graph.node]
        for name in _trained(graph):
            key = self._float_of[name] = f"f{len(self.floats)}"
            self.floats[key] = Shifted(tensor_of(self._known[name]), name in self._sparse)
        for i, (name, proto) in enumerate(self._known.items()):
            if name in self._weight_of or name in self._float_of:
                continue
            value = tensor_of(proto)
            if value.is_floating_point():  # moves with the module; integers are shapes and indices, and stay on the CPU
                self._buffer_of[name] = f"constant{i}"
                self.register_buffer(self._buffer_of[name], value, persistent=False)
            else:
                self._integers[name] = value
        self._last = {name: i for i, node in enumerate(graph.node) for name in node.input}

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Input name -> tensor to output name -> tensor, of the graph's shapes and dtypes."""
        values: dict[str, Any] = {**self._integers, **feeds}
        values |= {name: getattr(self, buffer) for name, buffer in self._buffer_of.items()}
        values |= {name: self.floats[key]() for name, key in self._float_of.items()}
        for i, (node, run) in enumerate(self._steps):
            inputs = [values.get(name) for name in node.input]
            if node.op_type not in READS_SHAPES:
                inputs = _together(inputs)
            try:
                found = run(*inputs)
            except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
                reason = first_line(error)
                raise GraphError(
                    f"node {node.name or node.output[0]!r} ({node.op_type}) does not run in PyTorch: {reason[:200]}",
                    "quantize it without --qat",
                ) from None
            values.update(zip(node.output, found if isinstance(found, tuple) else (found,), strict=False))
            for name in node.input:
                if self._last[name] == i and name not in self._outputs:
                    values.pop(name, None)
        return {name: values[name] for name in self._outputs}

    def export(self) -> onnx.ModelProto:
        """The graph again, node for node, with the weights, biases and scales as they are now."""
        values: dict[str, Array] = {}
        for name, (key, scale) in self._weight_of.items():
            weight = self.weights[key]
            assert isinstance(weight, QuantizedWeight)
            values[name], values[scale] = weight.quantized()
        with torch.no_grad():
            for name, step in self._step_of.items():
                values[name] = step.scale().cpu().numpy().reshape(tuple(self._known[name].dims))
            values |= {name: self.floats[key]().cpu().numpy() for name, key in self._float_of.items()}
        model: onnx.ModelProto = onnx.ModelProto.FromString(self._model.SerializeToString())
        for tensor in model.graph.initializer:
            if tensor.name in values:
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(values[tensor.name], order="C"), tensor.name))
        return model

    def _pairs(self) -> set[str]:
        """int8 tensors between QuantizeLinear and DequantizeLinear with the same scale. Raises for any other use of one."""
        nodes = self._model.graph.node
        quantizers = {node.output[0]: node for node in nodes if node.op_type == "QuantizeLinear"}
        outputs = {value.name for value in self._model.graph.output}
        for node in nodes:
            for name in node.input:
                if name in quantizers and (
                    node.op_type != "DequantizeLinear" or node.input[1] != quantizers[name].input[1] or name in outputs
                ):
                    raise _refused(quantizers[name], "without a DequantizeLinear of its scale behind it")
        return set(quantizers)

    def _compile(self, node: onnx.NodeProto, pairs: set[str]) -> Operator:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            self._check_symmetric(node)
        if node.op_type == "QuantizeLinear":
            step = self._step(node)
            return lambda x, *rest: step(x)
        if node.op_type == "DequantizeLinear":
            if node.input[0] in pairs:
                return lambda x, *rest: x
            weight = self._weight(node)
            return lambda *rest: weight()
        if node.op_type == "Constant":
            value = _constant(node)
            return lambda: value
        if node.op_type not in _TABLE or node.domain not in ("", "ai.onnx"):
            raise GraphError(
                f"node {node.name or node.output[0]!r} is {node.op_type}: quantization-aware training is not available for it",
                "quantize it without --qat",
            )
        function = _TABLE[node.op_type]
        attributes = {found.name: helper.get_attribute_value(found) for found in node.attribute}
        call = Call(node.name or node.output[0], node.op_type, attributes, len([name for name in node.output if name]))
        return lambda *inputs: function(call, *inputs)

    def _check_symmetric(self, node: onnx.NodeProto) -> None:
        if node.input[1] not in self._known or self._known[node.input[1]].data_type != onnx.TensorProto.FLOAT:
            raise _refused(node, "with a scale that is no float32 constant")
        zero = self._known.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is None or zero.data_type != onnx.TensorProto.INT8 or numpy_helper.to_array(zero).any():
            raise _refused(node, "with a zero point other than int8 0")

    def _step(self, node: onnx.NodeProto) -> ActivationStep:
        """Pairs that begin with the same scale are of one group, which has one scale so that TensorRT may move Q through."""
        name = node.input[1]
        scale = tensor_of(self._known[name])
        if scale.numel() != 1:
            raise _refused(node, "with a scale a channel")
        for step in self._step_of.values():
            if float(step.start) == float(scale):
                self._step_of[name] = step
                return step
        step = self._step_of[name] = ActivationStep(scale.reshape(()))
        # White pixels, and other values that an input has often, lie on a level or beside it: learning their step by a gradient
        # that is straight through the rounding costs more than it gains (2 dB and back, on digits).
        step.ratio.requires_grad_(node.input[0] not in self._inputs)
        self.steps.append(step)
        return step

    def _weight(self, node: onnx.NodeProto) -> QuantizedWeight:
        name, scale = node.input[0], node.input[1]
        if name not in self._known or attribute(node, "block_size", 0):
            raise _refused(node, "of something that is neither a constant nor quantized before it")
        if name not in self._weight_of:
            if self._uses[scale] != 1:
                raise _refused(node, "with a scale that others use too")
            levels, scales = (numpy_helper.to_array(self._known[n]) for n in (name, scale))
            key = f"w{len(self.weights)}"
            axis, original = attribute(node, "axis", 1), self._originals.get(name)
            self.weights[key] = QuantizedWeight(levels, scales, axis, original, name in self._sparse)
            self._weight_of[name] = (key, scale)
        weight = self.weights[self._weight_of[name][0]]
        assert isinstance(weight, QuantizedWeight)
        return weight


def _refused(node: onnx.NodeProto, what: str) -> GraphError:
    return Call(node.name or node.output[0], node.op_type, {}, 1).refuse(what)


def _together(inputs: list[Any]) -> list[Any]:
    """All on the device of those that are on one: shapes and indices are made on the CPU."""
    devices = [value.device for value in inputs if value is not None and value.device.type != "cpu"]
    return [value.to(devices[0]) if value is not None else None for value in inputs] if devices else inputs


def _constant(node: onnx.NodeProto) -> Tensor:
    found = node.attribute[0]
    value = helper.get_attribute_value(found)
    if found.name == "value":
        return tensor_of(value)
    if found.name.startswith(("value_float", "value_int")):
        return torch.tensor(value, dtype=torch.float32 if "float" in found.name else torch.int64)
    raise _refused(node, found.name)


def _trained(graph: onnx.GraphProto) -> list[str]:
    """Float initializers that are weights or biases and nothing else, in the graph's order."""
    known, uses = constants(graph), consumers(graph)
    counts: dict[str, int] = {}
    for node in graph.node:
        positions: tuple[int, ...] = _TRAINED.get(node.op_type, (0, 1) if node.op_type == "Add" else ())
        for i in positions:
            name = node.input[i] if i < len(node.input) else ""
            if name in known and (node.op_type != "Add" or _is_vector(known[name])):
                counts[name] = counts.get(name, 0) + 1
    return [
        name
        for name, count in counts.items()
        if count == uses[name]
        and known[name].data_type == onnx.TensorProto.FLOAT
        and np.isfinite(numpy_helper.to_array(known[name])).all()
    ]


def _is_vector(tensor: onnx.TensorProto) -> bool:
    """Whether all but one axis have size 1: tables of positions and masks are added too, and stay as they are."""
    return len([size for size in tensor.dims if size > 1]) == 1

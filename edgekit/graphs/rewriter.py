"""The walk behind `to_float`: which float tensor each integer tensor stands for, as ``real = (integer - zero) * scale``."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import GraphError

from .editing import Array, constants, consumers, subgraphs
from .opset import opset
from .weights import clipped, dequantized, limits_of

__all__ = ["Encoded", "Rewriter", "part"]

#: Ends of a quantized range that a fused activation leaves: ReLU, ReLU6, hard tanh. Other ends only come from calibration.
_ENDS = (0.0, 1.0, 6.0, -1.0)
_KNOWN_RANGES = {"Relu": (0.0, np.inf), "Sigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "HardSigmoid": (0.0, 1.0),
                 "Tanh": (-1.0, 1.0), "Abs": (0.0, np.inf), "Exp": (0.0, np.inf)}  # fmt: skip
#: Their outputs lie in the range of their inputs.
_WITHIN = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Reshape", "Transpose", "Flatten", "Squeeze",
           "Unsqueeze", "Identity", "Concat", "Gather", "Slice", "ReduceMean", "Split", "Dropout"}  # fmt: skip
UNBOUNDED = (-np.inf, np.inf)


def part(node: onnx.NodeProto, index: int) -> str:
    """An optional input's name, "" where it is absent."""
    return node.input[index] if index < len(node.input) else ""


class Encoded(NamedTuple):
    """An integer tensor that is not computed any more: ``value`` (float) is what it stands for.

    ``scale``, ``zero``: names of tensors ("" for a zero of 0); ``axis`` of a scale per channel; ``dtype``: ONNX element type.
    """

    value: str
    scale: str
    zero: str
    axis: int
    dtype: int


class Rewriter:
    """Collects the nodes and constants of the float graph. ``rounding``: quantized tensors stay integers, only the
    operators on them become float, so that the result must agree with the original but for the order of sums."""

    def __init__(self, model: onnx.ModelProto, rounding: bool) -> None:
        graph = model.graph
        self.rounding = rounding
        self._model, self._inferred = model, False
        self.opset = opset(model)
        self.nodes: list[onnx.NodeProto] = []
        self.encoded: dict[str, Encoded] = {}
        self.counts: Counter[str] = Counter()  # roundings removed, weights and biases dequantized, integers kept
        self.replaced: Counter[str] = Counter()  # quantized operators, by type
        self.uses = consumers(graph)
        self.outputs = {value.name for value in graph.output}
        captured = (set(consumers(inner)) for node in graph.node for inner in subgraphs(node))
        self.pinned = self.outputs.union(*captured)
        self.types = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.output, *graph.input)}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.products: dict[str, onnx.NodeProto] = {}  # float products with constant weights, by output
        self.made: dict[str, Array] = {}
        self._stored = constants(graph)
        self._aliases: dict[str, str] = {}
        self._ranges: dict[str, tuple[float, float]] = {}
        self._computed: set[str] = set()  # encoded tensors whose integers are computed as well
        self._once: dict[tuple[object, ...], str] = {}
        self._names = {*self._stored, *self.types, *(name for n in graph.node for name in (*n.input, *n.output))}

    # Names and constants

    def fresh(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._names:
            name, number = f"{wanted}_{number}", number + 1
        self._names.add(name)
        return name

    def resolved(self, name: str) -> str:
        """The tensor that carries this name's value now."""
        return self._aliases.get(name, name)

    def one(self) -> str:
        """A scale of 1."""
        if ("one",) not in self._once:
            self._once["one",] = self.keep(np.ones((), np.float32), "one")
        return self._once["one",]

    def constant(self, name: str) -> Array | None:
        if name not in self.made and name in self._stored:
            self.made[name] = np.asarray(numpy_helper.to_array(self._stored[name]))
        return self.made.get(name)

    def keep(self, value: Array, wanted: str) -> str:
        """Add a constant; its name."""
        name = self.fresh(wanted)
        self.made[name] = value
        return name

    def alias(self, name: str, value: str) -> None:
        """From here on ``value`` is read where ``name`` was; names that the outside reads stay, behind an Identity."""
        if name in self.pinned:
            self.emit("Identity", [value], name)
        else:
            self._aliases[name] = value
            self.uses[value] += self.uses[name] - 1

    # Nodes

    def emit(
        self, op: str, inputs: list[str], output: str = "", attributes: dict[str, Any] | None = None, base: str = ""
    ) -> str:
        """Append a node; the name of its output."""
        output = output or self.fresh(f"{base or inputs[0]}/{op.lower()}")
        self.append(helper.make_node(op, inputs, [output], name=self.fresh(f"{output}/node"), **(attributes or {})))
        return output

    def append(self, node: onnx.NodeProto) -> None:
        self.nodes.append(node)
        if node.op_type in _KNOWN_RANGES:
            self._ranges[node.output[0]] = _KNOWN_RANGES[node.op_type]
        elif node.op_type in _WITHIN:
            inputs = node.input if node.op_type == "Concat" else node.input[:1]
            ranges = [self._ranges.get(name, UNBOUNDED) for name in inputs]
            found = min(low for low, _ in ranges), max(high for _, high in ranges)
            self._ranges |= dict.fromkeys(node.output, found)
        elif node.op_type == "Clip" and len(node.input) == 3:
            ends = [self.constant(name) if name else None for name in node.input[1:]]
            low, high = (end if value is None else float(value) for end, value in zip(UNBOUNDED, ends, strict=True))
            self._ranges[node.output[0]] = low, high

    def arithmetic(self, op: str, a: str, b: str, base: str) -> str:
        """``a op b`` (Add, Sub, Mul, Div): constants are computed, neutral constants left out."""
        left, right = self.constant(a), self.constant(b)
        if right is not None and right.size == 1 and float(right.reshape(())) == (0.0 if op in ("Add", "Sub") else 1.0):
            return a
        if left is not None and right is not None:
            operation = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}[op]
            return self.keep(np.asarray(operation(left, right)).astype(left.dtype), f"{base}/{op.lower()}")
        return self.emit(op, [a, b], base=base)

    # Integers and what they stand for

    def equal(self, a: str, b: str) -> bool:
        """Whether two scales or zero points are the same; "" is a zero of 0."""
        if a == b:
            return True
        left, right = (np.zeros(1) if name == "" else self.constant(name) for name in (a, b))
        if left is None or right is None:
            return False
        if left.size != right.size:
            return left.size > 0 and right.size > 0 and bool((left == left.flat[0]).all() and (right == left.flat[0]).all())
        return bool((left.reshape(-1).astype(np.float64) == right.reshape(-1).astype(np.float64)).all())

    def real(self, name: str, scale: str, zero: str = "", axis: int = 1, block: int = 0, wanted: str = "") -> str:
        """The float tensor ``(name - zero) * scale``. ``wanted``: a name for it where it is a constant."""
        name = self.resolved(name)
        x = self.constant(name)
        if x is not None and self.constant(scale) is not None and (not zero or self.constant(zero) is not None):
            return self._constant_real(name, x, scale, zero, axis, block, wanted)
        found = self.encoded.get(name)
        if found is not None:
            single = all(self.is_single(part) for part in (found.scale, found.zero, scale, zero))
            same = self.equal(found.scale, scale) and self.equal(found.zero, zero)
            if same and (single or found.axis == axis):
                return found.value
            if single:
                return self._rescaled(name, found, scale, zero)
            self.integers(name)
        key = ("real", name, scale, zero, axis)
        if key not in self._once:
            steps = self.emit("Cast", [name], attributes={"to": self._float_type(scale)}, base=name)
            if zero:
                steps = self.arithmetic("Sub", steps, self.float_zero(self._spread(zero, name, axis), scale), name)
            self._once[key] = self.arithmetic("Mul", steps, self._spread(scale, name, axis), name)
        return self._once[key]

    def operand(self, node: onnx.NodeProto, index: int, axis: int = 1) -> str:
        """What an input stands for that is followed by its scale and its (optional) zero point."""
        return self.real(node.input[index], node.input[index + 1], part(node, index + 2), axis)

    def quantized(self, output: str, value: str, scale: str, zero: str, axis: int = 1, dtype: int = 0) -> None:
        """``output`` was ``value`` rounded to integers: from here on it stands for ``value``."""
        self.counts["weights" if self.constant(value) is not None else "roundings"] += 1
        if self.rounding:
            self.emit("QuantizeLinear", [value, scale, *([zero] if zero else [])], output)
            return
        point = self.constant(zero) if zero else None
        if point is not None:
            dtype = int(helper.np_dtype_to_tensor_dtype(point.dtype))
        elif zero in self.types:
            dtype = self.types[zero].elem_type
        dtype = dtype or TensorProto.UINT8
        self.encode(output, Encoded(self._limited(value, scale, zero, point, dtype, axis), scale, zero, axis, dtype))

    def encode(self, output: str, encoded: Encoded) -> None:
        self.encoded[output] = encoded
        self.uses[encoded.value] += self.uses[output]

    def integers(self, name: str) -> None:
        """Compute an integer tensor after all, for an operator that needs it."""
        found = self.encoded.get(name)
        if found is None or name in self._computed:
            return
        self._computed.add(name)
        steps = self.arithmetic("Div", found.value, self._spread(found.scale, name, found.axis), name)
        if self.opset >= 11:
            steps = self.emit("Round", [steps], base=name)
        else:
            half = self.keep(np.array(0.5, self._numpy_type(found.scale)), f"{name}/half")
            steps = self.emit("Floor", [self.arithmetic("Add", steps, half, name)], base=name)
        if found.zero:
            zero = self.float_zero(self._spread(found.zero, name, found.axis), found.scale)
            steps = self.arithmetic("Add", steps, zero, name)
        limits = limits_of(found.dtype)
        if limits:
            steps = self._clip(steps, *limits, self._numpy_type(found.scale))
        self.emit("Cast", [steps], name, {"to": found.dtype})
        self.counts["kept"] += 1

    def float_zero(self, zero: str, scale: str) -> str:
        """A zero point as a float tensor of the type of ``scale``."""
        point = self.constant(zero)
        key = ("zero", zero, self._float_type(scale))
        if key not in self._once:
            self._once[key] = (
                self.emit("Cast", [zero], attributes={"to": self._float_type(scale)})
                if point is None
                else self.keep(point.astype(np.float32).astype(self._numpy_type(scale)), f"{zero}/float")
            )
        return self._once[key]

    def rank(self, name: str) -> int:
        """Axes of a tensor. Raises `GraphError` where neither the file nor inference says."""
        found = self.types.get(name)
        if (found is None or not found.HasField("shape")) and not self._inferred:
            self._inferred = True
            with contextlib.suppress(Exception):  # inference fails on graphs that run
                graph = onnx.shape_inference.infer_shapes(self._model).graph
                self.types |= {v.name: v.type.tensor_type for v in graph.value_info}
            found = self.types.get(name)
        if found is None or not found.HasField("shape"):
            raise GraphError(
                f"{name!r} has a scale per channel and a shape that the file does not state",
                "run ONNX Runtime's shape inference (quant_pre_process) before quantizing, or import the float model",
            )
        return len(found.shape.dim)

    def _constant_real(self, name: str, x: Array, scale: str, zero: str, axis: int, block: int, wanted: str) -> str:
        factor, point = self.constant(scale), self.constant(zero) if zero else None
        key = ("constant", name, scale, zero, axis, block)
        if key not in self._once:
            assert factor is not None
            try:
                value = dequantized(x, factor, point, axis, block)
            except ValueError as error:
                raise GraphError(f"the constant {name!r} cannot be dequantized: {error}", "quantize the model again") from None
            self.counts["biases" if x.dtype == np.int32 else "weights"] += 1
            usable = wanted and wanted not in self.outputs
            if usable:
                self.made[wanted] = value
            self._once[key] = wanted if usable else self.keep(value, f"{name}/float")
        return self._once[key]

    def _rescaled(self, name: str, found: Encoded, scale: str, zero: str) -> str:
        """The same integers read with another scale and zero point: ``value * scale / own + (zero - other) * scale``."""
        result = self.arithmetic("Mul", found.value, self.arithmetic("Div", scale, found.scale, name), name)
        if self.equal(found.zero, zero):
            return result
        if not (found.zero or zero):
            return result
        nothing = self.keep(np.zeros((), self._numpy_type(scale)), f"{name}/zero")
        own, other = (self.float_zero(point, scale) if point else nothing for point in (found.zero, zero))
        shift = self.arithmetic("Mul", self.arithmetic("Sub", own, other, name), scale, name)
        return self.arithmetic("Add", result, shift, name)

    def _limited(self, value: str, scale: str, zero: str, point: Array | None, dtype: int, axis: int) -> str:
        """``value`` within the range of its integers, where an end of it is that of a fused activation."""
        x, factor, limits = self.constant(value), self.constant(scale), limits_of(dtype)
        if factor is None or (zero and point is None) or limits is None:
            return value
        if x is not None:
            return self.keep(clipped(x, factor, point, limits, axis), f"{value}/clipped")
        if factor.size != 1:
            return value
        shift = 0 if point is None else int(point.astype(np.int64).reshape(-1)[0])
        step = float(factor.reshape(-1)[0])
        have = self._ranges.get(value, UNBOUNDED)
        ends = [step * (limit - shift) for limit in limits]
        fused = [any(abs(end - known) <= 1e-5 * abs(known) for known in _ENDS) for end in ends]
        low = ends[0] if fused[0] and have[0] < ends[0] - 1e-5 else -np.inf
        high = ends[1] if fused[1] and have[1] > ends[1] + 1e-5 else np.inf
        key = ("limited", value, low, high)
        if (low, high) != UNBOUNDED and key not in self._once:
            relu = (low, high) == (0.0, np.inf)
            self._once[key] = self.emit("Relu", [value]) if relu else self._clip(value, low, high, factor.dtype)
        return self._once.get(key, value)

    def _clip(self, value: str, low: float, high: float, dtype: Any) -> str:
        if self.opset < 11:  # limits were attributes
            limits = {"min": float(low), "max": float(high)}
            return self.emit("Clip", [value], attributes={k: v for k, v in limits.items() if np.isfinite(v)})
        ends = [self.keep(np.array(end, dtype), f"{value}/limit") if np.isfinite(end) else "" for end in (low, high)]
        return self.emit("Clip", [value, *ends])

    def is_single(self, name: str) -> bool:
        """Whether a scale or zero point is one number: known, or stated to be a scalar."""
        value = self.constant(name) if name else np.zeros(())
        if value is not None:
            return value.size == 1
        stated = self.types.get(name)
        return stated is None or not stated.HasField("shape") or len(stated.shape.dim) == 0

    def single(self, found: Encoded) -> bool:
        """Whether an encoding is per tensor."""
        return self.is_single(found.scale) and self.is_single(found.zero)

    def _spread(self, vector: str, like: str, axis: int) -> str:
        """A scale or zero point that broadcasts along an axis of ``like``; a negative axis counts from the end."""
        value = self.constant(vector)
        if self.is_single(vector):
            return vector
        rank = value.ndim if value is not None else self.rank(vector)
        if rank != 1:
            raise GraphError(
                f"the activation {like!r} is quantized in blocks (scale {vector!r})",
                "import the float model that it was made from",
            )
        if axis == -1:
            return vector
        after = -axis - 1 if axis < 0 else self.rank(like) - axis - 1
        if value is not None:
            return self.keep(value.reshape(-1, *[1] * after), f"{vector}/spread") if after else vector
        shape = self.keep(np.array([-1, *[1] * after], np.int64), f"{vector}/shape")
        return self.emit("Reshape", [vector, shape])

    def _float_type(self, scale: str) -> int:
        value = self.constant(scale)
        if value is not None:
            return int(helper.np_dtype_to_tensor_dtype(value.dtype))
        return int(self.types[scale].elem_type) if scale in self.types else TensorProto.FLOAT

    def _numpy_type(self, scale: str) -> Any:
        return helper.tensor_dtype_to_np_dtype(self._float_type(scale))

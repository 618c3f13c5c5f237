"""ONNX operators in PyTorch, differentiable: a table from operator to function.

Semantics: the ONNX operator reference, opset 13 and later.
Each function takes a `Call`, then the node's inputs (None where one is left out), and gives a tensor or a tuple of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import numpy_helper

from edgekit.errors import GraphError, MissingExtra

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError:
    raise MissingExtra("train", "torch") from None

__all__ = ["OPERATORS", "READS_SHAPES", "Call", "Operator", "tensor_of"]

Operator = Callable[..., Any]
#: Operators that read integers from their later inputs: those may stay on the CPU.
READS_SHAPES = {
    "ConstantOfShape", "Expand", "Pad", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Reshape", "Resize",
    "Slice", "Split", "Squeeze", "Tile", "Unsqueeze",
}  # fmt: skip
_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A node as its function sees it."""

    name: str
    op: str
    attributes: Mapping[str, Any]
    outputs: int

    def get(self, name: str, default: Any) -> Any:
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def refuse(self, what: str) -> GraphError:
        return GraphError(
            f"node {self.name!r} is {self.op} with {what}: quantization-aware training is not available for it",
            "quantize it without --qat",
        )


def tensor_of(proto: Any) -> Tensor:
    """A TensorProto as a tensor of its own memory."""
    return torch.tensor(numpy_helper.to_array(proto))


def _ints(value: Tensor | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in (value.flatten().tolist() if isinstance(value, Tensor) else value)]


# Elementwise


def _div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _cast(call: Call, x: Tensor) -> Tensor:
    if call.get("to", 1) not in _DTYPES:
        raise call.refuse(f"the type {call.get('to', 1)}")
    return x.to(_DTYPES[call.get("to", 1)])


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def folded(call: Call, first: Tensor, *rest: Tensor) -> Tensor:
        for other in rest:
            first = function(first, other)
        return first

    return folded


def _plain(function: Callable[..., Tensor]) -> Operator:
    return lambda call, *inputs: function(*inputs)


def _slope(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


_ELEMENTWISE: dict[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "Cast": _cast,
    "Ceil": _plain(torch.ceil),
    "Clip": _clip,
    "Cos": _plain(torch.cos),
    "Div": _div,
    "Elu": lambda call, x: F.elu(x, call.get("alpha", 1.0)),
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Floor": _plain(torch.floor),
    "Gelu": lambda call, x: F.gelu(x, approximate=call.get("approximate", "none")),
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "HardSigmoid": lambda call, x: (call.get("alpha", 0.2) * x + call.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda call, x: x * (x / 6 + 0.5).clamp(0, 1),
    "LeakyRelu": lambda call, x: F.leaky_relu(x, call.get("alpha", 0.01)),
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "Max": _fold(torch.maximum),
    "Min": _fold(torch.minimum),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "PRelu": _slope,
    "Pow": lambda call, x, exponent: torch.pow(x, exponent).to(x.dtype),
    "Reciprocal": _plain(torch.reciprocal),
    "Relu": _plain(torch.relu),
    "Sigmoid": _plain(torch.sigmoid),
    "Sin": _plain(torch.sin),
    "Softplus": _plain(F.softplus),
    "Sqrt": _plain(torch.sqrt),
    "Sub": _plain(torch.sub),
    "Sum": _fold(torch.add),
    "Tanh": _plain(torch.tanh),
    "Where": _plain(torch.where),
}


# Layers and normalization


def _pads(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Padding of the spatial axes: all beginnings, then all ends."""
    mode = call.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        return _ints(call.get("pads", None)) if mode == "NOTSET" and call.get("pads", None) else [0] * 2 * len(sizes)
    begins, ends = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size)
        small, large = total // 2, total - total // 2
        begins.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return begins + ends


def _symmetric(pads: list[int]) -> bool:
    return pads[: len(pads) // 2] == pads[len(pads) // 2 :]


def _padded(x: Tensor, pads: list[int], value: float) -> Tensor:
    """``pads``: of the last axes, all beginnings then all ends, as ONNX has them."""
    half = len(pads) // 2
    flat = [pads[i + side * half] for i in reversed(range(half)) for side in (0, 1)]  # F.pad begins with the last axis
    return F.pad(x, flat, value=value) if any(flat) else x


def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    pads = _pads(call, x.shape[2:], weight.shape[2:], strides, dilations)
    if not _symmetric(pads):
        x, pads = _padded(x, pads, 0.0), [0] * 2 * rank
    function: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return function(x, weight, bias, strides, pads[:rank], dilations, call.get("group", 1))


def _conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    if call.get("output_shape", None) or call.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise call.refuse("output_shape or auto_pad")
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    pads, more = call.get("pads", None) or [0] * 2 * rank, call.get("output_padding", None) or [0] * rank
    function: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    if _symmetric(pads):
        return function(x, weight, bias, strides, pads[:rank], more, call.get("group", 1), dilations)
    y = function(x, weight, bias, strides, 0, more, call.get("group", 1), dilations)
    return _padded(y, [-p for p in pads], 0.0)


def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    y = (a.T if call.get("transA", 0) else a) @ (b.T if call.get("transB", 0) else b)
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    y = y if alpha == 1.0 else alpha * y
    return y if c is None else y + (c if beta == 1.0 else beta * c)


def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    if call.outputs > 1:
        raise call.refuse("outputs for mean and deviation")
    shape = list(x.shape[call.get("axis", -1) % x.ndim :])
    y = F.layer_norm(x, shape, None, None, call.get("epsilon", 1e-5)) * scale
    return y if bias is None else y + bias


def _batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if call.get("training_mode", 0):
        raise call.refuse("training_mode")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, call.get("epsilon", 1e-5))


def _windows(call: Call, sizes: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilations, padding, and what ceil_mode reads beyond it: torch drops the last window by another rule."""
    rank, kernel = len(sizes), _ints(call.get("kernel_shape", None))
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    pads, beyond = _pads(call, sizes, kernel, strides, dilations), [0] * 2 * rank
    for i in range(rank) if call.get("ceil_mode", 0) else ():
        free = sizes[i] + pads[i] + pads[i + rank] - (kernel[i] - 1) * dilations[i] - 1
        last = math.ceil(free / strides[i]) * strides[i]  # where the last window begins
        last -= strides[i] if last >= sizes[i] + pads[i] else 0  # in nothing but padding
        beyond[i + rank] = max(0, last - free)
    return kernel, strides, dilations, pads, beyond


def _max_pool(call: Call, x: Tensor) -> Tensor:
    if call.outputs > 1:
        raise call.refuse("an output for indices")
    kernel, strides, dilations, pads, beyond = _windows(call, x.shape[2:])
    function: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.ndim - 3]
    return function(_padded(_padded(x, pads, -math.inf), beyond, -math.inf), kernel, strides, 0, dilations)


def _average_pool(call: Call, x: Tensor) -> Tensor:
    kernel, strides, dilations, pads, beyond = _windows(call, x.shape[2:])
    if any(d != 1 for d in dilations):
        raise call.refuse("dilations")
    function: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
    y: Tensor = function(_padded(_padded(x, pads, 0.0), beyond, 0.0), kernel, strides)
    include = call.get("count_include_pad", 0)
    if not any(beyond) and (include or not any(pads)):
        return y
    counted = _padded(_padded(torch.ones_like(x[:1, :1]), pads, float(include)), beyond, 0.0)
    return y / function(counted, kernel, strides)  # the mean of what is counted


def _global(function: Callable[..., Tensor]) -> Operator:
    return lambda call, x: function(x, dim=tuple(range(2, x.ndim)), keepdim=True)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def reduced(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        found = _ints(axes if axes is not None else call.get("axes", None))
        if not found and call.get("noop_with_empty_axes", 0):
            return x
        return function(x, dim=tuple(found or range(x.ndim)), keepdim=bool(call.get("keepdims", 1)))

    return reduced


# Shapes


def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    sizes = _ints(shape)
    if not call.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    return x.reshape(math.prod(x.shape[: axis % x.ndim if axis < 0 else axis]), -1)


def _squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


def _unsqueeze(call: Call, x: Tensor, axes: Tensor) -> Tensor:
    found = _ints(axes)
    for axis in sorted(axis % (x.ndim + len(found)) for axis in found):
        x = x.unsqueeze(axis)
    return x


def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.get("perm", None) or list(reversed(range(x.ndim))))


def _shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[call.get("start", 0) : call.get("end", None)], dtype=torch.int64)


def _slice(
    call: Call, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    first, last = _ints(starts), _ints(ends)
    for axis, begin, end, step in zip(
        _ints(axes) or range(len(first)), first, last, _ints(steps) or [1] * len(first), strict=True
    ):
        places = range(*slice(begin, end, step).indices(x.shape[axis]))
        if step > 0:
            index = [slice(None)] * x.ndim
            index[axis] = slice(places.start, max(places.stop, places.start), step)
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    return x


def _split(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = call.get("axis", 0)
    wanted = -(-x.shape[axis] // call.outputs) if sizes is None else _ints(sizes)
    return torch.split(x, wanted, axis)


def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    flat = indices.to(torch.int64).flatten()
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    return x.index_select(axis, flat).reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(_ints(shape))))  # type: ignore[no-untyped-call]


def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    proto = call.get("value", None)
    value = torch.zeros(1) if proto is None else tensor_of(proto)
    return value.reshape(()).expand(_ints(shape)).clone()


def _pad(call: Call, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    found, chosen = _ints(pads), _ints(axes) or list(range(x.ndim))
    every = [0] * 2 * x.ndim
    for i, axis in enumerate(chosen):
        every[axis % x.ndim], every[axis % x.ndim + x.ndim] = found[i], found[i + len(chosen)]
    mode = call.get("mode", "constant")
    if mode == "constant":
        return _padded(x, every, 0.0 if value is None else float(value))
    spatial = max(x.ndim - 2, 1)
    flat = [every[i + side * x.ndim] for i in reversed(range(x.ndim)) for side in (0, 1)]
    if mode not in ("reflect", "edge") or any(flat[2 * spatial :]):
        raise call.refuse(f"mode {mode!r}")
    return F.pad(x, flat[: 2 * spatial], mode="replicate" if mode == "edge" else mode)


_SHAPES: dict[str, Operator] = {
    "Concat": lambda call, *inputs: torch.cat(inputs, call.get("axis", 0)),
    "ConstantOfShape": _constant_of_shape,
    "Dropout": lambda call, x, *rest: x,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": lambda call, x: x,
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda call, x, repeats: x.repeat(_ints(repeats)),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
_LAYERS: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "InstanceNormalization": lambda call, x, scale, bias: F.instance_norm(
        x, None, None, scale, bias, eps=call.get("epsilon", 1e-5)
    ),
    "LayerNormalization": _layer_norm,
    "LogSoftmax": lambda call, x: torch.log_softmax(x, call.get("axis", -1)),
    "MatMul": _plain(torch.matmul),
    "MaxPool": _max_pool,
    "ReduceL2": _reduce(torch.linalg.vector_norm),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Softmax": lambda call, x: torch.softmax(x, call.get("axis", -1)),
}
OPERATORS: dict[str, Operator] = {**_ELEMENTWISE, **_LAYERS, **_SHAPES}

"""ONNX Runtime's own quantized operators (domain com.microsoft), in float.

Source: ONNX Runtime's docs/ContribOperators.md and the schemas that it reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edgekit.errors import GraphError

from .editing import Array, attribute
from .rewriter import Rewriter, part

__all__ = ["HANDLERS"]

Handler = Callable[[Rewriter, onnx.NodeProto], None]


def _refused(node: onnx.NodeProto, why: str) -> GraphError:
    return GraphError(
        f"node {node.name or node.output[0]!r} ({node.op_type}) cannot be brought back to float: {why}",
        "import the float model that it was made from",
    )


def _attributes(node: onnx.NodeProto, *left_out: str) -> dict[str, Any]:
    if attribute(node, "channels_last", 0):
        raise _refused(node, "its channels are last")
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name not in (*left_out, "channels_last")}


def _unary(op: str) -> Handler:
    """x, its scale and zero; the output's scale and zero."""

    def handler(rewriter: Rewriter, node: onnx.NodeProto) -> None:
        x = rewriter.operand(node, 0)
        attributes = _attributes(node)
        if op == "LeakyRelu":
            attributes.setdefault("alpha", 0.01)
        value = rewriter.emit(op, [x], attributes=attributes, base=node.output[0])
        rewriter.quantized(node.output[0], value, node.input[3], part(node, 4))

    return handler


def _binary(op: str) -> Handler:
    """a, b and the output, each with scale and zero."""

    def handler(rewriter: Rewriter, node: onnx.NodeProto) -> None:
        a, b = (rewriter.operand(node, i) for i in (0, 3))
        value = rewriter.emit(op, [a, b], base=node.output[0])
        rewriter.quantized(node.output[0], value, node.input[6], part(node, 7))

    return handler


def _softmax(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    version = int(attribute(node, "opset", 13))
    axis = int(attribute(node, "axis", -1 if version >= 13 else 1))
    if (version >= 13) != (rewriter.opset >= 13) and axis != -1:
        raise _refused(node, f"it follows opset {version}, the graph opset {rewriter.opset}")
    x = rewriter.operand(node, 0)
    value = rewriter.emit("Softmax", [x], attributes={"axis": axis}, base=node.output[0])
    rewriter.quantized(node.output[0], value, node.input[3], part(node, 4))


def _concat(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    parts = [rewriter.operand(node, i) for i in range(2, len(node.input), 3)]
    value = rewriter.emit("Concat", parts, attributes=_attributes(node), base=node.output[0])
    rewriter.quantized(node.output[0], value, node.input[0], node.input[1])


def _where(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    x, y = (rewriter.operand(node, i) for i in (1, 4))
    value = rewriter.emit("Where", [node.input[0], x, y], base=node.output[0])
    rewriter.quantized(node.output[0], value, node.input[7], node.input[8])


def _gemm(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    """``alpha * (a @ b + c)``; c counts in steps of the two scales' product. Without an output scale the output is float."""
    alpha = float(attribute(node, "alpha", 1.0))
    inputs = [
        rewriter.operand(node, 0),
        rewriter.operand(node, 3, 0 if attribute(node, "transB", 0) else 1),
    ]
    if part(node, 6):
        scale = rewriter.arithmetic("Mul", node.input[4], node.input[1], node.input[6])
        factor = rewriter.keep(np.array(alpha, np.float32), f"{node.output[0]}/alpha")
        inputs.append(rewriter.real(node.input[6], rewriter.arithmetic("Mul", scale, factor, node.input[6]), "", -1))
    if not part(node, 7):
        rewriter.emit("Gemm", inputs, node.output[0], _attributes(node))
        return
    value = rewriter.emit("Gemm", inputs, attributes=_attributes(node), base=node.output[0])
    rewriter.quantized(node.output[0], value, node.input[7], part(node, 8))


def _with_bias(rewriter: Rewriter, node: onnx.NodeProto, value: str, bias: str) -> None:
    if bias:
        rewriter.emit("Add", [value, bias], node.output[0])
    else:
        rewriter.alias(node.output[0], value)


def _matmul_to_float(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    a = rewriter.real(node.input[0], node.input[2], part(node, 4), -2)
    b = rewriter.real(node.input[1], node.input[3], part(node, 5), -1)
    _with_bias(rewriter, node, rewriter.emit("MatMul", [a, b], base=node.output[0]), part(node, 6))


def _dynamic_matmul(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    a = node.input[0]
    rewriter.counts["roundings"] += 1
    if rewriter.rounding:
        names = [rewriter.fresh(f"{node.output[0]}/{name}") for name in ("steps", "scale", "zero")]
        rewriter.append(helper.make_node("DynamicQuantizeLinear", [a], names))
        a = rewriter.real(names[0], names[1], names[2])
    b = rewriter.real(node.input[1], node.input[2], part(node, 3), -1)
    _with_bias(rewriter, node, rewriter.emit("MatMul", [a, b], base=node.output[0]), part(node, 4))


def _lstm(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    """Weights (directions, inputs, 4 * hidden) are those of LSTM, transposed; a scale each direction, or each column."""
    if rewriter.rounding:
        rewriter.append(node)  # it rounds inside: nothing to emulate it with
        return
    rewriter.counts["roundings"] += 1
    names = []
    for index, first in ((1, 8), (2, 10)):
        values = [rewriter.constant(node.input[i]) for i in (index, first, first + 1)]
        if any(value is None for value in values):
            raise _refused(node, f"its weights {node.input[index]!r} are no constants")
        name = f"{node.input[index]}/float"
        names.append(rewriter.keep(_recurrent_weights(node, *[v for v in values if v is not None]), name))
        rewriter.counts["weights"] += 1
    inputs = [node.input[0], *names, *(part(node, i) for i in range(3, 8))]
    while not inputs[-1]:
        inputs.pop()
    plain = helper.make_node("LSTM", inputs, list(node.output), name=node.name)
    plain.attribute.extend(node.attribute)
    rewriter.append(plain)


def _recurrent_weights(node: onnx.NodeProto, w: Array, scale: Array, zero: Array) -> Array:
    if w.ndim != 3 or scale.size not in (w.shape[0], w.shape[0] * w.shape[2]) or zero.size not in (1, scale.size):
        raise _refused(node, f"weights {list(w.shape)} with scales {list(scale.shape)}")
    shape = (w.shape[0], 1, -1)
    shift = zero.astype(np.int32).reshape(shape if zero.size > 1 else ())
    steps = (w.astype(np.int32) - shift).astype(np.float32)
    return np.ascontiguousarray((steps * scale.reshape(shape)).transpose(0, 2, 1))


def _matmul_bits(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    """MatMulNBits: weights (N, blocks, bytes) of 4 or 8 bits, the low half of a byte first, in blocks along K."""
    bits, block = int(attribute(node, "bits", 4)), int(attribute(node, "block_size", 0))
    n, k = int(attribute(node, "N", 0)), int(attribute(node, "K", 0))
    packed, scales = rewriter.constant(node.input[1]), rewriter.constant(node.input[2])
    zeros = rewriter.constant(part(node, 3)) if part(node, 3) else None
    if bits not in (4, 8) or part(node, 4) or packed is None or scales is None or (part(node, 3) and zeros is None):
        raise _refused(node, f"{bits} bits, or weights that are no constants or reordered")
    blocks = -(-k // max(block, 1))
    if block < 1 or min(n, k) < 1 or packed.size * 8 != n * blocks * block * bits or scales.size != n * blocks:
        raise _refused(node, f"weights {list(packed.shape)} and {scales.size} scales do not fit N {n}, K {k}")
    steps = _unpacked(packed.reshape(n, -1), bits).reshape(n, blocks, block)
    if zeros is None:
        points = np.full((n, blocks), 1 << (bits - 1), np.float32)
    elif zeros.dtype == np.uint8:
        points = _unpacked(zeros.reshape(n, -1), bits)[:, :blocks]
    else:
        points = zeros.astype(np.float32).reshape(n, blocks)
    weight = ((steps - points[:, :, None]) * scales.astype(np.float32).reshape(n, blocks, 1)).reshape(n, -1)[:, :k]
    rewriter.counts["weights"] += 1
    name = rewriter.keep(np.ascontiguousarray(weight.T).astype(scales.dtype), f"{node.input[1]}/float")
    _with_bias(rewriter, node, rewriter.emit("MatMul", [node.input[0], name], base=node.output[0]), part(node, 5))


def _unpacked(packed: Array, bits: int) -> Array:
    """(N, bytes) uint8 -> (N, values) float32."""
    if bits == 8:
        return packed.astype(np.float32)
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float32)


HANDLERS: dict[str, Handler] = {
    "DynamicQuantizeLSTM": _lstm,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "MatMulIntegerToFloat": _matmul_to_float,
    "MatMulNBits": _matmul_bits,
    "QGemm": _gemm,
    "QLinearAdd": _binary("Add"),
    "QLinearAveragePool": _unary("AveragePool"),
    "QLinearConcat": _concat,
    "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearLeakyRelu": _unary("LeakyRelu"),
    "QLinearMul": _binary("Mul"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearSoftmax": _softmax,
    "QLinearWhere": _where,
}

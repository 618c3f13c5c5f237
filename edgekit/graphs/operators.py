"""What each quantized operator of the ONNX standard computes, in float, and how integers travel between them.

Source: the ONNX operator schemas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgekit.errors import GraphError

from .editing import attribute, consumers, subgraphs
from .microsoft import HANDLERS as MICROSOFT
from .rewriter import Encoded, Rewriter, part
from .weights import folded, is_narrow

__all__ = ["QUANTIZED", "rewrite_node"]

#: They move the elements of input 0, or choose among them: the encoding of what they are given is that of what they give.
_MOVES = frozenset(
    """MaxPool Reshape Transpose Flatten Squeeze Unsqueeze Slice Gather GatherElements GatherND Identity Expand Tile Split
    Resize Upsample DepthToSpace SpaceToDepth ReduceMax ReduceMin ReverseSequence TopK Pad""".split()  # noqa: SIM905
)
#: Their answer is the same for the integers and for what they stand for.
_ASKS = frozenset({"ArgMax", "ArgMin", "Shape", "Size"})
_FOLLOWED = frozenset({"MatMulInteger", "ConvInteger", "DequantizeLinear", "MatMulIntegerToFloat"})


def rewrite_node(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    """Append what a node becomes. ``node`` is a copy whose inputs are resolved."""
    values = [rewriter.constant(name) for name in node.input]
    if not rewriter.pinned.intersection(node.output) and all(value is not None for value in values):
        result = folded(node, [value for value in values if value is not None])
        if result is not None:
            rewriter.made[node.output[0]] = result
            return
    standard = node.domain in ("", "ai.onnx")
    handler = _STANDARD.get(node.op_type) if standard else None
    if node.domain == "com.microsoft":
        handler = MICROSOFT.get(node.op_type) or _STANDARD.get(node.op_type)
    if handler is not None:
        rewriter.replaced[node.op_type] += 1
        handler(rewriter, node)
    elif not (standard and (_moved(rewriter, node) or _scaled_product(rewriter, node))):
        _kept(rewriter, node)


def _kept(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    """A node as it is; integers that it, or a graph inside it, reads are computed after all."""
    asks = node.op_type in _ASKS and node.domain in ("", "ai.onnx")
    for i, name in enumerate(node.input):
        if asks and name in rewriter.encoded:
            node.input[i] = rewriter.encoded[name].value
        else:
            rewriter.integers(name)
    for inner in subgraphs(node):
        for name in consumers(inner):
            rewriter.integers(name)
    rewriter.append(node)


def _moved(rewriter: Rewriter, node: onnx.NodeProto) -> bool:
    """Operators that only move elements, on encoded tensors or on constants that a DequantizeLinear reads further on."""
    if node.op_type in ("Concat", "Max", "Min"):
        return _joined(rewriter, node)
    plain_relu = node.op_type == "Relu" and node.input[0] in rewriter.encoded
    if not (node.op_type in _MOVES or plain_relu) or not node.input:
        return False
    name = node.input[0]
    found = rewriter.encoded.get(name)
    if found is None:
        found = _foreseen(rewriter, node)
    if found is None or not rewriter.single(found) or (plain_relu and not rewriter.equal(found.zero, "")):
        return False
    if node.op_type == "Pad" and not _padded(rewriter, node, found):
        return False
    node.input[0] = found.value
    moved = node.output if node.op_type == "Split" else node.output[:1]
    for i, output in enumerate(moved):
        if output:
            node.output[i] = rewriter.fresh(f"{output}/float")
            rewriter.encode(output, found._replace(value=node.output[i]))
    rewriter.append(node)
    return True


def _joined(rewriter: Rewriter, node: onnx.NodeProto) -> bool:
    found = [rewriter.encoded.get(name) for name in node.input]
    first = found[0] if found else None
    if first is None or not rewriter.single(first):
        return False
    for other in found:
        if other is None or not (rewriter.equal(first.scale, other.scale) and rewriter.equal(first.zero, other.zero)):
            return False
    inputs = [other.value for other in found if other is not None]
    value = rewriter.emit(node.op_type, inputs, attributes=attributes_of(node), base=node.output[0])
    rewriter.encode(node.output[0], first._replace(value=value))
    return True


def _padded(rewriter: Rewriter, node: onnx.NodeProto, found: Encoded) -> bool:
    """The integer that Pad fills in, as what it stands for."""
    if attribute(node, "mode", b"constant") != b"constant":
        return True
    if not part(node, 2):
        if rewriter.equal(found.zero, ""):
            return True
        node.input.extend([""] * (3 - len(node.input)))
        dtype = helper.tensor_dtype_to_np_dtype(found.dtype)
        node.input[2] = rewriter.keep(np.zeros((), dtype), f"{node.output[0]}/fill")
    if rewriter.constant(node.input[2]) is None:
        return False
    node.input[2] = rewriter.real(node.input[2], found.scale, found.zero)
    return True


def _foreseen(rewriter: Rewriter, node: onnx.NodeProto) -> Encoded | None:
    """The encoding of a constant, from the DequantizeLinear that reads it behind nodes that move elements."""
    x, name = rewriter.constant(node.input[0]), node.output[0]
    if x is None or not is_narrow(int(helper.np_dtype_to_tensor_dtype(x.dtype))) or node.op_type in ("Pad", "TopK"):
        return None
    for _ in range(8):
        readers = rewriter.readers.get(name, [])
        if len(readers) != 1 or name in rewriter.pinned:
            return None
        reader = readers[0]
        if reader.op_type == "DequantizeLinear":
            scale, zero = (rewriter.resolved(part(reader, i)) for i in (1, 2))
            known = [rewriter.constant(part_name) for part_name in (scale, zero) if part_name]
            if any(value is None or value.size != 1 for value in known):
                return None
            dtype = int(helper.np_dtype_to_tensor_dtype(x.dtype))
            return Encoded(rewriter.real(node.input[0], scale, zero), scale, zero, 1, dtype)
        if reader.op_type not in _MOVES or reader.input[0] != name:
            return None
        name = reader.output[0]
    return None


def _scaled_product(rewriter: Rewriter, node: onnx.NodeProto) -> bool:
    """Scales that follow a product of integers go into its weights, a bias that follows into its bias."""
    if node.op_type not in ("Mul", "Add") or len(node.input) != 2:
        return False
    for product_name, constant_name in (tuple(node.input), tuple(node.input)[::-1]):
        product, constant = rewriter.products.get(product_name), rewriter.constant(constant_name)
        if product is None or constant is None or rewriter.uses[product_name] != 1:
            continue
        weight = rewriter.constant(product.input[1])
        assert weight is not None
        channels = weight.shape[0 if product.op_type == "Conv" else -1]
        after = weight.ndim - 2 if product.op_type == "Conv" else 0
        fits = constant.size == 1 and constant.ndim <= weight.ndim
        fits = fits or constant.shape in ((channels, *[1] * after), (1, channels, *[1] * after))
        if not fits or constant.dtype != weight.dtype:
            continue
        if node.op_type == "Mul" and len(product.input) == 2:
            factor = constant.reshape(-1, *[1] * (weight.ndim - 1)) if product.op_type == "Conv" else constant.reshape(-1)
            product.input[1] = rewriter.keep((weight * factor).astype(weight.dtype), f"{product.input[1]}/scaled")
        elif node.op_type == "Add" and product.op_type == "Conv" and len(product.input) == 2:
            bias = np.broadcast_to(constant.reshape(-1), (channels,))
            product.input.append(rewriter.keep(bias.copy(), f"{product_name}/bias"))
        else:
            continue
        rewriter.alias(node.output[0], product_name)
        return True
    return False


def attributes_of(node: onnx.NodeProto, *left_out: str) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name not in left_out}


def _quantize(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    if rewriter.rounding:
        rewriter.append(node)
        return
    dtype = int(attribute(node, "output_dtype", 0))
    rewriter.quantized(node.output[0], node.input[0], node.input[1], part(node, 2), int(attribute(node, "axis", 1)), dtype)


def _dequantize(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    axis, block = int(attribute(node, "axis", 1)), int(attribute(node, "block_size", 0))
    value = rewriter.real(node.input[0], node.input[1], part(node, 2), axis, block, node.output[0])
    if value != node.output[0]:
        rewriter.alias(node.output[0], value)


def _quantize_dynamically(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    outputs = [name for name in node.output if name]
    undone = {*_FOLLOWED, "Mul"}  # what reads the scale and the zero point to undo them, not to use them for themselves
    read = {reader.op_type for name in outputs[1:] for reader in rewriter.readers.get(name, [])}
    followed = _is_followed(rewriter, outputs[0]) and read <= undone and not rewriter.pinned.intersection(outputs)
    if rewriter.rounding or not followed:
        rewriter.append(node)
        return
    rewriter.counts["roundings"] += 1
    scale, zero = node.output[1], node.output[2]
    rewriter.made[scale], rewriter.made[zero] = np.ones((), np.float32), np.zeros((), np.uint8)
    rewriter.encode(outputs[0], Encoded(node.input[0], scale, zero, 1, TensorProto.UINT8))


def _is_followed(rewriter: Rewriter, name: str, depth: int = 0) -> bool:
    """Whether all that reads these integers can read floats instead."""
    if name in rewriter.pinned or depth > 8:
        return False
    return all(
        reader.op_type in _FOLLOWED
        or (reader.op_type in _MOVES and reader.op_type != "Pad" and _is_followed(rewriter, reader.output[0], depth + 1))
        for reader in rewriter.readers.get(name, [])
    )


def _integer_product(op: str) -> Callable[[Rewriter, onnx.NodeProto], None]:
    """MatMulInteger and ConvInteger: int32 sums of ``(a - a_zero) * (b - b_zero)``."""
    a_axis, b_axis = (1, 0) if op == "Conv" else (-2, -1)

    def handler(rewriter: Rewriter, node: onnx.NodeProto) -> None:
        one = rewriter.one()
        a_zero, b_zero = part(node, 2), part(node, 3)
        found, scale = rewriter.encoded.get(node.input[0]), one
        if found is not None and rewriter.single(found) and rewriter.equal(found.zero, a_zero):
            scale = found.scale  # the sums of what is encoded, divided by its scale: in the weights, where they are constant
        a = rewriter.real(node.input[0], scale, a_zero, a_axis)
        b = rewriter.real(node.input[1], one, b_zero, b_axis)
        weight, step = rewriter.constant(b), rewriter.constant(scale)
        after = scale != one
        if after and weight is not None and step is not None:
            b, after = (b if step.reshape(()) == 1 else rewriter.keep(weight / step.reshape(()), f"{b}/scaled")), False
        value = rewriter.emit(op, [a, b], attributes=attributes_of(node), base=node.output[0])
        if weight is not None and not after:
            rewriter.products[value] = rewriter.nodes[-1]
        if after:
            value = rewriter.arithmetic("Div", value, scale, node.output[0])
        rewriter.encode(node.output[0], Encoded(value, one, "", 1, TensorProto.INT32))

    return handler


def _cast(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    found, wanted = rewriter.encoded.get(node.input[0]), int(attribute(node, "to", 1))
    if found is None or not rewriter.single(found):
        _kept(rewriter, node)
    elif wanted in (TensorProto.INT32, TensorProto.INT64):
        rewriter.encode(node.output[0], found._replace(dtype=wanted))
    elif wanted in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16):
        value = rewriter.real(node.input[0], rewriter.one())
        if wanted == TensorProto.FLOAT:
            rewriter.alias(node.output[0], value)
        else:
            rewriter.emit("Cast", [value], node.output[0], {"to": wanted})
    else:
        _kept(rewriter, node)


def _convolution(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    """QLinearConv; com.microsoft's may have channels last."""
    x_scale, w_scale = node.input[1], node.input[4]
    if attribute(node, "channels_last", 0):
        raise GraphError(
            f"node {node.name or node.output[0]!r} (QLinearConv) cannot be brought back to float: its channels are last",
            "import the file from before ONNX Runtime optimised it",
        )
    inputs = [rewriter.operand(node, 0), rewriter.operand(node, 3, 0)]
    if part(node, 8):
        inputs.append(rewriter.real(node.input[8], rewriter.arithmetic("Mul", w_scale, x_scale, node.input[8]), "", 0))
    value = rewriter.emit("Conv", inputs, attributes=attributes_of(node, "channels_last"), base=node.output[0])
    rewriter.quantized(node.output[0], value, node.input[6], node.input[7])


def _matrix_product(rewriter: Rewriter, node: onnx.NodeProto) -> None:
    a = rewriter.operand(node, 0, -2)
    b = rewriter.operand(node, 3, -1)
    value = rewriter.emit("MatMul", [a, b], base=node.output[0])
    rewriter.quantized(node.output[0], value, node.input[6], node.input[7])


_STANDARD: dict[str, Callable[[Rewriter, onnx.NodeProto], None]] = {
    "Cast": _cast,
    "ConvInteger": _integer_product("Conv"),
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _quantize_dynamically,
    "MatMulInteger": _integer_product("MatMul"),
    "QLinearConv": _convolution,
    "QLinearMatMul": _matrix_product,
    "QuantizeLinear": _quantize,
}
#: Operators of quantized graphs, with those that stay: attention and embeddings that ONNX Runtime fused, integer Mul.
QUANTIZED = frozenset(
    {*_STANDARD, *MICROSOFT, "QAttention", "QEmbedLayerNormalization", "QLinearReduceMean", "MulInteger"} - {"Cast"}
)

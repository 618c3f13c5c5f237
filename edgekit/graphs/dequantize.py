"""Quantized graphs brought back to float: the rounding goes, what was rounded stays.

An integer tensor of a quantized graph stands for ``(integer - zero point) * scale``. One walk through the graph follows
what each stands for, and computes that instead (`rewriter`). What limits a range on purpose stays: the ReLU or ReLU6 that
a quantizer folded into the range of its output.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from edgekit.errors import GraphError, first_line

from .editing import all_nodes, attribute, constants, prune, set_constant
from .microsoft import HANDLERS as MICROSOFT
from .operators import QUANTIZED, rewrite_node
from .rewriter import Rewriter, part
from .weights import dequantized, is_narrow

__all__ = ["MICROSOFT_OPERATORS", "exact_reference", "float_biases", "is_explicit", "quantized_nodes", "to_float"]

#: Operators of the domain com.microsoft that `to_float` takes.
MICROSOFT_OPERATORS = frozenset({*MICROSOFT, "QLinearConv", "QuantizeLinear", "DequantizeLinear"})
_PAIR = ("QuantizeLinear", "DequantizeLinear")
#: Integer products: inputs that are weights, each with that of its zero point.
_WEIGHTS = {
    "ConvInteger": ((1, 3),),
    "DynamicQuantizeLSTM": ((1, 9), (2, 11)),
    "DynamicQuantizeMatMul": ((1, 3),),
    "MatMulInteger": ((1, 3),),
    "MatMulIntegerToFloat": ((1, 5),),
    "QGemm": ((3, 5),),
    "QLinearConv": ((3, 5),),
    "QLinearMatMul": ((3, 5),),
}


def quantized_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes, also of subgraphs, that quantize, dequantize or compute on integers that stand for floats."""
    domains = ("", "ai.onnx", "com.microsoft")
    return [node for node in all_nodes(model.graph) if node.op_type in QUANTIZED and node.domain in domains]


def is_explicit(model: onnx.ModelProto) -> bool:
    """Whether all quantization is explicit Q/DQ as TensorRT takes it: signed int8 with zero points of 0.

    Weights may be int4, biases int32. A graph without quantized nodes is none.
    """
    nodes, known = quantized_nodes(model), constants(model.graph)
    return bool(nodes) and all(node.domain != "com.microsoft" and _is_symmetric(node, known) for node in nodes)


def _is_symmetric(node: onnx.NodeProto, known: dict[str, TensorProto]) -> bool:
    if node.op_type not in _PAIR:
        return False
    zero = part(node, 2)
    stored = known.get(part(node, 0)) if node.op_type == "DequantizeLinear" else None
    allowed = (TensorProto.INT8, TensorProto.INT4, TensorProto.INT32) if stored is not None else (TensorProto.INT8,)
    if not zero:
        stated = stored.data_type if stored is not None else attribute(node, "output_dtype", 0)
        return stated in allowed or (stored is None and node.op_type == "DequantizeLinear")
    if zero not in known or known[zero].data_type not in allowed:
        return False
    try:
        return not numpy_helper.to_array(known[zero]).astype(np.int32).any()
    except ValueError:  # its bytes do not fill its shape
        return False


def float_biases(model: onnx.ModelProto) -> int:
    """DequantizeLinear of int32 constants becomes float, in place: TensorRT takes no int32. Returns how many."""
    known, drop = constants(model.graph), []
    for i, node in enumerate(model.graph.node):
        if node.op_type != "DequantizeLinear" or node.input[0] not in known or node.input[1] not in known:
            continue
        if known[node.input[0]].data_type != TensorProto.INT32 or node.output[0] in {o.name for o in model.graph.output}:
            continue
        values = [np.asarray(numpy_helper.to_array(known[name])) for name in node.input if name in known]
        set_constant(model.graph, node.output[0], dequantized(values[0], values[1], None, int(attribute(node, "axis", 1))))
        drop.append(i)
    for i in reversed(drop):
        del model.graph.node[i]
    if drop:
        prune(model, [value.name for value in model.graph.output])
    return len(drop)


def to_float(model: onnx.ModelProto, rounding: bool = False) -> tuple[bool, list[str]]:
    """Rewrite a quantized graph to float, in place. Returns (changed, notes on what is lost); a float graph stays as it is.

    Takes QuantizeLinear and DequantizeLinear (symmetric or not, per tensor, per channel, in blocks; 2 to 16 bits, float8),
    QLinearConv, QLinearMatMul, ConvInteger, MatMulInteger, DynamicQuantizeLinear, ONNX Runtime's own quantized operators
    (`MICROSOFT_OPERATORS`) and weights that Cast and Mul dequantize. Integers that some other operator or an output of the
    graph needs are still computed. Quantized nodes inside subgraphs stay.

    ``rounding``: keep every rounding, and make only the operators between them float. That graph must give the answers of
    the original, up to ties: a proof of the rewrite, at the price of its speed.

    Raises `GraphError`, the model untouched, where a node cannot be brought back.
    """
    where = "the quantized graph"
    try:
        if not quantized_nodes(model) and not _narrow_weights(model):
            return False, []
        rewriter = Rewriter(model, rounding)
        for original in model.graph.node:
            where = f"node {original.name or ''.join(original.output[:1])!r} ({original.op_type})"
            node = onnx.NodeProto.FromString(original.SerializeToString())
            for i, name in enumerate(node.input):
                node.input[i] = rewriter.resolved(name)
            with np.errstate(all="ignore"):  # scales of damaged files: what overflows is no number, and so found later
                rewrite_node(rewriter, node)
        for value in model.graph.output:
            rewriter.integers(value.name)
        _replace(model, rewriter)
    # Inputs that the schema requires are missing, a tensor's bytes do not fill its shape, a name is no UTF-8.
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = first_line(error)
        raise GraphError(f"{where} is damaged: {reason}"[:300], "export the model again") from None
    left = Counter(node.op_type for node in quantized_nodes(model))
    return True, _notes(rewriter, left)


def _narrow_weights(model: onnx.ModelProto) -> bool:
    """Whether a weight of at most 8 bits is cast to float."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            types[node.output[0]] = node.attribute[0].t.data_type
        elif node.op_type == "Cast" and node.input and is_narrow(types.get(node.input[0], TensorProto.FLOAT)):
            return True
    return False


def _replace(model: onnx.ModelProto, rewriter: Rewriter) -> None:
    """The rewriter's nodes and constants into the model."""
    graph = model.graph
    stored = constants(graph)
    nodes = _named_outputs(rewriter)
    made = [
        numpy_helper.from_array(np.asarray(value, order="C"), name)
        for name, value in rewriter.made.items()
        if name not in stored
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(made)
    prune(model, [value.name for value in graph.output])
    names = {name for node in graph.node for name in node.output}
    infos = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.value_info if v.name in names]
    del graph.value_info[:]
    graph.value_info.extend(infos)
    used = {node.domain for node in all_nodes(graph)} | {"", "ai.onnx"}
    opsets = [entry for entry in model.opset_import if entry.domain in used]
    copies = [onnx.OperatorSetIdProto.FromString(entry.SerializeToString()) for entry in opsets]
    del model.opset_import[:]
    model.opset_import.extend(copies)


def _named_outputs(rewriter: Rewriter) -> list[onnx.NodeProto]:
    """The nodes, where an Identity only gave an output its name with the maker of that output named so."""
    makers = {name: node for node in rewriter.nodes for name in node.output}
    kept = []
    renamed: dict[str, str] = {}
    for node in rewriter.nodes:
        source = node.input[0] if node.op_type == "Identity" and node.input and node.output else ""
        if source and node.output[0] in rewriter.outputs and source in makers and source not in rewriter.pinned | set(renamed):
            renamed[source] = node.output[0]
        else:
            kept.append(node)
    for node in kept:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name in renamed:
                    names[i] = renamed[name]
    return kept


def _notes(rewriter: Rewriter, left: Counter[str]) -> list[str]:
    counts = rewriter.counts
    operators = {
        name: n for name, n in sorted(rewriter.replaced.items()) if name not in (*_PAIR, "Cast", "DynamicQuantizeLinear")
    }
    said = [
        _number(counts["roundings"], "activation", "no longer rounded"),
        _number(counts["weights"], "constant", "dequantized"),
        _number(counts["biases"], "bias", "dequantized"),
        f"now float: {', '.join(f'{name} ({n})' for name, n in operators.items())}" if operators else "",
    ]
    notes = ["the quantized graph was brought back to float: " + "; ".join(part for part in said if part)]
    if counts["kept"]:
        notes.append(
            f"{_number(counts['kept'], 'integer tensor', 'still computed')}: an output or an integer operator reads it"
        )
    if left:
        notes.append(f"still quantized: {', '.join(f'{name} ({n})' for name, n in sorted(left.items()))}")
    return notes


def _number(count: int, what: str, how: str) -> str:
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{count} {what if count == 1 else plural} {how}" if count else ""


def exact_reference(model: onnx.ModelProto) -> bytes:
    """The same quantized graph, serialized, with int8 weights of integer products as uint8 (128 more, the zero point too).

    It computes the same numbers. Without VNNI, ONNX Runtime's kernels for signed weights add pairs of products in 16 bits,
    which overflow; those for unsigned weights do not.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = constants(copy.graph)
    for number, node in enumerate(copy.graph.node):
        if node.domain in ("", "ai.onnx", "com.microsoft"):
            for index, zero_index in _WEIGHTS.get(node.op_type, ()):
                _unsigned_weights(copy.graph, node, known, (index, zero_index), f"unsigned{number}")
    data: bytes = copy.SerializeToString()
    return data


def _unsigned_weights(
    graph: onnx.GraphProto, node: onnx.NodeProto, known: dict[str, TensorProto], places: tuple[int, int], suffix: str
) -> None:
    index, zero_index = places
    zero = part(node, zero_index)
    signed = node.input[index] in known and known[node.input[index]].data_type == TensorProto.INT8
    if not signed or (zero and zero not in known):
        return
    weights = np.asarray(numpy_helper.to_array(known[node.input[index]]))
    point = np.asarray(numpy_helper.to_array(known[zero])) if zero else np.zeros((), np.int8)
    node.input.extend([""] * (zero_index + 1 - len(node.input)))
    for i, value in ((index, weights), (zero_index, point)):
        node.input[i] = f"{node.input[i]}/{suffix}"
        graph.initializer.append(numpy_helper.from_array((value.astype(np.int16) + 128).astype(np.uint8), node.input[i]))

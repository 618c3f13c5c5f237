"""Quantized graphs written by hand, brought back to float; damaged ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgekit.errors import GraphError
from edgekit.graphs import is_explicit, quantized_nodes, to_float

from .dequantize_kit import Array, answers, brought_back, graph, node, normal


def constant_int8(*shape: int, seed: int = 0, kind: Any = np.int8) -> Array:
    limits = np.iinfo(kind)
    return np.random.default_rng(seed).integers(limits.min + 1, limits.max, shape).astype(kind)


def int4(*shape: int) -> onnx.TensorProto:
    return helper.make_tensor("q", TensorProto.INT4, shape, np.random.default_rng(0).integers(-7, 8, shape).ravel().tolist())


F32, MS = np.float32, "com.microsoft"

S, Z = {"s": F32(0.05), "z": np.uint8(128)}, {"s2": F32(0.04), "z2": np.uint8(120)}

PAIR = [node("QuantizeLinear", "x s z", "xq"), node("DequantizeLinear", "xq s z", "xd")]

QUANTIZED_X = [node("QuantizeLinear", "x s z", "xq")]


def between(*nodes: Any, weights: dict[str, Any] | None = None, **more: Any) -> onnx.ModelProto:
    """x (2, 4, 6, 6), as uint8 ``xq`` -> nodes -> ``yq`` -> y."""
    last = [node("DequantizeLinear", "yq s z", "y")] if not more.pop("raw", False) else []
    return graph([*QUANTIZED_X, *nodes, *last], {**S, **(weights or {})}, [2, 4, 6, 6], **more)


def dense(*nodes: Any, weights: dict[str, Any], **more: Any) -> onnx.ModelProto:
    """x (3, 8) -> nodes -> y."""
    return graph(list(nodes), weights, [3, 8], **more)


BY_HAND = {
    "a pair read with another scale": graph(
        [*QUANTIZED_X, node("DequantizeLinear", "xq s2 z2", "y")], {**S, **Z}, [2, 8]
    ),
    "no zero point, unsigned: negative values were cut": graph(
        [node("QuantizeLinear", "x s", "q"), node("DequantizeLinear", "q s", "y")], S, [4, 64]
    ),
    "a scale per channel": graph(
        [node("QuantizeLinear", "x cs cz", "q", axis=1), node("DequantizeLinear", "q cs cz", "y", axis=1)],
        {"cs": np.array([0.03, 0.04, 0.05], F32), "cz": np.array([0, 3, -3], np.int8)}, [2, 3, 5],
    ),
    "16 bits": graph(
        [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")],
        {"s": F32(1e-3), "z": np.uint16(30000)}, [2, 3, 5], 21,
    ),
    "moved and joined": between(
        node("MaxPool", "xq", "m", kernel_shape=[2, 2]), node("Transpose", "m", "t", perm=[0, 1, 3, 2]),
        node("Concat", "t m", "k", axis=1), node("Pad", "k pads", "p"), node("Slice", "p starts ends", "yq"),
        weights={"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "starts": np.array([0, 1]), "ends": np.array([2, 7])},
    ),
    "split": between(node("Split", "xq", "yq o", axis=1)),
    "integers compared": between(
        node("Equal", "xq z", "e"), node("Where", "e z2 xq", "yq"), weights=Z
    ),
    "an integer output": between(node("Identity", "xq", "y"), raw=True, y_type=TensorProto.UINT8),
    "an index of the largest": between(
        node("Flatten", "xq", "f"), node("ArgMax", "f", "y", axis=1), raw=True, y_type=TensorProto.INT64
    ),
    "an integer input": graph(
        [node("DequantizeLinear", "x s z", "d"), node("MatMul", "d w", "y")],
        {**S, "w": normal(8, 4)}, [3, 8], x_type=TensorProto.UINT8,
    ),
    "weights cast": dense(
        node("Cast", "q", "c", to=1), node("Sub", "c o", "m"), node("Mul", "m s", "w"), node("MatMul", "x w", "y"),
        weights={"q": constant_int8(8, 4, kind=np.uint8), "o": F32(120), **S},
    ),
    "weights transposed behind the scale": dense(
        node("Transpose", "q", "t", perm=[1, 0]), node("DequantizeLinear", "t s cz", "w", axis=1),
        node("MatMul", "x w", "y"), weights={"q": constant_int8(4, 8), "s": np.abs(normal(4)), "cz": np.zeros(4, np.int8)},
    ),
    "weights in blocks of 4 bits": dense(
        node("DequantizeLinear", "q bs", "w", axis=0, block_size=4), node("MatMul", "x w", "y"),
        weights={"q": int4(8, 6), "bs": np.abs(normal(2, 6))}, opset=21,
    ),
    "weights quantized in the graph, beyond their range": dense(
        node("QuantizeLinear", "w s i", "q"), node("DequantizeLinear", "q s i", "d"), node("MatMul", "x d", "y"),
        weights={"w": normal(8, 4, scale=4), "i": np.int8(0), "s": F32(0.05)},
    ),
    "a table of 8 bits": graph(
        [node("Cast", "x", "ids", to=7), node("Gather", "q ids", "g"), node("DequantizeLinear", "g s i", "y")],
        {"q": constant_int8(300, 6), "s": F32(0.05), "i": np.int8(3)}, [3, 5], x_type=TensorProto.UINT8,
    ),
    "MatMulInteger of a static scale": dense(
        *QUANTIZED_X, node("MatMulInteger", "xq q z", "a"), node("Cast", "a", "c", to=1), node("Mul", "c ws", "m"),
        node("Add", "m b", "y"), weights={**S, "q": constant_int8(8, 4, kind=np.uint8), "ws": F32(1e-3), "b": normal(4)},
    ),
    "MatMulInteger of two activations": dense(
        *QUANTIZED_X, node("Transpose", "xq", "t", perm=[1, 0]), node("MatMulInteger", "xq t z z", "a"),
        node("Cast", "a", "y", to=1), weights=S,
    ),
    "MatMulIntegerToFloat": dense(
        *QUANTIZED_X, node("MatMulIntegerToFloat", "xq q s ws z wz b", "y", domain=MS),
        weights={**S, "q": constant_int8(8, 4), "ws": np.abs(normal(4)), "wz": np.zeros(4, np.int8), "b": normal(4)},
        domains=[MS],
    ),
    "DynamicQuantizeMatMul": dense(
        node("DynamicQuantizeMatMul", "x q ws - b", "y", domain=MS),
        weights={"q": constant_int8(8, 4), "ws": np.abs(normal(4)), "b": normal(4)}, domains=[MS],
    ),
    "MatMulNBits": graph(
        [node("MatMulNBits", "x q bs", "y", domain=MS, K=40, N=3, bits=4, block_size=32)],
        {"q": constant_int8(3, 2, 16, kind=np.uint8), "bs": np.abs(normal(6))}, [5, 40], domains=[MS],
    ),
    "MatMulNBits with zero points": graph(
        [node("MatMulNBits", "x q bs bz", "y", domain=MS, K=64, N=3, bits=4, block_size=32)],
        {"q": constant_int8(3, 2, 16, kind=np.uint8), "bs": np.abs(normal(6)), "bz": constant_int8(3, kind=np.uint8)},
        [5, 64], domains=[MS],
    ),
    "QLinearWhere": between(
        node("Greater", "x zero", "c"), node("QLinearWhere", "c xq s z other s2 z2 s z", "yq", domain=MS),
        weights={"zero": F32(0), "other": constant_int8(6, kind=np.uint8), **Z}, domains=[MS],
    ),
    "a dynamic scale that stays": dense(
        node("DynamicQuantizeLinear", "x", "q ds dz"), node("Cast", "q", "c", to=TensorProto.INT32),
        node("BitwiseAnd", "c mask", "m"), node("Cast", "m", "f", to=1), node("Mul", "f ds", "y"),
        weights={"mask": np.int32(240)}, opset=18,
    ),
    "a dynamic scale that is read for itself stays": dense(
        node("DynamicQuantizeLinear", "x", "q ds dz"), node("DequantizeLinear", "q ds dz", "f"),
        node("Div", "f ds", "d"), node("MatMul", "d w", "y"), weights={"w": normal(8, 4)},
    ),
    "opset 10": graph(
        [*PAIR, node("Conv", "xd w", "c"), node("QuantizeLinear", "c s six", "q"), node("DequantizeLinear", "q s six", "y")],
        {**S, "six": np.uint8(0), "w": normal(4, 4, 1, 1)}, [2, 4, 6, 6], 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_graphs_by_hand(name: str) -> None:
    made = BY_HAND[name]
    r = np.random.default_rng(0)
    x = made.graph.input[0].type.tensor_type
    shape = [d.dim_value for d in x.shape.dim]
    feeds = {"x": r.integers(0, 255, shape).astype(np.uint8) if x.elem_type == TensorProto.UINT8 else r.normal(size=shape)}
    feeds["x"] = feeds["x"].astype(np.float32) if x.elem_type == TensorProto.FLOAT else feeds["x"]
    back, plain, emulated = brought_back(made, feeds)
    assert emulated > 100
    assert plain > 24
    left = ["DynamicQuantizeLinear"] if "stays" in name else []
    assert [n.op_type for n in quantized_nodes(back)] == left


def test_a_folded_relu6_stays_and_calibrated_ends_do_not() -> None:
    def limited(scale: float, zero: int) -> list[str]:
        nodes = [node("Conv", "x w", "c"), node("QuantizeLinear", "c s z", "q"), node("DequantizeLinear", "q s z", "y")]
        made = graph(nodes, {"s": F32(scale), "z": np.uint8(zero), "w": normal(4, 4, 1, 1)}, [2, 4, 6, 6])
        to_float(made)
        return [n.op_type for n in made.graph.node]

    assert limited(6 / 255, 0) == ["Conv", "Clip"]
    assert limited(0.05, 0) == ["Conv", "Relu"]
    assert limited(0.05, 128) == ["Conv"]


def test_subgraphs_read_what_they_read_before() -> None:
    x = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    branches = [helper.make_graph([node(op, "xd", "o")], op, [], [x]) for op in ("Relu", "Neg")]
    nodes = [*PAIR, node("ReduceSum", "x", "sum", keepdims=0), node("Greater", "sum zero", "c")]
    nodes.append(helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1]))
    back, plain, emulated = brought_back(graph(nodes, {**S, "zero": F32(0)}, [3, 8]), {"x": normal(3, 8, scale=1)})
    assert emulated > 100
    assert plain > 24
    assert not quantized_nodes(back)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (between(node("QLinearConv", "xq s z", "yq")), "damaged"),
        (dense(node("DequantizeLinear", "q cs", "w"), node("MatMul", "x w", "y"),
               weights={"q": constant_int8(8, 4), "cs": np.ones(3, F32)}), "cannot be dequantized"),
        (dense(node("MatMulNBits", "x q cs", "y", domain=MS, K=8, N=4, bits=4, block_size=16),
               weights={"q": constant_int8(3, kind=np.uint8), "cs": np.ones(3, F32)}), "do not fit"),
        (between(node("QLinearGlobalAveragePool", "xq s z s z", "yq", domain=MS, channels_last=1)), "channels are last"),
        (between(node("QLinearConv", "xq s z w s z s z", "yq", domain=MS, channels_last=1),
                 weights={"w": constant_int8(4, 4, 1, 1, kind=np.uint8)}), "channels are last"),
        (graph([node("DequantizeLinear", "x cs", "y")], {"cs": np.ones(8, F32)}, None, x_type=TensorProto.INT8),
         "scale per channel"),
    ],
)  # fmt: skip
def test_damaged_graphs_are_refused_and_untouched(made: onnx.ModelProto, why: str) -> None:
    before = made.SerializeToString()
    with pytest.raises(GraphError, match=why):
        to_float(made)
    assert made.SerializeToString() == before


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Conv", "Relu", "Add", "Mul", "Concat", "MaxPool", "Sigmoid"]),
            st.integers(0, 20),
            st.sampled_from([None, np.int8, np.uint8, np.int16]),
            st.integers(20, 90),
        ),
        min_size=1,
        max_size=10,
    )
)
def test_removing_pairs_gives_the_float_graph(plan: list[tuple[str, int, Any, int]]) -> None:
    """Pairs put into any graph leave no trace but the limits of their range, which no value here reaches."""
    plain: list[Any] = []
    paired: list[Any] = []
    weights: dict[str, Any] = {"w": normal(4, 4, 1, 1)}
    tensors = [("x", "x")]
    for i, (op, other, kind, zero) in enumerate(plan):
        (a, qa), (b, qb) = tensors[-1], tensors[other % len(tensors)]
        more: dict[str, Any] = {"axis": 2} if op == "Concat" else {"kernel_shape": [1, 1]} if op == "MaxPool" else {}
        single = op in ("Relu", "Sigmoid", "MaxPool")
        for inputs, nodes, suffix in (((a, b), plain, ""), ((qa, qb), paired, "_q")):
            read = inputs[0] if single else f"{inputs[0]} w" if op == "Conv" else " ".join(inputs)
            nodes.append(node(op, read, f"t{i}{suffix}", **more))
            if op == "Concat":
                nodes[-1] = node("Add", " ".join(inputs), f"t{i}{suffix}")
        last = f"t{i}_q"
        if kind is not None:
            weights |= {f"s{i}": F32(1e4 + zero), f"z{i}": kind(zero)}
            paired.append(node("QuantizeLinear", f"{last} s{i} z{i}", f"i{i}"))
            paired.append(node("DequantizeLinear", f"i{i} s{i} z{i}", f"d{i}"))
            last = f"d{i}"
        tensors.append((f"t{i}", last))
    for nodes, name in ((plain, tensors[-1][0]), (paired, tensors[-1][1])):
        nodes.append(node("Abs", name, "y"))
    feeds = {"x": normal(2, 4, 3, 3, scale=0.1)}
    expected = graph(plain, weights, [2, 4, 3, 3], 21)
    made = graph(paired, weights, [2, 4, 3, 3], 21)
    to_float(made)
    assert not quantized_nodes(made)
    assert [n.op_type for n in made.graph.node] == [n.op_type for n in expected.graph.node]
    np.testing.assert_array_equal(answers(made.SerializeToString(), feeds), answers(expected.SerializeToString(), feeds))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(BY_HAND)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_comes_back_or_is_refused_untouched(name: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(BY_HAND[name].SerializeToString())
    for position, value in flips:
        data[position % len(data)] = value
    made = onnx.ModelProto()
    try:
        made.ParseFromString(bytes(data))
    except DecodeError:
        return
    before = made.SerializeToString(deterministic=True)
    is_explicit(made)
    message = ""
    try:
        changed, notes = to_float(made)
    except GraphError as error:
        changed, notes, message = False, [], error.message
    assert changed == bool(notes)
    assert "\n" not in message
    assert changed or made.SerializeToString(deterministic=True) == before

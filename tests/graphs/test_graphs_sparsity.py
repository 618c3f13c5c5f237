"""Which layers of a graph are 2:4, wherever their weights lie and whatever type they have."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.graphs.sparsity import dense_layers, is_24

Array = np.ndarray[Any, Any]


def sparse(shape: tuple[int, ...], axis: int, seed: int = 0) -> Array:
    """Weights of which every four consecutive along ``axis`` have two zeros."""
    random = np.random.default_rng(seed)
    last = random.uniform(1, 2, np.moveaxis(np.empty(shape), axis, -1).shape).astype(np.float32)
    fours = last.reshape(-1, 4)
    for row in fours:
        row[random.permutation(4)[:2]] = 0
    return np.ascontiguousarray(np.moveaxis(last, -1, axis))


def graph(nodes: list[Any], weights: dict[str, Any], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    tensors = [v if isinstance(v, TensorProto) else numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    values = [helper.make_tensor_value_info(name, kind, None) for name in "xy"]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def only(model: onnx.ModelProto) -> Any:
    (layer,) = dense_layers(model)
    return layer


@given(st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.0]), min_size=8, max_size=8), min_size=1, max_size=6))
def test_the_pattern_is_two_zeros_in_every_four(rows: list[list[float]]) -> None:
    weight = np.array(rows)
    expected = all(sum(value != 0 for value in row[i : i + 4]) <= 2 for row in rows for i in (0, 4))
    assert is_24(weight) == expected
    assert is_24(weight.T, 0) == expected
    assert not is_24(weight[:, :6])


@pytest.mark.parametrize(
    ("op", "shape", "axis", "attributes"),
    [
        ("Conv", (3, 8, 3, 3), 1, {}),
        ("Conv", (3, 8, 5), 1, {}),
        ("Gemm", (5, 8), 1, {"transB": 1}),
        ("Gemm", (8, 5), 0, {}),
        ("MatMul", (8, 5), 0, {}),
        ("MatMul", (2, 8, 5), 1, {}),
    ],
)
def test_the_pattern_lies_along_the_input_channels(
    op: str, shape: tuple[int, ...], axis: int, attributes: dict[str, Any]
) -> None:
    model = graph([helper.make_node(op, ["x", "w"], ["y"], name="layer", **attributes)], {"w": sparse(shape, axis)})
    assert only(model)[:5] == ("layer", op, "w", shape, 0.5)
    assert only(model).sparse
    other = next(i for i in range(len(shape)) if i != axis)
    wrong = [*shape]
    wrong[axis], wrong[other] = 8, 8
    model = graph([helper.make_node(op, ["x", "w"], ["y"], **attributes)], {"w": sparse(tuple(wrong), other)})
    assert not only(model).sparse
    assert only(model).name == "y"


def test_the_left_matrix_of_a_product_is_read_along_its_columns() -> None:
    model = graph([helper.make_node("MatMul", ["w", "x"], ["y"])], {"w": sparse((3, 8), 1)})
    assert only(model).sparse


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Conv", ["x", "w"], ["y"], group=2),
        helper.make_node("ConvTranspose", ["x", "w"], ["y"]),
        helper.make_node("MatMul", ["x", "x"], ["y"]),
        helper.make_node("Conv", ["x", "w"], ["y"], domain="com.microsoft"),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ],
)
def test_what_no_sparse_kernel_runs_is_left_out(node: onnx.NodeProto) -> None:
    assert dense_layers(graph([node], {"w": sparse((8, 8, 1, 1), 1)})) == []


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats(dtype: Any) -> None:
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": sparse((8, 4), 0).astype(dtype)})
    assert only(model).sparse


def chain(*nodes: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [*nodes, helper.make_node("Gemm", ["x", "d"], ["y"], name="layer", transB=1)]


def test_weights_are_found_behind_what_edgekit_and_exporters_put_in_front() -> None:
    weight = sparse((4, 8), 1)
    shape = np.array([4, 8])
    nodes = chain(
        helper.make_node("Transpose", ["w"], ["a"], perm=[1, 0]),
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.FLOAT16),
        helper.make_node("Transpose", ["b"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["d"]),
    )
    layer = only(graph(nodes, {"w": weight.reshape(4, 8), "shape": shape}))
    assert layer == ("layer", "Gemm", "w", (4, 8), 0.5, True)
    constant = helper.make_node("Constant", [], ["d"], value=numpy_helper.from_array(weight))
    assert only(graph(chain(constant), {})).sparse
    computed = chain(helper.make_node("Mul", ["x", "w"], ["d"]))
    assert dense_layers(graph(computed, {"w": weight})) == []


@pytest.mark.parametrize(
    ("zero", "attributes"),
    [
        (None, {"axis": 0}),
        (np.zeros(4), {"axis": 0}),
        (np.array([3, -5, 0, 7]), {"axis": 0}),
        (np.array([[1, 2]] * 4), {"axis": 1, "block_size": 4}),
    ],
    ids=["none", "zeros", "a channel", "blocks"],
)
def test_integers_are_zero_at_their_zero_point(zero: Array | None, attributes: dict[str, Any]) -> None:
    steps = np.rint(sparse((4, 8), 1) * 40).astype(np.int8)
    spread = np.int8(0)
    names = ["q", "s"]
    weights: dict[str, Any] = {"s": np.ones(np.shape(zero) if zero is not None else 4, np.float32)}
    if zero is not None:
        names.append("z")
        weights["z"] = zero.astype(np.int8)
        spread = np.repeat(weights["z"], 4, 1) if zero.ndim == 2 else weights["z"][:, None]
    nodes = chain(helper.make_node("DequantizeLinear", names, ["d"], **attributes))
    assert only(graph(nodes, {**weights, "q": steps + spread})) == ("layer", "Gemm", "q", (4, 8), 0.5, True)
    assert only(graph(nodes, {**weights, "q": steps + spread + 1})).sparse is False


def test_small_formats_behind_dequantization() -> None:
    nodes = chain(helper.make_node("DequantizeLinear", ["q", "s"], ["d"], axis=0))
    weight = sparse((4, 8), 1)
    four = helper.make_tensor("q", TensorProto.INT4, (4, 8), np.rint(weight * 3).astype(np.int8).ravel().tolist())
    eight = numpy_helper.from_array(weight.astype(ml_dtypes.float8_e4m3fn), "q")
    for stored in (four, eight):
        assert only(graph(nodes, {"q": stored, "s": np.ones(4, np.float32)})).sparse


def test_float_weights_that_the_graph_itself_rounds_keep_their_zeros() -> None:
    nodes = chain(
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=0),
    )
    weights = {"w": sparse((4, 8), 1), "s": np.ones(4, np.float32), "z": np.zeros(4, np.int8)}
    assert only(graph(nodes, weights)).sparse

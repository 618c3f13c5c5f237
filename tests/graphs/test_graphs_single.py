"""Graphs of other floats computed in float32: the same answers, the same interface, and nothing left of the other type."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.graphs import to_single
from edgekit.graphs.editing import all_nodes, element_types
from edgekit.runtime.onnxruntime import session

Array = np.ndarray[Any, Any]
F, F16, F64, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16
DTYPES = {F: np.float32, F16: np.float16, F64: np.float64}
X = np.linspace(-1, 1, 12).reshape(3, 4)


def model(
    nodes: list[onnx.NodeProto], x: int, outputs: dict[str, int], weights: dict[str, Array], opset: int = 17
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", x, [3, 4])],
        [helper.make_tensor_value_info(name, kind, [3, 4]) for name, kind in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def answers(made: onnx.ModelProto, x: int) -> list[Array]:
    return list(session(made.SerializeToString()).run(None, {"x": X.astype(DTYPES[x])}))


def in_single(made: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(made.SerializeToString())
    assert to_single(copy)[0]
    onnx.checker.check_model(copy, full_check=True)
    assert [(v.name, v.type.tensor_type.elem_type) for v in (*copy.graph.input, *copy.graph.output)] == [
        (v.name, v.type.tensor_type.elem_type) for v in (*made.graph.input, *made.graph.output)
    ]
    return copy


def assert_same(made: onnx.ModelProto, x: int, near: float) -> onnx.ModelProto:
    """The rewritten graph answers as the original does, in its types; only the interface has another float inside."""
    found = in_single(made)
    for ours, theirs in zip(answers(found, x), answers(made, x), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.astype(np.float64), theirs.astype(np.float64), rtol=near, atol=near)
    ends = {value.name for value in (*found.graph.input, *found.graph.output)}
    others = {name for name, kind in element_types(found).items() if kind in (F16, F64, BF16)}
    assert others <= ends
    return found


def test_constants_attributes_and_subgraphs_are_float32() -> None:
    branches = [
        helper.make_graph(
            [
                helper.make_node("Constant", [], [f"k{op}"], value=numpy_helper.from_array(np.full((1, 4), 2, np.float16))),
                helper.make_node(op, ["x", f"k{op}"], [f"z{op}"]),
            ],
            op,
            [],
            [helper.make_tensor_value_info(f"z{op}", F16, [3, 4])],
        )
        for op in ("Add", "Mul")
    ]
    nodes = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.ones((1, 4), np.float16))),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["fill"], value=numpy_helper.from_array(np.full(1, 0.5, np.float16))),
        helper.make_node("EyeLike", ["x"], ["eye"], dtype=F16),
        helper.make_node("If", ["yes"], ["b"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Sum", ["x", "k", "fill", "eye", "b"], ["y"]),
    ]
    assert_same(model(nodes, F16, {"y": F16}, {"yes": np.array(True)}), F16, 2e-3)


@pytest.mark.parametrize("kind", [F16, F64])
def test_inputs_that_are_outputs_and_casts_at_the_ends(kind: int) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["direct"], to=F),
        helper.make_node("Relu", ["direct"], ["r"]),
        helper.make_node("Cast", ["r"], ["h"], to=kind),
        helper.make_node("Cast", ["h"], ["again"], to=F),
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("Cast", ["m"], ["single"], to=F),
        helper.make_node("Cast", ["m"], ["twin"], to=F),
        helper.make_node("Cast", ["m"], ["whole"], to=TensorProto.INT64),
    ]
    outputs = {"x": kind, "direct": F, "h": kind, "again": F, "m": kind, "single": F, "twin": F, "whole": TensorProto.INT64}
    weight = np.linspace(-2, 2, 16).reshape(4, 4).astype(DTYPES[kind])
    found = assert_same(model(nodes, kind, outputs, {"w": weight}), kind, 2e-3)
    assert [node.op_type for node in found.graph.node if node.op_type != "Cast"] == ["Relu", "MatMul"]


def test_a_cast_around_a_layer_goes() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=F16),
        helper.make_node("Cast", ["w"], ["v"], to=F),
        helper.make_node("MatMul", ["h", "w"], ["a"]),
        helper.make_node("Cast", ["a"], ["b"], to=F),
        helper.make_node("MatMul", ["b", "v"], ["y"]),
    ]
    found = assert_same(model(nodes, F, {"y": F}, {"w": np.eye(4, dtype=np.float16)}), F, 2e-3)
    assert [node.op_type for node in found.graph.node] == ["MatMul", "MatMul"]


def test_numbers_outside_of_float32_stay_finite_and_not_zero() -> None:
    weights = {"mask": np.array([[0, 0, 0, -1e300]]), "eps": np.array(1e-300)}
    nodes = [
        helper.make_node("Sub", ["x", "x"], ["z"]),
        helper.make_node("Max", ["z", "eps"], ["e"]),
        helper.make_node("Div", ["z", "e"], ["q"]),  # 0 / 0 where eps becomes 0
        helper.make_node("Add", ["x", "mask"], ["m"]),
        helper.make_node("Mul", ["m", "z"], ["n"]),  # -infinity * 0 where the mask becomes infinite
        helper.make_node("Add", ["q", "n"], ["y"]),
    ]
    found = assert_same(model(nodes, F64, {"y": F64}, weights), F64, 1e-6)
    assert not answers(found, F64)[0].any()


def test_bfloat16_is_float32_too() -> None:
    weight = helper.make_tensor("w", BF16, [4, 4], np.eye(4).ravel())
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=BF16),
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=F),
    ]
    made = model(nodes, F, {"y": F}, {})
    made.graph.initializer.append(weight)
    np.testing.assert_array_equal(answers(in_single(made), F)[0], X.astype(np.float32))


def test_a_float32_graph_stays_as_it_is() -> None:
    made = model([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64)], F, {"y": TensorProto.INT64}, {})
    before = made.SerializeToString()
    assert to_single(made) == (False, [])
    assert made.SerializeToString() == before


def test_the_note_counts_weights_and_names_the_types() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Mul", ["a", "scalar"], ["b"]),
        helper.make_node("Cast", ["b"], ["c"], to=F64),
        helper.make_node("Add", ["c", "bias"], ["y"]),
    ]
    weights = {"w": np.eye(4, dtype=np.float16), "scalar": np.float16(2), "bias": np.ones(4)}
    _, notes = to_single(model(nodes, F16, {"y": F64}, {k: np.asarray(v) for k, v in weights.items()}))
    assert notes == ["float16 and float64 tensors are computed in float32: 2 weights"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_graphs_that_mix_types_answer_as_before(data: st.DataObject) -> None:
    """Random chains of casts, products and sums over float16, float32 and float64, with any of them as outputs."""
    start = data.draw(st.sampled_from([F, F16, F64]))
    tensors = [("x", start)]
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, Array] = {}
    for i in range(data.draw(st.integers(1, 8))):
        source, kind = data.draw(st.sampled_from(tensors))
        op = data.draw(st.sampled_from(["Cast", "MatMul", "Add", "Tanh", "Where"]))
        same = [name for name, other in tensors if other == kind]
        inputs, attributes = [source], {}
        if op == "Cast":
            kind = attributes["to"] = data.draw(st.sampled_from([F, F16, F64]))
        elif op == "MatMul":
            weights[f"w{i}"] = (np.eye(4) * 0.5 + 0.1).astype(DTYPES[kind])
            inputs.append(f"w{i}")
        elif op == "Add":
            inputs.append(data.draw(st.sampled_from(same)))
        elif op == "Where":
            weights["yes"] = np.eye(3, 4, dtype=bool)
            inputs = ["yes", source, data.draw(st.sampled_from(same))]
        nodes.append(helper.make_node(op, inputs, [f"t{i}"], name=f"n{i}", **attributes))
        tensors.append((f"t{i}", kind))
    chosen = data.draw(st.lists(st.sampled_from(tensors[1:]), min_size=1, max_size=3, unique=True))
    made = model(nodes, start, dict(chosen), weights)
    copy = onnx.ModelProto.FromString(made.SerializeToString())
    to_single(copy)
    onnx.checker.check_model(copy, full_check=True)
    for ours, theirs in zip(answers(copy, start), answers(made, start), strict=True):
        assert ours.dtype == theirs.dtype
        scale = max(float(np.abs(theirs.astype(np.float64)).max()), 1.0)
        np.testing.assert_allclose(ours.astype(np.float64) / scale, theirs.astype(np.float64) / scale, atol=5e-3)
    assert len({node.name for node in all_nodes(copy.graph)}) == len(copy.graph.node)


def test_indices_that_are_counted_in_float64_stay() -> None:
    """float32 has 24 bits: an index of 30 would come out another."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Mod", ["wide", "rows"], ["row"], fmod=1),
        helper.make_node("Cast", ["row"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["picked"]),
        helper.make_node("MatMul", ["picked", "w"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    weights = {
        "rows": np.array(100.0),
        "table": rng.normal(size=(100, 8)).astype(np.float32),
        "w": rng.normal(size=(8, 4)).astype(np.float32),
    }
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "counted", inputs, outputs, initializers)
    counted = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    before = counted.SerializeToString()
    assert to_single(counted) == (False, [])
    assert counted.SerializeToString() == before

"""The float16 pass: well typed for any graph, and close."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler.precision import activation_peaks, against_golden, kept_float32, to_fp16
from edgekit.errors import BackendError
from edgekit.runtime.onnxruntime import session

OPS = [
    "Relu",
    "Exp",
    "Sigmoid",
    "Add",
    "Mul",
    "Softmax",
    "MatMul",
    "Transpose",
    "Identity",
    "ReduceMean",
    "Shape",
    "If",
    "Clip",
    "Resize",
]


def branch(name: str, captured: str, op: str) -> onnx.GraphProto:
    out = helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4])
    return helper.make_graph([helper.make_node(op, [captured], [name])], name, [], [out])


def graph(plan: list[tuple[str, int, int]]) -> onnx.ModelProto:
    """A random graph of (4, 4) tensors; ``If`` captures tensors of the graph around it."""
    square: list[str] = ["x", "w"]
    nodes: list[Any] = []
    for index, (op, i, j) in enumerate(plan):
        name, first, second = f"t{index}", square[i % len(square)], square[j % len(square)]
        if op in ("Add", "Mul", "MatMul"):
            nodes.append(helper.make_node(op, [first, second], [name]))
        elif op == "ReduceMean":
            nodes += [
                helper.make_node(op, [first], [f"m{index}"], axes=[1]),
                helper.make_node("Sub", [second, f"m{index}"], [name]),
            ]
        elif op == "Shape":
            nodes += [helper.make_node(op, [first], [f"s{index}"]), helper.make_node("Reshape", [second, f"s{index}"], [name])]
        elif op == "If":
            then, other = branch(f"a{index}", first, "Neg"), branch(f"b{index}", second, "Relu")
            nodes.append(helper.make_node(op, ["yes"], [name], then_branch=then, else_branch=other))
        elif op == "Clip":
            nodes.append(helper.make_node(op, [first, "low", "high"], [name]))
        elif op == "Resize":
            nodes.append(helper.make_node("Reshape", [first, "four"], [f"r{index}"]))
            nodes.append(helper.make_node(op, [f"r{index}", "", "scales"], [f"z{index}"]))
            nodes.append(helper.make_node("Slice", [f"z{index}", "start", "end", "last"], [f"c{index}"]))
            nodes.append(helper.make_node("Reshape", [f"c{index}", "two"], [name]))
        else:
            nodes.append(helper.make_node(op, [first], [name]))
        square.append(name)
    nodes.append(helper.make_node("Tanh", [square[-1]], ["y"]))
    constants = {
        "w": np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32) / 2,
        "yes": np.array(True),
        "low": np.float32(-2),
        "high": np.float32(2),
        "scales": np.array([1, 1, 1, 2], np.float32),
        "four": np.array([1, 1, 4, 4]),
        "two": np.array([4, 4]),
        "start": np.array([0]),
        "end": np.array([4]),
        "last": np.array([3]),
    }
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=10))
def test_any_graph_stays_well_typed_and_close(plan: list[tuple[str, int, int]]) -> None:
    made = graph(plan)
    x = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32) / 2
    try:
        truth = session(made.SerializeToString()).run(None, {"x": x})[0]
    except BackendError:  # ONNX Runtime 1.32 loses the input of an `If` whose branch it inlines: nothing to compare with
        reject()
    peaks = activation_peaks(made, {"x": x})
    for twin in (False, True):
        half = to_fp16(made, peaks, twin=twin)  # checks types strictly
        assert [o.type.tensor_type.elem_type for o in half.graph.output] == [TensorProto.FLOAT]
        found = session(half.SerializeToString()).run(None, {"x": x})[0]
        # tanh has slope 1 at most; each step may grow an error of 2^-11 relative to its largest value
        assert np.abs(found - truth).max() <= 0.02 * max(1.0, *peaks.values())


def test_what_float16_cannot_hold_stays_float32() -> None:
    made = graph([("MatMul", 0, 1), ("Mul", 2, 2)])
    assert {n.op_type for n in to_fp16(made, {"t0": 1000.0, "t1": 1.0}).graph.node if "Cast" in n.op_type} == {"Cast"}

    def runs_half(peaks: dict[str, float], op: str) -> bool:
        half = to_fp16(made, peaks)
        return any(n.op_type == op and any(name.endswith("_fp16") for name in n.input) for n in half.graph.node)

    assert runs_half({}, "MatMul")
    assert not runs_half({"t0": 1000.0}, "MatMul")
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((4, 4), 1e5, np.float32), "w"))
    assert not runs_half({}, "MatMul")


def test_the_twin_shows_the_rounding_that_onnx_runtime_hides() -> None:
    made = graph([("Add", 0, 1), ("Add", 2, 1)])
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((4, 4), 500, np.float32), "w"))
    made.graph.node[1].op_type = "Sub"  # (x + 500) - 500
    x = np.random.default_rng(1).uniform(size=(4, 4)).astype(np.float32)
    twin = session(to_fp16(made, {}, twin=True).SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(np.arctanh(twin), np.rint(x * 4) / 4, atol=0.26)
    assert len(np.unique(twin)) <= 6  # steps of 0.25 or 0.5 remain


@pytest.mark.parametrize("op", ["MatMul", "Resize", "If"])
def test_the_errors_are_measured_against_golden(op: str) -> None:
    made = graph([(op, 0, 1)])
    x = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    truth = session(made.SerializeToString()).run(None, {"x": x})[0]
    half = to_fp16(made, activation_peaks(made, {"x": x}))
    assert against_golden(half.SerializeToString(), {"x": x}, {"y": truth}).snr_db > 50
    assert against_golden(half.SerializeToString(), {"x": x}, {"y": truth + 1}).snr_db < 20


def test_nodes_kept_for_their_range_are_counted_and_shapes_are_not() -> None:
    weights = {"w": np.eye(4, dtype=np.float32), "huge": np.full((4, 4), 1e5, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "huge"], ["b"]),
        helper.make_node("Shape", ["b"], ["s"]),
        helper.make_node("Reshape", ["a", "s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert kept_float32(model, {}) == 1  # the MatMul with 1e5
    assert kept_float32(model, {"a": 1e3}) == 3  # everything that touches a

"""Control flow made straight computes what it computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import EdgekitError
from edgekit.graphs.control import both_branches, drop_branches, inline_constant_branches, unroll
from edgekit.runtime.onnxruntime import session

F, INT, B = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
value = helper.make_tensor_value_info


def model(nodes: list[Any], weights: dict[str, Any], inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(made: onnx.ModelProto, **feeds: Any) -> list[Any]:
    onnx.checker.check_model(made)
    found: list[Any] = session(made.SerializeToString()).run(None, feeds)
    return found


def branch(operator: str, shape: tuple[int, ...] = (2, 3)) -> onnx.GraphProto:
    """x OPERATOR k: the constant's name is the same in both branches."""
    k = numpy_helper.from_array(np.full(shape, 2, np.float32), "k")
    return helper.make_graph([helper.make_node(operator, ["x", "k"], ["r"])], "b", [], [value("r", F, [2, 3])], [k])


def choice(condition: str, weights: dict[str, Any], inputs: list[Any], other: onnx.GraphProto | None = None) -> onnx.ModelProto:
    node = helper.make_node("If", [condition], ["y"], name="if", then_branch=branch("Add"), else_branch=other or branch("Mul"))
    return model([node], weights, [value("x", F, [2, 3]), *inputs], [value("y", F, [2, 3])])


X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("condition", [True, False])
def test_a_constant_condition_leaves_one_branch(condition: bool) -> None:
    made = choice("c", {"c": condition}, [])
    truth = run(made, x=X)
    assert inline_constant_branches(made)
    assert "If" not in {node.op_type for node in made.graph.node}
    np.testing.assert_array_equal(run(made, x=X)[0], truth[0])
    assert not inline_constant_branches(made)


@pytest.mark.parametrize("condition", [True, False])
def test_a_condition_of_run_time_computes_both(condition: bool) -> None:
    made = choice("c", {}, [value("c", B, [])])
    truth = run(made, x=X, c=np.array(condition))
    assert not inline_constant_branches(made)
    assert both_branches(made)
    assert "If" not in {node.op_type for node in made.graph.node}
    np.testing.assert_array_equal(run(made, x=X, c=np.array(condition))[0], truth[0])


def loads(trial: onnx.ModelProto) -> bool:
    try:
        session(trial.SerializeToString())
    except EdgekitError:
        return False
    return True


def test_a_branch_that_does_not_fit_is_dropped() -> None:
    made = choice("c", {}, [value("c", B, [])], branch("MatMul", (5, 3)))
    assert drop_branches(made, loads)
    np.testing.assert_array_equal(run(made, x=X, c=np.array(True))[0], X + 2)


def test_a_branch_that_fails_for_some_inputs_is_not_dropped() -> None:
    gather = helper.make_graph([helper.make_node("Gather", ["x", "i"], ["r"])], "b", [], [value("r", F, [3])])
    zero = helper.make_graph([helper.make_node("ReduceMax", ["x"], ["r"], axes=[0], keepdims=0)], "b", [], [value("r", F, [3])])
    node = helper.make_node("If", ["c"], ["y"], name="if", then_branch=gather, else_branch=zero)
    made = model([node], {}, [value("x", F, [2, 3]), value("c", B, []), value("i", INT, [])], [value("y", F, [3])])
    before = made.SerializeToString()
    assert not drop_branches(made, loads)
    assert made.SerializeToString() == before


@pytest.mark.parametrize("shape", [[], [1, 3], ["n", 3]])
def test_branches_of_several_shapes_stay(shape: list[Any]) -> None:
    total = helper.make_node("ReduceSum", ["x", "axes"] if shape else ["x"], ["r"], keepdims=1 if shape else 0)
    other = helper.make_graph([total], "b", [], [value("r", F, shape)])
    made = choice("c", {"axes": np.array([0])}, [value("c", B, [])], other)
    made.graph.output[0].type.tensor_type.ClearField("shape")
    before = made.SerializeToString()
    assert not both_branches(made)
    assert made.SerializeToString() == before


def loop(until: int | None, most: int | None) -> onnx.ModelProto:
    """s = 2 s + x while i < until, at most ``most`` times; the scan output holds s of each round."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["s", "s"], ["twice"]),
            helper.make_node("Add", ["twice", "x"], ["next"]),
            helper.make_node("Add", ["i", "one"], ["j"]),
            helper.make_node("Less", ["j", "until"], ["on"])
            if until is not None
            else helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Identity", ["next"], ["row"]),
        ],
        "body",
        [value("i", INT, []), value("go", B, []), value("s", F, [2, 3])],
        [value("on", B, []), value("next", F, [2, 3]), value("row", F, [2, 3])],
        [numpy_helper.from_array(np.int64(1), "one")],
    )
    inputs = ["most" if most is not None else "", "true", "start"]
    node = helper.make_node("Loop", inputs, ["last", "rows"], name="loop", body=body)
    weights = {"true": True, "start": np.ones((2, 3), np.float32), "until": np.int64(until or 0), "most": np.int64(most or 0)}
    return model([node], weights, [value("x", F, [2, 3])], [value("last", F, [2, 3]), value("rows", F, ["n", 2, 3])])


@pytest.mark.parametrize(("until", "most"), [(None, 4), (3, None), (3, 10), (5, 2)])
def test_a_loop_whose_rounds_follow_from_constants_is_unrolled(until: int | None, most: int | None) -> None:
    made = loop(until, most)
    truth = run(made, x=X)
    assert unroll(made)
    assert "Loop" not in {node.op_type for node in made.graph.node}
    for before, after in zip(truth, run(made, x=X), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(("until", "most"), [(None, 100_000), (5_000, None), (0, None), (None, 0)])
def test_a_loop_that_is_too_long_or_never_runs_stays(until: int | None, most: int | None) -> None:
    made = loop(until, most)
    if until == 0:
        made.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array(False), "true"))
    before = made.SerializeToString()
    assert not unroll(made)
    assert made.SerializeToString() == before


def test_a_scan_without_nodes_does_not_grow_beyond_the_budget() -> None:
    body = helper.make_graph([], "body", [value("row", F, [2])], [value("row", F, [2])])
    scan = helper.make_node("Scan", ["x"], ["rows"], name="scan", num_scan_inputs=1, body=body)
    made = model([scan], {}, [value("x", F, [8_000, 2])], [value("rows", F, ["n", 2])])
    assert not unroll(made)


def test_the_constants_of_a_body_are_copied_once() -> None:
    made = loop(None, 4)
    assert unroll(made)
    assert sum(tensor.name.endswith("/one") for tensor in made.graph.initializer) == 1


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1), st.integers(0, 1))
def test_a_scan_is_unrolled(length: int, axis: int, out: int) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "row"], ["t"]), helper.make_node("Mul", ["t", "row"], ["o"])],
        "body",
        [value("s", F, [2]), value("row", F, [2])],
        [value("t", F, [2]), value("o", F, [2])],
    )
    shape = [2, length] if axis else [length, 2]
    scan = helper.make_node(
        "Scan",
        ["s0", "x"],
        ["last", "rows"],
        name="scan",
        num_scan_inputs=1,
        body=body,
        scan_input_axes=[axis],
        scan_output_axes=[out],
    )
    made = model(
        [scan], {"s0": np.ones(2, np.float32)}, [value("x", F, shape)], [value("last", F, [2]), value("rows", F, ["a", "b"])]
    )
    x = np.random.default_rng(length).normal(size=shape).astype(np.float32)
    truth = run(made, x=x)
    assert unroll(made)
    for before, after in zip(truth, run(made, x=x), strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-6)

"""Small tools of every pass: names that are free, and element types."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.graphs.editing import element_types, free_name, tensor_names

F = TensorProto.FLOAT


def with_subgraph() -> onnx.ModelProto:
    """x (3, 4) -> FastGelu (not of ONNX) g; Cast h; If i, whose branches compute o."""
    o = helper.make_tensor_value_info("o", F, [3, 4])
    branches = [helper.make_graph([helper.make_node(op, ["x"], ["o"])], op, [], [o]) for op in ("Relu", "Neg")]
    nodes = [
        helper.make_node("FastGelu", ["x"], ["g"], domain="com.microsoft"),
        helper.make_node("Relu", ["g"], ["r"]),
        helper.make_node("Cast", ["g"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Reshape", ["h", "shape"], ["k"]),
        helper.make_node("If", ["c"], ["i"], then_branch=branches[0], else_branch=branches[1]),
    ]
    known = {"c": np.array(True), "shape": np.array([-1], np.int64)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", F, ["n", 4])],
        [helper.make_tensor_value_info("i", F, None), helper.make_empty_tensor_value_info("k")],
        [numpy_helper.from_array(v, k) for k, v in known.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_types_are_known_as_far_as_onnx_knows_the_operators() -> None:
    model = with_subgraph()
    before = model.SerializeToString()
    assert element_types(model) == {
        "x": F, "h": TensorProto.FLOAT16, "k": TensorProto.FLOAT16, "i": F, "c": TensorProto.BOOL, "shape": TensorProto.INT64,
    }  # fmt: skip
    assert model.SerializeToString() == before
    model.graph.node[3].op_type = "Constant"  # inference fails: what the file states remains
    assert element_types(model)["x"] == F


def test_names_inside_subgraphs_are_taken() -> None:
    assert tensor_names(with_subgraph().graph) == {"x", "g", "r", "h", "k", "i", "c", "shape", "o"}


@given(st.sets(st.sampled_from(["a", "a_", "a__", "a/p", "a/q", "a_/q"])))
def test_a_free_name_is_the_wanted_one_where_that_is_free(taken: set[str]) -> None:
    name, base = free_name(taken, "a"), free_name(taken, "a", ("p", "q"))
    assert name not in taken
    assert not {f"{base}/p", f"{base}/q"} & taken
    assert (name == "a") == ("a" not in taken)
    assert (base == "a") == (not {"a/p", "a/q"} & taken)

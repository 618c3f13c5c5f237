"""Models handled without their weights: what is left out, and what is written."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler.passes import infer_shapes
from edgekit.graphs.light import store, without_weights
from edgekit.graphs.opset import raise_opset


def chain(widths: list[int]) -> onnx.ModelProto:
    """Matrix products through ``widths``, with a Reshape whose target is a small constant."""
    weights = [numpy_helper.from_array(np.full(s, 0.5, np.float32), f"w{i}") for i, s in enumerate(pairwise(widths))]
    names = ["x", *(f"h{i}" for i in range(len(weights)))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(len(weights))]
    weights.append(numpy_helper.from_array(np.array([-1, 1, widths[-1]], np.int64), "shape"))
    nodes.append(helper.make_node("Reshape", [names[-1], "shape"], ["y"], name="Reshape", doc_string="last"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, widths[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c"])
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="test")
    helper.set_model_props(made, {"author": "nobody"})
    return made


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=2, max_size=6))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, widths: list[int]) -> None:
    model, folder = chain(widths), tmp_path_factory.mktemp("m")
    for name in ("a", "b"):
        store(model, folder / name)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    assert onnx.load(folder / "a") == model


def test_an_outline_has_the_shapes_and_small_constants_only() -> None:
    model = chain([64, 32, 8])
    light = without_weights(model)
    assert [value.name for value in light.graph.input] == ["x", "w0"]  # 2,048 elements; w1 has 256
    assert [tensor.name for tensor in light.graph.initializer] == ["w1", "shape"]
    assert len(light.SerializeToString()) < len(model.SerializeToString()) / 4
    onnx.checker.check_model(light)


def test_shapes_are_those_that_the_whole_model_gives() -> None:
    model = chain([64, 32, 8])
    wanted = onnx.shape_inference.infer_shapes(model, data_prop=True)
    infer_shapes(model)
    assert list(model.graph.value_info) == list(wanted.graph.value_info)
    assert list(model.graph.output) == list(wanted.graph.output)
    assert [value.name for value in model.graph.input] == ["x"]
    assert len(model.graph.initializer) == 3


def test_an_opset_is_raised_around_weights_that_are_inputs_too() -> None:
    """As files of IR 3 have them."""
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [1, 64]), ("w", [64, 64]))
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values, [out], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)
    assert raise_opset(model) == (True, "")
    assert [tensor.name for tensor in model.graph.initializer] == ["w"]
    assert [value.name for value in model.graph.input] == ["x", "w"]
    onnx.checker.check_model(model, full_check=True)

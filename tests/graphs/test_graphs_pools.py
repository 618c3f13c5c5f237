"""Dilated pools as slices, and integer types that TensorRT lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.graphs.narrow import plain_border, to_signed
from edgekit.graphs.pools import expand_dilated_pools
from edgekit.runtime.onnxruntime import session

F = TensorProto.FLOAT
value = helper.make_tensor_value_info


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["MaxPool", "AveragePool"]),
    st.sampled_from(["NOTSET", "VALID"]),
    st.booleans(),
    st.tuples(st.integers(5, 12), st.integers(5, 12)),
    st.tuples(st.integers(1, 3), st.integers(2, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(1, 2), st.integers(2, 3)),
    st.integers(0, 1),
)
def test_a_dilated_pool_is_its_slices(
    operator: str, auto: str, padded: bool, size: Any, kernel: Any, strides: Any, dilations: Any, pad: int
) -> None:
    assume(all((k - 1) * d + 1 <= n for k, d, n in zip(kernel, dilations, size, strict=True)))
    more = {"count_include_pad": int(padded)} if operator == "AveragePool" else {}
    pads = {"pads": [pad] * 4} if auto == "NOTSET" else {"auto_pad": auto}
    assume(pad < min(kernel) or auto != "NOTSET")
    node = helper.make_node(operator, ["x"], ["y"], kernel_shape=kernel, strides=strides, dilations=dilations, **more, **pads)
    graph = helper.make_graph([node], "g", [value("x", F, [2, 3, *size])], [value("y", F, None)])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    x = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    truth = session(made.SerializeToString()).run(None, {"x": x})[0]
    assume(0 not in truth.shape)
    made = onnx.shape_inference.infer_shapes(made)
    assert expand_dilated_pools(made)
    found = session(made.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
def test_a_dilated_pool_keeps_its_type(operator: str) -> None:
    node = helper.make_node(operator, ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2])
    kinds = [value(name, TensorProto.FLOAT16, shape) for name, shape in (("x", [1, 1, 5, 5]), ("y", [1, 1, 3, 3]))]
    made = helper.make_model(helper.make_graph([node], "g", kinds[:1], kinds[1:]), opset_imports=[helper.make_opsetid("", 19)])
    assert expand_dilated_pools(made)
    onnx.checker.check_model(made, full_check=True)


def test_integers_that_tensorrt_lacks_become_wider() -> None:
    cast = helper.make_node("Cast", ["s"], ["y"], to=TensorProto.UINT16)
    nodes = [helper.make_node("Mul", ["x", "k"], ["s"]), cast]
    k = numpy_helper.from_array(np.array([3, 5], np.uint32), "k")
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.UINT32, [2])], [value("y", TensorProto.UINT16, [2])], [k])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert to_signed(made)
    onnx.checker.check_model(made, full_check=True)
    found = session(made.SerializeToString()).run(None, {"x": np.array([7, 9], np.int64)})[0]
    assert found.dtype == np.int32
    assert found.tolist() == [21, 45]
    assert not to_signed(made)


def test_a_border_of_bfloat16_becomes_float32() -> None:
    kind = TensorProto.BFLOAT16
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [value("x", kind, [2])], [value("y", kind, [2])])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert len(plain_border(made)) == 2
    onnx.checker.check_model(made, full_check=True)
    assert [node.op_type for node in made.graph.node] == ["Cast", "Identity", "Cast"]
    assert {v.type.tensor_type.elem_type for v in (*made.graph.input, *made.graph.output)} == {F}
    assert plain_border(made) == []

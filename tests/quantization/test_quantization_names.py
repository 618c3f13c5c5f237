"""Whatever names a graph has, its int8 and fp8 forms compute the same, and their own names are unique."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import GraphError
from edgekit.quantization.fp8 import to_fp8
from edgekit.quantization.graph import Parameters, Quantizer, check, insert
from edgekit.quantization.placement import Placement, place
from edgekit.quantization.prepare import prepare
from edgekit.quantization.simulate import Simulator, measured_shapes, observe
from edgekit.quantization.weight_only import weight_only

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 4)).astype(np.float32)
MATRICES = {key: RNG.normal(size=(4, 4)).astype(np.float32) for key in "uvw"}
VECTORS = {key: RNG.uniform(0.5, 1.5, 4).astype(np.float32) for key in "bgmn"}
#: Tensors of the graph, in the order in which names are drawn for them.
TENSORS = [*"rstpq", *MATRICES, *VECTORS]
#: What quantization calls its own, for the tensor x and a node a.
WANTED = [
    "x/scale", "x/int8", "x/dequantized", "x/shift", "x/shifted", "x/factor", "x/factored", "x/2/scale", "x/fp8",
    "a/weight/int8", "a/weight/scale", "a/weight/dequantized", "a/weight_/int8", "a/weight/fp8", "a/bias", "a/bias_",
    "a.weight", "a.bias", "y/unbiased", "edgekit/zero_point/scalar", "edgekit/zero_point/4",
]  # fmt: skip
NODES = ["", "a", "b", "x/sub", "x/quantize", "x/dequantize", "a/weight/dequantize", "a/add_bias", "Gemm_1", "MatMul_3"]


def named(tensors: list[str], nodes: list[str]) -> bytes:
    """x -> Relu r -> Gemm, BatchNormalization t -> MatMul p, q; x -> MatMul y = x @ w, and what is read of the others."""
    name = {"x": "x", "y": "y", **dict(zip(TENSORS, tensors, strict=True))}

    def node(index: int, op: str, inputs: str, output: str) -> onnx.NodeProto:
        return helper.make_node(op, [name[key] for key in inputs], [name[output]], name=nodes[index])

    made = [
        node(0, "Relu", "x", "r"),
        node(1, "Gemm", "rub", "s"),
        node(2, "BatchNormalization", "sgbmn", "t"),
        node(3, "MatMul", "tv", "p"),
        node(4, "MatMul", "xp", "q"),
        node(5, "MatMul", "qw", "y"),
    ]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])],
        [numpy_helper.from_array(value, name[key]) for key, value in (MATRICES | VECTORS).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


class Forms(NamedTuple):
    placement: Placement
    int8: onnx.ModelProto
    fp8: onnx.ModelProto
    int8_weights: onnx.ModelProto


def quantized(data: bytes) -> Forms:
    """All forms, with the same numbers whatever the names are."""
    prepared = prepare(data)
    placement = place(prepared)
    assert len(placement.layers) == 3
    assert len(placement.products) == 1
    quantizer = Quantizer(0.05, np.arange(4, dtype=np.float32) / 8, np.arange(1, 5, dtype=np.float32))
    parameters = Parameters(
        dict.fromkeys(placement.groups.values(), 0.05),
        {layer.name: np.full(4, 0.02, np.float32) for layer in placement.layers},
        {layer.name: np.arange(4, dtype=np.float32) for layer in placement.layers},
        {placement.layers[0].data: quantizer},
    )
    int8 = insert(prepared, placement, parameters, placement.names)
    fp8 = to_fp8(prepared, placement.layers, dict.fromkeys([layer.data for layer in placement.layers], 4.0))
    with patch("edgekit.quantization.weight_only.MIN_PARAMETERS", 16):
        small, _ = weight_only(onnx.load_model_from_string(data), bits=8, block=0)
    return Forms(placement, int8, fp8, small)


PLAIN = quantized(named(TENSORS, list("nopqrs")))
ANSWERS = [Simulator(model)({"x": X})["y"] for model in PLAIN[1:]]


@settings(max_examples=60, deadline=None)
@example([*WANTED[10:], "x/scale"], ["b", "a", "", "a/add_bias", "", "Gemm_2"])
@example(["r", "s", "t", "x/scale", *WANTED[9:17]], ["Gemm_1", "", "x/quantize", "a", "", "MatMul_4"])
@given(
    st.permutations(WANTED).map(lambda names: names[: len(TENSORS)]),
    st.lists(st.sampled_from(NODES), min_size=6, max_size=6, unique_by=lambda name: name or object()),
)
def test_names_make_no_difference(tensors: list[str], nodes: list[str]) -> None:
    data = named(tensors, nodes)
    forms = quantized(data)
    for model, again, expected in zip(forms[1:], quantized(data)[1:], ANSWERS, strict=True):
        assert model.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
        check(model)
        tensors = [*(o for n in model.graph.node for o in n.output), *(i.name for i in model.graph.initializer), "x"]
        assert len(tensors) == len(set(tensors))
        np.testing.assert_array_equal(Simulator(model)({"x": X})["y"], expected)
    assert len({node.name for node in forms.int8.graph.node}) == len(forms.int8.graph.node)


def test_names_stay_where_nothing_collides() -> None:
    """Calibrations of before rebuild the same bytes."""
    stored = {tensor.name for tensor in PLAIN.int8.graph.initializer}
    assert {"q/scale", "s/weight/int8", "s/weight/scale", "s/bias", "edgekit/zero_point/scalar", "r/shift"} <= stored
    assert {"o.weight", "o.bias"}.isdisjoint(stored)
    assert not [name for name in stored if name.endswith("_")]
    assert [node.name for node in PLAIN.int8.graph.node][:5] == ["n", "r/sub", "r/mul", "r/quantize", "r/dequantize"]
    assert PLAIN.placement.names == ["o", "q", "s", "r"]


def test_a_graph_that_was_made_here_is_not_blamed_on_the_import() -> None:
    model = onnx.ModelProto.FromString(PLAIN.int8.SerializeToString())
    next(node for node in model.graph.node if node.op_type == "QuantizeLinear").op_type = "DequantizeLinear"
    with pytest.raises(GraphError) as caught:
        Simulator(model)
    assert "defect of edgekit, at the node 'r/quantize'" in caught.value.hint
    model.producer_name = "pytorch"
    with pytest.raises(GraphError) as caught:
        Simulator(model)
    assert "import it again" in caught.value.hint


def test_what_measures_a_graph_takes_no_name_that_it_has() -> None:
    """``x/seen`` and ``a/shape`` are tensors of the graph: once they were made twice, and ONNX Runtime refused it."""
    nodes = [
        helper.make_node("Relu", ["x"], ["x/seen"]),
        helper.make_node("Add", ["x/seen", "x"], ["a"]),
        helper.make_node("Neg", ["a"], ["a/shape"]),
        helper.make_node("Add", ["a", "a/shape"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]), ir_version=8)
    feeds = {"x": np.full((2, 3), -2.0, np.float32)}
    assert measured_shapes(model, ["a", "x", "x/seen"], feeds) == {"a": (2, 3), "x": (2, 3), "x/seen": (2, 3)}
    assert measured_shapes(model, [], feeds) == {}
    seen = observe(model, {"x": 24, "x/seen": 24}, lambda: [feeds], 1 << 20)
    assert (seen["x"].amax, seen["x/seen"].amax) == (2.0, 0.0)

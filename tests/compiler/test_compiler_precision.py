"""The float16 pass: well typed for any graph, and close."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler.precision import activation_peaks, against_golden, kept_float32, to_fp16, without_rounding
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
    "QDQ",
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
        elif op == "QDQ":
            nodes.append(helper.make_node("QuantizeLinear", [first, "step", "zero"], [f"q{index}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{index}", "step", "zero"], [name]))
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
        "step": np.float32(0.03),
        "zero": np.int8(0),
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
    limit = 0.3 if any(op == "QDQ" for op, _, _ in plan) else 0.02
    for twin in (False, True):
        half = to_fp16(made, peaks, twin=twin)  # checks types strictly
        assert [o.type.tensor_type.elem_type for o in half.graph.output] == [TensorProto.FLOAT]
        found = session(half.SerializeToString()).run(None, {"x": x})[0]
        # tanh has slope 1 at most; each step may grow an error of 2^-11 relative to its largest value, or of one int8 step
        assert np.abs(found - truth).max() <= limit * max(1.0, *peaks.values())


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


def quantized(nodes: list[Any], weights: dict[str, Any], x: list[int], opset: int = 17) -> onnx.ModelProto:
    """``nodes`` from the float32 tensor x to y."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )
    made = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(made)


def pair(tensor: str, scale: str = "s") -> list[Any]:
    """Q and DQ behind a tensor T: T_q and T_d."""
    return [
        helper.make_node("QuantizeLinear", [tensor, scale, "z"], [f"{tensor}_q"], f"{tensor}_quantize"),
        helper.make_node("DequantizeLinear", [f"{tensor}_q", scale, "z"], [f"{tensor}_d"], f"{tensor}_dequantize"),
    ]


RANDOM = np.random.default_rng(4)
WEIGHT = RANDOM.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
#: Per-channel int8 weights of an 8-channel convolution, and the scale of its activations.
STORED = {"w": WEIGHT, "ws": RANDOM.uniform(5e-4, 2e-3, 8).astype(np.float32), "wz": np.zeros(8, np.int8)}
STORED |= {"s": np.float32(0.0301), "z": np.int8(0)}
DEQUANTIZED = helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "weights", axis=0)
IMAGE = RANDOM.normal(size=(2, 8, 9, 9)).astype(np.float32)


def two_convolutions(between: list[Any] | None = None, extra: dict[str, Any] | None = None) -> onnx.ModelProto:
    """x - Q/DQ - Conv - Relu (r) - ``between`` (r to t) - Q/DQ - Conv - y."""
    nodes = [
        *pair("x"),
        DEQUANTIZED,
        helper.make_node("Conv", ["x_d", "wd"], ["c"], "first"),
        helper.make_node("Relu", ["c"], ["r"]),
    ]
    nodes += [*(between or [helper.make_node("Identity", ["r"], ["t"])]), *pair("t")]
    nodes += [helper.make_node("Conv", ["t_d", "wd"], ["y"], "second")]
    return quantized(nodes, {**STORED, **(extra or {})}, [2, 8, 9, 9])


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    return found | {i.name: i.data_type for i in inferred.initializer}


def answer(model: onnx.ModelProto, x: np.ndarray[Any, Any] = IMAGE) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = session(model.SerializeToString()).run(None, {"x": x})[0]
    return found


def made_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def test_what_is_not_int8_becomes_float16() -> None:
    made = two_convolutions()
    half = to_fp16(made, activation_peaks(made, {"x": IMAGE}))
    known = types(half)
    for name in ("first", "second"):
        assert [known[n] for n in made_of(half, name).input] == [TensorProto.FLOAT16] * 2
    assert known[made_of(half, "x_quantize").input[0]] == TensorProto.FLOAT  # the graph's input is not rounded first
    assert [known[n] for n in made_of(half, "t_quantize").input] == [TensorProto.FLOAT16, TensorProto.FLOAT16, TensorProto.INT8]
    assert known[made_of(half, "weights").input[1]] == TensorProto.FLOAT16
    stored = next(i for i in half.graph.initializer if i.name == "w")
    np.testing.assert_array_equal(numpy_helper.to_array(stored), WEIGHT)
    assert [n.op_type for n in half.graph.node].count("Cast") == 1  # the output
    assert half.opset_import[0].version == 19
    assert kept_float32(made, {}) == 0
    error = answer(half) - answer(made)
    assert 10 * np.log10((answer(made) ** 2).mean() / (error**2).mean()) > 40  # some values change by one int8 step


def test_quantizing_and_dequantizing_share_the_rounded_scale() -> None:
    made = two_convolutions()
    half = to_fp16(made, {})
    scales = [made_of(half, name).input[1] for name in ("x_quantize", "x_dequantize", "t_quantize", "t_dequantize")]
    values = {i.name: numpy_helper.to_array(i) for i in half.graph.initializer}
    assert {float(values[name]) for name in scales} == {float(np.float16(0.0301))}


@pytest.mark.parametrize("peaks", [{"y": 1000.0}, {"t_d": 600.0}])
def test_a_layer_that_stays_float32_reads_float32_from_its_dequantizers(peaks: dict[str, float]) -> None:
    half = to_fp16(two_convolutions(), peaks)
    known = types(half)
    makers = {name: node for node in half.graph.node for name in node.output}
    for layer, wanted in (("first", TensorProto.FLOAT16), ("second", TensorProto.FLOAT)):
        inputs = made_of(half, layer).input
        assert [known[n] for n in inputs] == [wanted] * 2
        assert [makers[n].op_type for n in inputs] == ["DequantizeLinear"] * 2  # no Cast in between
    assert kept_float32(two_convolutions(), peaks) == 1


def test_large_weights_behind_a_dequantizer_are_judged_as_weights() -> None:
    assert kept_float32(two_convolutions(), {"wd": 600.0}) == 0
    assert kept_float32(two_convolutions(), {"wd": 70000.0}) == 2
    assert kept_float32(two_convolutions(), {"x": 600.0}) == 0  # read by QuantizeLinear alone, in float32


def test_scales_that_float16_cannot_hold_stay_float32() -> None:
    tiny = two_convolutions(extra={"ws": np.full(8, 1e-6, np.float32)})
    half = to_fp16(tiny, {})
    known = types(half)
    assert known[made_of(half, "weights").input[1]] == TensorProto.FLOAT
    assert known[made_of(half, "first").input[1]] == TensorProto.FLOAT16  # by a Cast
    np.testing.assert_allclose(answer(half), answer(tiny), atol=0.01 * np.abs(answer(tiny)).max())


def test_a_channel_of_zeros_may_have_any_scale() -> None:
    stored = WEIGHT.copy()
    stored[3] = 0
    made = two_convolutions(extra={"w": stored, "ws": np.where(np.arange(8) == 3, 1e-30, STORED["ws"]).astype(np.float32)})
    half = to_fp16(made, {})
    assert types(half)[made_of(half, "weights").input[1]] == TensorProto.FLOAT16
    assert np.isfinite(answer(half)).all()
    np.testing.assert_array_equal(answer(half)[:, 3], 0)


SHIFTED = [
    helper.make_node("Pad", ["r", "pads", "shift0"], ["p"]),
    helper.make_node("Max", ["p", "low"], ["m"]),
    helper.make_node("Sub", ["m", "shift"], ["d"]),
    helper.make_node("Mul", ["d", "gain"], ["t"]),
]
CHANNELS = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "shift0": np.float32(0), "low": np.full((1, 8, 1, 1), 0.1, np.float32)}
CHANNELS |= {k: RANDOM.uniform(0.5, 1, (1, 8, 1, 1)).astype(np.float32) for k in ("shift", "gain")}


def test_what_stands_in_front_of_a_quantizer_is_float16() -> None:
    made = two_convolutions(SHIFTED, CHANNELS)
    half = to_fp16(made, activation_peaks(made, {"x": IMAGE}))
    known = types(half)
    for node in half.graph.node:
        if node.op_type in ("Pad", "Max", "Sub", "Mul"):
            assert known[node.output[0]] == TensorProto.FLOAT16
    error = answer(half) - answer(made)
    assert 10 * np.log10((answer(made) ** 2).mean() / (error**2).mean()) > 40


@pytest.mark.parametrize(
    "between",
    [
        [helper.make_node("ReduceMean", ["r"], ["t"], axes=[2], keepdims=1)],
        [helper.make_node("Split", ["r"], ["t", "u"], axis=1)],
    ],
)
def test_an_operator_that_changed_before_opset_19_is_converted(between: list[Any]) -> None:
    nodes = [*pair("x"), DEQUANTIZED, helper.make_node("Conv", ["x_d", "wd"], ["c"]), helper.make_node("Relu", ["c"], ["r"])]
    made = quantized([*nodes, *between, *pair("t"), helper.make_node("Neg", ["t_d"], ["y"])], STORED, [2, 8, 9, 9])
    half = to_fp16(made, {})
    assert half.opset_import[0].version == 19
    np.testing.assert_allclose(answer(half), answer(made), atol=0.04)  # one int8 step


def test_the_twin_of_a_quantized_graph_rounds_alike() -> None:
    made = two_convolutions(SHIFTED, CHANNELS)
    peaks = activation_peaks(made, {"x": IMAGE})
    twin = to_fp16(made, peaks, twin=True)
    assert TensorProto.FLOAT16 not in {i.data_type for i in twin.graph.initializer}
    assert {v for k, v in types(twin).items() if k.endswith("_q")} == {TensorProto.INT8}
    error = answer(twin) - answer(to_fp16(made, peaks))
    assert 10 * np.log10((answer(twin) ** 2).mean() / max((error**2).mean(), 1e-20)) > 40


def test_without_its_rounding_a_quantized_graph_is_the_float_graph_of_its_weights() -> None:
    weight = WEIGHT * STORED["ws"][:, None, None, None]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["y"]),
    ]
    truth = answer(quantized(nodes, {"w": weight.astype(np.float32)}, [2, 8, 9, 9]))
    found = answer(without_rounding(two_convolutions()))
    np.testing.assert_allclose(found, truth, atol=1e-5)
    assert np.abs(answer(two_convolutions()) - truth).max() > 1e-3


def test_a_graph_without_float32_has_no_peaks() -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [4]) for name in ("x", "y")]
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert activation_peaks(model, {"x": np.ones(4, np.float16)}) == {}


@pytest.mark.parametrize("stated", [["N", 9], ["N", 1, 9]])
def test_a_wrong_output_shape_of_an_exporter_does_not_stand_in_the_way(stated: list[Any]) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, stated)],
        [numpy_helper.from_array(np.ones((4, 5), np.float32), "w")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    half = to_fp16(model, {})
    assert {node.op_type for node in half.graph.node} == {"Cast", "MatMul", "Relu"}
    x = np.ones((2, 4), np.float32)
    assert session(half.SerializeToString()).run(None, {"x": x})[0].shape == (2, 5)

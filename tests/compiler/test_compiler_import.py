"""`edgekit import`: good files, foreign ways of writing them, and what the passes do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler import foreign, import_onnx, passes
from edgekit.compiler.passes import drop_dead, fold_constants, opset, simplify
from edgekit.compiler.shapes import parse_constants, profiles_for
from edgekit.errors import GraphError, UsageError
from edgekit.runtime import Model, check_golden
from edgekit.runtime.onnxruntime import session

from .foreign_files import F, N, model, pooled, saved, shaped_reshape

pytestmark = pytest.mark.usefixtures("in_process")


def test_a_clean_file_is_kept_byte_for_byte(tiny_onnx: Path, tmp_path: Path) -> None:
    bundle = import_onnx(tiny_onnx, out=tmp_path / "b.edge")
    assert (bundle.path / "model.onnx").read_bytes() == tiny_onnx.read_bytes()
    assert bundle.manifest.inputs[0].shape == ("n", 3, 32, 32)
    assert check_golden(bundle).relative <= 1e-4
    assert sorted(bundle.manifest.files) == ["golden.npz", "model.onnx"]


def test_a_stated_shape_is_bound_and_a_dynamic_one_recorded(tiny_onnx: Path, tmp_path: Path) -> None:
    fixed = import_onnx(tiny_onnx, out=tmp_path / "f.edge", shape="x:2x3x32x32")
    assert fixed.manifest.inputs[0].shape == (2, 3, 32, 32)
    assert fixed.manifest.outputs[0].shape == (2, 10)
    ranged = import_onnx(tiny_onnx, out=tmp_path / "d.edge", dynamic=["x:1..8x3x32x32"])
    assert ranged.manifest.history[-1].config["dynamic"] == {"x": "1..8x3x32x32"}
    x = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    with Model.open(fixed.path) as a, Model.open(ranged.path) as b:
        np.testing.assert_allclose(a.run({"x": x})["y"], b.run({"x": x})["y"], rtol=1e-5)


def test_a_wrong_name_goes_to_the_only_input_that_fits(tiny_onnx: Path, tmp_path: Path) -> None:
    bundle = import_onnx(tiny_onnx, out=tmp_path / "b.edge", shape=["image:1x3x32x32"])
    assert bundle.manifest.inputs[0].shape == (1, 3, 32, 32)
    assert "image" in bundle.manifest.history[-1].figures["notes"][0]
    with pytest.raises(UsageError, match="image"):
        import_onnx(tiny_onnx, out=tmp_path / "c.edge", shape=["image:1x1x32x32"])


def test_one_symbol_gets_one_size(tmp_path: Path) -> None:
    both = [helper.make_tensor_value_info(n, F, ["n", 4]) for n in ("a", "b")]
    path = saved(tmp_path / "m.onnx", model([helper.make_node("Add", ["a", "b"], ["y"])], y=["n", 4], inputs=both))
    bundle = import_onnx(path, out=tmp_path / "b.edge", shape="a:3x4")
    assert [spec.shape for spec in bundle.manifest.inputs] == [(3, 4), (3, 4)]
    with pytest.raises(UsageError, match="stated as 3 and as 2"):
        import_onnx(path, out=tmp_path / "c.edge", shape=["a:3x4", "b:2x4"])


def test_axes_that_all_go_by_a_question_mark_are_no_symbol(tmp_path: Path) -> None:
    """Paddle's exporter writes "?" for every axis it does not know; they need not be equal."""
    free = [helper.make_tensor_value_info("x", F, ["?", "?", "?"])]
    path = saved(tmp_path / "m.onnx", model([helper.make_node("Relu", ["x"], ["y"])], y=["?", "?", "?"], inputs=free))
    bundle = import_onnx(path, out=tmp_path / "b.edge", shape="x:1x3x8")
    assert bundle.manifest.inputs[0].shape == (1, 3, 8)
    assert bundle.manifest.outputs[0].shape == (1, 3, 8)


def test_an_old_opset_is_raised(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["u"], axes=[1]),
        helper.make_node("ReduceSum", ["u"], ["y"], axes=[2], keepdims=0),
    ]
    bundle = import_onnx(saved(tmp_path / "m.onnx", model(nodes, y=["n", 1], version=9)), out=tmp_path / "b.edge")
    assert bundle.manifest.history[-1].figures["opset"] == 17
    assert opset(onnx.load(bundle.path / "model.onnx")) == 17


def test_an_opset_that_nothing_runs_any_more_is_converted_and_noted(tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 2), np.float32), "b": np.ones(2, np.float32)}
    made = model([helper.make_node("Gemm", ["x", "w", "b"], ["y"], broadcast=1)], weights, x=[3, 4], y=[3, 2], version=6)
    bundle = import_onnx(saved(tmp_path / "m.onnx", made), out=tmp_path / "b.edge")
    assert any("does not run opset 6" in note for note in bundle.manifest.history[-1].figures["notes"])
    with Model.open(bundle.path) as m:
        np.testing.assert_array_equal(m.run({"x": np.ones((3, 4), np.float32)})["y"], np.full((3, 2), 5))


def test_weights_listed_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info("x", F, ["n", 4]), helper.make_tensor_value_info("w", F, [4, 2])]
    made = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": np.ones((4, 2), np.float32)},
        y=["n", 2],
        inputs=inputs,
        ir_version=3,
    )
    bundle = import_onnx(saved(tmp_path / "m.onnx", made), out=tmp_path / "b.edge")
    assert [spec.name for spec in bundle.manifest.inputs] == ["x"]


def test_constants_and_known_shapes_are_folded(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", shaped_reshape())
    bundle = import_onnx(path, out=tmp_path / "b.edge", shape="x:3x4")
    assert [n.op_type for n in onnx.load(bundle.path / "model.onnx").graph.node] == ["Reshape", "Mul"]
    dynamic = import_onnx(path, out=tmp_path / "d.edge")
    with Model.open(dynamic.path) as m:
        assert m.run({"x": np.ones((5, 4), np.float32)})["y"].shape == (5, 2, 2)


def test_integer_inputs_and_two_outputs(tmp_path: Path) -> None:
    ids = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "t"])]
    made = model(
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        {"table": np.eye(9, dtype=np.float32)},
        y=["n", "t", 9],
        inputs=ids,
    )
    made.graph.node.append(helper.make_node("ArgMax", ["y"], ["best"], axis=2, keepdims=0))
    made.graph.output.append(helper.make_tensor_value_info("best", TensorProto.INT64, ["n", "t"]))
    bundle = import_onnx(saved(tmp_path / "m.onnx", made), out=tmp_path / "b.edge")
    assert [(s.name, s.dtype) for s in bundle.manifest.outputs] == [("y", "float32"), ("best", "int64")]


def quantized(zero: Any) -> onnx.ModelProto:
    """x -> Q -> DQ -> MatMul with int8 weights -> y."""
    nodes = [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s", "z"], ["d"]),
             N("DequantizeLinear", ["i", "s", "o"], ["w"]), N("MatMul", ["d", "w"], ["y"])]  # fmt: skip
    weights = {"s": np.float32(0.03), "z": zero, "o": np.int8(0), "i": np.eye(4, dtype=np.int8) * 30}
    return model(nodes, weights, y=["n", 4])


def test_asymmetric_quantization_comes_back_to_float_and_symmetric_stays(tmp_path: Path) -> None:
    bundle = import_onnx(saved(tmp_path / "a.onnx", quantized(np.uint8(128))), out=tmp_path / "a.edge")
    assert [n.op_type for n in onnx.load(bundle.path / "model.onnx").graph.node] == ["MatMul"]
    figures = bundle.manifest.history[-1].figures
    assert figures["quantized_snr_db"] > 30
    assert figures["emulated_snr_db"] > 100
    assert any("edgekit quantize makes it int8 again" in note for note in figures["notes"])
    assert check_golden(bundle).relative <= 1e-4
    symmetric = saved(tmp_path / "s.onnx", quantized(np.int8(0)))
    kept = import_onnx(symmetric, out=tmp_path / "s.edge")
    assert (kept.path / "model.onnx").read_bytes() == symmetric.read_bytes()


def test_onnx_runtimes_own_operators_are_taken_where_float_can_say_them(tmp_path: Path) -> None:
    microsoft = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    made = model(
        [N("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft", name="d")],
        {"w": np.arange(-8, 8, dtype=np.int8).reshape(4, 4), "s": np.float32(0.1)}, y=["n", 4],
    )  # fmt: skip
    del made.opset_import[:]
    made.opset_import.extend(microsoft)
    bundle = import_onnx(saved(tmp_path / "m.onnx", made), out=tmp_path / "b.edge")
    assert [n.op_type for n in onnx.load(bundle.path / "model.onnx").graph.node] == ["MatMul"]
    made.graph.node[0].op_type = "FusedMatMul"
    with pytest.raises(GraphError, match=r"com\.microsoft\.FusedMatMul \(d\)"):
        import_onnx(saved(tmp_path / "f.onnx", made), out=tmp_path / "f.edge")


def test_a_rewrite_that_does_not_agree_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(made: onnx.ModelProto, rounding: bool = False) -> tuple[bool, list[str]]:
        made.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float32(3), "s"))
        return True, ["rewritten"]

    monkeypatch.setattr(foreign, "to_float", wrong)
    path = saved(tmp_path / "m.onnx", quantized(np.uint8(128)))
    answer = foreign.import_graph({"model": str(path), "shape": {}, "dynamic": {}}, tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == path.read_bytes()
    assert any("stays quantized as it was" in note and "dB from the quantized original" in note for note in answer["notes"])
    assert "quantized_snr_db" not in answer["figures"]


def test_what_tensorrt_refuses_is_noted(tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["z"], name="nz"), helper.make_node("Cast", ["z"], ["y"], to=F)]
    bundle = import_onnx(saved(tmp_path / "m.onnx", model(nodes, y=[2, None])), out=tmp_path / "b.edge")
    assert any("NonZero (nz)" in note for note in bundle.manifest.history[-1].figures["notes"])


def test_an_input_without_any_shape_needs_one(tmp_path: Path) -> None:
    made = model([helper.make_node("Relu", ["x"], ["y"])], y=["n", 4])
    made.graph.input[0].type.tensor_type.ClearField("shape")
    path = saved(tmp_path / "m.onnx", made)
    with pytest.raises(GraphError, match="unknown"):
        import_onnx(path, out=tmp_path / "b.edge")
    assert import_onnx(path, out=tmp_path / "c.edge", shape="x:2x4").manifest.inputs[0].shape == (2, 4)


def test_an_output_without_a_shape_gets_one(tmp_path: Path) -> None:
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((4, 2), np.float32)}, y=None)
    assert not made.graph.output[0].type.tensor_type.HasField("shape")
    bundle = import_onnx(saved(tmp_path / "m.onnx", made), out=tmp_path / "b.edge", shape="x:3x4")
    assert bundle.manifest.outputs[0].shape == (3, 2)


def test_folding_keeps_int8_weights_behind_dequantize() -> None:
    nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    made = model(nodes, {"q": np.ones((4, 2), np.int8), "s": np.float32(0.5)}, y=["n", 2])
    assert not fold_constants(made)


def test_dead_nodes_and_weights_go() -> None:
    made = model(
        [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["w"], ["dead"])],
        {"w": np.ones(4, np.float32)},
        y=["n", 4],
    )
    assert drop_dead(made)
    assert [n.op_type for n in made.graph.node] == ["Relu"]
    assert not made.graph.initializer
    assert not drop_dead(made)


OPS = ["Relu", "Neg", "Abs", "Sigmoid", "Add", "Mul", "Sub", "Shape", "Transpose", "Identity"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12), st.booleans()
)
def test_simplify_never_changes_an_output(plan: list[tuple[str, int, int]], fixed: bool) -> None:
    """Random graphs over an input and two constants, all (4, 4): the same outputs before and after."""
    square, nodes = ["x", "a", "b"], []
    for index, (op, i, j) in enumerate(plan):
        name, first, second = f"t{index}", square[i % len(square)], square[j % len(square)]
        if op == "Shape":
            nodes += [
                helper.make_node("Shape", [first], [f"s{index}"]),
                helper.make_node("Reshape", [second, f"s{index}"], [name]),
            ]
        else:
            nodes.append(helper.make_node(op, [first, second] if op in ("Add", "Mul", "Sub") else [first], [name]))
        square.append(name)
    nodes.append(helper.make_node("Add", [square[-1], "x"], ["y"]))
    random = np.random.default_rng(0)
    weights = {n: random.normal(size=(4, 4)).astype(np.float32) for n in "ab"}
    made = model(nodes, weights, x=[4, 4] if fixed else ["n", 4], y=None)
    feeds = {"x": random.normal(size=(4, 4)).astype(np.float32)}
    before = session(made.SerializeToString()).run(None, feeds)[0]
    simplify(made)
    onnx.checker.check_model(made)
    np.testing.assert_allclose(session(made.SerializeToString()).run(None, feeds)[0], before, rtol=1e-5, atol=1e-6)


def test_nodes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    nodes = [N("Relu", ["x"], ["a"], "relu"), N("Neg", ["a"], ["b"], "relu"), N("Abs", ["b"], ["y"], "relu_1")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    bundle = import_onnx(tmp_path / "m.onnx", out=tmp_path / "m.edge")
    names = [node.name for node in onnx.load(bundle.file("model.onnx")).graph.node]
    assert len(set(names)) == 3
    assert {"relu", "relu_1"} <= set(names)


def test_what_cannot_be_folded_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Add", ["one", "one"], ["two"]),
        helper.make_node("Mul", ["s", "two"], ["m"]),
        helper.make_node("Reshape", ["x", "s"], ["r"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.array([1, 1], np.int64), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    before = model.SerializeToString()

    class Fail(Exception):  # ONNX Runtime's errors derive from Exception alone
        pass

    def refuse(*_: object) -> None:
        raise Fail

    with monkeypatch.context() as patch:
        patch.setattr(passes, "session", refuse)
        assert not passes.fold_constants(model)
    assert model.SerializeToString() == before
    assert passes.fold_constants(model)
    onnx.checker.check_model(model)
    (y,) = session(model.SerializeToString()).run(None, {"x": np.zeros((2, 3), np.float32)})
    assert y.tolist() == [4, 6]


def test_an_input_that_is_a_parameter_becomes_a_constant(cli: Callable[..., Any], tmp_path: Path) -> None:
    path = saved(tmp_path / "pool.onnx", pooled())
    bundle = import_onnx(path, out=tmp_path / "a.edge", constants={"axes": np.array([2])})
    assert [spec.name for spec in bundle.manifest.inputs] == ["x"]
    assert bundle.manifest.outputs[0].shape == (2, 3)
    with Model.open(bundle.path, backend="onnxruntime") as opened:
        x = np.ones((2, 3, 4), np.float32)
        np.testing.assert_array_equal(opened.run({"x": x})["y"], x.sum(2))
    answer = cli("import", path, "--out", tmp_path / "b.edge", "--constant", "axes:2", "--json").json
    assert answer["inputs"] == {"x": "float32 2x3x4"}


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6), st.text("abc:/.", min_size=1, max_size=6))
def test_constants_are_read_as_they_are_written(values: list[int], name: str) -> None:
    assert parse_constants([f"{name}:{','.join(map(str, values))}"]) == {name: (values, None)}


def test_a_constant_keeps_the_shape_it_is_given(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info("x", F, [2, 2]), helper.make_tensor_value_info("p", F, ["a", "b"])]
    path = saved(tmp_path / "m.onnx", model([helper.make_node("Add", ["x", "p"], ["y"])], inputs=inputs, y=[None, None]))
    bundle = import_onnx(path, out=tmp_path / "b.edge", constants={"p": np.array([[0.0, 1.0]])})
    with Model.open(bundle.path, backend="onnxruntime") as opened:
        np.testing.assert_array_equal(opened.run({"x": np.zeros((2, 2), np.float32)})["y"], [[0, 1], [0, 1]])
    for stated, why in (({"p": np.zeros(2)}, "shape 2 were stated"), ("p:1,2", "2 numbers"), ({"p": [[1], [2, 3]]}, "object")):
        with pytest.raises(UsageError, match=why):
            import_onnx(path, out=tmp_path / "c.edge", constants=stated)


@pytest.mark.parametrize(("operator", "narrowed"), [("Max", True), ("Mul", False)])
def test_integers_that_wrap_around_stay(tmp_path: Path, operator: str, narrowed: bool) -> None:
    inputs = [helper.make_tensor_value_info(name, TensorProto.UINT32, [4]) for name in "ab"]
    nodes = [helper.make_node(operator, ["a", "b"], ["y"])]
    path = saved(tmp_path / "m.onnx", model(nodes, inputs=inputs, y=[4], y_type=TensorProto.UINT32))
    bundle = import_onnx(path, out=tmp_path / "b.edge")
    assert bundle.manifest.inputs[0].dtype == ("int64" if narrowed else "uint32")


def test_what_onnx_runtime_has_no_kernel_for_is_held_against_onnx_itself(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT16, [4]) for name in "ab"]
    made = model([helper.make_node("Max", ["a", "b"], ["y"])], inputs=inputs, y=[4], y_type=TensorProto.INT16)
    bundle = import_onnx(saved(tmp_path / "m.onnx", made), out=tmp_path / "b.edge")
    assert any("reference evaluator" in note for note in bundle.manifest.history[0].figures["notes"])


def stateful() -> onnx.ModelProto:
    """y = x + the sum of state over its first axis; only names of axes are missing."""
    inputs = [helper.make_tensor_value_info("x", F, [None, 4]), helper.make_tensor_value_info("state", F, [2, None, 4])]
    nodes = [
        helper.make_node("ReduceSum", ["state", "first"], ["s"], keepdims=0),
        helper.make_node("Equal", ["rate", "known"], ["c"]),
        helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch("Add"), else_branch=branch("MatMul")),
    ]
    inputs.append(helper.make_tensor_value_info("rate", TensorProto.INT64, []))
    weights = {"first": np.array([0]), "known": np.int64(16000)}
    return model(nodes, weights, inputs=inputs, y=[None, 4])


def branch(operator: str) -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node(operator, ["x", "s"], ["r"])], "b", [], [helper.make_tensor_value_info("r", F, None)]
    )


def test_a_nameless_axis_that_only_runs_with_the_batch_goes_with_it(tmp_path: Path) -> None:
    bundle = import_onnx(saved(tmp_path / "m.onnx", stateful()), out=tmp_path / "b.edge")
    assert [spec.shape for spec in bundle.manifest.inputs[:2]] == [("batch", 4), (2, "batch", 4)]
    assert profiles_for(bundle, "1..8")["state"] == [[2, 1, 4], [2, 8, 4], [2, 8, 4]]


def test_a_branch_that_cannot_run_at_the_stated_shapes_is_left_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", stateful())
    bundle = import_onnx(path, out=tmp_path / "b.edge", shape=["x:3x4", "state:2x3x4"])  # 3x4 times 3x4 is no product
    graph = onnx.load_model_from_string(bundle.read("model.onnx"))
    assert "If" not in {node.op_type for node in graph.graph.node}
    assert any("left out" in note for note in bundle.manifest.history[0].figures["notes"])


def test_sizes_that_nobody_states_are_those_at_which_the_graph_ran(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    path = saved(tmp_path / "m.onnx", model(nodes, x=["n", 3, "h"], y=["n", 3, "h"]))
    assert profiles_for(import_onnx(path, out=tmp_path / "b.edge"))["x"] == [[1, 3, 64]] * 3
    ranged = import_onnx(path, out=tmp_path / "r.edge", dynamic="x:1..2x3x8..16")
    assert profiles_for(ranged)["x"] == [[1, 3, 8], [2, 3, 16], [2, 3, 16]]

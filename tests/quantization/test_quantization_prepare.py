"""`prepare`: what is brought back to float, what stays as it is and is said, what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import GraphError
from edgekit.quantization.placement import Unquantized, place
from edgekit.quantization.prepare import prepare
from edgekit.runtime.onnxruntime import session

F, F16, F64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE
X = helper.make_tensor_value_info("x", F, [3, 4])
WEIGHT = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)


def model(*nodes: onnx.NodeProto, opset: int = 17, domains: tuple[str, ...] = (), **weights: object) -> onnx.ModelProto:
    """x (3, 4) -> nodes -> y (3, 4)."""
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in {"w": WEIGHT, **weights}.items()]
    graph = helper.make_graph(list(nodes), "g", [X], [helper.make_tensor_value_info("y", F, [3, 4])], initializers)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def answer(made: onnx.ModelProto) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = session(made.SerializeToString()).run(None, {"x": x})[0]
    return found


def test_a_quantized_graph_comes_back_with_a_note(capfd: pytest.CaptureFixture[str]) -> None:
    made = model(
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
        s=np.float32(0.03),
        z=np.uint8(128),
    )
    found = prepare(made.SerializeToString())
    assert [node.op_type for node in found.graph.node] == ["MatMul"]
    np.testing.assert_allclose(answer(found), answer(made), atol=0.2)
    assert "1 activation no longer rounded" in capfd.readouterr().err


def test_other_operators_and_subgraphs_stay_and_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    output = helper.make_tensor_value_info("o", F, [3, 4])
    branches = [helper.make_graph([helper.make_node(op, ["g"], ["o"])], op, [], [output]) for op in ("Relu", "Neg")]
    made = model(
        helper.make_node("FastGelu", ["x"], ["g"], domain="com.microsoft"),
        helper.make_node("If", ["c"], ["i"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("MatMul", ["i", "w"], ["y"]),
        domains=("com.microsoft",),
        c=np.array(True),
    )
    found = prepare(made.SerializeToString())
    assert [node.op_type for node in found.graph.node] == ["FastGelu", "If", "MatMul"]
    np.testing.assert_array_equal(answer(found), answer(made))
    said = capfd.readouterr().err
    assert "com.microsoft.FastGelu (1)" in said
    assert "2 subgraphs (If, Loop, Scan) stay float" in said


def test_one_subgraph_stays(capfd: pytest.CaptureFixture[str]) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["a", "e"], ["b"]), helper.make_node("Identity", ["e"], ["f"])], "body",
        [helper.make_tensor_value_info(name, F, [4]) for name in ("a", "e")],
        [helper.make_tensor_value_info(name, F, [4]) for name in ("b", "f")],
    )  # fmt: skip
    made = model(
        helper.make_node("Scan", ["start", "x"], ["last", "i"], body=body, num_scan_inputs=1),
        helper.make_node("MatMul", ["i", "w"], ["y"]),
        start=np.zeros(4, np.float32),
    )
    prepare(made.SerializeToString())
    assert "1 subgraph (If, Loop, Scan) stays float" in capfd.readouterr().err


def test_an_old_opset_is_raised_and_one_that_does_not_convert_refused() -> None:
    old = model(helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Clip", ["m"], ["y"], max=1.0), opset=10)
    found = prepare(old.SerializeToString())
    assert found.opset_import[0].version == 17
    np.testing.assert_array_equal(answer(found), answer(old))
    wrong = model(helper.make_node("Fost", ["x"], ["y"]), opset=9)
    with pytest.raises(GraphError, match="has opset 9, int8 needs 13"):
        prepare(wrong.SerializeToString())


def test_weights_in_other_files_and_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(helper.make_node("MatMul", ["x", "w"], ["y"]))
    monkeypatch.setattr("edgekit.quantization.prepare.MAX_BYTES", 100)
    with pytest.raises(GraphError, match="less than 100"):
        prepare(made.SerializeToString())
    monkeypatch.undo()
    weight = made.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    with pytest.raises(GraphError, match="1 weights in other files, as 'w'"):
        prepare(made.SerializeToString())


@pytest.mark.parametrize(
    "value", [{"value_float": 2.0}, {"value_floats": [1.0, 2.0, 3.0, 4.0]}, {"value": helper.make_tensor("t", F, [], [3.0])}]
)
def test_constants_of_every_form_become_initializers(value: dict[str, object]) -> None:
    made = model(
        helper.make_node("Constant", [], ["c"], **value),
        helper.make_node("Identity", ["c"], ["d"]),
        helper.make_node("Mul", ["x", "d"], ["m"]),
        helper.make_node("Constant", [], ["shape"], value_ints=[3, 4]),
        helper.make_node("Reshape", ["m", "shape"], ["r"]),
        helper.make_node("Gemm", ["r", "w"], ["y"]),
    )
    found = prepare(made.SerializeToString())
    assert [node.op_type for node in found.graph.node] == ["Mul", "Reshape", "Gemm"]
    np.testing.assert_array_equal(answer(found), answer(made))


@pytest.mark.parametrize("names", [("Gemm_1", ""), ("Gemm_1_", "Gemm_1", ""), ("Gemm_2", "Gemm_2_", "", "")])
def test_every_node_has_a_name_of_its_own(names: tuple[str, ...]) -> None:
    tensors = ["x", *(f"t{i}" for i in range(1, len(names))), "y"]
    nodes = [helper.make_node("Gemm", [tensors[i], "w"], [tensors[i + 1]], name=name) for i, name in enumerate(names)]
    found = [node.name for node in prepare(model(*nodes).SerializeToString()).graph.node]
    assert len(set(found)) == len(names)
    assert all(ours == theirs for ours, theirs in zip(found, names, strict=True) if theirs)


def narrow(kind: int, gamma: float = 1.0, weight: float = 1.0) -> onnx.ModelProto:
    """x (3, 4) -> Gemm with alpha and beta -> Gemm, BatchNormalization, all of another float type -> y."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    vectors = {key: np.linspace(0.5, 1.5, 4).astype(dtype) for key in ("b", "beta", "mean", "var")}
    return model(
        helper.make_node("Cast", ["x"], ["h"], to=kind),
        helper.make_node("Gemm", ["h", "v", "b"], ["i"], name="first", alpha=0.5, beta=2.0),
        helper.make_node("Gemm", ["i", "v"], ["n"], name="second"),
        helper.make_node("BatchNormalization", ["n", "gamma", "beta", "mean", "var"], ["o"]),
        helper.make_node("Cast", ["o"], ["y"], to=F),
        v=(weight * WEIGHT).astype(dtype),
        gamma=np.full(4, gamma, dtype),
        **vectors,
    )


@pytest.mark.parametrize(("kind", "near"), [(F16, 0.02), (F64, 1e-6)])
def test_other_floats_become_float32_and_fold(kind: int, near: float, capfd: pytest.CaptureFixture[str]) -> None:
    found = prepare(narrow(kind).SerializeToString())
    assert [node.op_type for node in found.graph.node] == ["Gemm", "Gemm"]
    np.testing.assert_allclose(answer(found), answer(narrow(kind)), rtol=near, atol=near)
    assert place(found).names == ["first", "second"]
    assert (
        f"note: {'float16' if kind == F16 else 'float64'} tensors are computed in float32: 6 weights" in capfd.readouterr().err
    )


def test_what_float16_could_not_hold_folds_in_float32() -> None:
    found = prepare(narrow(F16, gamma=30000.0, weight=8.0).SerializeToString())
    assert [node.op_type for node in found.graph.node] == ["Gemm", "Gemm"]
    huge = prepare(narrow(F, gamma=1e30, weight=1e15).SerializeToString())
    assert "BatchNormalization" in {node.op_type for node in huge.graph.node}


def test_folded_weights_do_not_take_the_name_of_the_data() -> None:
    made = model(
        helper.make_node("Relu", ["x"], ["fc.weight"]),
        helper.make_node("Gemm", ["fc.weight", "w", "fc.bias"], ["y"], name="fc", alpha=0.5),
        **{"fc.bias": WEIGHT[0]},
    )
    np.testing.assert_allclose(answer(prepare(made.SerializeToString())), answer(made), rtol=1e-5, atol=1e-6)


def test_operators_of_other_domains_are_not_folded_for_their_names() -> None:
    made = model(
        helper.make_node("Gemm", ["x", "w"], ["g"], name="foreign", domain="mine", alpha=0.5),
        helper.make_node("BatchNormalization", ["g", "s", "s", "s", "s"], ["y"]),
        domains=("mine",),
        s=np.ones(4, np.float32),
    )
    found = prepare(made.SerializeToString())
    assert [node.op_type for node in found.graph.node] == ["Gemm", "BatchNormalization"]
    assert found.graph.node[0].attribute[0].f == 0.5
    assert list(found.graph.node[0].input) == ["x", "w"]


@pytest.mark.parametrize(("kind", "word"), [(TensorProto.INT32, "int32"), (TensorProto.INT64, "int64")])
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_product_of_other_types_stays_as_it_is(op: str, kind: int, word: str) -> None:
    made = model(
        helper.make_node("Cast", ["x"], ["a"], to=kind),
        helper.make_node("Transpose", ["a"], ["b"]),
        helper.make_node(op, ["a", "b"], ["c"], name="product"),
        helper.make_node("Cast", ["c"], ["d"], to=F),
        helper.make_node("MatMul", ["d", "v"], ["y"], name="layer"),
        v=WEIGHT[:3],
    )
    placement = place(prepare(made.SerializeToString()))
    assert placement.names == ["layer"]
    assert placement.unquantized == (Unquantized("product", op, f"its inputs are {word}"),)


def test_products_behind_unknown_operators_and_with_an_empty_bias_are_quantized() -> None:
    made = model(
        helper.make_node("FastGelu", ["x"], ["a"], domain="com.microsoft"),
        helper.make_node("MatMul", ["a", "w"], ["b"], name="layer"),
        helper.make_node("Gemm", ["b", "a", ""], ["c"], name="product", transB=1),
        helper.make_node("Gemm", ["c", "b", "bias"], ["y"], name="biased"),
        domains=("com.microsoft",),
        bias=np.ones(4, np.float32),
    )
    placement = place(prepare(made.SerializeToString()))
    assert placement.names == ["layer", "product"]
    assert placement.unquantized == (Unquantized("biased", "Gemm", "the weights are computed"),)


def test_folding_leaves_weights_that_others_use() -> None:
    """Two convolutions share ``conv.weight``; the folded one of the node ``conv`` once took its name, and its place."""
    r = np.random.default_rng(0)
    ones = np.ones(4, np.float32)
    known = {"conv.weight": r.normal(size=(4, 4, 1, 1)).astype(np.float32), "g": 3 * ones, "z": 0 * ones, "v": ones}
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"], name="conv"),
        helper.make_node("BatchNormalization", ["a", "g", "z", "z", "v"], ["b"], name="bn"),
        helper.make_node("Conv", ["b", "conv.weight"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 4, 2, 2])],
        [helper.make_tensor_value_info("y", 1, [1, 4, 2, 2])],
        [numpy_helper.from_array(v, k) for k, v in known.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = r.normal(size=(1, 4, 2, 2)).astype(np.float32)
    expected = session(model.SerializeToString()).run(None, {"x": x})[0]
    found = session(prepare(model.SerializeToString()).SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_junk_is_refused() -> None:
    with pytest.raises(GraphError, match="cannot be read"):
        prepare(b"\x08\x07not an onnx file")

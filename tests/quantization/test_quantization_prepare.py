"""`prepare`: what is brought back to float, what stays as it is and is said, what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import GraphError
from edgekit.quantization.prepare import prepare
from edgekit.runtime.onnxruntime import session

F = TensorProto.FLOAT
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

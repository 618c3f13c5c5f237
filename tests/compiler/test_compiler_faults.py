"""inspect of an ONNX file, and what is wrong with a hostile one: by node, operator, attribute and tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.compiler.faults import check_structure, inference_fault
from edgekit.errors import GraphError

pytestmark = pytest.mark.usefixtures("in_process")

N = helper.make_node


def made(nodes: list[Any], x: list[Any], *, y: list[Any] | None = None, opset: int = 17, **weights: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def branch(reads: str) -> onnx.GraphProto:
    out = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    return helper.make_graph([N("Neg", [reads], ["inner"], "inside")], "b", [], [out])


SIDE = np.array([1 << 20, 1 << 20])
HOSTILE = {
    "the graph has a cycle: a (Add) -> r (Relu) -> a (Add); it goes through 'y'": made(
        [N("Add", ["x", "y"], ["h"], "a"), N("Relu", ["h"], ["y"], "r")], [1, 4]
    ),
    "the graph has a cycle: a (Add) -> a (Add); it goes through 'y'": made([N("Add", ["x", "y"], ["y"], "a")], [4]),
    "the graph has a cycle: i (If) -> i (If); it goes through 'y'": made(
        [N("If", ["t"], ["y"], "i", then_branch=branch("y"), else_branch=branch("x"))], [4], t=np.array(True)
    ),
    "node r (Relu) reads 'h', which node n (Neg) makes only after it: nodes out of order": made(
        [N("Relu", ["h"], ["y"], "r"), N("Neg", ["x"], ["h"], "n")], [1, 4]
    ),
    "node a (Add) reads 'nowhere', which nothing makes": made([N("Add", ["x", "nowhere"], ["y"], "a")], [4]),
    "the inside reads too early": made(
        [N("If", ["t"], ["y"], "i", then_branch=branch("own"), else_branch=branch("x")), N("Neg", ["x"], ["own"], "n")],
        [4],
        t=np.array(True),
    ),
    "'y' is made twice: by node r (Relu) and by node n (Neg)": made(
        [N("Relu", ["x"], ["y"], "r"), N("Neg", ["x"], ["y"], "n")], [4]
    ),
    "'x' is made twice: by an input or a weight and by node r (Relu)": made([N("Relu", ["x"], ["x"], "r")], [4]),
    "output 'y' is made by no node": made([N("Relu", ["x"], ["h"], "r")], [4]),
    "input x is 1x1099511627776: an axis has 16777216 at most": made([N("Relu", ["x"], ["y"], "r")], [1, 1 << 40]),
    "input x is 1048576x1048576: 4398046511104 bytes, 2147483648 at most": made(
        [N("Relu", ["x"], ["y"], "r")], [1 << 20, 1 << 20]
    ),
    "'h', which node bomb (Expand) makes, is 1048576x1048576: 4398046511104 bytes": made(
        [N("Expand", ["x", "s"], ["h"], "bomb"), N("ReduceMax", ["h"], ["y"], "m")], [1], s=SIDE
    ),
    "node c (Conv) has the attribute 'nosuch', which Conv of opset 17 lacks": made(
        [N("Conv", ["x", "w"], ["y"], "c", nosuch=7)], [1, 3, 8, 8], w=np.zeros((4, 3, 3, 3), np.float32)
    ),
    "node s (Softmax): the attribute axis is of type string, int was expected": made(
        [N("Softmax", ["x"], ["y"], "s", axis="one")], [1, 3]
    ),
    "node c (Cast) lacks the attribute 'to'": made([N("Cast", ["x"], ["y"], "c")], [1, 3]),
}


@pytest.mark.parametrize("cause", HOSTILE)
def test_a_hostile_graph_is_named_by_node_and_tensor(cause: str) -> None:
    expected = "node i (If) reads 'own', which node n (Neg) makes only after it" if cause.startswith("the inside") else cause
    with pytest.raises(GraphError) as caught:
        check_structure(HOSTILE[cause])
    assert caught.value.message.startswith(expected)
    assert caught.value.hint


def test_negative_and_repeated_weights_are_named() -> None:
    model = made([N("Add", ["x", "w"], ["y"], "a")], [4], w=np.zeros(4, np.float32))
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
    with pytest.raises(GraphError, match="weight 'w' is there twice"):
        check_structure(model)
    del model.graph.initializer[1]
    model.graph.initializer[0].dims[:] = [4, -4]
    with pytest.raises(GraphError, match="weight 'w' has an axis of -4: 4x-4"):
        check_structure(model)
    model.graph.initializer[0].dims[:] = [5]
    with pytest.raises(GraphError, match="weight 'w' of shape 5 has 16 bytes, 20 were expected"):
        check_structure(model)
    model.graph.initializer[0].data_type = 99
    with pytest.raises(GraphError, match="weight 'w' has the type 99, which ONNX does not know"):
        check_structure(model)


def test_an_opset_of_the_future_is_named() -> None:
    with pytest.raises(GraphError, match="opset 99 is newer than what onnx"):
        check_structure(made([N("Relu", ["x"], ["y"])], [4], opset=99))


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (
            N("Conv", ["x", "w"], ["y"], "c", pads=[1, 1, 1]),
            "node c (Conv): Attribute pads has incorrect size (pads=[1, 1, 1])",
        ),
        (N("Concat", ["x", "x"], ["y"], "cat", axis=9), "node cat (Concat): axis must be in [-rank, rank-1] (axis=9)"),
        (N("Relu", ["x"], ["y"], "r"), ""),
    ],
)
def test_what_contradicts_an_operator_is_named_with_its_attribute(node: Any, said: str) -> None:
    model = made([node], [1, 3, 8, 8], w=np.zeros((4, 3, 3, 3), np.float32))
    check_structure(model)
    assert inference_fault(model) == said


def test_inspect_shows_the_contradiction_and_refuses_a_cycle(tmp_path: Path, cli: Callable[..., Any]) -> None:
    onnx.save(made([N("Concat", ["x", "x"], ["y"], "cat", axis=9)], [1, 3]), tmp_path / "odd.onnx")
    done = cli("inspect", tmp_path / "odd.onnx")
    assert done.code == 0
    assert "contradicts itself, and is likely to be refused: node cat (Concat)" in done.out
    onnx.save(made([N("Add", ["x", "y"], ["y"], "a")], [4]), tmp_path / "cycle.onnx")
    done = cli("inspect", tmp_path / "cycle.onnx", "--json")
    assert done.code == 1
    assert done.json["error"].startswith("the graph has a cycle: a (Add) -> a (Add)")


def test_a_wrong_output_shape_of_an_exporter_is_no_fault() -> None:
    model = made([N("Relu", ["x"], ["y"], "r")], ["N", 4], y=["N", 1, 9])
    check_structure(model)
    assert inference_fault(model) == ""


def test_an_onnx_file_is_inspected_as_its_bundle_is(tiny_bundle: Bundle, tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "m.onnx").write_bytes(tiny_bundle.read(FLOAT_GRAPH))
    before = sorted(os.listdir(tmp_path))
    done = cli("inspect", tmp_path / "m.onnx", "--json")
    whole = cli("inspect", tiny_bundle.path, "--json").json
    assert whole["graphs"]["model.onnx"].pop("counted_at") == {"n": 1}
    assert done.json["graphs"]["m.onnx"] == whole["graphs"]["model.onnx"]
    assert done.json["targets"] == whole["targets"]
    assert done.json["inputs"] == whole["inputs"]
    assert done.json["size_bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert sorted(os.listdir(tmp_path)) == before  # nothing is written


def test_dynamic_axes_are_counted_as_stated(tmp_path: Path, cli: Callable[..., Any]) -> None:
    file = tmp_path / "m.onnx"
    onnx.save(made([N("Conv", ["x", "w"], ["y"], "c")], ["N", 3, "H", "H"], w=np.zeros((4, 3, 3, 3), np.float32)), file)
    done = cli("inspect", file, "--shape", "x:1x3x10x10", "--json").json
    assert done["graphs"]["m.onnx"]["macs"] == 8 * 8 * 4 * 27
    assert done["notes"] == []
    assert "dynamic axes count as 1: state those of x by --shape" in cli("inspect", file).out
    assert cli("inspect", file, "--shape", "x:1x3").code == 2


def test_shape_is_for_files_only(tiny_bundle: Bundle, cli: Callable[..., Any]) -> None:
    done = cli("inspect", tiny_bundle.path, "--shape", "x:1x3x32x32")
    assert done.code == 2
    assert "--shape is for an ONNX file" in done.err


def test_a_quantized_file_counts_as_import_brings_it(tmp_path: Path, cli: Callable[..., Any]) -> None:
    nodes = [
        N("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "dq"),
        N("MatMulInteger", ["q", "w", "z"], ["h"], "mm"),
        N("Cast", ["h"], ["f"], "c", to=TensorProto.FLOAT),
        N("Mul", ["f", "s"], ["y"], "m"),
    ]
    onnx.save(made(nodes, [1, 4], w=np.ones((4, 2), np.int8)), tmp_path / "q.onnx")
    found = cli("inspect", tmp_path / "q.onnx", "--json").json
    assert "edgekit import brings them back to float" in found["notes"][0]
    assert {row["builds"] for row in found["targets"] if row["target"] == "rtx-ada"} == {"engine"}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.child
def test_a_damaged_file_is_one_line(tiny_bundle: Bundle, tmp_path: Path, cli: Callable[..., Any], share: float) -> None:
    data = tiny_bundle.read(FLOAT_GRAPH)
    (tmp_path / "m.onnx").write_bytes(data[: int(len(data) * share)])
    done = cli("inspect", tmp_path / "m.onnx")
    assert done.code == 1
    assert done.err.startswith("error: m.onnx is not an ONNX file: ")
    assert len(done.err.splitlines()) == 2


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (
            N("Conv", ["x", "w"], ["y"], "c", pads=[1, 1, 1]),
            "node c (Conv): Attribute pads has incorrect size (pads=[1, 1, 1])",
        ),
        (N("Add", ["x", "y"], ["y"], "a"), "the graph has a cycle: a (Add) -> a (Add)"),
        (N("Relu", ["h"], ["y"], "r"), "node r (Relu) reads 'h', which nothing makes"),
    ],
)
def test_import_names_them_too(node: Any, said: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    onnx.save(made([node], [1, 3, 8, 8], w=np.zeros((4, 3, 3, 3), np.float32)), tmp_path / "m.onnx")
    done = cli("import", tmp_path / "m.onnx", "--out", tmp_path / "m.edge")
    assert done.code == 1
    assert said in done.err
    assert not (tmp_path / "m.edge").exists()

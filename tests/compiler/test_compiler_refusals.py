"""What a refusal of TensorRT names: node, operator, the attribute at fault, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler.refusals import cure, explained

N = helper.make_node


def made(node: Any, opset: int = 18, **weights: Any) -> bytes:
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(whole.SerializeToString())


HALF = np.array([1, 1, 0.5, 0.5], np.float32)
RESIZE = N(
    "Resize", ["x", "", "s"], ["y"], "rs", mode="cubic", coordinate_transformation_mode="tf_crop_and_resize", antialias=1
)


@pytest.mark.parametrize(
    ("refusal", "said", "hint"),
    [
        (
            'Resize (node rs): (antialias == 0) && "Antialiasing is not supported currently."',
            '"Antialiasing is not supported currently."; node rs has antialias=1',
            "export Resize without antialias=1",
        ),
        (
            'Resize (node rs): (transformationMode == "half_pixel") && "only supports half_pixel transformation modes!"',
            "; node rs has coordinate_transformation_mode='tf_crop_and_resize'",
            "export Resize without coordinate_transformation_mode='tf_crop_and_resize'",
        ),
        ("Resize (node rs): false", "Resize (node rs): TensorRT has no such operator", "cut Resize off before the export"),
        (
            "Resize (node number 0): too many",
            "too many; node rs has antialias=1, coordinate_transformation_mode='tf_crop_and_resize', mode='cubic'",
            "import it again with fixed shapes",
        ),
        ("Error Code 4 (IResizeLayer rs: mode is unknown)", "; node rs has mode='cubic'", "export Resize without mode='cubic'"),
        ("IBuilder: out of memory", "IBuilder: out of memory", "import it again with fixed shapes"),
        (
            "Resize (node rs): mode? [checkMacros.cpp::catchCudaError::250] Error Code 1: no driver",
            "Resize (node rs): mode?; node rs has mode='cubic'",
            "export Resize without mode='cubic'",
        ),
    ],
)
def test_a_refusal_names_the_attribute_at_fault(refusal: str, said: str, hint: str) -> None:
    graph = made(RESIZE, s=HALF)
    assert explained(graph, refusal).endswith(said)
    assert explained(graph, refusal).startswith(refusal.split(" ", 1)[0])
    assert cure(graph, refusal).startswith(hint)


def test_a_layer_that_tensorrt_made_of_a_node_names_it() -> None:
    nms = N("NonMaxSuppression", ["boxes", "scores"], ["y"], "my_nms")
    refusal = "IBuilder: Assertion !layerImpls.empty() failed. my_nms_0 has no runners"
    assert cure(made(nms), refusal).startswith("cut NonMaxSuppression off before the export")


def test_what_decides_a_branch_is_asked_for() -> None:
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branches = {
        f"{name}_branch": helper.make_graph([N(op, ["x"], ["z"])], name, [], [value])
        for name, op in (("then", "Relu"), ("else", "Neg"))
    }
    model = onnx.load_model_from_string(made(N("If", ["c"], ["y"], "choose", **branches), k=np.array(16000)))
    model.graph.input.append(helper.make_tensor_value_info("rate", TensorProto.INT64, []))
    model.graph.node.insert(0, N("Equal", ["rate", "k"], ["c"]))
    refusal = "[graphScope.cpp::analyze::471] Error Code 2: Internal Error (Assertion tScope.getType() failed)"
    graph = model.SerializeToString()
    assert explained(graph, refusal).endswith("; the graph holds If (choose), decided at run time")
    assert cure(graph, refusal).startswith("import it again with what decides If: --constant rate:V;")


@pytest.mark.parametrize(
    "refusal",
    ["OutOfMemory (Requested size was 1 bytes.)", "Could not find any implementation for node {ForeignNode[/a/Reshape_2]}"],
)
def test_a_refusal_of_another_kind_blames_no_branch_nor_reshape(refusal: str) -> None:
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branch = helper.make_graph([N("Relu", ["x"], ["z"])], "b", [], [value])
    graph = made(N("If", ["c"], ["y"], "choose", then_branch=branch, else_branch=branch), c=np.array(True))
    assert explained(graph, refusal) == refusal
    assert cure(graph, refusal) == "import it again with fixed shapes (--shape), or change this node"


def test_a_baked_in_batch_is_told_and_every_shape_input_named() -> None:
    graph = made(N("Relu", ["x"], ["y"]))
    assert "--batch N" in cure(graph, "/r: reshape changes volume. Reshaping [1,64] to [4,64].")
    asked = "a, b decides shapes: TensorRT needs such values when it compiles"
    assert "--constant a:V,V --constant b:V,V" in cure(graph, asked)


def test_a_branch_on_a_shape_asks_for_the_shape() -> None:
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branch = helper.make_graph([N("Relu", ["x"], ["z"])], "b", [], [value])
    model = onnx.load_model_from_string(made(N("If", ["c"], ["y"], "choose", then_branch=branch, else_branch=branch)))
    for node in (N("Cast", ["s"], ["c"], to=TensorProto.BOOL), N("Shape", ["x"], ["s"])):
        model.graph.node.insert(0, node)
    assert "--shape" in cure(model.SerializeToString(), "graphScope.cpp: Error Code 2")


def test_long_refusals_keep_what_the_node_has() -> None:
    found = explained(made(RESIZE, s=HALF), f"Resize (node rs): antialias {'x' * 900}")
    assert len(found) == 500
    assert found.endswith("; node rs has antialias=1")


@pytest.mark.parametrize(
    ("node", "said", "hint"),
    [
        (N("Det", ["x"], ["y"], "d"), "Det (node d): TensorRT has no such operator", "hint: cut Det off before the export"),
        (RESIZE, "node rs has", "hint: export Resize without"),
    ],
)
def test_a_build_that_is_refused_says_it(node: Any, said: str, hint: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    weights = {"s": HALF} if node is RESIZE else {}
    (tmp_path / "m.onnx").write_bytes(made(node, **weights))
    assert onnx.load(tmp_path / "m.onnx").graph.node[0].name == node.name
    assert cli("import", tmp_path / "m.onnx", "--out", tmp_path / "m.edge").code == 0
    done = cli("build", tmp_path / "m.edge", "--target", "rtx-ada")
    assert done.code == 1
    assert said in done.err
    assert hint in done.err

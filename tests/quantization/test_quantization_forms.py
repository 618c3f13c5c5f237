"""The forms beside int8 through the verb: what is stored, what is said, and graphs of other floats."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.bundle import Bundle
from edgekit.errors import GraphError

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(2, 6, 256)).astype(np.float32)


def normal(*shape: int, scale: float = 0.2) -> Array:
    return RNG.normal(0, scale, shape).astype(np.float32)


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}_{output}", **attributes)


def imported(nodes: list[Any], weights: dict[str, Any], x: Array, folder: Path) -> tuple[Bundle, Path]:
    """The bundle that ``edgekit import`` makes of the graph, and a folder of eight samples like ``x``."""
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "given.onnx").write_bytes(model.SerializeToString())
    calib = folder / "calib"
    calib.mkdir()
    for i in range(8):
        np.savez(calib / f"{i}.npz", x=np.roll(x, i, axis=-1))
    return edgekit.import_onnx(folder / "given.onnx", out=folder / "given.edge"), calib


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (TensorProto.FLOAT16, "int8"),
        (TensorProto.DOUBLE, "int8"),
        (TensorProto.FLOAT16, "fp8"),
        (TensorProto.DOUBLE, "weights8"),
        (TensorProto.FLOAT16, "weights4"),
    ],
)
def test_other_floats_take_every_form(kind: int, form: str, tmp_path: Path) -> None:
    """Inputs and outputs keep their type, the graph between them is float32, and TensorRT-RTX builds it."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [node("MatMul", "x w", "a"), node("Relu", "a", "r"), node("MatMul", "r v", "y")]
    weights = {"w": normal(256, 128).astype(dtype), "v": normal(128, 128).astype(dtype)}
    bundle, calib = imported(nodes, weights, ROWS.astype(dtype), tmp_path)
    made = edgekit.quantize(
        bundle, out=tmp_path / "made.edge", calib=calib, format=form, method="auto" if form != "int8" else "minmax"
    )
    figures = made.manifest.history[-1].figures
    assert figures["snr_db"] > 15
    assert [(spec.name, spec.dtype) for spec in (*made.manifest.inputs, *made.manifest.outputs)] == [
        ("x", dtype.name),
        ("y", dtype.name),
    ]
    pytest.importorskip("tensorrt_rtx")
    assert edgekit.build(made, target="rtx-ada").engine


def test_recurrent_layers_alone_take_weights_and_say_what_was_stored(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Their MACs were counted for nothing, and asked ONNX Runtime for an empty graph."""
    nodes, weights = [node("LSTM", "x w r", "y", hidden_size=80)], {"w": normal(1, 320, 64), "r": normal(1, 320, 80, scale=0.1)}
    x = RNG.normal(size=(12, 1, 64)).astype(np.float32)
    bundle, calib = imported(nodes, weights, x, tmp_path)
    figures = {}
    for form in ("weights8", "weights4"):
        made = edgekit.quantize(bundle, out=tmp_path / f"{form}.edge", calib=calib, format=form)
        figures[form] = made.manifest.history[-1].figures
        assert figures[form]["layers"] == {form: 2, "float": 0}
    assert figures["weights4"]["stored"] == figures["weights8"]["stored"]
    stored = figures["weights4"]["stored"]["int8"]
    assert (stored["tensors"], stored["weights"], stored["bytes_before"]) == (2, 320 * 144, 4 * 320 * 144)
    assert stored["bytes_after"] == 320 * 144 + 2 * 4 * 320
    said = capfd.readouterr().err
    assert "int8: 46080 weights in 2 tensors" in said
    assert "int4" not in said
    with pytest.raises(GraphError, match="no layer can be fp8"):
        edgekit.quantize(bundle, out=tmp_path / "fp8.edge", calib=calib, format="fp8")


def test_the_answer_tells_int4_from_int8(cli: Callable[..., Any], tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "a"), node("Transpose", "a", "b", perm=[0, 2, 1]), node("MatMul", "v b", "c")]
    nodes.append(node("MatMul", "u c", "y"))  # too small
    weights = {"w": normal(256, 128), "v": normal(128, 128), "u": normal(8, 128)}
    bundle, calib = imported(nodes, weights, ROWS, tmp_path)
    found = cli("quantize", bundle.path, "--out", tmp_path / "q.edge", "--calib", calib, "--format", "weights4")
    assert found.code == 0
    assert "32768 weights in int4 (128 KiB became 18); 16384 weights in int8 (64 KiB became 16)" in found.out
    assert "MACs" not in found.out
    figures = Bundle.open(tmp_path / "q.edge").manifest.history[-1].figures
    assert figures["layers"] == {"weights4": 2, "float": 1}


@pytest.mark.parametrize(
    ("form", "held", "types"),
    [
        ("fp8", "fp8 inputs and weights", {"fp8", "float"}),
        ("weights8", "int8 weights", {"float"}),
        ("weights4", "int4 and int8 weights", {"float"}),
    ],
)
def test_what_is_said_of_a_bundle_names_its_form(
    cli: Callable[..., Any], form: str, held: str, types: set[str], tmp_path: Path
) -> None:
    """The file is called model.int8.onnx all the same."""
    nodes = [node("MatMul", "x w", "a"), node("Relu", "a", "r"), node("MatMul", "r v", "y")]
    bundle, calib = imported(nodes, {"w": normal(256, 128), "v": normal(128, 128)}, ROWS, tmp_path)
    made = edgekit.quantize(bundle, out=tmp_path / "made.edge", calib=calib, format=form)
    assert made.form == form
    plot = tmp_path / "layers.svg"
    compared = cli("compare", made.path, "--layers", "--plot", plot)
    assert compared.code == 0
    assert {row["type"] for row in edgekit.compare(made, layers=True)["layers"]} == types
    assert ("fp8 layer" in plot.read_text(encoding="utf-8")) == ("fp8" in compared.out) == (form == "fp8")
    kit = edgekit.build(made, target="jetson-thor").kit
    assert kit is not None
    with zipfile.ZipFile(kit) as archive:
        assert f"precision {form}\n" in archive.read("README.txt").decode()
        assert json.loads(archive.read("build.json"))["precision"] == form
    built = cli("build", made.path, "--target", "jetson-thor", "--precision", "int8", "--json").json
    assert built["precision"] == form
    assert built["note"].startswith(f"{held} where the graph says so, float16 elsewhere")
    assert "int8 speed" not in built["note"]
    assert cli("inspect", made.path, "--json").json["graphs"]["model.int8.onnx"]["form"] == form
    assert cli("inspect", kit, "--json").json["precision"] == form
    edgekit.report(made, out=tmp_path / "report.html")
    assert f'<span class="tag">{form}</span>' in (tmp_path / "report.html").read_text(encoding="utf-8")

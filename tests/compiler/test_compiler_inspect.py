"""inspect: what a graph costs, and which targets take it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import Bundle
from edgekit.compiler import build
from edgekit.compiler.coverage import coverage, refused
from edgekit.compiler.versions import readers
from edgekit.quantization import quantize
from edgekit.targets import USER_TARGETS, load_targets

pytestmark = pytest.mark.usefixtures("in_process")

N = helper.make_node


def graph(nodes: list[Any], x: list[Any], opset: int = 17, **weights: Any) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def plain(opset: int) -> onnx.ModelProto:
    return graph([N("Relu", ["x"], ["y"])], [1, 4], opset)


def test_every_operator_is_counted_with_its_bytes(tiny_bundle: Bundle, cli: Callable[..., Any]) -> None:
    found = cli("inspect", tiny_bundle.path, "--json").json["graphs"]["model.onnx"]
    rows = {row["op"]: row for row in found["layers"]}
    assert sum(row["layers"] for row in found["layers"]) == found["nodes"]
    assert sum(row["macs"] for row in found["layers"]) == found["macs"]
    assert sum(row["bytes"] for row in found["layers"]) == found["bytes"]
    assert rows["Relu"]["bytes"] == 2 * 4 * 16 * 32 * 32
    assert rows["Flatten"] == {"op": "Flatten", "layers": 1, "macs": 0, "parameters": 0, "bytes": 0}  # renames, moves nothing
    heaviest = found["heaviest"][0]
    assert (heaviest["op"], heaviest["reads"], heaviest["writes"]) == ("Conv", "1x16x32x32", "1x16x32x32")
    assert heaviest["weights"].startswith("16x16x3x3")


def test_every_layer_on_request(tiny_bundle: Bundle, cli: Callable[..., Any]) -> None:
    graph_ = cli("inspect", tiny_bundle.path, "--layers", "--json").json["graphs"]["model.onnx"]
    assert len(graph_["every_layer"]) == sum(row["layers"] for row in graph_["layers"]) - 1  # Flatten is none
    assert "heaviest" not in graph_


def test_inspect_says_what_takes_the_graph(
    tiny_bundle: Bundle, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text("[mine]\nlike = 'jetson-orin-nx'\n", encoding="utf-8")
    monkeypatch.setenv(USER_TARGETS, str(tmp_path / "mine.toml"))
    rows = {row["target"]: row for row in cli("inspect", tiny_bundle.path, "--json").json["targets"]}
    assert list(rows) == list(load_targets())
    assert (rows["mine"]["builds"], rows["rtx-ada"]["builds"], rows["x86-cpu"]["builds"]) == ("kit", "engine", None)
    assert rows["x86-cpu"]["runs"]
    assert not rows["jetson-xavier-nx"]["runs"]
    assert "older than the kit's 8.6" in rows["jetson-xavier-nx"]["why"]
    assert "jetson-thor" in cli("inspect", tiny_bundle.path).out


def test_the_quantized_graph_decides(
    tiny_bundle: Bundle, tmp_path: Path, calibration_folder: Path, cli: Callable[..., Any]
) -> None:
    made = quantize(tiny_bundle, out=tmp_path / "q.edge", calib=calibration_folder, samples=8, method="minmax")
    rows = {row["target"]: row for row in cli("inspect", made.path, "--json").json["targets"]}
    orin = rows["jetson-orin-nano"]
    assert (orin["precision"], orin["why"]) == ("int8", None)
    assert [entry.split(" ")[0] for entry in build(made, target="jetson-orin-nano").tensorrt.split(", ")] == orin[
        "tensorrt"
    ].split(", ")


@pytest.mark.parametrize("opset", [17, 18, 19, 21, 22, 23])
def test_it_reads_as_build_does(opset: int) -> None:
    for form, typed in (("float", opset), ("int8", max(opset, 19))):
        for row in coverage(plain(opset), form):
            target = load_targets()[row["target"]]
            able, _ = readers(target, typed, opset)
            assert row["runs"] == bool(able or target.kind != "device"), (row, form)
            if target.kind == "device" and able:
                assert row["tensorrt"] == ", ".join(entry.tensorrt for entry in able)


def test_what_tensorrt_refuses_is_named_and_a_cpu_runs_it() -> None:
    nodes = [N("NonZero", ["x"], ["i"], name=f"look{k}") for k in range(5)] + [N("Cast", ["i"], ["y"], to=TensorProto.FLOAT)]
    rows = {row["target"]: row for row in coverage(graph(nodes, [1, 4]), "float")}
    assert not rows["rtx-ada"]["runs"]
    assert "NonZero (look0), NonZero (look1), NonZero (look2) and 2 more" in rows["rtx-ada"]["why"]
    assert rows["jetson-orin-nano"]["runs"]  # classic TensorRT has had it since 8.5
    assert rows["x86-cpu"]["runs"]
    rows = {row["target"]: row for row in coverage(graph([N("Det", ["x"], ["y"], name="d")], [4, 4]), "float")}
    assert "Det (d)" in rows["jetson-orin-nano"]["why"]


def test_a_scatter_is_refused_for_its_reduction_only() -> None:
    ends: dict[str, Any] = {"i": np.zeros((1, 1), np.int64), "u": np.ones((1, 4), np.float32)}
    for reduction, names in (("none", []), ("add", ["ScatterND (s, reduction='add')"])):
        nodes = [N("ScatterND", ["x", "i", "u"], ["y"], name="s", reduction=reduction)]
        assert refused(graph(nodes, [2, 4], **ends)) == names


def test_fp8_goes_where_tensor_cores_have_it() -> None:
    rows = {row["target"]: row for row in coverage(plain(19), "fp8")}
    assert {name for name, row in rows.items() if not row["runs"]} >= {"jetson-orin-nano", "rtx-turing", "rtx-ampere", "a2"}
    assert {name for name, row in rows.items() if row["runs"]} >= {"rtx-ada", "rtx-blackwell", "jetson-thor", "l4"}
    assert "has no fp8" in rows["rtx-ampere"]["why"]

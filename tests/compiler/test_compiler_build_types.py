"""`edgekit build`: which types an engine computes in, and sparse weights."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, INT8_GRAPH, Bundle
from edgekit.compiler import build, build_engine, import_onnx, summarise
from edgekit.compiler.compilation import compile_graph
from edgekit.errors import GoldenError, UsageError
from edgekit.manifest import Tolerance, history_entry

from .bundles_to_build import linear, record, write

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def quantized(tmp_path: Path) -> Bundle:
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(32, 32)), random.normal(size=(4, 32)).astype(np.float32)
    graphs = {FLOAT_GRAPH: linear(weight), INT8_GRAPH: linear(weight, quantized=True)}
    golden = {FLOAT_GRAPH: Tolerance("relative", 1e-4), INT8_GRAPH: Tolerance("snr_db", 30.0)}
    return write(tmp_path / "q.edge", graphs, x, ("n", 32), golden=golden)


@pytest.mark.parametrize("precision", ["best", "int8"])
def test_an_int8_engine_computes_in_float16_elsewhere(quantized: Bundle, precision: str) -> None:
    made = build(quantized, target="rtx-ada", precision=precision)
    assert made.precision == "int8"
    assert "float16 elsewhere" in made.note
    found = record(quantized, "rtx-ada")
    assert found["opset"] == 19
    assert found["golden_snr_db"] > 30
    assert found["golden"] == {"kind": "snr_db", "limit": 30.0}
    assert build(quantized, target="rtx-ada", precision="fp32").precision == "fp32"
    assert record(quantized, "rtx-ada")["graph_sha256"] == quantized.manifest.files[FLOAT_GRAPH]


def test_an_int8_engine_owes_what_its_own_graph_reaches(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(32, 32)), random.normal(size=(1, 32)).astype(np.float32)
    graphs = {FLOAT_GRAPH: linear(weight), INT8_GRAPH: linear(weight, quantized=True)}
    bundle = write(tmp_path / "t.edge", graphs, x, ("n", 32), golden={INT8_GRAPH: Tolerance("snr_db", 60.0)})
    build(bundle, target="jetson-thor")
    found = record(bundle, "jetson-thor")
    assert found["golden"]["limit"] == pytest.approx(found["golden_snr_db"] - 3, abs=0.06)


def cancelling(weight: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """As `linear`, quantized, behind (x + 500) - 500, which keeps no more than 0.25 of x in float16."""
    made = linear(weight, quantized=True)
    made.graph.node[0].input[0] = "b"
    made.graph.node.insert(0, helper.make_node("Sub", ["a", "big"], ["b"]))
    made.graph.node.insert(0, helper.make_node("Add", ["x", "big"], ["a"]))
    made.graph.initializer.append(numpy_helper.from_array(np.float32(500), "big"))
    return made


def test_int8_keeps_float32_around_it_where_float16_makes_noise_of_its_size(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(32, 32)), random.normal(size=(4, 32)).astype(np.float32)
    graphs = {FLOAT_GRAPH: linear(weight), INT8_GRAPH: cancelling(weight)}
    bundle = write(tmp_path / "c.edge", graphs, x, ("n", 32))
    made = build(bundle, target="rtx-ada")
    assert made.precision == "int8"
    assert "float32 outside of int8, because fp16 did not hold: float16 alone" in made.note
    assert record(bundle, "rtx-ada")["graph_sha256"] == bundle.manifest.files[INT8_GRAPH]


def test_int8_keeps_float32_around_it_where_tensorrt_refuses_float16(
    quantized: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(trt: Any, graph: bytes, *rest: Any) -> build_engine.Built:
        if b"fp16" in graph:
            raise build_engine.BuildError("no float16 here")
        return build_engine.Built(b"plan")

    monkeypatch.setattr(build_engine, "build", refuse)
    request = {"float_graph": str(quantized.file(FLOAT_GRAPH)), "int8_graph": str(quantized.file(INT8_GRAPH))}
    request |= {
        "golden": str(quantized.file(GOLDEN)),
        "form": "int8",
        "precision": "best",
        "target_precisions": ["fp32", "fp16", "int8"],
    }
    request |= {"engine": True, "module": "tensorrt_rtx", "compute_capability": "8.9", "target": "rtx-ada"}
    request |= {"sparse": True, "profiles": {}, "shapes": {}, "batch_axes": {}}
    answer = compile_graph(request, tmp_path)
    assert (answer["precision"], answer["opset"], answer["golden_snr_db"]) == ("int8", 17, None)
    assert "no float16 here" in answer["notes"][0]
    assert (tmp_path / "graph.onnx").read_bytes() == quantized.read(INT8_GRAPH)


def test_best_falls_back_to_fp32_where_fp16_does_not_hold(tmp_path: Path) -> None:
    # sums of large terms that cancel: (x + 500) - 500 keeps no more than 0.25 of x in float16
    nodes = [
        helper.make_node("Add", ["x", "big"], ["a"]),
        helper.make_node("Sub", ["a", "big"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    made = linear(np.eye(8), extra=nodes)
    made.graph.initializer.append(numpy_helper.from_array(np.float32(500), "big"))
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    bundle = write(tmp_path / "b.edge", {FLOAT_GRAPH: made}, x, ("n", 8))
    result = build(bundle, target="rtx-ada")
    assert result.precision == "fp32"
    assert "dB" in result.note
    with pytest.raises(GoldenError, match="fp16"):
        build(bundle, target="rtx-ada", precision="fp16")


def sparse_bundle(path: Path, weight: np.ndarray[Any, Any]) -> Bundle:
    """A float and an int8 graph of one product, of which two weights of every four along K are zero."""
    weight.reshape(-1, 4, weight.shape[1])[:, 1:3] = 0
    x = np.random.default_rng(1).normal(size=(4, len(weight))).astype(np.float32)
    graphs = {FLOAT_GRAPH: linear(weight), INT8_GRAPH: linear(weight, quantized=True)}
    golden = {FLOAT_GRAPH: Tolerance("relative", 1e-4), INT8_GRAPH: Tolerance("snr_db", 30.0)}
    return write(path, graphs, x, ("n", len(weight)), golden=golden)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_builder_looks_for_sparse_kernels_where_weights_are_24(tmp_path: Path, precision: str) -> None:
    bundle = sparse_bundle(tmp_path / "s.edge", np.random.default_rng(0).normal(size=(64, 32)))
    made = build(bundle, target="rtx-ampere", precision=precision)
    found = record(bundle, "rtx-ampere")
    assert (found["flags"], found["sparse_layers"], made.sparse_layers) == (["SPARSE_WEIGHTS"], 1, 1)
    assert "1 of 1 layers is 2:4: SPARSE_WEIGHTS is set" in made.note
    assert build(bundle.path, target="rtx-ampere", precision=precision).sparse_layers == 1
    assert {graph["sparse_layers"] for graph in summarise(bundle.path)["graphs"].values()} == {1}


def test_sparse_weights_are_only_said_where_the_target_cannot_use_them(tmp_path: Path) -> None:
    bundle = sparse_bundle(tmp_path / "s.edge", np.random.default_rng(0).normal(size=(64, 32)))
    made = build(bundle, target="rtx-turing", precision="fp16")
    assert record(bundle, "rtx-turing")["flags"] == []
    assert (made.sparse_layers, "1 of 1 layers is 2:4, which SM 7.5 cannot use" in made.note) == (1, True)


def test_dense_weights_get_no_flag(quantized: Bundle) -> None:
    made = build(quantized, target="rtx-ampere")
    assert (record(quantized, "rtx-ampere")["flags"], made.sparse_layers) == ([], 0)
    assert "2:4" not in made.note


def test_the_flag_reaches_the_builders_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back from TensorRT-RTX itself, in the moment in which it builds."""
    trt: Any = pytest.importorskip("tensorrt_rtx")
    bundle = sparse_bundle(tmp_path / "s.edge", np.random.default_rng(0).normal(size=(64, 32)))
    seen: list[bool] = []

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.builder = real(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.builder, name)

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            seen.append(config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS))
            return self.builder.build_serialized_network(network, config)

    real = trt.Builder
    monkeypatch.setattr(trt, "Builder", Builder)
    request = {"float_graph": str(bundle.file(FLOAT_GRAPH)), "int8_graph": None, "golden": str(bundle.file(GOLDEN))}
    request |= {"precision": "fp16", "target_precisions": ["fp32", "fp16"], "engine": True, "form": "int8", "target": "here"}
    request |= {"module": "tensorrt_rtx", "compute_capability": "8.6"}
    request |= {"profiles": {"x": [[1, 64], [1, 64], [1, 64]]}, "shapes": {}, "batch_axes": {"x": 0, "y": 0}}
    for sparse in (True, False):
        answer = compile_graph({**request, "sparse": sparse}, tmp_path)
        assert answer["flags"] == (["SPARSE_WEIGHTS"] if sparse else [])
    assert seen == [True, False]
    assert (tmp_path / "plan.engine").stat().st_size > 1000


@pytest.mark.child
def test_a_kit_tells_the_device_to_look_for_sparse_kernels(tmp_path: Path) -> None:
    bundle = sparse_bundle(tmp_path / "s.edge", np.random.default_rng(0).normal(size=(64, 32)))
    made = build(bundle, target="jetson-orin-nano")
    assert made.kit is not None
    zipfile.ZipFile(made.kit).extractall(tmp_path / "kit")
    assert json.loads((tmp_path / "kit" / "build.json").read_text())["flags"] == ["SPARSE_WEIGHTS"]
    assert "--sparsity=enable" in (tmp_path / "kit" / "README.txt").read_text()
    command = [sys.executable, "build_engine.py", "--module", "tensorrt_rtx", "--compute-capability", "8.6", "--no-check"]
    done = subprocess.run(command, cwd=tmp_path / "kit", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["precision"] == "int8"


@pytest.mark.parametrize("target", ["rtx-ampere", "rtx-turing", "jetson-orin-nano"])
def test_fp8_needs_its_hardware(tmp_path: Path, target: str) -> None:
    entry = history_entry("quantize", {}, {"format": "fp8"})
    graphs = {FLOAT_GRAPH: linear(np.eye(16)), INT8_GRAPH: linear(np.eye(16), quantized=True)}
    bundle = write(tmp_path / "f.edge", graphs, np.ones((1, 16), np.float32), ("n", 16), history=(entry,))
    for precision in ("best", "int8"):
        with pytest.raises(UsageError, match=r"fp8, which needs SM 8\.9 .* is SM [78]\.[576]") as caught:
            build(bundle, target=target, precision=precision)
        assert "--format int8" in caught.value.hint
    assert build(bundle, target=target, precision="fp16").precision == "fp16"
    assert build(bundle, target="rtx-ada").precision == "fp8"


def test_a_float16_graph_owes_its_choices_too(tmp_path: Path) -> None:
    """The index of one of two columns that differ by less than float16 can tell, beside a float output that is fine."""
    columns = np.random.default_rng(0).normal(size=(16, 1)) * (1 + np.array([[0.0, 1e-5]]))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="scores"),
        helper.make_node("ArgMax", ["y"], ["best"], name="best", axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2]),
            helper.make_tensor_value_info("best", TensorProto.INT64, ["n"]),
        ],
        [numpy_helper.from_array(columns.astype(np.float32), "w")],
    )
    source = tmp_path / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    bundle = import_onnx(source, out=tmp_path / "two.edge")
    with pytest.raises(GoldenError, match="fp16"):
        build(bundle, target="rtx-ada", precision="fp16")
    assert build(bundle, target="rtx-ada", precision="best").precision == "fp32"

"""`edgekit build`: engines without a GPU, the cache, precision, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, INT8_GRAPH, Bundle
from edgekit.compiler import build, build_engine, child, import_onnx, summarise
from edgekit.compiler.compilation import compile_graph
from edgekit.errors import BackendError, BundleError, GoldenError, GraphError, MissingExtra, UsageError
from edgekit.manifest import FORMAT, Manifest, TensorSpec, Tolerance, history_entry
from edgekit.runtime.golden import save_golden
from edgekit.runtime.onnxruntime import session
from edgekit.trust import is_trusted

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.usefixtures("in_process")


def write(
    path: Path, graphs: dict[str, onnx.ModelProto], x: np.ndarray[Any, Any], shape: tuple[int | str, ...], **extra: Any
) -> Bundle:
    """A bundle of one input ``x`` and one output ``y``; golden outputs by the first graph."""
    files = {name: made.SerializeToString() for name, made in graphs.items()}
    truth = session(next(iter(files.values()))).run(None, {"x": x})[0]
    with Bundle.create(path) as draft:
        for name, data in files.items():
            draft.write(name, data)
        draft.write(GOLDEN, save_golden({"x": x}, {"y": truth}))
        inputs, outputs = (TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", ("n", truth.shape[1])),)
        draft.manifest = Manifest(FORMAT, path.stem, "tensor", inputs, outputs, **extra)
    return Bundle.open(path)


def linear(weight: np.ndarray[Any, Any], quantized: bool = False, extra: list[Any] | None = None) -> onnx.ModelProto:
    """x (n, k) @ w -> y, in float32 or as explicit symmetric Q/DQ."""
    weights: dict[str, Any] = {"w": weight.astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    if quantized:
        scale = np.abs(weight).max(0) / 127
        weights = {
            "q": np.rint(weight / scale).astype(np.int8),
            "ws": scale.astype(np.float32),
            "wz": np.zeros(len(scale), np.int8),
        }
        weights |= {"xs": np.float32(4 / 127), "xz": np.int8(0)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["q", "ws", "wz"], ["wd"], axis=1),
            helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product"),
        ]
    graph = helper.make_graph(
        extra or nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def quantized(tmp_path: Path) -> Bundle:
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(32, 32)), random.normal(size=(4, 32)).astype(np.float32)
    graphs = {FLOAT_GRAPH: linear(weight), INT8_GRAPH: linear(weight, quantized=True)}
    golden = {FLOAT_GRAPH: Tolerance("relative", 1e-4), INT8_GRAPH: Tolerance("snr_db", 30.0)}
    return write(tmp_path / "q.edge", graphs, x, ("n", 32), golden=golden)


def record(bundle: Bundle, target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Bundle.open(bundle.path).file(f"engines/{target}.json").read_bytes())
    return found


def test_an_engine_is_built_once_and_then_cached(digits_bundle: Bundle) -> None:
    first = build(digits_bundle, target="rtx-ada")
    assert (first.cached, first.precision, first.kit) == (False, "fp16", None)
    assert first.engine is not None
    engine = first.engine.read_bytes()
    assert len(engine) == first.size_bytes > 10_000
    again = build(digits_bundle.path, target="rtx-ada")
    assert again.cached
    assert again.engine is not None
    assert again.engine.read_bytes() == engine
    assert [h.stage for h in Bundle.open(digits_bundle.path).manifest.history] == ["train", "build"]
    assert first.bundle.digest == digits_bundle.digest
    assert record(digits_bundle, "rtx-ada")["golden_snr_db"] >= 40


def test_whatever_decides_the_engine_misses_the_cache(tiny_bundle: Bundle) -> None:
    wishes: list[dict[str, Any]] = [{}, {"precision": "fp32"}, {"batch": 4}, {"batch": "1..4"}]
    seen = {record(build(tiny_bundle, target="jetson-thor", **wish).bundle, "jetson-thor")["key"] for wish in wishes}
    seen.add(record(build(tiny_bundle, target="jetson-orin-nx").bundle, "jetson-orin-nx")["key"])
    assert len(seen) == 5


def test_a_damaged_or_missing_engine_is_not_served(digits_bundle: Bundle) -> None:
    made = build(digits_bundle, target="rtx-ada", precision="fp32")
    assert made.engine is not None
    data = made.engine.read_bytes()
    made.engine.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(digits_bundle.path)
    assert not build(digits_bundle.path, target="rtx-ada", precision="fp32").cached
    assert build(digits_bundle.path, target="rtx-ada", precision="fp32").cached


def test_an_engine_of_another_machine_is_served_and_never_trusted_for_that(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CI restores its cache on other machines; a runtime there refuses the engine until it is built there."""
    made = build(tiny_bundle, target="rtx-ada")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    served = build(tiny_bundle.path, target="rtx-ada")
    assert served.cached
    assert "edgekit build --again" in served.note
    assert not is_trusted(record(made.bundle, "rtx-ada")["engine_sha256"])
    again = build(tiny_bundle.path, target="rtx-ada", again=True)
    assert is_trusted(record(again.bundle, "rtx-ada")["engine_sha256"])
    assert "edgekit build --again" not in build(tiny_bundle.path, target="rtx-ada").note


@pytest.mark.child
def test_a_cached_build_loads_no_heavy_library(digits_bundle: Bundle) -> None:
    build(digits_bundle, target="rtx-ada")
    code = (
        "import sys; from edgekit.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'onnx', 'onnxruntime', 'tensorrt_rtx', 'tensorrt', 'torch', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "build", str(digits_bundle.path), "--target", "rtx-ada", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cached"] is True


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


def test_the_batch_becomes_the_profile(digits_bundle: Bundle) -> None:
    build(digits_bundle, target="rtx-ada", batch="1..8")
    assert record(digits_bundle, "rtx-ada")["profiles"] == {"x": [[1, 1, 28, 28], [8, 1, 28, 28], [8, 1, 28, 28]]}


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


def test_what_tensorrt_refuses_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["z"], name="nz"), helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT)]
    bundle = write(tmp_path / "n.edge", {FLOAT_GRAPH: linear(np.eye(4), extra=nodes)}, np.ones((1, 4), np.float32), (1, 4))
    with pytest.raises(GraphError, match=r"NonZero \(node nz\)"):
        build(bundle, target="rtx-ada", precision="fp32")
    assert not Bundle.open(bundle.path).has("engines/rtx-ada.engine")
    assert not bundle.manifest.history


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"target": "toaster"}, UsageError, "no target"),
        ({"target": "jetson-orin-nano", "precision": "fp8"}, UsageError, "does not run 'fp8'"),
        ({"target": "rtx-ada", "precision": "fp8"}, UsageError, "does not make fp8"),
        ({"target": "rtx-ada", "precision": "double"}, UsageError, "does not run 'double'"),
        ({"target": "rtx-ada", "precision": "int8"}, BundleError, "no int8 graph"),
        ({"target": "rtx-ada", "batch": "8..1"}, UsageError, "--batch"),
    ],
)
def test_wrong_wishes_are_refused(tiny_bundle: Bundle, options: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        build(tiny_bundle, **options)
    assert sorted(Bundle.open(tiny_bundle.path).manifest.files) == ["golden.npz", "model.onnx"]


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


def test_a_damaged_bundle_is_refused_even_when_cached(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    assert cli("build", tiny_bundle.path, "--target", "rtx-ada").code == 0
    graph = tiny_bundle.path / FLOAT_GRAPH
    data = graph.read_bytes()
    graph.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    done = cli("build", tiny_bundle.path, "--target", "rtx-ada")
    assert done.code == 1
    assert "damaged" in done.err


def test_without_tensorrt_rtx_the_extra_is_named(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.compiler.versions._RTX_DISTRIBUTIONS", ())
    with pytest.raises(MissingExtra) as caught:
        build(tiny_bundle, target="rtx-ada")
    assert caught.value.hint == "pip install 'edgekit[rtx]'"
    assert build(tiny_bundle, target="jetson-thor").kit is not None


@pytest.mark.child
def test_a_tensorrt_rtx_without_its_library_is_not_called_missing(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "broken/tensorrt_rtx.py"
    module.parent.mkdir()
    module.write_text("raise ImportError('libtensorrt_rtx.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(module.parent))  # where the child that compiles looks too
    with pytest.raises(BackendError, match=r"tensorrt_rtx does not load: libtensorrt_rtx\.so\.1") as caught:
        build(tiny_bundle, target="rtx-ada")
    assert "install it again" in caught.value.hint


def test_the_command_answers_what_scripts_rely_on(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    engine = cli("build", tiny_bundle.path, "--target", "rtx-blackwell", "--json")
    assert engine.code == 0
    assert engine.json["engine"].endswith("engines/rtx-blackwell.engine")
    assert engine.json["kit"] is None
    kit = cli("build", tiny_bundle.path, "--target", "jetson-orin-nano", "--json")
    assert kit.json["engine"] is None
    assert zipfile.is_zipfile(kit.json["kit"])
    assert cli("build", tiny_bundle.path, "--target", "toaster").code == 2


def test_inspect_tells_of_bundles_and_engines(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    assert cli("build", tiny_bundle.path, "--target", "rtx-ada").code == 0
    bundle = cli("inspect", tiny_bundle.path, "--json").json
    assert bundle["graphs"]["model.onnx"]["macs"] == 32 * 32 * 3 * 9 * 16 + 32 * 32 * 16 * 9 * 16 + 160
    assert bundle["graphs"]["model.onnx"]["sparse_layers"] == 0
    assert bundle["graphs"]["model.onnx"]["parameters"] == 16 * 27 + 16 * 144 + 170
    assert set(bundle["files"]) == {"model.onnx", "golden.npz", "engines/rtx-ada.engine", "engines/rtx-ada.json"}
    engine = tiny_bundle.path / "engines/rtx-ada.engine"
    found = cli("inspect", engine, "--json")
    assert found.json["compute_capability"] == "8.9"
    assert "without a GPU" in found.json["note"]
    engine.write_bytes(b"other")
    assert cli("inspect", engine).code == 1
    assert cli("inspect", tiny_bundle.path / "nothing").code == 2


def test_targets_lists_every_figure_with_its_source(cli: Callable[..., Any]) -> None:
    rows = cli("targets", "--json").json["targets"]
    nano = next(row for row in rows if row["name"] == "jetson-orin-nano")
    assert nano["bandwidth_gbs"] == {"value": 102, "source": "NVIDIA Jetson Orin Nano Super developer kit data sheet"}
    assert "jetson-orin-nano" in cli("targets").out


@pytest.mark.child
def test_only_the_reader_of_foreign_files_has_an_address_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    set_to: list[int] = []
    monkeypatch.setattr(
        resource, "setrlimit", lambda what, limits: set_to.append(limits[0]) if what == resource.RLIMIT_AS else None
    )
    child._limit_memory(0)
    assert not set_to
    child._limit_memory(1 << 30)
    assert set_to == [1 << 30]
    for available, limit in ((10 << 30, 10 << 30), (1 << 30, child.LEAST_SPACE), (None, child.ADDRESS_SPACE)):
        monkeypatch.setattr(child, "memory_in", lambda path, name, found=available: found)
        child._limit_memory(child.ADDRESS_SPACE)
        assert set_to[-1] == limit


@pytest.mark.child
def test_an_engine_is_built_without_an_address_limit(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    call = child.call

    def noted(*arguments: Any, address_space: int = child.ADDRESS_SPACE) -> dict[str, Any]:
        asked.append(address_space)
        return call(*arguments, address_space=address_space)

    monkeypatch.setattr(child, "call", noted)
    build(tiny_bundle, target="rtx-ada")
    assert asked == [0]


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


def test_an_operator_that_tensorrt_refuses_is_written_out(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "mean")]
    norm = helper.make_node("LayerNormalization", ["x", "scale"], ["y", "mean"], name="norm")  # TensorRT gives no mean
    graph = helper.make_graph([norm], "g", inputs, outputs, [numpy_helper.from_array(np.ones(4, np.float32), "scale")])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "norm.onnx").write_bytes(made.SerializeToString())
    result = build(import_onnx(tmp_path / "norm.onnx", out=tmp_path / "norm.edge"), target="rtx-ada", precision="fp32")
    assert result.engine is not None
    assert "LayerNormalization written out by its ONNX definition" in result.note


def crash(code: signal.Signals) -> child.NativeCrash:
    made = child.NativeCrash(f"the native parser crashed ({code.name}) on this graph", "")
    made.code = -code
    return made


@pytest.mark.child
def test_a_crash_of_tensorrt_is_tried_again_with_fixed_axes(digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = child.call, list[bool]()

    def call(function: str, request: dict[str, Any], *rest: Any, **named: Any) -> dict[str, Any]:
        asked.append("fixed" in request)
        if len(asked) == 1:
            raise crash(signal.SIGSEGV)
        return real(function, request, *rest, **named)

    monkeypatch.setattr(child, "call", call)
    result = build(digits_bundle, target="rtx-ada", precision="fp32", again=True)
    assert asked == [False, True]
    assert "axes of one size are fixed in the graph" in result.note


@pytest.mark.parametrize(("code", "times"), [(signal.SIGABRT, 2), (signal.SIGKILL, 1)])
@pytest.mark.child
def test_a_crash_is_told_and_memory_that_is_short_is_not_tried_twice(
    digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, code: signal.Signals, times: int
) -> None:
    asked = []

    def call(*request: Any, **_: Any) -> dict[str, Any]:
        asked.append(request)
        raise crash(code)

    monkeypatch.setattr(child, "call", call)
    with pytest.raises(GraphError, match="crashed"):
        build(digits_bundle, target="rtx-ada", precision="fp32", again=True)
    assert len(asked) == times


def test_sizes_that_nobody_stated_are_noted(tmp_path: Path, cli: Callable[..., Any]) -> None:
    made = linear(np.ones((8, 4)))
    points = helper.make_tensor_value_info("p", TensorProto.FLOAT, ["points", 4])
    made.graph.input.append(points)
    made.graph.node.append(helper.make_node("Neg", ["p"], ["q"]))
    made.graph.output.append(helper.make_tensor_value_info("q", TensorProto.FLOAT, ["points", 4]))
    onnx.save(made, tmp_path / "m.onnx")
    import_onnx(tmp_path / "m.onnx", out=tmp_path / "b.edge")
    result = build(tmp_path / "b.edge", target="jetson-orin-nano", batch="1..8", precision="fp32")
    assert "takes points=1 only, which nobody stated: import it with --shape or --dynamic" in result.note


def test_a_target_of_another_kind_takes_the_place_of_its_namesake(
    tmp_path: Path, tiny_bundle: Bundle, cli: Callable[..., Any]
) -> None:
    for like, file in (("jetson-orin-nano", "board.kit.zip"), ("rtx-ada", "board.engine")):
        (tmp_path / "t.toml").write_text(f'[board]\nlike = "{like}"\ntitle = "Ours"\n')
        done = cli("build", tiny_bundle.path, "--target", "board", "--precision", "fp32", "--targets", tmp_path / "t.toml")
        assert done.code == 0, done.err
        kept = [name for name in Bundle.open(tiny_bundle.path).manifest.files if name.startswith("engines/")]
        assert kept == sorted(["engines/board.json", f"engines/{file}"])
        assert not (tiny_bundle.path / "engines" / ("board.engine" if file.endswith("zip") else "board.kit.zip")).exists()


def test_a_kit_of_what_no_tensorrt_builds_says_so(tmp_path: Path) -> None:
    det = helper.make_node("Det", ["x"], ["y"], "d")
    nms = helper.make_node("NonZero", ["x"], ["y"], "where")
    for node, kind, usable in ((det, TensorProto.FLOAT, False), (nms, TensorProto.INT64, True)):
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4])
        graph = helper.make_graph([node], "g", [x], [helper.make_tensor_value_info("y", kind, None)])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
        import_onnx(tmp_path / "m.onnx", out=tmp_path / f"{node.name}.edge")
        made = build(tmp_path / f"{node.name}.edge", target="jetson-orin-nano", precision="fp32")
        assert made.usable is usable  # NonZero is classic TensorRT's, not RTX's
        said = "NOTHING BUILDS THIS KIT: TensorRT does not build Det (d); ONNX Runtime runs its graph"
        assert made.note.startswith(said) is not usable


@pytest.mark.child
def test_nowhere_to_write_is_told_before_a_build(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(child, "call", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(UsageError, match="may not be written"):
        build(tiny_bundle, target="rtx-ada")


def test_a_damaged_engine_of_another_target_stops_no_build(tiny_bundle: Bundle, cli: Callable[..., Any]) -> None:
    build(tiny_bundle, target="rtx-ada")
    engine = tiny_bundle.path / "engines/rtx-ada.engine"
    engine.write_bytes(b"x" + engine.read_bytes()[1:])
    assert cli("build", tiny_bundle.path, "--target", "rtx-ampere").code == 0
    shown = cli("inspect", tiny_bundle.path)
    assert f"hint: make it again: edgekit build {tiny_bundle.path} --target rtx-ada" in shown.err
    assert not build(tiny_bundle.path, target="rtx-ada").cached
    assert cli("inspect", tiny_bundle.path).code == 0

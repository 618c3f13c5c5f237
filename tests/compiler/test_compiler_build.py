"""`edgekit build`: engines without a GPU, the cache, crashes, and what is refused."""

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

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.compiler import build, child, import_onnx
from edgekit.errors import BackendError, BundleError, GraphError, MissingExtra, UsageError
from edgekit.trust import is_trusted

from .bundles_to_build import linear, record, write

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.usefixtures("in_process")


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


def test_the_batch_becomes_the_profile(digits_bundle: Bundle) -> None:
    build(digits_bundle, target="rtx-ada", batch="1..8")
    assert record(digits_bundle, "rtx-ada")["profiles"] == {"x": [[1, 1, 28, 28], [8, 1, 28, 28], [8, 1, 28, 28]]}


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

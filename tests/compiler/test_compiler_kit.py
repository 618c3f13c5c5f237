"""The build kit: deterministic, self-contained, and written for the TensorRT of every JetPack."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bundle import INT8_GRAPH, Bundle
from edgekit.compiler import build, build_engine, build_options
from edgekit.compiler.kit import SCRIPTS
from edgekit.compiler.versions import readers
from edgekit.quantization import quantize
from edgekit.runtime.golden import load_golden
from edgekit.targets import target_named

SPEC = {"precision": "int8", "profiles": {"x": [[1, 4], [2, 4], [8, 4]]}, "flags": ["SPARSE_WEIGHTS"]}


@pytest.mark.parametrize(
    ("version", "network", "flags"),
    [
        ("8.6.1", 0b01, ["SPARSE_WEIGHTS", "INT8", "FP16"]),
        ("10.3", 0b11, ["SPARSE_WEIGHTS"]),
        ("10.16", 0b11, ["SPARSE_WEIGHTS"]),
        ("11.4", 0b10, ["SPARSE_WEIGHTS"]),
        ("rtx1.7", 0b01, ["SPARSE_WEIGHTS"]),
    ],
)
def test_each_version_gets_the_flags_it_knows(
    simulated_builder: Callable[..., Any], tiny_onnx: Path, version: str, network: int, flags: list[str]
) -> None:
    simulated = simulated_builder(version)
    built = build_engine.build(simulated.module, tiny_onnx.read_bytes(), dict(SPEC), lambda phase, share: True)
    assert built.plan.endswith(tiny_onnx.read_bytes())
    assert simulated.told["network"] == network
    assert simulated.told["flags"] == flags
    assert simulated.told["shapes"] == {"x": ((1, 4), (2, 4), (8, 4))}
    assert ("progress_monitor" in simulated.told) == (version != "8.6.1")


@pytest.mark.parametrize("noise", ["[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35)", ""])
def test_the_first_error_of_tensorrt_is_the_reason(simulated_builder: Callable[..., Any], tiny_onnx: Path, noise: str) -> None:
    simulated = simulated_builder("10.16")

    def fail(answer: Any) -> Any:
        for line in filter(None, [noise, "Error Code 4: the\n reason", "Error Code 2: what follows from it"]):
            simulated.logger.log(1, line)
        return answer

    simulated._build = lambda network, config: fail(None)
    with pytest.raises(build_engine.BuildError) as caught:
        build_engine.build(simulated.module, tiny_onnx.read_bytes(), dict(SPEC))
    assert str(caught.value) == "Error Code 4: the reason"
    simulated.refused_profile = lambda: fail(-1)
    with pytest.raises(build_engine.BuildError) as caught:
        build_engine.build(simulated.module, tiny_onnx.read_bytes(), dict(SPEC))
    assert str(caught.value) == "the profile does not fit the graph: Error Code 4: the reason"


def test_a_contradictory_profile_is_told_by_the_real_tensorrt(tiny_onnx: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    spec = {**SPEC, "flags": [], "profiles": {"x": [[n, 3, 32, 32] for n in (4, 2, 8)]}, "compute_capability": "8.9"}
    with pytest.raises(build_engine.BuildError, match="the profile does not fit the graph") as caught:
        build_engine.build(trt, tiny_onnx.read_bytes(), spec)
    assert "cudaError" not in str(caught.value)


def test_the_progress_share_never_falls() -> None:
    trt = types.SimpleNamespace(IProgressMonitor=type("IProgressMonitor", (), {"__init__": lambda self: None}))
    shares: list[float] = []
    monitor = build_engine._monitor(trt, lambda phase, share: shares.append(share) is None)
    monitor.phase_start("build", None, 2)
    for _ in range(2):
        monitor.phase_start("tactics", "build", 4)
        for step in range(4):
            assert monitor.step_complete("tactics", step)
        monitor.phase_finish("tactics")
    monitor.step_complete("build", 0)
    monitor.step_complete("build", 1)
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(1 / 8)
    assert shares[-1] == 1.0


def test_the_progress_of_several_threads_is_one() -> None:
    trt = types.SimpleNamespace(IProgressMonitor=type("IProgressMonitor", (), {"__init__": lambda self: None}))
    monitor = build_engine._monitor(trt, lambda phase, share: True)
    for depth in range(500):  # so that to sum them up takes time
        monitor.phase_start(f"phase {depth}", f"phase {depth - 1}", 10)

    def tactics(number: int) -> bool:
        for _ in range(200):
            monitor.phase_start(f"tactics {number}", "phase 499", 3)
            monitor.step_complete(f"tactics {number}", 0)
            monitor.phase_finish(f"tactics {number}")
        return True

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(tactics, range(4)))
    finally:
        sys.setswitchinterval(before)


@pytest.fixture
def kit(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    made = build(tiny_bundle, target="jetson-orin-nano", batch="1..8").kit
    assert made is not None
    zipfile.ZipFile(made).extractall(tmp_path / "kit")
    return tmp_path / "kit"


def test_a_kit_is_complete_and_deterministic(tiny_bundle: Bundle, kit: Path) -> None:
    made = tiny_bundle.path / "engines/jetson-orin-nano.kit.zip"
    first = made.read_bytes()
    hashed = {*(script.name for script in SCRIPTS), "golden.npz", "graph.onnx"}
    assert {p.name for p in kit.iterdir()} == {"README.txt", "build.json", *hashed}
    spec = json.loads((kit / "build.json").read_text())
    assert spec["files"] == {n: hashlib.sha256((kit / n).read_bytes()).hexdigest() for n in hashed}
    assert spec["profiles"] == {"x": [[1, 3, 32, 32], [8, 3, 32, 32], [8, 3, 32, 32]]}
    assert [e["tensorrt"] for e in spec["tensorrt"]] == ["8.6.2", "10.3.0", "10.16.2"]
    readme = (kit / "README.txt").read_text()
    assert "python3 build_engine.py" in readme
    assert "--maxShapes=x:8x3x32x32" in readme
    build(tiny_bundle.path, target="jetson-orin-nano", precision="fp32")
    assert made.read_bytes() != first
    build(tiny_bundle.path, target="jetson-orin-nano", batch="1..8")
    assert made.read_bytes() == first


def run_kit(kit: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a device would: its own process, only the kit's folder, no edgekit on the path."""
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "build_engine.py", *options]
    return subprocess.run(command, cwd=kit, capture_output=True, text=True, check=False)


def test_the_script_builds_a_real_engine(kit: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = run_kit(kit, "--module", "tensorrt_rtx", "--compute-capability", "8.9", "--no-check", "--out", "made")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    engine = kit / "made" / "jetson-orin-nano.engine"
    assert answer["engine_sha256"] == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert json.loads((kit / "made" / "jetson-orin-nano.json").read_text())["precision"] == "fp16"


def test_a_damaged_kit_is_refused(kit: Path) -> None:
    data = (kit / "graph.onnx").read_bytes()
    (kit / "graph.onnx").write_bytes(data[:-1] + b"x")
    done = run_kit(kit, "--no-check")
    assert done.returncode == 1
    assert "damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_tensorrt_the_script_says_so(kit: Path) -> None:
    done = run_kit(kit, "--no-check")
    assert done.returncode == 1
    assert "this Python has no usable tensorrt" in done.stderr
    assert "apt-get install tensorrt" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_is_python_3_8_with_numpy_only() -> None:
    """JetPack 5 has Python 3.8; the parser takes its grammar, the imports are the standard library's and numpy."""
    modules: set[str] = set()
    for script in SCRIPTS:
        tree = ast.parse(script.read_text(encoding="utf-8"), feature_version=(3, 8))
        modules |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        modules |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules - set(sys.stdlib_module_names) - {"__future__", ""} == {"numpy", *(script.stem for script in SCRIPTS[1:])}


def test_golden_of_the_kit_is_the_bundles(tiny_bundle: Bundle, kit: Path) -> None:
    with np.load(io.BytesIO((kit / "golden.npz").read_bytes())) as file:
        np.testing.assert_array_equal(file["output/y"], load_golden(tiny_bundle)[1]["y"])


def test_a_kit_names_only_the_jetpacks_that_read_it(tmp_path: Path, tiny_bundle: Bundle) -> None:
    nano = target_named("jetson-orin-nano")
    able, notes = readers(nano, 18)
    assert [entry.tensorrt for entry in able] == ["10.3.0", "10.16.2"]
    assert notes == ["not for JetPack 6.0: TensorRT 8.6.2 reads opset 17 at most, the graph has 18"]
    result = build(tiny_bundle, target="jetson-xavier-nx")
    assert "is older than the kit's 8.6" in result.note
    assert result.tensorrt == "none"
    assert "run python3 build_engine.py" not in result.note
    assert result.note.startswith("NOTHING BUILDS THIS KIT: no TensorRT for jetson-xavier-nx takes it")
    assert not result.usable
    assert result.kit is not None
    with zipfile.ZipFile(result.kit) as kit:
        readme = kit.read("README.txt").decode()
        assert json.loads(kit.read("build.json"))["tensorrt"] == []
    assert "NOTHING BUILDS THIS KIT" in readme
    assert "JetPack 5.1.x: TensorRT 8.5.2 is older than the kit's 8.6" in readme
    assert "python3 build_engine.py" not in readme
    again = build(result.bundle, target="jetson-xavier-nx")
    assert again.cached
    assert again.figures()["usable"] is False
    assert build(result.bundle, target="jetson-orin-nano").figures()["usable"] is True


@pytest.fixture
def int8_kit(tmp_path: Path, tiny_bundle: Bundle, calibration_folder: Path) -> tuple[Bundle, Path]:
    quantized = quantize(tiny_bundle, out=tmp_path / "q.edge", calib=calibration_folder, samples=8)
    made = build(quantized, target="jetson-orin-nano").kit
    assert made is not None
    zipfile.ZipFile(made).extractall(tmp_path / "kit")
    return quantized, tmp_path / "kit"


def test_an_int8_kit_has_a_graph_for_strongly_typed_tensorrt_and_one_for_flags(int8_kit: tuple[Bundle, Path]) -> None:
    quantized, kit = int8_kit
    spec = json.loads((kit / "build.json").read_text())
    assert (spec["graph"], spec["untyped_graph"]) == ("graph.onnx", "untyped.onnx")
    assert [e["tensorrt"] for e in spec["tensorrt"]] == ["8.6.2", "10.3.0", "10.16.2"]
    assert (kit / "untyped.onnx").read_bytes() == quantized.read(INT8_GRAPH)
    assert spec["files"]["untyped.onnx"] == quantized.manifest.files[INT8_GRAPH]
    assert "--onnx=untyped.onnx" in (kit / "README.txt").read_text()
    thor = build(quantized, target="jetson-thor").kit  # no TensorRT 8 there
    assert thor is not None
    assert "untyped.onnx" not in zipfile.ZipFile(thor).namelist()


@pytest.mark.parametrize(("version", "name"), [("8.6.1", "untyped.onnx"), ("10.3", "graph.onnx"), ("11.4", "graph.onnx")])
def test_the_script_picks_the_graph_that_its_tensorrt_reads(
    int8_kit: tuple[Bundle, Path],
    simulated_builder: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    name: str,
) -> None:
    _, kit = int8_kit
    simulated = simulated_builder(version)
    monkeypatch.setitem(sys.modules, "tensorrt", simulated.module)
    assert build_engine.main(["--kit", str(kit), "--no-check"]) == 0
    assert simulated.told["graph"] == (kit / name).read_bytes()
    answer = json.loads((kit / "jetson-orin-nano.json").read_text())
    assert answer["graph_sha256"] == hashlib.sha256((kit / name).read_bytes()).hexdigest()
    assert simulated.told["flags"] == (["INT8", "FP16"] if version == "8.6.1" else [])


def test_a_kit_names_the_jetpacks_that_read_either_graph() -> None:
    able, notes = readers(target_named("jetson-orin-nano"), 19, 17)
    assert [entry.tensorrt for entry in able] == ["8.6.2", "10.3.0", "10.16.2"]
    assert notes == []
    able, notes = readers(target_named("jetson-orin-nano"), 19, 18)
    assert [entry.tensorrt for entry in able] == ["10.3.0", "10.16.2"]
    assert notes == ["not for JetPack 6.0: TensorRT 8.6.2 reads opset 17 at most, the graph has 18"]


def test_a_tensorrt_without_network_flags_gets_no_precision_flags_it_lacks() -> None:
    trt = types.SimpleNamespace(BuilderFlag=types.SimpleNamespace(FP16=1))
    assert build_options.precision_flags(trt, "int8") == ["FP16"]

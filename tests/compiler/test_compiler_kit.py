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
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bundle import INT8_GRAPH, Bundle
from edgekit.compiler import build, build_engine, build_options
from edgekit.compiler.kit import SCRIPTS
from edgekit.compiler.versions import readers
from edgekit.quantization import quantize
from edgekit.runtime.golden import compare_arrays, load_golden, save_golden
from edgekit.targets import target_named

#: What each TensorRT's Python module has, of all that build_engine.py asks for (read from the bindings of each version).
_WEAK = {"FP16", "INT8", "SPARSE_WEIGHTS"}
API: dict[str, dict[str, set[str]]] = {
    "8.6": {"NetworkDefinitionCreationFlag": {"EXPLICIT_BATCH", "EXPLICIT_PRECISION"}, "BuilderFlag": _WEAK},
    "10.3": {"NetworkDefinitionCreationFlag": {"EXPLICIT_BATCH", "STRONGLY_TYPED"}, "BuilderFlag": _WEAK},
    "10.16": {"NetworkDefinitionCreationFlag": {"EXPLICIT_BATCH", "STRONGLY_TYPED"}, "BuilderFlag": _WEAK},
    "11.4": {"NetworkDefinitionCreationFlag": {"STRONGLY_TYPED"}, "BuilderFlag": {"SPARSE_WEIGHTS"}},
    "rtx": {"NetworkDefinitionCreationFlag": {"STRONGLY_TYPED"}, "BuilderFlag": {"SPARSE_WEIGHTS"}},
}
BITS = {"EXPLICIT_BATCH": 0, "EXPLICIT_PRECISION": 1, "STRONGLY_TYPED": 1}
COMMON = {
    "Builder": "create_builder_config create_network create_optimization_profile build_serialized_network",
    "IBuilderConfig": "add_optimization_profile create_timing_cache get_timing_cache set_flag set_timing_cache "
    "progress_monitor num_compute_capabilities set_compute_capability",
    "OnnxParser": "parse num_errors get_error",
    "IOptimizationProfile": "set_shape",
}


class Recorder:
    """Stands in for one TensorRT object: allows the attributes of that version, notes what is called."""

    def __init__(self, allowed: str, calls: list[tuple[str, Any]], answers: dict[str, Any]) -> None:
        self.__dict__.update(_allowed=set(allowed.split()), _calls=calls, _answers=answers)

    def __getattr__(self, name: str) -> Any:
        if name not in self._allowed:
            raise AttributeError(name)

        def call(*arguments: Any, **_: Any) -> Any:
            self._calls.append((name, arguments))
            return self._answers.get(name)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._allowed:
            raise AttributeError(name)
        self._calls.append((name, value))


def fake(version: str, calls: list[tuple[str, Any]]) -> Any:
    """A module with the enumerations and methods of one TensorRT version."""
    api = API[version]
    trt = types.SimpleNamespace()
    bits = {name: 0 if version == "rtx" else BITS[name] for name in api["NetworkDefinitionCreationFlag"]}
    trt.NetworkDefinitionCreationFlag = types.SimpleNamespace(**bits)
    trt.BuilderFlag = types.SimpleNamespace(**{name: name for name in api["BuilderFlag"]})
    trt.ILogger = type("ILogger", (), {"ERROR": 1, "__init__": lambda self: None})
    if version != "8.6":
        trt.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
    absent = {"8.6": {"progress_monitor"}}.get(version, set()) | (
        set() if version == "rtx" else {"num_compute_capabilities", "set_compute_capability"}
    )
    config = Recorder(" ".join(set(COMMON["IBuilderConfig"].split()) - absent), calls, {"add_optimization_profile": 0})
    profile = Recorder(COMMON["IOptimizationProfile"], calls, {})
    answers = {"create_builder_config": config, "create_optimization_profile": profile, "build_serialized_network": b"plan"}
    trt.Builder = lambda logger: Recorder(COMMON["Builder"], calls, answers)
    trt.OnnxParser = lambda network, logger: Recorder(COMMON["OnnxParser"], calls, {"parse": True})
    return trt


SPEC = {"precision": "int8", "profiles": {"x": [[1, 4], [2, 4], [8, 4]]}, "flags": ["SPARSE_WEIGHTS"]}


@pytest.mark.parametrize(
    ("version", "network", "flags"),
    [
        ("8.6", 0b01, ["SPARSE_WEIGHTS", "INT8", "FP16"]),
        ("10.3", 0b11, ["SPARSE_WEIGHTS"]),
        ("10.16", 0b11, ["SPARSE_WEIGHTS"]),
        ("11.4", 0b10, ["SPARSE_WEIGHTS"]),
        ("rtx", 0b01, ["SPARSE_WEIGHTS"]),
    ],
)
def test_each_version_gets_the_flags_it_knows(version: str, network: int, flags: list[str]) -> None:
    calls: list[tuple[str, Any]] = []
    built = build_engine.build(fake(version, calls), b"graph", dict(SPEC), lambda phase, share: True)
    assert built.plan == b"plan"
    assert [a for n, a in calls if n == "create_network"] == [(network,)]
    assert [a[0] for n, a in calls if n == "set_flag"] == flags
    assert [a for n, a in calls if n == "set_shape"] == [("x", (1, 4), (2, 4), (8, 4))]
    assert ("progress_monitor" in [n for n, _ in calls]) == (version != "8.6")


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


@pytest.fixture
def kit(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    made = build(tiny_bundle, target="jetson-orin-nano", batch="1..8").kit
    assert made is not None
    zipfile.ZipFile(made).extractall(tmp_path / "kit")
    return tmp_path / "kit"


def test_a_kit_is_complete_and_deterministic(tiny_bundle: Bundle, kit: Path) -> None:
    made = tiny_bundle.path / "engines/jetson-orin-nano.kit.zip"
    first = made.read_bytes()
    hashed = {"build_engine.py", "build_options.py", "golden.npz", "graph.onnx"}
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


class Gpu:
    """A device in host memory: the CUDA calls of the check, and an engine whose outputs a function makes."""

    def __init__(self, function: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], batch: tuple[int, int]) -> None:
        self.function, self.batch, self.live, self.memory = function, batch, 0, {}
        self.num_io_tensors, self.addresses, self.shape = 2, {}, ()

    def call(self, name: str, *arguments: Any) -> None:
        self.live -= name == "cudaFree"

    def malloc(self, size: int) -> Any:
        self.live += 1
        self.memory[self.live] = np.zeros(size, np.uint8)
        return types.SimpleNamespace(value=self.live)

    def copy(self, target: Any, source: Any, size: int, kind: int) -> None:
        import ctypes

        device = self.memory[(target if kind == 1 else source).value]
        host = (source if kind == 1 else target).value
        ctypes.memmove(*((device.ctypes.data, host) if kind == 1 else (host, device.ctypes.data)), size)

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "x" else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, int]]:
        return [(self.batch[0], 3), (self.batch[1], 3), (self.batch[1], 3)]

    def create_execution_context(self) -> Gpu:
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        assert self.batch[0] <= shape[0] <= self.batch[1]
        self.shape = shape

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        x = self.memory[self.addresses["x"]].view(np.float32).reshape(self.shape)
        self.memory[self.addresses["y"]] = np.ascontiguousarray(self.function(x), np.float32).view(np.uint8).ravel()
        return True

    def module(self) -> Any:
        return types.SimpleNamespace(
            ILogger=type("ILogger", (), {"ERROR": 1, "__init__": lambda s: None}),
            TensorIOMode=types.SimpleNamespace(INPUT="in"),
            nptype=lambda dtype: np.float32,
            Runtime=lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda plan: self),
        )


@pytest.mark.parametrize("batch", [(1, 8), (1, 2), (3, 3), (8, 8), (1, 1)])
def test_the_check_on_the_device_compares_every_golden_sample(tmp_path: Path, batch: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    (tmp_path / "golden.npz").write_bytes(save_golden({"x": x}, {"y": x * 2}))
    tolerance = {"kind": "snr_db", "limit": 40.0}
    good = Gpu(lambda a: a * 2, batch)
    assert build_engine.check(good.module(), b"", tmp_path / "golden.npz", tolerance, good) == {
        "snr_db": 200.0,
        "relative": 0.0,
    }
    assert good.live == 0
    for function in (lambda a: a * 2.1, lambda a: a * np.nan, lambda a: np.where(a == x[3], 0, a * 2)):
        wrong = Gpu(function, batch)
        with pytest.raises(build_engine.BuildError, match=r"misses|finite"):
            build_engine.check(wrong.module(), b"", tmp_path / "golden.npz", tolerance, wrong)


def test_choices_of_an_int8_engine_are_not_held_beside_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    ids = np.arange(4)
    tolerance = {"kind": "snr_db", "limit": 10.0}
    gpu = Gpu(lambda a: a, (4, 4))

    def check(outputs: dict[str, Any], found: dict[str, Any], quantized: bool) -> float:
        (tmp_path / "golden.npz").write_bytes(save_golden({"x": x}, outputs))
        monkeypatch.setattr(build_engine, "_run", lambda *_: found)
        return build_engine.check(gpu.module(), b"", tmp_path / "golden.npz", tolerance, gpu, quantized=quantized)["snr_db"]

    assert check({"y": x, "ids": ids}, {"y": x * np.float32(1.1), "ids": ids[::-1]}, True) == pytest.approx(20.0, abs=0.1)
    assert check({"ids": np.arange(40)}, {"ids": np.append(np.arange(39), 10**6)}, True) == pytest.approx(16.02, abs=0.1)
    for outputs, found, quantized in [
        ({"y": x, "ids": ids}, {"y": x, "ids": ids[::-1]}, False),
        ({"ids": ids}, {"ids": ids[::-1]}, True),
        ({"y": x, "ids": ids}, {"y": x * np.float32(2), "ids": ids}, True),
    ]:
        with pytest.raises(build_engine.BuildError, match="misses"):
            check(outputs, found, quantized)


@pytest.mark.parametrize(
    ("golden", "found"),
    [
        ([3.0, -4.0, -np.inf], [3.0, -4.5, -np.inf]),
        ([3e-35, -4e-35], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 1e-12]),
        ([0.0, 1e-40], [0.0, 0.0]),
        ([1.0, 2.0], [1.0, 2.0]),
    ],
)
def test_the_kit_measures_as_the_runtime_does(
    golden: list[float], found: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    truth, answer = np.array(golden, np.float32), np.array(found, np.float32)
    gpu = Gpu(lambda a: a, (1, 4))
    (tmp_path / "golden.npz").write_bytes(save_golden({"x": truth}, {"y": truth}))
    monkeypatch.setattr(build_engine, "_run", lambda *_: {"y": answer})
    result = build_engine.check(gpu.module(), b"", tmp_path / "golden.npz", {"kind": "snr_db", "limit": -1.0}, gpu)
    wanted = compare_arrays(truth, answer)
    assert (result["relative"], result["snr_db"]) == (pytest.approx(wanted.relative), pytest.approx(wanted.snr_db))


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


@pytest.mark.parametrize(("version", "name"), [("8.6", "untyped.onnx"), ("10.3", "graph.onnx"), ("11.4", "graph.onnx")])
def test_the_script_picks_the_graph_that_its_tensorrt_reads(
    int8_kit: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch, version: str, name: str
) -> None:
    _, kit = int8_kit
    calls: list[tuple[str, Any]] = []
    trt = fake(version, calls)
    trt.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert build_engine.main(["--kit", str(kit), "--no-check"]) == 0
    assert [arguments for call, arguments in calls if call == "parse"] == [((kit / name).read_bytes(),)]
    answer = json.loads((kit / "jetson-orin-nano.json").read_text())
    assert answer["graph_sha256"] == hashlib.sha256((kit / name).read_bytes()).hexdigest()
    assert [a[0] for n, a in calls if n == "set_flag"] == (["INT8", "FP16"] if version == "8.6" else [])


def test_a_kit_names_the_jetpacks_that_read_either_graph() -> None:
    able, notes = readers(target_named("jetson-orin-nano"), 19, 17)
    assert [entry.tensorrt for entry in able] == ["8.6.2", "10.3.0", "10.16.2"]
    assert notes == []
    able, notes = readers(target_named("jetson-orin-nano"), 19, 18)
    assert [entry.tensorrt for entry in able] == ["10.3.0", "10.16.2"]
    assert notes == ["not for JetPack 6.0: TensorRT 8.6.2 reads opset 17 at most, the graph has 18"]


def test_a_scalar_input_goes_along_with_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = {"x": np.ones((4, 3), np.float32), "t": np.float32(2)}
    (tmp_path / "golden.npz").write_bytes(save_golden(golden, {"y": golden["x"] * 2}))
    gpu = Gpu(lambda a: a * 2, (1, 2))
    gpu.get_tensor_profile_shape = lambda name, _: [(), (), ()] if name == "t" else [(1, 3), (2, 3), (2, 3)]
    monkeypatch.setattr(build_engine, "_run", lambda trt, engine, feeds, cuda: {"y": feeds["x"] * feeds["t"]})
    tolerance = {"kind": "snr_db", "limit": 40.0}
    assert build_engine.check(gpu.module(), b"", tmp_path / "golden.npz", tolerance, gpu)["snr_db"] == 200.0


def test_a_tensorrt_without_network_flags_gets_no_precision_flags_it_lacks() -> None:
    trt = types.SimpleNamespace(BuilderFlag=types.SimpleNamespace(FP16=1))
    assert build_options.precision_flags(trt, "int8") == ["FP16"]

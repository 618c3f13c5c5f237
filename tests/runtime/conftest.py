"""Bundles with preprocessing around the tiny graph, one whose weights were touched, and a simulated GPU with TensorRT."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.errors import EdgekitError
from edgekit.manifest import ImagePreprocessing
from edgekit.trust import trust_engine

Rewrite = Callable[..., Bundle]


@pytest.fixture
def rewrite(tmp_path: Path) -> Rewrite:
    """``rewrite(bundle, name, graph=bytes, **manifest)``: a copy with another graph or other manifest fields."""

    def write(bundle: Bundle, name: str, graph: bytes | None = None, **changes: Any) -> Bundle:
        with Bundle.create(tmp_path / name) as draft:
            draft.write(FLOAT_GRAPH, graph or bundle.file(FLOAT_GRAPH).read_bytes())
            draft.write(GOLDEN, bundle.file(GOLDEN).read_bytes())
            draft.manifest = msgspec.structs.replace(bundle.manifest, files={}, **changes)
        return Bundle.open(tmp_path / name)

    return write


@pytest.fixture
def photo_bundle(tiny_bundle: Bundle, rewrite: Rewrite) -> Callable[[str], Bundle]:
    """``photo_bundle(fit)``: 32x32 RGB in, ten labels out."""

    def make(fit: Any) -> Bundle:
        spec = ImagePreprocessing(32, 32, 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), fit=fit)
        labels = tuple("abcdefghij")
        return rewrite(tiny_bundle, f"{fit}.edge", task="image-classification", preprocessing=spec, labels=labels)

    return make


def _helper(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simulated_cuda, simulated_tensorrt = _helper("simulated_cuda"), _helper("simulated_tensorrt")
simulated_pycuda = _helper("simulated_pycuda")


class Simulation:
    """A GPU (`cuda`), its CUDA module (`runtime`; `driver` for pycuda) and a TensorRT (`trt`), which the process imports as
    the real ones."""

    def __init__(self, patch: pytest.MonkeyPatch, release: str, cuda: Any, library: str = "cuda-bindings") -> None:
        self.cuda, self.release = cuda, release
        self.trt = simulated_tensorrt.make_module(release, cuda)
        self.backend = "tensorrt-rtx" if release == simulated_tensorrt.RTX else "tensorrt"
        self.plan = simulated_tensorrt.plan
        self._pretend(patch, {self.trt.__name__: self.trt})
        if not isinstance(cuda, simulated_cuda.SimulatedCuda):
            return  # a real GPU, with the CUDA that is installed
        if library == "pycuda":
            package: Any = types.ModuleType("pycuda")
            package.VERSION_TEXT = "2026.1"
            self.runtime = None
            self.driver = simulated_pycuda.Driver(cuda)
            patch.setitem(sys.modules, "cuda.bindings.runtime", None)
            patch.setitem(sys.modules, "pycuda", package)
            patch.setitem(sys.modules, "pycuda.driver", self.driver)
            return
        self.runtime = cuda.module()
        bindings: Any = types.ModuleType("cuda.bindings")
        bindings.__version__ = "13.0.0"
        bindings.runtime = self.runtime
        self._pretend(
            patch, {"cuda": types.ModuleType("cuda"), "cuda.bindings": bindings, "cuda.bindings.runtime": self.runtime}
        )

    def _pretend(self, patch: pytest.MonkeyPatch, modules: dict[str, types.ModuleType]) -> None:
        for name, module in modules.items():
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            patch.setitem(sys.modules, name, module)

    def engine(self, bundle: Bundle, graph: str = FLOAT_GRAPH, *, trusted: bool = True, **changes: Any) -> Bundle:
        """The bundle with an engine for one of its graphs; ``changes`` of the record, and ``plan`` of what is in the engine.

        ``onnx``: what `build` made of that graph, where the engine is of that.
        """
        onnx = changes.pop("onnx", None) or bundle.read(graph)
        shapes = {spec.name: spec.shape for spec in bundle.manifest.inputs}
        profiles = {
            name: [[size if isinstance(axis, str) else axis for axis in shape] for size in (1, 4, 4)]
            for name, shape in shapes.items()
        }
        inside = {"sm": self.cuda.sm, "profiles": profiles, **changes.pop("plan", {})}
        plan = simulated_tensorrt.plan(onnx, self.trt, **inside)
        target = changes.get("target", "rtx-ampere" if self.backend == "tensorrt-rtx" else "simulated")
        digest = hashlib.sha256(plan).hexdigest()
        record = {
            "target": target,
            "kind": "rtx",
            "module": self.trt.__name__,
            "tensorrt": self.trt.__version__,
            "compute_capability": self.cuda.sm,
            "precision": "fp32" if graph == FLOAT_GRAPH else "int8",
            "file": f"engines/{target}.engine",
            "key": "k" * 64,
            "graph_sha256": hashlib.sha256(onnx).hexdigest(),
            "sources": {graph: bundle.manifest.files[graph]},
            "golden": {"kind": "snr_db", "limit": 40.0},
            "engine_sha256": digest,
            **changes,
        }
        if trusted:
            trust_engine(digest)
        files = {f"engines/{target}.engine": plan, f"engines/{target}.json": msgspec.json.encode(record)}
        return bundle.extend(files)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Simulation]:
    """``simulate(release, library="cuda-bindings", sm="8.6", integrated=False)``: from here on the process has a GPU.

    Caches are the test's own.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def make(release: str = simulated_tensorrt.RTX, library: str = "cuda-bindings", **gpu: Any) -> Simulation:
        return Simulation(monkeypatch, release, simulated_cuda.SimulatedCuda(**gpu), library)

    return make


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Simulation:
    """A real GPU with a simulated TensorRT: its "engines" copy input to output on the device, on the runner's stream.

    Skips, with the reason, where there is no GPU.
    """
    from edgekit.runtime.cuda import open_cuda

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    try:
        device = open_cuda().device()
    except EdgekitError as error:
        pytest.skip(f"no GPU to use: {error.message}")
    runtime = pytest.importorskip("cuda.bindings.runtime")
    simulation = Simulation(monkeypatch, simulated_tensorrt.RTX, types.SimpleNamespace(sm=device.sm))
    simulation.trt.execute = simulated_tensorrt.device_copy(runtime)
    del simulation.trt.CudaGraphStrategy  # a copy captures nothing by itself: the runner shall
    return simulation


RELEASES: list[str] = simulated_tensorrt.VERSIONS


@pytest.fixture(params=RELEASES)
def simulation(request: pytest.FixtureRequest, simulate: Callable[..., Simulation]) -> Simulation:
    """One for each supported TensorRT."""
    return simulate(request.param)

"""TensorRT's building half, simulated: what it is told is noted, and only names that a release has may be asked for."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import json
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.compiler import build_engine, check_engine, child
from edgekit.compiler.kit import make_kit
from edgekit.runtime.golden import save_golden
from edgekit.targets import target_named

API: dict[str, Any] = json.loads((Path(__file__).parents[1] / "runtime/tensorrt_api.json").read_text(encoding="utf-8"))
RELEASES: list[str] = API["versions"]
RTX = "rtx1.7"
_RUNTIME = Path(__file__).parents[1] / "runtime"


def _helper(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, _RUNTIME / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simulated_cuda, simulated_tensorrt = _helper("simulated_cuda"), _helper("simulated_tensorrt")
_ENUMERATIONS = (
    "BuilderFlag MemoryPoolType DeviceType HardwareCompatibilityLevel ProfilingVerbosity ComputeCapability "
    "NetworkDefinitionCreationFlag LayerInformationFormat OnnxParserFlag"
)


#: Of the network's creation flags, as the bindings of each release have them.
_BITS = {"EXPLICIT_BATCH": 0, "EXPLICIT_PRECISION": 1, "STRONGLY_TYPED": 1}


def _offers(name: str, attribute: str, release: str) -> bool:
    listed = API["classes"][name].get(attribute, "")
    return listed == "all" or release in listed.split()


class Part:
    """One object of TensorRT: an attribute that its class lacks in this release fails, as in the real one."""

    def __init__(self, kind: str, trt: Any, **attributes: Any) -> None:
        self.__dict__.update(_kind=kind, _trt=trt, **attributes)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and not _offers(self._kind, name, self._trt.release):
            raise AttributeError(f"TensorRT {self._trt.release} has no {self._kind}.{name}")
        if not name.startswith("_"):
            self._trt.used.add((self._kind, name))
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not _offers(self._kind, name, self._trt.release):
            raise AttributeError(f"TensorRT {self._trt.release} has no {self._kind}.{name}")
        self._trt.used.add((self._kind, name))
        self._trt.told[name] = value
        if name not in self._trt.ignored:
            self.__dict__[name] = value


def _enumeration(name: str, release: str) -> Any:
    class Member(str):
        __slots__ = ()

        def __int__(self) -> int:
            return 0 if release == RTX else _BITS.get(self, 0)

        @property
        def name(self) -> str:
            return str(self)

    members = {member: Member(member) for member in API["classes"][name] if _offers(name, member, release)}
    return types.SimpleNamespace(**members, __members__=members) if members else None


class SimulatedBuilder:
    """A module ``tensorrt``: `told` is what the configuration was given; the plan is the graph behind a line of JSON.

    ``gpu_only``: operators that no DLA takes. ``cores``: DLAs of the device. ``sm``: its compute capability.
    """

    def __init__(self, release: str, cores: int = 0, gpu_only: str = "", timings: bytes = b"timings") -> None:
        self.release, self.cores, self.gpu_only, self.timings = release, cores, gpu_only.split(), timings
        self.told: dict[str, Any] = {"flags": [], "parser_flags": []}
        self.network: Any = None
        self.refused_profile: Callable[[], int] = lambda: 0
        self.used: set[tuple[str, str]] = set()  # (class, attribute)
        self.ignored: set[str] = set()  # attributes that are taken, logged as unsupported, and left as they were
        module: Any = types.ModuleType("tensorrt")
        self.module = module
        module.__version__ = release
        module.ILogger = type("ILogger", (), {"ERROR": 1, "WARNING": 2, "__init__": lambda self: None})
        if release != "8.6.1":
            module.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
        for name in _ENUMERATIONS.split():
            if (found := _enumeration(name, release)) is not None:
                setattr(module, name, found)
        module.Builder, module.OnnxParser, module.Runtime = self._builder, self._parser, self._runtime

    def part(self, kind: str, **attributes: Any) -> Any:
        return Part(kind, self, **attributes)

    def _builder(self, logger: Any) -> Any:
        self.logger = logger
        return self.part(
            "Builder",
            create_network=self._network,
            create_builder_config=self._config,
            create_optimization_profile=lambda: self.part("IOptimizationProfile", set_shape=self._set_shape),
            build_serialized_network=self._build,
            num_DLA_cores=self.cores,
        )

    def _network(self, flags: int) -> Any:
        self.told["network"] = flags
        return self.part("INetworkDefinition", num_layers=0, num_inputs=0)

    def _set_shape(self, name: str, *shapes: Any) -> None:
        self.told.setdefault("shapes", {})[name] = shapes

    def _parser(self, network: Any, logger: Any) -> Any:
        def parse(graph: bytes) -> bool:
            self.graph = self.told["graph"] = graph
            self.told["parsed_with"] = list(self.told["parser_flags"])
            read = onnx.load_model_from_string(graph).graph
            nodes = read.node
            bytes_in = {value.name for value in read.input if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
            if any(node.op_type != "Cast" and bytes_in & set(node.input) for node in nodes):
                return False  # as TensorRT-RTX 1.7 does: "first input has type UInt8 but must have type Float, Half, ..."
            layers = [self._layer(node) for node in nodes]
            network.__dict__.update(num_layers=len(layers), get_layer=layers.__getitem__)
            self.network = network
            return True

        return self.part("OnnxParser", parse=parse, set_flag=self.told["parser_flags"].append, num_errors=0)

    def _layer(self, node: onnx.NodeProto) -> Any:
        tensors = [self.part("ITensor", name=n, dtype=types.SimpleNamespace(name="HALF"), shape=(-1, 4)) for n in node.output]
        return self.part(
            "ILayer",
            name=node.name or node.output[0],
            type=types.SimpleNamespace(name=node.op_type.upper()),
            num_inputs=1,
            get_input=lambda index: None,
            num_outputs=len(tensors),
            get_output=tensors.__getitem__,
        )

    def _config(self) -> Any:
        config = self.part(
            "IBuilderConfig",
            add_optimization_profile=lambda profile: self.refused_profile(),
            set_flag=self.told["flags"].append,
            set_memory_pool_limit=lambda pool, size: self.told.__setitem__(pool, size),
            can_run_on_DLA=lambda layer: layer.type.name not in self.gpu_only,
            create_timing_cache=self._create_cache,
            set_timing_cache=lambda cache, ignore_mismatch: not cache._data.startswith(b"other"),
            get_timing_cache=lambda: self.part("ITimingCache", serialize=lambda: self.told["timing_cache"] + self.timings),
            hardware_compatibility_level="NONE",
            set_compute_capability=self._compile_for,
        )
        self.config = config
        return config

    def _compile_for(self, capability: str, index: int) -> bool:
        self.told.setdefault("gpus", []).append(capability)
        return index < self.told["num_compute_capabilities"]

    def _create_cache(self, data: bytes) -> Any:
        self.told["timing_cache"] = data
        if data.startswith(b"damaged"):
            self.logger.log(2, "Failed to deserialize timing cache. Returning an empty timing cache.")
        return self.part("ITimingCache", _data=data)

    def _build(self, network: Any, config: Any) -> bytes:
        return json.dumps({"release": self.release}).encode() + b"\n" + self.graph

    def _runtime(self, logger: Any) -> Any:
        def load(plan: bytes) -> Any:
            inspector = self.part("EngineInspector", get_engine_information=self._information)
            return self.part("ICudaEngine", create_engine_inspector=lambda: inspector)

        return self.part("Runtime", deserialize_cuda_engine=load)

    def _information(self, form: Any) -> str:
        layers = [{"Name": "fused", "LayerType": "CaskConvolution"}, {"Name": "out", "LayerType": "Reformat"}]
        return json.dumps({"Layers": layers, "Bindings": []})


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    """Each supported TensorRT."""
    return str(request.param)


@pytest.fixture
def simulated_builder() -> Callable[..., SimulatedBuilder]:
    """``simulated_builder(release, cores=0, gpu_only="")``."""
    return SimulatedBuilder


@pytest.fixture
def script(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Any]:
    """``script(*words, release=..., kit=..., **options)``: the kit's script as a device runs it, on a simulated TensorRT."""
    target = target_named("jetson-agx-orin")

    def run(
        *words: Any,
        simulated: Any = None,
        release: str = "10.16",
        kit: bytes | None = None,
        cuda: Any = None,
        **options: Any,
    ) -> Any:
        simulated = simulated or SimulatedBuilder(release, cores=2)
        record = {
            "target": target.name,
            "precision": "fp32",
            "profiles": {},
            "flags": [],
            "golden": None,
            "key": "k" * 64,
            "batch_axes": {},
        }
        record |= {"memory": {"total": 1 << 30}}
        data = kit or make_kit(target, target.tensorrt, {**record, "options": options}, tiny_bundle.read(FLOAT_GRAPH), None)
        zipfile.ZipFile(io.BytesIO(data)).extractall(tmp_path / "kit")
        monkeypatch.setitem(sys.modules, "tensorrt", simulated.module)
        monkeypatch.setattr(check_engine, "Cuda", lambda: cuda)
        capsys.readouterr()
        code = build_engine.main(["--kit", str(tmp_path / "kit"), *map(str, words), *([] if cuda else ["--no-check"])])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return types.SimpleNamespace(code=code, json=json.loads(out) if out else None, err=err, told=simulated.told)

    return run


class _Library:
    """libcudart, as ctypes calls it, on a simulated GPU."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu

    def _made(self, pointer: Any, answer: tuple[Any, Any]) -> int:
        error, pointer._obj.value = answer
        return int(error)

    def cudaMalloc(self, pointer: Any, size: Any) -> int:  # noqa: N802
        return self._made(pointer, self.gpu.cudaMalloc(size.value))

    def cudaStreamCreate(self, pointer: Any) -> int:  # noqa: N802
        return self._made(pointer, self.gpu.cudaStreamCreateWithFlags(0))

    def cudaDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:  # noqa: N802
        value._obj.value = int(self.gpu.sm.split(".")[attribute.value - 75])
        return int(self.gpu.error)

    def cudaMemcpy(self, target: Any, source: Any, size: Any, kind: Any) -> int:  # noqa: N802
        device, host = (target, source) if kind.value == 1 else (source, target)
        here = (ctypes.c_uint8 * size.value).from_address(host.value)
        there = self.gpu.bytes_at(device.value, size.value)
        if kind.value == 1:
            there[:] = here
        else:
            ctypes.memmove(here, there.ctypes.data, size.value)
        return int(self.gpu.error)

    def __getattr__(self, name: str) -> Any:
        return lambda what: int(getattr(self.gpu, name)(what.value)[0])


class Device:
    """A simulated GPU with its CUDA runtime and the running half of a TensorRT; `check` runs an ONNX graph as the engine."""

    def __init__(self, release: str, sm: str, folder: Path) -> None:
        self.gpu, self.folder = simulated_cuda.SimulatedCuda(sm=sm), folder
        self.trt = simulated_tensorrt.make_module(release, self.gpu)
        self.library = _Library(self.gpu)

    def plan(self, graph: str | bytes, profiles: dict[str, Any] | None = None, **more: Any) -> bytes:
        """``graph``: a model, or one in the words of `onnx.parser`."""
        if isinstance(graph, str):
            graph = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {graph}').SerializeToString()
        made: bytes = simulated_tensorrt.plan(graph, self.trt, self.gpu.sm, profiles or {}, **more)
        return made

    def check(
        self, plan: bytes, inputs: Any, outputs: Any, axes: dict[str, int], limit: float = 40.0, quantized: bool = False
    ) -> dict[str, float]:
        golden = self.folder / "golden.npz"
        golden.write_bytes(save_golden(inputs, outputs))
        return build_engine.check(self.trt, plan, golden, {"kind": "snr_db", "limit": limit}, axes, quantized=quantized)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Device]:
    """``device(release="10.16", sm="8.7")``."""

    def make(release: str = "10.16", sm: str = "8.7") -> Device:
        made = Device(release, sm, tmp_path)
        monkeypatch.setattr(check_engine.ctypes, "CDLL", lambda name: made.library)
        return made

    return make


@pytest.fixture
def in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` and `import_onnx` without their child process, which imports onnx anew each time: a second that a test of what
    they answer need not wait. A test marked ``child`` gets the real one."""
    if request.node.get_closest_marker("child"):
        return

    def call(function: str, request: Any, folder: Path, timeout_s: float, address_space: int = 0) -> Any:
        from edgekit.compiler import compilation, foreign, inspection

        run = {
            "compilation:compile_graph": compilation.compile_graph,
            "foreign:import_graph": foreign.import_graph,
            "inspection:inspect_graph": inspection.inspect_graph,
        }[function]
        return json.loads(json.dumps(run(json.loads(json.dumps(request)), folder)))

    monkeypatch.setattr(child, "call", call)

"""TensorRT's runtime half with ONNX Runtime behind it, on a `SimulatedCuda`.

One class stands for TensorRT 8.6 to 11 and TensorRT-RTX: an attribute that a version lacks (tensorrt_api.json, read off the
real bindings) raises `AttributeError` here too. Like the real one, calls answer False or None and say why to the logger only.
"""

from __future__ import annotations

import enum
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
from onnx import load_model_from_string

from edgekit.runtime.onnxruntime import DTYPES, session

API: dict[str, Any] = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text(encoding="utf-8"))
VERSIONS: list[str] = API["versions"]
RTX = "rtx1.7"
_MAGIC = b"simulated plan\n"


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8


_TYPES = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8", "int32": "INT32", "bool": "BOOL", "uint8": "UINT8"}
_TYPES["int64"] = "INT64"
_NUMPY = {name: dtype for dtype, name in _TYPES.items()}
_TYPES["float64"] = "FLOAT"  # what every parser makes of it
TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
EngineValidity = enum.Enum("EngineValidity", ["VALID", "SUBOPTIMAL", "INVALID"])
EngineInvalidityDiagnostics = enum.IntFlag("EngineInvalidityDiagnostics", ["VERSION_MISMATCH", "UNSUPPORTED_CC"])


def plan(onnx: bytes, module: Any, sm: str, profiles: dict[str, Any], **more: Any) -> bytes:
    """A serialized engine; ``profiles`` as in a build's record, ``more`` e.g. ``host=["x"]``, ``dtypes={"y": "BF16"}``."""
    about = {"version": module.__version__, "sm": sm, "profiles": profiles, **more}
    return _MAGIC + json.dumps(about).encode() + b"\n" + onnx


def _offers(name: str, attribute: str, version: str) -> bool:
    listed = API["classes"][name].get(attribute, "")
    return listed == "all" or version in listed.split()


class _Guarded:
    """Lets only those attributes be asked for that the version has; notes each in ``trt.used``."""

    def __init__(self, name: str, trt: Any) -> None:
        self.__dict__.update(_name=name, _trt=trt)

    def __getattribute__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            return object.__getattribute__(self, attribute)
        trt, name = self._trt, self._name
        if not _offers(name, attribute, trt.release):
            raise AttributeError(f"TensorRT {trt.release} has no {name}.{attribute}")
        trt.used.add((name, attribute))
        return object.__getattribute__(self, attribute)


def make_module(release: str, cuda: Any) -> types.ModuleType:
    """The module ``tensorrt`` of a release, or ``tensorrt_rtx``; ``used`` collects (class, attribute)."""
    trt: Any = types.ModuleType("tensorrt_rtx" if release == RTX else "tensorrt")
    trt.release, trt.cuda, trt.used = release, cuda, set()
    trt.__version__ = "1.7.1.116" if release == RTX else f"{release}.0"
    trt.IProfiler = type("IProfiler", (), {"__init__": lambda self: None})
    trt.ILogger = type("ILogger", (), {"ERROR": 1, "WARNING": 2, "__init__": lambda self: None})
    trt.TensorIOMode, trt.TensorLocation = TensorIOMode, TensorLocation
    if release == RTX:
        trt.EngineValidity, trt.EngineInvalidityDiagnostics = EngineValidity, EngineInvalidityDiagnostics
        trt.CudaGraphStrategy = CudaGraphStrategy
    trt.logger = None  # the first that the process registers stays; later ones are ignored
    trt.nptype = lambda dtype: np.dtype(_NUMPY[dtype.name])
    trt.Runtime = lambda logger: _Runtime(trt, logger)
    trt.execute = None  # (name -> (address, shape, dtype), stream) -> bool: what runs instead, where the CUDA is a real one
    trt.breaks_capture = False  # whether execution does something that a capture forbids
    trt.ran = []  # of each inference: "own", or RTX's "fallback" or "specialized" kernels, and " in a graph" of RTX's own
    trt.alive = 0  # engines and contexts that exist
    trt.compiled = 0  # kernels that RTX had to compile for want of a cache
    return trt  # type: ignore[no-any-return]


def device_copy(runtime: Any) -> Any:
    """For ``trt.execute``: y = x by a copy on the device, with a real ``cuda.bindings.runtime``."""

    def execute(places: dict[str, Any], stream: int) -> bool:
        (source, shape, dtype), (target, _, _) = places["x"], places["y"]
        size = int(np.prod(shape)) * dtype.itemsize
        (error,) = runtime.cudaMemcpyAsync(target, source, size, runtime.cudaMemcpyKind.cudaMemcpyDefault, stream)
        return int(error) == 0

    return execute


class _Runtime(_Guarded):
    def __init__(self, trt: Any, logger: Any) -> None:
        super().__init__("Runtime", trt)
        trt.logger = self._logger = trt.logger or logger
        self.DLA_core, self.engine_host_code_allowed = 0, False

    def _read(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        about, _, onnx = data.removeprefix(_MAGIC).partition(b"\n")
        return json.loads(about), onnx

    def get_engine_validity(self, data: bytes) -> tuple[Any, Any]:
        about = self._read(data)[0]
        fits = about["version"] == self._trt.__version__ and about["sm"] == self._trt.cuda.sm
        if fits:
            return EngineValidity[about.get("validity", "VALID")], 0
        return EngineValidity.INVALID, 1 if about["version"] != self._trt.__version__ else 2

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        if not data.startswith(_MAGIC):
            return self._logger.log(
                1, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag does not match)"
            )
        about, onnx = self._read(data)
        if about.get("host_code") and not self.engine_host_code_allowed:
            return self._logger.log(1, "Error Code 3: API Usage Error (engineHostCodeAllowed is not set)")
        if about["version"] != self._trt.__version__ and not about.get("host_code"):
            return self._logger.log(1, "Error Code 6: The engine plan file is not compatible with this version of TensorRT")
        if about["sm"] != self._trt.cuda.sm and not about.get("ampere_plus"):
            return self._logger.log(1, "Error Code 6: The engine plan file is generated on an incompatible device")
        if about.get("dla", 0) != self.DLA_core:
            return self._logger.log(1, f"simulated: this engine is for DLA core {about['dla']}")
        return _Engine(self._trt, self._logger, about, onnx)


class _Engine(_Guarded):
    def __init__(self, trt: Any, logger: Any, about: dict[str, Any], onnx: bytes) -> None:
        super().__init__("ICudaEngine", trt)
        self._logger, self._about, self._digest = logger, about, str(len(onnx))
        self._session = session(onnx)
        self._layers = [node.name or node.output[0] for node in load_model_from_string(onnx).graph.node]
        values = [(v, True) for v in self._session.get_inputs()] + [(v, False) for v in self._session.get_outputs()]
        self._values = {value.name: value for value, _ in values}
        self._inputs = {value.name for value, is_input in values if is_input}
        trt.alive += 1

    def __del__(self) -> None:
        self._trt.alive -= 1

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    def get_tensor_name(self, index: int) -> str:
        return list(self._values)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        stated = self._about.get("dtypes", {}).get(name) or _TYPES[DTYPES[self._values[name].type]]
        if not _offers("DataType", stated, self._trt.release):
            stated = "INT32"  # what a parser of before 10 makes of int64
        return DataType[stated]

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.HOST if name in self._about.get("host", []) else TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else -1 for axis in self._values[name].shape)

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        return [tuple(s) for s in self._about["profiles"].get(name, [self.get_tensor_shape(name)] * 3)]

    def create_runtime_config(self) -> Any:
        return _RuntimeConfig(self._trt)

    def create_execution_context(self, config: Any = None) -> Any:
        if self._about.get("no_context"):
            return self._logger.log(1, "Error Code 2: OutOfMemory (Requested size was 1 bytes.)")
        cache = object.__getattribute__(config, "_cache") if config is not None else None
        if cache is None or self._digest not in cache._kernels:
            self._trt.compiled += 1
        if cache is not None:
            cache._kernels.add(self._digest)
        captures = config is not None and self._trt.release == RTX and config.cuda_graph_strategy != CudaGraphStrategy.DISABLED
        return _Context(self._trt, self._logger, self, captures)


class _RuntimeConfig(_Guarded):
    def __init__(self, trt: Any) -> None:
        super().__init__("IRuntimeConfig", trt)
        self._cache: Any = None
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def create_runtime_cache(self) -> Any:
        return _RuntimeCache(self._trt)

    def set_runtime_cache(self, cache: Any) -> bool:
        self._cache = cache
        return True


class _RuntimeCache(_Guarded):
    def __init__(self, trt: Any) -> None:
        super().__init__("IRuntimeCache", trt)
        self._kernels: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps({"sm": self._trt.cuda.sm, "kernels": sorted(self._kernels)}).encode()

    def deserialize(self, blob: bytes) -> bool:
        found = json.loads(blob)
        if found["sm"] != self._trt.cuda.sm:
            return False
        self._kernels |= set(found["kernels"])
        return True


class _Context(_Guarded):
    def __init__(self, trt: Any, logger: Any, engine: _Engine, captures: bool) -> None:
        super().__init__("IExecutionContext", trt)
        self._logger, self._engine, self._captures = logger, engine, captures
        self._runs: dict[Any, int] = {}  # of each shape
        self.profiler: Any = None
        self.enqueue_emits_profile = True
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        trt.alive += 1

    def __del__(self) -> None:
        self._trt.alive -= 1

    def _error(self, text: str) -> bool:
        self._logger.log(1, f"IExecutionContext::{text}")
        return False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        if len(shape) != len(least) or any(not low <= axis <= high for low, axis, high in zip(least, shape, most, strict=True)):
            return self._error(
                "setInputShape: Error Code 3: API Usage Error (shape does not satisfy any optimization profiles)"
            )
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        given = self._shapes
        return [n for n in self._engine._inputs if n not in given and -1 in self._engine.get_tensor_shape(n)]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Dynamic axes of an output take the value of the input axis of the same name."""
        if name in self._shapes:
            return self._shapes[name]
        symbols: dict[Any, int] = {}
        for given, shape in self._shapes.items():
            symbols |= dict(zip(self._engine._values[given].shape, shape, strict=True))
        axes = self._engine._values[name].shape
        return tuple(axis if isinstance(axis, int) else symbols.get(axis, -1) for axis in axes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def _kernels(self) -> str:
        """Which kernels an inference starts now: RTX compiles those for a shape while it runs others, for three runs here."""
        shapes = tuple(sorted(self._shapes.items()))
        self._runs[shapes] = self._runs.get(shapes, 0) + 1
        if self._trt.release != RTX:
            return "own"
        if self._runs[shapes] <= 3:
            return "fallback"
        return "specialized in a graph" if self._captures else "specialized"

    def execute_async_v3(self, stream: int) -> bool:
        cuda, engine = self._trt.cuda, self._engine
        for name in engine._values:
            if not self._addresses.get(name):
                return self._error(f"enqueueV3: Error Code 3: API Usage Error (Address is not set for tensor {name})")
        if self.infer_shapes():
            return self._error("enqueueV3: Error Code 3: API Usage Error (not all shapes are specified)")
        places = {
            name: (self._addresses[name], self.get_tensor_shape(name), np.dtype(_NUMPY[engine.get_tensor_dtype(name).name]))
            for name in engine._values
        }
        if self._trt.execute is not None:
            return bool(self._trt.execute(places, stream))
        if any(stream.captured is not None for stream in cuda.streams.values()):
            if self._trt.breaks_capture and cuda._forbidden():
                self._error("enqueueV3: Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)")
            if self._captures:
                return self._error("enqueueV3: Consider turning off RTX Cudagraphs capture if capturing the stream externally.")
        kernels = self._kernels()

        def work() -> None:
            self._trt.ran.append(kernels)
            if self.profiler is not None and self.enqueue_emits_profile:
                for index, layer in enumerate(self._engine._layers):
                    self.profiler.report_layer_time(layer, 0.01 * (index + 1))
            feeds = {}
            for name in engine._inputs:
                address, shape, dtype = places[name]
                array = cuda.bytes_at(address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
                feeds[name] = array.astype(DTYPES[engine._values[name].type])
            for value, array in zip(engine._session.get_outputs(), engine._session.run(None, feeds), strict=True):
                address, shape, dtype = places[value.name]
                target = cuda.bytes_at(address, int(np.prod(shape)) * dtype.itemsize)
                target[:] = np.frombuffer(np.ascontiguousarray(array.astype(dtype)).tobytes(), np.uint8)

        return not cuda.enqueue(stream, work)

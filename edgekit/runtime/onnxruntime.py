"""The ONNX Runtime backend: the CPU of any machine, and the reference for all others."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from edgekit.bundle import INT8_GRAPH, Bundle
from edgekit.errors import BackendError, MissingExtra, first_line
from edgekit.manifest import ImagePreprocessing, TensorSpec, Tolerance

from .feeds import check_feeds
from .graph_file import read_graph

try:
    import onnxruntime as ort
except ImportError:
    raise MissingExtra("runtime", "onnxruntime") from None

__all__ = ["DTYPES", "OnnxRuntimeRunner", "session"]

#: ONNX Runtime's type names -> numpy's.
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
}


@functools.cache
def _saturates() -> bool:
    """Whether ONNX Runtime's int8 kernels add pairs of products in 16 bits here, which overflow: on x86-64 without VNNI.

    Answers were off by a third of their range. Q/DQ is then computed as it is written, in float: slower, and right. (Its own
    remedy, ``session.x64quantprecision``, breaks graphs in which two products share a zero point: ONNX Runtime 1.32.)
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def session(
    model: str | bytes, threads: int = 1, *, low_memory: bool = False, profile: str | None = None
) -> ort.InferenceSession:
    """An `InferenceSession` on the CPU with edgekit's settings. ``low_memory``: holds weights once. ``profile``:
    the beginning of the name of a file for the times of all nodes, which ``end_profiling`` writes.

    Raises `BackendError` where the graph does not load.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if low_memory:
        options.enable_cpu_mem_arena = False
        # Above it weights of convolutions are laid out anew, all of them beside the old ones.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if _saturates():
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  ONNX Runtime raises many types of its own
        reason = first_line(error)
        raise BackendError(
            f"ONNX Runtime cannot load the graph: {reason}", "import it again: edgekit import MODEL.onnx --out B"
        ) from None


class OnnxRuntimeRunner:
    """Runs one graph of a bundle with ONNX Runtime on ``threads`` cores (0: all)."""

    name = "onnxruntime"
    batches: tuple[int, int] | None = None
    tolerance: Tolerance | None = None
    frames: ImagePreprocessing | None = None

    def __init__(self, bundle: Bundle, graph: str, threads: int) -> None:
        self.bundle, self.graph, self.threads = bundle, graph, threads
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self._shared: Any = None
        self._session: Any = None

    def share(self) -> OnnxRuntimeRunner:
        """Another runner on the same session, which threads may share."""
        if self._session is None:
            raise BackendError("the model is not open", "share it inside: with Model.open(path) as model")
        other = OnnxRuntimeRunner(self.bundle, self.graph, self.threads)
        other._shared = self._session
        return other

    def __enter__(self) -> OnnxRuntimeRunner:
        self._session = self._shared or session(read_graph(self.bundle, self.graph), self.threads)
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        self._names = [spec.name for spec in self.outputs]
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._session = None

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if self._session is None:
            raise BackendError("the model is not open", "use it inside: with Model.open(path) as model")
        try:
            return dict(zip(self._names, self._session.run(None, feeds), strict=True))
        except Exception as error:  # noqa: BLE001  as above; the feeds are checked only once they failed
            check_feeds(self.inputs, feeds)
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}", "check the input values") from None

    def describe(self) -> dict[str, Any]:
        """``int8``, of a quantized graph: ``kernels``, or ``float`` where Q/DQ is computed as it is written."""
        about = {"backend": self.name, "version": ort.__version__, "provider": "CPUExecutionProvider", "threads": self.threads}
        if self.graph != INT8_GRAPH or self.bundle.form != "int8":  # other forms have no int8 products
            return about
        return about | {"int8": "float" if _saturates() else "kernels"}


def _spec(value: Any) -> TensorSpec:
    shape = tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape)
    return TensorSpec(value.name, DTYPES.get(value.type, value.type), shape)

"""A loaded TensorRT engine: checked first, shared by the execution contexts of several runners, unloaded with the last."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from typing import Any

from edgekit.bundle import Bundle
from edgekit.errors import BackendError, MissingExtra

from . import rtx_cache
from .cuda import Cuda, Device, open_cuda
from .engines import Choice, Options, choose

__all__ = ["Engine", "load_library"]


def load_library(module: str) -> Any:
    """The TensorRT module. Raises `MissingExtra` or `BackendError` with what brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if importlib.util.find_spec(module) is not None:  # the bindings are there, a library below them is not
            raise BackendError(f"{module} does not load: {_line(str(error))}", "install it again, with its libraries") from None
    if module == "tensorrt_rtx":
        raise MissingExtra("rtx", module)
    raise BackendError(
        "this needs the Python module 'tensorrt', which is not installed",
        "JetPack brings it (apt install python3-libnvinfer), as do NVIDIA's TensorRT containers",
    )


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


class Log:
    """TensorRT's errors since the last `clear`: its calls answer False or None and say why only here.

    There is one for the process, which several cameras' threads use: each sees what was said in its own, and what TensorRT's
    own threads said.
    """

    def __init__(self) -> None:
        self._own = threading.local()  # of a thread that has called `clear`
        self._others: list[tuple[int, str]] = []  # numbered, the last hundred
        self._count = 0

    def add(self, severity: int, worst: int, message: str) -> None:
        if severity > worst:
            return
        lines = getattr(self._own, "lines", None)
        if lines is None:
            self._count += 1
            self._others = [*self._others[-99:], (self._count, message)]
        elif len(lines) < 100:
            lines.append(message)

    def clear(self) -> None:
        """Before a call whose reason may be asked for: what was said of other calls would mislead."""
        self._own.lines, self._own.since = [], self._count

    def take(self) -> str:
        """The first error: those after it follow from it."""
        since = getattr(self._own, "since", 0)
        lines = [*getattr(self._own, "lines", ()), *(line for number, line in self._others if number > since)]
        self.clear()
        return _line(lines[0]) if lines else "TensorRT gave no reason"


@functools.cache
def registered_logger(trt: Any) -> tuple[Any, Log]:
    """(the logger of a TensorRT module, what it logs). TensorRT keeps the first that a process gives it, and only that one."""
    log = Log()

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(int(severity), int(trt.ILogger.ERROR), message)

    return Logger(), log


def _capture_inside(trt: Any, config: Any) -> bool:
    """Let TensorRT-RTX make the CUDA graphs of its contexts; False where it has no such choice.

    It runs fallback kernels until those for a shape are compiled, in the background: only it knows when a capture pays, and
    one from outside would keep the fallback for good. (That one would also want the builder's REQUIRE_USER_ALLOCATION, and
    then each context memory from its caller; its own falls back to plain runs where an engine cannot be captured.)
    """
    strategy = getattr(getattr(trt, "CudaGraphStrategy", None), "WHOLE_GRAPH_CAPTURE", None)
    if strategy is None or not hasattr(config, "cuda_graph_strategy"):
        return False
    config.cuda_graph_strategy = strategy
    return bool(config.cuda_graph_strategy == strategy)


class Engine:
    """A loaded engine, which the contexts of several runners share; unloaded with the last of them.

    ``cuda_graph``: whether its runs shall be CUDA graphs. ``captures``: whether TensorRT makes them by itself.
    """

    def __init__(self, bundle: Bundle, graph: str, module: str, *, cuda_graph: bool) -> None:
        self.cuda: Cuda = open_cuda()
        self.trt = load_library(module)
        self._lock = threading.Lock()
        self._users = 0
        with self.cuda.current():
            self.device: Device = self.cuda.device()
            logger, self.log = registered_logger(self.trt)
            self.log.clear()
            self._runtime = self.trt.Runtime(logger)
            validity = self._valid if hasattr(self._runtime, "get_engine_validity") else None
            version = str(self.trt.__version__)
            self.choice: Choice = choose(bundle, graph, module, version, self.device, validity)
            self._prepare(self.choice.record.options)
            self.engine = self._runtime.deserialize_cuda_engine(self.choice.plan)
            if self.engine is None:
                raise BackendError(
                    f"TensorRT {version} does not load the engine for {self.choice.record.target}: {self.log.take()}",
                    f"build it again: edgekit build {bundle.path} --target {self.choice.record.target}",
                )
            self._config, self._cache = rtx_cache.restore(self.engine, self.choice, self.device)
            self.captures = cuda_graph and _capture_inside(self.trt, self._config)

    def _prepare(self, options: Options) -> None:
        if options.dla is not None:
            self._runtime.DLA_core = options.dla  # else it runs on core 0, whatever it was built for
        if options.compatible == "version":
            self._runtime.engine_host_code_allowed = True  # it brings a runtime of its own; `choose` has seen who made it

    def _valid(self, plan: bytes) -> tuple[bool, str]:
        validity, bits = self._runtime.get_engine_validity(plan)
        members, reasons = self.trt.EngineValidity, self.trt.EngineInvalidityDiagnostics.__members__
        named = [name for name, bit in reasons.items() if int(bits) & int(bit)]
        words = ", ".join([validity.name, *named]) if validity != members.VALID else ""
        return validity != members.INVALID, words

    def context(self) -> Any:
        """A new execution context, one a runner. Raises `BackendError`."""
        with self._lock:
            if self.engine is None:
                raise BackendError("the model that this one shares was closed", "enter the share while it is open")
            self.log.clear()
            context = self.engine.create_execution_context(*([] if self._config is None else [self._config]))
            if context is None:
                raise BackendError(
                    f"TensorRT makes no context for the engine of {self.choice.record.target}: {self.log.take()}",
                    "free GPU memory, or build again: edgekit build B --target NAME",
                )
            self._users += 1
            return context

    def release(self) -> None:
        """One context less; the last one stores the runtime cache and unloads the engine."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                rtx_cache.store(self._cache, self.choice, self.device)
                # TensorRT wants its objects destroyed before those that made them.
                self._cache = self._config = None
                self.engine = None
                self._runtime = None

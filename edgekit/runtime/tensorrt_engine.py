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
    """TensorRT's errors since the last look: its calls answer False or None and say why only here."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, severity: int, worst: int, message: str) -> None:
        if severity <= worst and len(self.lines) < 100:
            self.lines.append(message)

    def take(self) -> str:
        """The first error: those after it follow from it."""
        text = _line(self.lines[0]) if self.lines else "TensorRT gave no reason"
        self.lines.clear()
        return text


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


class Engine:
    """A loaded engine, which the contexts of several runners share; unloaded with the last of them."""

    def __init__(self, bundle: Bundle, graph: str, module: str) -> None:
        self.cuda: Cuda = open_cuda()
        self.trt = load_library(module)
        self._lock = threading.Lock()
        self._users = 0
        with self.cuda.current():
            self.device: Device = self.cuda.device()
            logger, self.log = registered_logger(self.trt)
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

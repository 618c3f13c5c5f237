"""CUDA as the TensorRT backend needs it: one small interface over ``cuda.bindings`` or ``pycuda``, whichever is installed.

Handles (streams, events, device addresses, graphs) are plain integers or opaque objects of the library; all of them are made
and freed by the `Cuda` that they came from, in the thread that entered `Cuda.current`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BackendError, MissingExtra

__all__ = ["CaptureRefused", "Cuda", "Device", "Pinned", "open_cuda"]

_DRIVER_HINT = "edgekit doctor shows what this machine has; the NVIDIA driver brings libcuda.so"
_MEMORY_HINT = "free GPU memory (other processes hold it), or build for a smaller batch: edgekit build --batch N"

_P = ParamSpec("_P")
_T = TypeVar("_T")


class CaptureRefused(BackendError):
    """The work cannot become a CUDA graph; run it as it is."""


class Device(NamedTuple):
    """A GPU. ``sm``: compute capability, ``8.7``. ``driver``: the CUDA version that the driver supports, ``12.6``.

    ``integrated``: it shares its memory with the CPU, as on every Jetson, so that nothing needs to be copied.
    """

    name: str
    sm: str
    driver: str
    integrated: bool
    memory_bytes: int


class Pinned(NamedTuple):
    """Page-locked host memory: ``host`` uint8 (size,), and the ``device`` address of the same bytes, 0 where not mapped."""

    host: NDArray[np.uint8]
    device: int
    handle: Any


class Cuda(Protocol):
    """What a library offers. Every method raises `BackendError` with CUDA's own name for what went wrong."""

    library: str

    def device(self) -> Device: ...

    def free_bytes(self) -> int:
        """What the device has left, for all that use it."""
        ...

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Make the device the calling thread's own for the block."""
        ...

    def stream(self) -> int: ...

    def free_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None: ...

    def event(self) -> Any: ...

    def record(self, event: Any, stream: int) -> None: ...

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds on the device between two recorded events, the last of which is waited for."""
        ...

    def free_event(self, event: Any) -> None: ...

    def allocate(self, size: int) -> int:
        """Device memory, ``size`` > 0 bytes."""
        ...

    def free(self, address: int) -> None: ...

    def pin(self, size: int, *, mapped: bool) -> Pinned: ...

    def unpin(self, pinned: Pinned) -> None: ...

    def upload(self, address: int, pinned: Pinned, size: int, stream: int) -> None:
        """Copy the first ``size`` bytes to the device, asynchronously."""
        ...

    def download(self, pinned: Pinned, address: int, size: int, stream: int) -> None: ...

    def capture(self, work: Callable[[], None], stream: int) -> Any:
        """What ``work`` enqueues on ``stream``, as a graph; nothing of it runs. Raises `CaptureRefused`."""
        ...

    def launch(self, graph: Any, stream: int) -> None: ...

    def free_graph(self, graph: Any) -> None: ...


def open_cuda() -> Cuda:
    """The first library that is installed. Raises `MissingExtra` without one, `BackendError` without driver or GPU."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        runtime = None
    if runtime is not None:
        return _Bindings(runtime)
    try:
        driver = importlib.import_module("pycuda.driver")
    except ImportError:
        raise MissingExtra("cuda", "cuda.bindings") from None
    return _PyCuda(driver)


def _view(address: int, size: int) -> NDArray[np.uint8]:
    """Host memory at ``address`` as an array that does not own it."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class _Bindings:
    """``cuda.bindings.runtime``: every call answers (error, results...). The primary context is current in every thread."""

    def __init__(self, runtime: Any) -> None:
        self._rt = runtime
        self._check = runtime.cudaError_t.cudaSuccess
        module = importlib.import_module("cuda.bindings")
        self.library = f"cuda-bindings {module.__version__}"
        try:
            count = self._call("cudaGetDeviceCount")
        except BackendError as error:
            raise BackendError(f"no CUDA device can be used here: {error.message}", _DRIVER_HINT) from None
        if not count:
            raise BackendError("this machine has no CUDA device", "choose --backend onnxruntime")

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._rt, name)(*arguments)
        if error != self._check:
            raise BackendError(f"{name} failed: {self._words(error)}", _hint(int(error)))
        return results[0] if len(results) == 1 else tuple(results)

    def _words(self, error: Any) -> str:
        _, name = self._rt.cudaGetErrorName(error)
        _, text = self._rt.cudaGetErrorString(error)
        return f"{_text(name)} ({_text(text)})"

    def device(self) -> Device:
        properties = self._call("cudaGetDeviceProperties", self._call("cudaGetDevice"))
        version = int(self._call("cudaDriverGetVersion"))  # 1000 * major + 10 * minor
        return Device(
            name=_text(properties.name),
            sm=f"{properties.major}.{properties.minor}",
            driver=f"{version // 1000}.{version % 1000 // 10}",
            integrated=bool(properties.integrated),
            memory_bytes=int(properties.totalGlobalMem),
        )

    def free_bytes(self) -> int:
        return int(self._call("cudaMemGetInfo")[0])

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        yield  # the runtime API does it by itself

    def stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def free_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def event(self) -> Any:
        return self._call("cudaEventCreate")

    def record(self, event: Any, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        self._call("cudaEventSynchronize", end)
        return float(self._call("cudaEventElapsedTime", start, end))

    def free_event(self, event: Any) -> None:
        self._call("cudaEventDestroy", event)

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pin(self, size: int, *, mapped: bool) -> Pinned:
        flags = self._rt.cudaHostAllocMapped if mapped else self._rt.cudaHostAllocDefault
        host = int(self._call("cudaHostAlloc", size, flags))
        device = int(self._call("cudaHostGetDevicePointer", host, 0)) if mapped else 0
        return Pinned(_view(host, size), device, host)

    def unpin(self, pinned: Pinned) -> None:
        self._call("cudaFreeHost", pinned.handle)

    def upload(self, address: int, pinned: Pinned, size: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, pinned.handle, size, kind, stream)

    def download(self, pinned: Pinned, address: int, size: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", pinned.handle, address, size, kind, stream)

    def capture(self, work: Callable[[], None], stream: int) -> Any:
        # Thread-local: another camera's thread may allocate meanwhile, which a global capture would forbid it.
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        failure = None
        try:
            work()
        except BackendError as error:
            failure = error
        try:
            graph = self._call("cudaStreamEndCapture", stream)
        except BackendError as error:
            self._rt.cudaGetLastError()  # a broken capture leaves its error behind, for the next call to report
            raise CaptureRefused((failure or error).message) from None
        try:
            if failure is not None:
                raise CaptureRefused(failure.message)
            return self._call("cudaGraphInstantiate", graph, 0)
        except CaptureRefused:
            raise
        except BackendError as error:
            raise CaptureRefused(error.message) from None
        finally:
            self._call("cudaGraphDestroy", graph)  # the executable graph is a copy

    def launch(self, graph: Any, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)


def _in_words(method: Callable[Concatenate[_PyCuda, _P], _T]) -> Callable[Concatenate[_PyCuda, _P], _T]:
    """A method of `_PyCuda` whose pycuda errors are `BackendError`, so that a caller may go on, or give back what it can."""

    @functools.wraps(method)
    def call(self: _PyCuda, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self._words():
            return method(self, *args, **kwargs)

    return call


class _PyCuda:
    """``pycuda.driver``: objects free themselves when dropped, so they are kept here by their integer handles."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.library = f"pycuda {importlib.import_module('pycuda').VERSION_TEXT}"
        self._held: dict[int, Any] = {}
        with self._words():
            driver.init()
            if not driver.Device.count():
                raise BackendError("this machine has no CUDA device", "choose --backend onnxruntime")
            self._device = driver.Device(0)
            self._context = self._device.retain_primary_context()

    @contextlib.contextmanager
    def _words(self) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            hint = _MEMORY_HINT if isinstance(error, self._driver.MemoryError) else _DRIVER_HINT
            raise BackendError(f"CUDA failed: {(str(error).splitlines() or ['no reason given'])[0]}", hint) from None

    @_in_words
    def device(self) -> Device:
        attribute = self._driver.device_attribute
        major, minor = self._device.compute_capability()
        version = int(self._driver.get_driver_version())
        return Device(
            name=self._device.name(),
            sm=f"{major}.{minor}",
            driver=f"{version // 1000}.{version % 1000 // 10}",
            integrated=bool(self._device.get_attribute(attribute.INTEGRATED)),
            memory_bytes=int(self._device.total_memory()),
        )

    @_in_words
    def free_bytes(self) -> int:
        return int(self._driver.mem_get_info()[0])

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        with self._words():
            self._context.push()
        try:
            yield
        finally:
            with contextlib.suppress(self._driver.Error):  # after a fault; its own error is the one to be seen
                self._driver.Context.pop()

    def _keep(self, handle: int, thing: Any) -> int:
        self._held[handle] = thing
        return handle

    @_in_words
    def stream(self) -> int:
        stream = self._driver.Stream()
        return self._keep(int(stream.handle), stream)

    @_in_words
    def free_stream(self, stream: int) -> None:
        self._held.pop(stream)

    @_in_words
    def synchronize(self, stream: int) -> None:
        self._held[stream].synchronize()

    @_in_words
    def event(self) -> Any:
        return self._driver.Event()

    @_in_words
    def record(self, event: Any, stream: int) -> None:
        event.record(self._held[stream])

    @_in_words
    def elapsed_ms(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.time_till(end))

    def free_event(self, event: Any) -> None:
        """Freed with its last reference."""

    @_in_words
    def allocate(self, size: int) -> int:
        memory = self._driver.mem_alloc(size)
        return self._keep(int(memory), memory)

    @_in_words
    def free(self, address: int) -> None:
        self._held.pop(address).free()

    @_in_words
    def pin(self, size: int, *, mapped: bool) -> Pinned:
        flags = self._driver.host_alloc_flags.DEVICEMAP if mapped else 0
        host = self._driver.pagelocked_empty((size,), np.uint8, mem_flags=flags)
        return Pinned(host, int(host.base.get_device_pointer()) if mapped else 0, host)

    @_in_words
    def unpin(self, pinned: Pinned) -> None:
        pinned.handle.base.free()

    @_in_words
    def upload(self, address: int, pinned: Pinned, size: int, stream: int) -> None:
        self._driver.memcpy_htod_async(address, pinned.host[:size], self._held[stream])

    @_in_words
    def download(self, pinned: Pinned, address: int, size: int, stream: int) -> None:
        self._driver.memcpy_dtoh_async(pinned.host[:size], address, self._held[stream])

    def capture(self, work: Callable[[], None], stream: int) -> Any:
        raise self._no_graphs()

    def launch(self, graph: Any, stream: int) -> None:
        raise self._no_graphs()

    def free_graph(self, graph: Any) -> None:
        raise self._no_graphs()

    def _no_graphs(self) -> CaptureRefused:
        return CaptureRefused(f"{self.library} cannot capture CUDA graphs; cuda-bindings can")


def _text(value: Any) -> str:
    return value.decode(errors="replace").rstrip("\0") if isinstance(value, bytes) else str(value)


def _hint(code: int) -> str:
    """What mends the CUDA errors that a user can mend."""
    if code == 2:  # cudaErrorMemoryAllocation
        return _MEMORY_HINT
    if code == 35:  # cudaErrorInsufficientDriver
        return "install the NVIDIA driver, or a newer one: the CUDA library here is newer than it"
    return _DRIVER_HINT

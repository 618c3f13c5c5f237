"""``pycuda.driver`` over a `SimulatedCuda`: objects that free themselves, errors as exceptions, nothing without a context."""

from __future__ import annotations

import types
from typing import Any

import numpy as np


class Error(Exception):
    """As ``pycuda.driver.Error``: the first line says what failed."""


class MemoryError(Error):  # noqa: A001  the name is pycuda's
    """As ``pycuda.driver.MemoryError``."""


class Pages(np.ndarray[Any, Any]):
    """Page-locked memory; ``base`` is what owns it."""

    base: Any = None  # numpy's own is read-only


class Driver:
    """The module; ``depth`` counts the contexts that are pushed. ``refuses``: after a fault, a context cannot be pushed."""

    def __init__(self, simulated: Any) -> None:
        self.simulated, self.depth, self.refuses = simulated, 0, False
        driver = self

        class Stream:
            handle = 0

            def __init__(self) -> None:
                self.handle = driver.call("cudaStreamCreateWithFlags", 1)

            def synchronize(self) -> None:
                driver.call("cudaStreamSynchronize", self.handle)

            def __del__(self) -> None:
                driver.simulated.cudaStreamDestroy(self.handle)

        class Memory:
            def __init__(self, size: int) -> None:
                self.address = driver.call("cudaMalloc", size)

            def __int__(self) -> int:
                return int(self.address)

            def free(self) -> None:
                driver.call("cudaFree", self.address)

        self.Error, self.MemoryError = Error, MemoryError
        self.Stream, self.mem_alloc, self.Event = Stream, Memory, _Event
        self.Context = types.SimpleNamespace(pop=self._pop)
        self.Device: Any = lambda index: self._device()
        self.Device.count = lambda: simulated.count
        self.device_attribute = types.SimpleNamespace(INTEGRATED=18)
        self.host_alloc_flags = types.SimpleNamespace(DEVICEMAP=2)

    def call(self, name: str, *arguments: Any) -> Any:
        """A call of the simulation. Raises `Error` without a context, and for what CUDA answers as an error."""
        if not self.depth:
            raise Error(f"{name} failed: invalid device context")
        error, *results = getattr(self.simulated, name)(*arguments)
        if error:
            kind = MemoryError if error == self.simulated.cudaError_t.cudaErrorMemoryAllocation else Error
            raise kind(f"{name} failed: {error.name}\nmore")
        return results[0] if results else None

    def init(self) -> None: ...

    def mem_get_info(self) -> tuple[int, int]:
        return self.call("cudaMemGetInfo"), self.simulated.limit

    def get_driver_version(self) -> int:
        return 12060

    def _device(self) -> Any:
        return types.SimpleNamespace(
            retain_primary_context=lambda: types.SimpleNamespace(push=self._push),
            compute_capability=lambda: tuple(map(int, self.simulated.sm.split("."))),
            name=lambda: "Simulated GPU",
            get_attribute=lambda attribute: int(self.simulated.integrated),
            total_memory=lambda: self.simulated.limit,
        )

    def _push(self) -> None:
        if self.refuses and self.simulated.error:
            raise Error(f"cuCtxPushCurrent failed: {self.simulated.error.name}")
        self.depth += 1

    def _pop(self) -> None:
        self.depth -= 1

    def pagelocked_empty(self, shape: tuple[int], dtype: Any, mem_flags: int = 0) -> Any:
        host = self.call("cudaHostAlloc", shape[0], mem_flags)
        pages = self.simulated.pinned[host].view(Pages)
        pages.base = types.SimpleNamespace(
            get_device_pointer=lambda: self.call("cudaHostGetDevicePointer", host, 0),
            free=lambda: self.call("cudaFreeHost", host),
        )
        return pages

    def memcpy_htod_async(self, target: int, source: Any, stream: Any) -> None:
        kind = self.simulated.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, stream.handle)

    def memcpy_dtoh_async(self, target: Any, source: int, stream: Any) -> None:
        kind = self.simulated.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, stream.handle)


class _Event:
    def record(self, stream: Any) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.stream.synchronize()

    def time_till(self, other: Any) -> float:
        return 0.5

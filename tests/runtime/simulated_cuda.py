"""``cuda.bindings.runtime`` on host memory, with the rules of the real one: what fails there fails here, in the same words.

Device addresses are no host addresses. Work on a stream waits until the stream is synchronized, so what is read before is
not there yet. Memory starts as garbage. Freed or foreign addresses make the next synchronize fail, and every call after it.
"""

# ruff: noqa: N801, N802, N815 - the names are CUDA's

from __future__ import annotations

import ctypes
import enum
import itertools
import types
from collections.abc import Callable
from typing import Any

import numpy as np

GARBAGE = 0xA5


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


class IllegalAddress(Exception):
    """Raised inside queued work; the stream reports it when it is synchronized."""


Work = Callable[[], None]


class _Stream:
    def __init__(self) -> None:
        self.queue: list[Work] = []
        self.captured: list[Work] | None = None
        self.broken = False  # a call that capture forbids was made


class SimulatedCuda:
    """One GPU. ``limit`` is its memory in bytes; ``error``, set by a fault, stays, as in a real CUDA context."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaHostAllocMapped = 2

    def __init__(self, sm: str = "8.6", *, integrated: bool = False, count: int = 1) -> None:
        self.sm, self.integrated, self.count = sm, integrated, count
        self.limit = 1 << 30
        self.error = cudaError_t.cudaSuccess
        self.memory: dict[int, np.ndarray[Any, Any]] = {}  # device address -> uint8
        self.pinned: dict[int, np.ndarray[Any, Any]] = {}  # host address -> uint8
        self.mapped: dict[int, int] = {}  # device address of mapped memory -> host address
        self.streams: dict[int, _Stream] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.events: set[int] = set()
        self.log: list[str] = []
        self._addresses = itertools.count(0x700_0000_0000, 0x1000_0000)
        self._handles = itertools.count(1)

    def module(self) -> types.ModuleType:
        """As ``cuda.bindings.runtime``; every name that is asked for is noted in ``used``."""
        simulated, used = self, set[str]()

        class Runtime(types.ModuleType):
            def __getattr__(self, name: str) -> Any:
                used.add(name)
                return getattr(simulated, name)

        module = Runtime("cuda.bindings.runtime")
        self.used = used
        return module

    @property
    def left(self) -> dict[str, int]:
        """What was made and not freed."""
        kinds = {"memory": self.memory, "pinned": self.pinned, "streams": self.streams, "graphs": self.graphs}
        return {name: len(things) for name, things in {**kinds, "events": self.events}.items() if things}

    # What queued work does

    def bytes_at(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """The ``size`` bytes at a device address. Raises `IllegalAddress` for freed, foreign or too little memory."""
        memory = self.pinned[self.mapped[address]] if address in self.mapped else self.memory.get(address)
        if memory is None or len(memory) < size:
            raise IllegalAddress
        return memory[:size]

    def host_at(self, address: int, size: int) -> np.ndarray[Any, Any]:
        memory = self.pinned.get(address)
        if memory is None or len(memory) < size:
            raise IllegalAddress
        return memory[:size]

    def enqueue(self, stream: int, work: Work) -> cudaError_t:
        if stream not in self.streams:
            return cudaError_t.cudaErrorInvalidResourceHandle
        target = self.streams[stream]
        (target.queue if target.captured is None else target.captured).append(work)
        return self.error

    def _forbidden(self) -> bool:
        """Whether a capture is under way, which the call then breaks."""
        for stream in self.streams.values():
            if stream.captured is not None:
                stream.broken = True
                return True
        return False

    # The API

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (cudaError_t.cudaSuccess, self.count) if self.count >= 0 else (cudaError_t.cudaErrorInsufficientDriver, None)

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return self.error, 0

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        major, minor = map(int, self.sm.split("."))
        return self.error, types.SimpleNamespace(
            name=b"Simulated GPU", major=major, minor=minor, integrated=int(self.integrated), totalGlobalMem=self.limit
        )

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return self.error, 13000

    def cudaGetErrorName(self, error: Any) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return cudaError_t.cudaSuccess, b"in words"

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (self.error,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self.error, self.limit - sum(map(len, self.memory.values())), self.limit

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self._forbidden():
            return cudaError_t.cudaErrorStreamCaptureUnsupported, None
        if size > self.limit - sum(map(len, self.memory.values())):
            return cudaError_t.cudaErrorMemoryAllocation, None
        address = next(self._addresses)
        self.memory[address] = np.full(size, GARBAGE, np.uint8)
        return self.error, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        if self.memory.pop(address, None) is None:
            return (cudaError_t.cudaErrorInvalidValue,)
        return (self.error,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        memory = np.full(size, GARBAGE, np.uint8)
        host = memory.ctypes.data
        self.pinned[host] = memory
        if flags & self.cudaHostAllocMapped:
            self.mapped[next(self._addresses)] = host
        return self.error, host

    def cudaHostGetDevicePointer(self, host: int, flags: int) -> tuple[Any, ...]:
        for address, mapped in self.mapped.items():
            if mapped == host:
                return self.error, address
        return cudaError_t.cudaErrorInvalidValue, None

    def cudaFreeHost(self, host: int) -> tuple[Any, ...]:
        if host not in self.pinned:
            return (cudaError_t.cudaErrorInvalidValue,)
        ctypes.memset(host, GARBAGE, len(self.pinned[host]))  # whoever still reads it sees it
        del self.pinned[host]
        self.mapped = {address: mapped for address, mapped in self.mapped.items() if mapped != host}
        return (self.error,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any, ...]:
        def copy() -> None:
            if kind == cudaMemcpyKind.cudaMemcpyHostToDevice:
                self.bytes_at(target, size)[:] = self.host_at(source, size)
            else:
                self.host_at(target, size)[:] = self.bytes_at(source, size)

        self.log.append(kind.name.removeprefix("cudaMemcpy"))
        return (self.enqueue(stream, copy),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        handle = next(self._handles)
        self.streams[handle] = _Stream()
        return self.error, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        if self.streams.pop(stream, None) is None:
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        return (self.error,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        if self._forbidden():
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        if stream not in self.streams:
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        queue, self.streams[stream].queue = self.streams[stream].queue, []
        try:
            for work in queue:
                work()
        except IllegalAddress:
            self.error = cudaError_t.cudaErrorIllegalAddress
        return (self.error,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any, ...]:
        self.streams[stream].captured, self.streams[stream].broken = [], False
        return (self.error,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        found, self.streams[stream].captured = self.streams[stream].captured, None
        if self.streams[stream].broken or found is None:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        handle = next(self._handles)
        self.graphs[handle] = found
        return self.error, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        handle = next(self._handles)
        self.graphs[handle] = list(self.graphs[graph])
        return self.error, handle

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        return (cudaError_t.cudaErrorInvalidValue if self.graphs.pop(graph, None) is None else self.error,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        self.log.append("GraphLaunch")
        for work in self.graphs[graph]:
            self.enqueue(stream, work)
        return (self.error,)

    def cudaEventCreate(self) -> tuple[Any, ...]:
        handle = next(self._handles)
        self.events.add(handle)
        return self.error, handle

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        return (self.enqueue(stream, lambda: None),)

    def cudaEventSynchronize(self, event: int) -> tuple[Any, ...]:
        for stream in list(self.streams):
            self.cudaStreamSynchronize(stream)
        return (self.error,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Any, ...]:
        return self.error, 0.25

    def cudaEventDestroy(self, event: int) -> tuple[Any, ...]:
        self.events.remove(event)
        return (self.error,)

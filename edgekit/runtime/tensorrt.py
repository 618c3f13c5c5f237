"""The TensorRT backends: classic TensorRT (8.6 to 11, with JetPack) and TensorRT-RTX, through one class.

Features are asked for by name, never by version. An engine is checked (`engines.choose`) before it is loaded. Inputs and
outputs go through page-locked memory, which an integrated GPU reads where it lies; upload, inference and download are
captured as one CUDA graph once the shapes stay the same, but by TensorRT-RTX, which captures inference by itself. What a run
does is in `TensorRtRunner.describe`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from itertools import pairwise
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import Bundle
from edgekit.errors import BackendError, InputError
from edgekit.manifest import ImagePreprocessing, TensorSpec, Tolerance, batch_axes

from .cuda import CaptureRefused, Pinned
from .feeds import check_feeds
from .tensorrt_engine import Engine

__all__ = ["TensorRtRtxRunner", "TensorRtRunner"]

#: TensorRT's names of types -> numpy's. BF16, FP8 and 4-bit inputs have no numpy type; edgekit does not build them.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
#: What a parser makes of types that its TensorRT lacks: int64 before TensorRT 10, float64 always.
NARROWED = {("int64", "int32"), ("float64", "float32")}
_CLOSED = "use it inside: with Model.open(path) as model"


class _Tensor:
    """One input or output: its name and types, its limits, its memory."""

    def __init__(self, name: str, dtype: str, spec: TensorSpec) -> None:
        self.name, self.dtype, self.spec = name, np.dtype(dtype), spec
        self.least: tuple[int, ...] = ()
        self.most: tuple[int, ...] = ()
        self.pinned: Pinned | None = None
        self.address = 0  # of its own device memory; 0 where the device uses the pinned memory
        self.size = 0
        self.view: NDArray[Any] = np.empty(0, dtype)

    def take(self, array: NDArray[Any]) -> None:
        """Copy an input to page-locked memory; wider numbers than the engine's must fit."""
        if array.dtype != self.dtype and array.size and not _fits(array, self.dtype):
            raise InputError(
                f"input {self.name} holds {np.nanmin(array)} to {np.nanmax(array)}, which this engine's {self.dtype} cannot",
                f"this TensorRT has no {array.dtype}: give smaller numbers, or use --backend onnxruntime",
            )
        np.copyto(self.view, array, casting="same_kind")

    def give(self) -> NDArray[Any]:
        """An output as an array of the caller's own, in the type that the model states."""
        return self.view.astype(self.spec.dtype)


class TensorRtRunner:
    """Runs the engine that a bundle holds for one of its graphs; enter it, and use it, from one thread.

    ``cuda_graph``: capture a run as a CUDA graph where TensorRT lets it. ``zero_copy``: let the GPU work in page-locked host
    memory; None, where the GPU is integrated. `share` gives another camera's thread a context of its own on the same
    engine. Raises, when entered, `BackendError` that says why no engine of the bundle may run here, and what to do.
    """

    name = "tensorrt"
    module = "tensorrt"

    def __init__(
        self, bundle: Bundle, graph: str, threads: int, *, cuda_graph: bool = True, zero_copy: bool | None = None
    ) -> None:
        self.bundle, self.graph, self.threads = bundle, graph, threads
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.batches: tuple[int, int] | None = None
        self.tolerance: Tolerance | None = None
        self.frames: ImagePreprocessing | None = None
        self._wish = (cuda_graph, zero_copy)
        self._engine: Engine | None = None
        self._context: Any = None
        self._profiler: Any = None
        self._tensors: list[_Tensor] = []

    def share(self) -> TensorRtRunner:
        """A runner with its own context, stream and memory on this one's engine; enter it in another thread."""
        if self._engine is None:
            raise BackendError("the model is not open", _CLOSED)
        other = type(self)(self.bundle, self.graph, self.threads, cuda_graph=self._wish[0], zero_copy=self._wish[1])
        other._engine = self._engine
        return other

    def __enter__(self) -> TensorRtRunner:
        engine = self._engine = self._engine or Engine(self.bundle, self.graph, self.module, cuda_graph=self._wish[0])
        self._cuda = engine.cuda
        self._stream = 0
        self._graph: Any = None
        self._bound: dict[str, tuple[int, ...]] | None = None
        self._no_graph = self._ungraphed()
        self._zero_copy = engine.device.integrated if self._wish[1] is None else self._wish[1]
        self.tolerance, self.frames = engine.choice.record.golden, engine.choice.record.frames
        with self._cuda.current():
            try:
                self._context = engine.context()
            except BaseException:
                self._engine = None
                raise
            try:
                self._stream = self._cuda.stream()
                self._tensors = self._described(engine)
                self._ins = [t for t in self._tensors if t.least]
                self._outs = [t for t in self._tensors if not t.least]
            except BaseException:
                self._close()
                raise
        self.inputs = tuple(tensor.spec for tensor in self._ins)
        self.outputs = tuple(tensor.spec for tensor in self._outs)
        self.batches = self._batches()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(BackendError):  # after a fault
                stack.enter_context(self._cuda.current())
            self._close()

    def _close(self) -> None:
        """Give everything back. After a fault CUDA refuses even this; the fault's own error is the one to be seen."""
        with contextlib.suppress(BackendError):
            self._drop_graph()
        for tensor in self._tensors:
            with contextlib.suppress(BackendError):
                self._release(tensor)
        self._tensors = []
        if self._stream:
            with contextlib.suppress(BackendError):
                self._cuda.free_stream(self._stream)
            self._stream = 0
        self._bound = self._context = self._profiler = None
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.release()

    def _described(self, loaded: Engine) -> list[_Tensor]:
        """The engine's inputs and outputs. Raises `BackendError` for kinds that this runner cannot feed."""
        engine, trt = loaded.engine, loaded.trt
        stated = {spec.name: spec for spec in (*self.bundle.manifest.inputs, *self.bundle.manifest.outputs)}
        tensors = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = DTYPES.get(engine.get_tensor_dtype(name).name)
            if dtype is None or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                what = f"has type {engine.get_tensor_dtype(name).name}" if dtype is None else "decides shapes"
                raise BackendError(f"{name} {what}, which this backend does not run", "choose --backend onnxruntime")
            known = stated.get(name)
            axes = tuple(engine.get_tensor_shape(name))
            names = known.shape if known and len(known.shape) == len(axes) else tuple(f"{name}_{i}" for i in range(len(axes)))
            shape = tuple(axis if axis >= 0 else str(names[i]) for i, axis in enumerate(axes))
            wide = known is not None and (known.dtype, dtype) in NARROWED
            tensor = _Tensor(name, dtype, TensorSpec(name, known.dtype if known and wide else dtype, shape))
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                least, _, most = engine.get_tensor_profile_shape(name, 0)
                tensor.least, tensor.most = tuple(least), tuple(most)
            tensors.append(tensor)
        return tensors

    def _batches(self) -> tuple[int, int] | None:
        """The engine's, along the axis of each input that is the batch, if the bundle's graph leaves it open."""
        stated = {spec.name: spec for spec in self.bundle.manifest.inputs}
        inputs = [stated.get(tensor.name, tensor.spec) for tensor in self._ins]
        axes = batch_axes(inputs, ())
        limits = [
            (tensor.least[axis], tensor.most[axis])
            for tensor, spec in zip(self._ins, inputs, strict=True)
            if (axis := axes.get(spec.name)) is not None and isinstance(spec.shape[axis], str)
        ]
        return (max(low for low, _ in limits), min(high for _, high in limits)) if limits else None

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Input name -> array, to output name -> array; blocks until the outputs are there.

        Raises `InputError` for a feed of another name, type or shape than the engine's profile takes.
        """
        if self._context is None:
            raise BackendError("the model is not open", _CLOSED)
        arrays = {name: np.asarray(array) for name, array in feeds.items()}
        with self._cuda.current():
            if {name: array.shape for name, array in arrays.items()} != self._bound or any(
                arrays[t.name].dtype != t.spec.dtype for t in self._ins
            ):
                self._bind(arrays)
            for tensor in self._ins:
                tensor.take(arrays[tensor.name])
            if self._graph is None:
                self._enqueue()
                self._cuda.synchronize(self._stream)
                if not self._no_graph:  # from the second run on: TensorRT prepares itself in the first
                    self._capture()
            else:
                self._cuda.launch(self._graph, self._stream)
                self._cuda.synchronize(self._stream)
            return {tensor.name: tensor.give() for tensor in self._outs}

    def _bind(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take new input shapes: set them, size the memory, give TensorRT the addresses."""
        check_feeds(self.inputs, arrays, self.frames)
        for tensor in self._ins:
            _check_profile(tensor, arrays[tensor.name].shape)
        self._drop_graph()
        self._bound = None
        self._no_graph = self._ungraphed()
        context = self._context
        if self._engine is not None:
            self._engine.log.clear()
        for tensor in self._ins:
            if not context.set_input_shape(tensor.name, tuple(arrays[tensor.name].shape)):
                raise self._failed(f"TensorRT refuses input {tensor.name} of shape {_shape(arrays[tensor.name].shape)}")
        if missing := context.infer_shapes():
            raise self._failed(f"TensorRT cannot tell all shapes: {', '.join(missing)} are missing")
        for tensor in self._tensors:
            shape = tuple(context.get_tensor_shape(tensor.name))
            if min(shape, default=1) < 0:
                raise BackendError(
                    f"the size of output {tensor.name} depends on the data ({_shape(shape)})", "choose --backend onnxruntime"
                )
            self._place(tensor, shape)
            address = tensor.pinned.device if self._zero_copy and tensor.pinned else tensor.address
            if not context.set_tensor_address(tensor.name, address):
                raise self._failed(f"TensorRT refuses the memory of {tensor.name}")
        self._bound = {name: array.shape for name, array in arrays.items()}

    def _place(self, tensor: _Tensor, shape: tuple[int, ...]) -> None:
        """Memory of at least this shape; what is large enough is kept."""
        count = math.prod(shape)
        size = max(count * tensor.dtype.itemsize, 1)  # an empty tensor needs an address too
        if size > tensor.size:
            self._release(tensor)
            tensor.pinned = self._cuda.pin(size, mapped=self._zero_copy)
            tensor.address = 0 if self._zero_copy else self._cuda.allocate(size)
            tensor.size = size
        if tensor.pinned is not None:
            tensor.view = tensor.pinned.host[: count * tensor.dtype.itemsize].view(tensor.dtype).reshape(shape)

    def _release(self, tensor: _Tensor) -> None:
        tensor.view = np.empty(0, tensor.dtype)
        if tensor.address:
            self._cuda.free(tensor.address)
        if tensor.pinned is not None:
            self._cuda.unpin(tensor.pinned)
        tensor.pinned, tensor.address, tensor.size = None, 0, 0

    def _enqueue(self) -> None:
        """Upload, inference, download, all asynchronous on the stream."""
        self._upload()
        self._execute()
        self._download()

    def _upload(self) -> None:
        for tensor in self._ins:
            if tensor.pinned is not None and not self._zero_copy and tensor.view.nbytes:
                self._cuda.upload(tensor.address, tensor.pinned, tensor.view.nbytes, self._stream)

    def _execute(self) -> None:
        if self._engine is not None:
            self._engine.log.clear()  # a refused capture leaves lines behind
        if not self._context.execute_async_v3(self._stream):
            raise self._failed("TensorRT did not run")

    def _download(self) -> None:
        for tensor in self._outs:
            if tensor.pinned is not None and not self._zero_copy and tensor.view.nbytes:
                self._cuda.download(tensor.pinned, tensor.address, tensor.view.nbytes, self._stream)

    def _capture(self) -> None:
        """Keep a run as a graph; where that is refused, say why and go on without."""
        try:
            self._graph = self._cuda.capture(self._enqueue, self._stream)
        except CaptureRefused as error:
            self._no_graph = error.message

    def _ungraphed(self) -> str:
        """Why runs are not captured here, "" where they shall be."""
        if not self._wish[0]:
            return "switched off"
        return "by TensorRT-RTX" if self._engine is not None and self._engine.captures else ""

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._cuda.free_graph(self._graph)
            self._graph = None

    def _failed(self, what: str) -> BackendError:
        reason = self._engine.log.take() if self._engine else ""
        return BackendError(f"{what}: {reason}", "build again: edgekit build B --target NAME; edgekit doctor shows the machine")

    def device_ms(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """``upload``, ``compute`` and ``download`` of one run without a graph, in milliseconds by the GPU's own clock."""
        self.run(feeds)
        with self._cuda.current():
            events = [self._cuda.event() for _ in range(4)]
            try:
                for event, step in zip(events, (self._upload, self._execute, self._download), strict=False):
                    self._cuda.record(event, self._stream)
                    step()
                self._cuda.record(events[3], self._stream)
                spans = [self._cuda.elapsed_ms(a, b) for a, b in pairwise(events)]
            finally:
                for event in events:
                    self._cuda.free_event(event)
        return dict(zip(("upload", "compute", "download"), spans, strict=True))

    def layer_ms(self, feeds: Mapping[str, NDArray[Any]], runs: int) -> dict[str, list[float]]:
        """Layer of the engine, after fusion -> its milliseconds in each of ``runs`` inferences, by the GPU's own clock.

        For a runner of ``cuda_graph=False``: a graph is launched as a whole. Timing each layer slows the run.
        """
        self.run(feeds)
        trt = self._engine.trt if self._engine is not None else None
        taken: dict[str, list[float]] = {}

        class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined, union-attr, unused-ignore]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)  # type: ignore[union-attr]

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                taken.setdefault(layer_name, []).append(float(ms))

        self._profiler = Profiler()  # TensorRT does not keep it alive
        self._context.profiler = self._profiler
        self._context.enqueue_emits_profile = True
        for _ in range(runs):
            self.run(feeds)
        return taken

    def describe(self) -> dict[str, Any]:
        """``cuda_graph``: True, who makes it, or why none. ``suboptimal``: why TensorRT-RTX expects less speed, or None."""
        engine = self._engine
        if engine is None:
            return {"backend": self.name, "version": "", "threads": 1}
        record = engine.choice.record
        return {
            "backend": self.name,
            "version": str(engine.trt.__version__),
            "threads": 1,
            "gpu": engine.device.name,
            "sm": engine.device.sm,
            "cuda_driver": engine.device.driver,
            "cuda_library": engine.cuda.library,
            "engine": record.target,
            "engine_precision": record.precision,
            "uint8_input": record.frames is not None,
            "cuda_graph": self._graph is not None or self._no_graph or "not yet: the second run of a shape makes it",
            "zero_copy": self._zero_copy,
            "suboptimal": engine.choice.suboptimal or None,
        }


class TensorRtRtxRunner(TensorRtRunner):
    """The same on TensorRT-RTX, whose engines compile their kernels when they first run and cache them."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"


def _fits(array: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "f":  # an infinity stays one
        return not bool((np.abs(array[np.isfinite(array)]) > np.finfo(dtype).max).any())
    limits = np.iinfo(dtype)
    return bool(limits.min <= array.min() and array.max() <= limits.max)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"


def _check_profile(tensor: _Tensor, shape: tuple[int, ...]) -> None:
    if not all(low <= axis <= high for low, axis, high in zip(tensor.least, shape, tensor.most, strict=True)):
        raise InputError(
            f"input {tensor.name} has shape {_shape(shape)}, the engine takes {_shape(tensor.least)} to {_shape(tensor.most)}",
            "give fewer samples at once, or build for more: edgekit build B --target NAME --batch 1..8",
        )

"""Backends by name. One backend is one file with one `Runner`; ``auto`` takes the first that works here."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from numpy.typing import NDArray

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BackendError, MissingExtra, UsageError
from edgekit.manifest import ImagePreprocessing, TensorSpec, Tolerance

__all__ = ["BACKENDS", "ENGINE_MODULES", "Runner", "open_runner", "runnable_graphs"]

#: name -> (module, class), in the order that ``auto`` tries them.
BACKENDS: dict[str, tuple[str, str]] = {
    "tensorrt": ("edgekit.runtime.tensorrt", "TensorRtRunner"),
    "tensorrt-rtx": ("edgekit.runtime.tensorrt", "TensorRtRtxRunner"),
    "onnxruntime": ("edgekit.runtime.onnxruntime", "OnnxRuntimeRunner"),
}
#: Backends that run a bundle's engines, and the Python module of each.
ENGINE_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


class Runner(Protocol):
    """A context manager around one executable model. Nothing is loaded, and no GPU touched, before it is entered.

    ``batches``: the least and most samples that one run takes, None where any number or only the stated one does.
    ``tolerance``: what its answers owe the golden outputs, where that is not what the manifest states for the graph.
    ``frames``: the preprocessing that it does by itself, on uint8 (n, H, W, C); None where it takes the graph's own inputs.
    """

    name: str
    bundle: Bundle
    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batches: tuple[int, int] | None
    tolerance: Tolerance | None
    frames: ImagePreprocessing | None

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Input name -> array, to output name -> array; blocks until the outputs are there."""
        ...

    def share(self) -> Runner:
        """Of an entered runner: another for another thread, on the same weights; not yet entered."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, version and settings, recorded with every figure."""
        ...


def open_runner(bundle: Bundle, backend: str = "auto", graph: str | None = None, threads: int = 1) -> Runner:
    """A runner, not yet entered. ``graph`` is a file of the bundle; the default is the one the bundle is about.

    ``auto``: of those that could work here the first that does, which shows when it is entered.
    """
    if backend not in ("auto", *BACKENDS):
        raise UsageError(f"there is no backend {backend!r}", f"choose one of: auto, {', '.join(BACKENDS)}")
    graph = graph or bundle.graph
    missing: list[str] = []
    runners: list[Runner] = []
    for name in BACKENDS if backend == "auto" else (backend,):
        if backend == "auto" and not _plausible(bundle, name, graph):
            continue
        module, kind = BACKENDS[name]
        try:
            runners.append(getattr(importlib.import_module(module), kind)(bundle, graph, threads))
        except MissingExtra as error:
            missing.append(f"{name} ({error.hint})")
    if not runners:
        raise BackendError(f"no backend can run {bundle.path} here", f"install one: {'; '.join(missing)}")
    return runners[0] if len(runners) == 1 else _FirstThatWorks(runners)


def runnable_graphs(bundle: Bundle, backend: str) -> tuple[str, ...]:
    """The graphs of a bundle that a backend can run, the float one first: all that it has, or those that have an engine."""
    if backend in ENGINE_MODULES:
        from .engines import engine_graphs  # what runs on ONNX Runtime starts without it

        return engine_graphs(bundle, ENGINE_MODULES[backend])
    return tuple(graph for graph in (FLOAT_GRAPH, INT8_GRAPH) if bundle.has(graph))


def _plausible(bundle: Bundle, backend: str, graph: str) -> bool:
    """Whether a backend is worth a try: its library is installed and the bundle has an engine. Nothing is loaded to see."""
    if backend not in ENGINE_MODULES:
        return True
    engines = any(name.startswith("engines/") for name in bundle.manifest.files)
    return (
        engines and importlib.util.find_spec(ENGINE_MODULES[backend]) is not None and graph in runnable_graphs(bundle, backend)
    )


class _FirstThatWorks:
    """Enters the first of several runners that can be entered, and then is that one."""

    def __init__(self, runners: list[Runner]) -> None:
        self._runners, self._runner = runners, runners[0]
        self.name, self.bundle, self.graph = "auto", runners[0].bundle, runners[0].graph
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.batches: tuple[int, int] | None = None
        self.tolerance: Tolerance | None = None
        self.frames: ImagePreprocessing | None = None
        self._passed: dict[str, str] = {}

    def __enter__(self) -> Runner:
        self._passed = {}
        for runner in self._runners[:-1]:
            try:
                return self._become(runner)
            except (BackendError, MissingExtra) as error:
                self._passed[runner.name] = error.message
        return self._become(self._runners[-1])

    def _become(self, runner: Runner) -> Runner:
        runner.__enter__()
        self._runner, self.name = runner, runner.name
        self.inputs, self.outputs = runner.inputs, runner.outputs
        self.batches, self.tolerance, self.frames = runner.batches, runner.tolerance, runner.frames
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._runner.__exit__(kind, value, traceback)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._runner.run(feeds)

    def share(self) -> Runner:
        return self._runner.share()

    def describe(self) -> dict[str, Any]:
        """That of the runner, and why those before it in the order did not do: ``passed_over``."""
        return {**self._runner.describe(), **({"passed_over": self._passed} if self._passed else {})}

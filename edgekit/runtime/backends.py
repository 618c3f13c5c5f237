"""Backends by name. One backend is one file with one `Runner`; ``auto`` takes the first that works here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from numpy.typing import NDArray

from edgekit.bundle import Bundle
from edgekit.errors import BackendError, MissingExtra, UsageError
from edgekit.manifest import TensorSpec

__all__ = ["BACKENDS", "Runner", "open_runner"]

#: name -> (module, class), in the order that ``auto`` tries them.
BACKENDS: dict[str, tuple[str, str]] = {
    "onnxruntime": ("edgekit.runtime.onnxruntime", "OnnxRuntimeRunner"),
}


class Runner(Protocol):
    """A context manager around one executable model. Nothing is loaded, and no GPU touched, before it is entered."""

    name: str
    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(self, bundle: Bundle, graph: str, threads: int) -> None: ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Input name -> array, to output name -> array; blocks until the outputs are there."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, version and settings, recorded with every figure."""
        ...


def open_runner(bundle: Bundle, backend: str = "auto", graph: str | None = None, threads: int = 1) -> Runner:
    """A runner, not yet entered. ``graph`` is a file of the bundle; the default is the one the bundle is about."""
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(f"there is no backend {backend!r}", f"choose one of: auto, {', '.join(BACKENDS)}")
    missing: list[str] = []
    for name in BACKENDS if backend == "auto" else (backend,):
        module, kind = BACKENDS[name]
        try:
            runner: type[Runner] = getattr(importlib.import_module(module), kind)
        except MissingExtra as error:
            missing.append(f"{name} ({error.hint})")
            continue
        return runner(bundle, graph or bundle.graph, threads)
    raise BackendError(f"no backend can run {bundle.path} here", f"install one: {'; '.join(missing)}")

"""What a build asks of TensorRT beyond the graph. Part of every build kit, beside build_engine.py, and with the same rules:
features by name, never by version; Python 3.8 and nothing else."""

from __future__ import annotations

from typing import Any

__all__ = ["BuildError", "configure"]


class BuildError(Exception):
    """TensorRT refused the graph, or lacks what was asked for; the message names it."""


def _member(trt: Any, enumeration: str, name: str, option: str) -> Any:
    """A member of one of TensorRT's enumerations. Raises `BuildError` that names the option which needs it."""
    found = getattr(getattr(trt, enumeration, None), name, None)
    if found is None:
        version = getattr(trt, "__version__", "")
        raise BuildError(f"{option}: TensorRT {version} has no {enumeration}.{name}; build the kit again without {option}")
    return found


def configure(trt: Any, config: Any, options: dict[str, Any]) -> None:
    """Set on a builder's configuration what ``options`` of a build.json asks for. Raises `BuildError`."""
    if options.get("workspace_mb") is not None:
        pool = _member(trt, "MemoryPoolType", "WORKSPACE", "--workspace-mb")
        config.set_memory_pool_limit(pool, options["workspace_mb"] << 20)

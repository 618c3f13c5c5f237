"""Figures that say how they were taken: latency and throughput, errors between graphs, and what a machine can do.

Names load when they are first used: `doctor` and the device's facts work where no backend is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkup import doctor
    from .comparison import compare
    from .harness import bench
    from .pairs import bench_pair

_HOMES = {"bench": "harness", "bench_pair": "pairs", "compare": "comparison", "doctor": "checkup"}

__all__ = ["bench", "bench_pair", "compare", "doctor"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]

"""Figures that say how they were taken: latency and throughput, errors between graphs, and what a machine can do.

Names load when they are first used: `doctor` and the device's facts work where no backend is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.lazy import on_first_use

if TYPE_CHECKING:
    from .checkup import doctor
    from .comparison import compare
    from .harness import bench
    from .pairs import bench_pair

_HOMES = {"bench": ".harness", "bench_pair": ".pairs", "compare": ".comparison", "doctor": ".checkup"}

__all__ = ["bench", "bench_pair", "compare", "doctor"]

__getattr__, __dir__ = on_first_use(__name__, _HOMES)

"""Figures that say how they were taken: latency and throughput, errors between graphs, and what a machine can do."""

from __future__ import annotations

from .checkup import doctor
from .comparison import compare
from .harness import bench
from .pairs import bench_pair

__all__ = ["bench", "bench_pair", "compare", "doctor"]

"""edgekit: from training to an NVIDIA device at the edge.

Every stage is a verb here, loaded on first use; the rooms behind them are nouns::

    import edgekit
    bundle = edgekit.train(data="digits", out="digits.edge")
    small = edgekit.quantize(bundle, out="digits8.edge", calib="digits")

On the device: ``from edgekit.runtime import Model``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .version import __version__

# ONNX Runtime's wheels report their use to Microsoft unless told not to, leave an identifier of the machine on disk, and read
# this when they are loaded. A device on a line reports to nobody of its own accord; "0" leaves it to ONNX Runtime.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from .lazy import on_first_use

if TYPE_CHECKING:
    from .benchmarking import bench, bench_pair, compare
    from .bundle import Bundle
    from .compiler import build, estimate, import_onnx
    from .deployment import install, pack, verify
    from .errors import EdgekitError
    from .evaluation import evaluate
    from .explanation import explain
    from .pipeline.pareto import pareto
    from .pruning import prune
    from .quantization import quantize
    from .reporting import report
    from .training import train
    from .training.search import search

_HOMES = {
    "Bundle": ".bundle",
    "EdgekitError": ".errors",
    "bench": ".benchmarking",
    "bench_pair": ".benchmarking",
    "build": ".compiler",
    "compare": ".benchmarking",
    "estimate": ".compiler",
    "evaluate": ".evaluation",
    "explain": ".explanation",
    "import_onnx": ".compiler",
    "install": ".deployment",
    "pack": ".deployment",
    "pareto": ".pipeline.pareto",
    "prune": ".pruning",
    "quantize": ".quantization",
    "report": ".reporting",
    "search": ".training.search",
    "train": ".training",
    "verify": ".deployment",
}

__all__ = [
    "Bundle",
    "EdgekitError",
    "__version__",
    "bench",
    "bench_pair",
    "build",
    "compare",
    "estimate",
    "evaluate",
    "explain",
    "import_onnx",
    "install",
    "pack",
    "pareto",
    "prune",
    "quantize",
    "report",
    "search",
    "train",
    "verify",
]

__getattr__, __dir__ = on_first_use(__name__, _HOMES)

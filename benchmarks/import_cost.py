"""What importing edgekit costs: import_cost.py [--rounds N]

Each round starts every process once, in a changing order, so that a busy moment falls on all alike; figures are
medians of paired differences.

1. ``import edgekit.runtime`` and its ONNX Runtime backend, over ``import numpy, onnxruntime`` alone. Milliseconds are
   taken inside the process around the import statement, megabytes as resident memory (VmRSS) after it.
   Targets: 30 ms, 10 MB.
   Bytecode is cached, as in any installation, even where PYTHONDONTWRITEBYTECODE is set.
2. Wall time of ``edgekit --help``, process start to exit, beside ``python -c pass``. Target: 200 ms.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _machine import save

from edgekit.progress import track

TARGETS = {"import_ms": 30.0, "import_mb": 10.0, "help_ms": 200.0}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
_TAIL = """
took = (time.perf_counter() - start) * 1e3
with open("/proc/self/status") as status:
    rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024 / 1e6
print(took, rss)
"""
_HEAD = "import time\nstart = time.perf_counter()\n"
IMPORTS = {
    "numpy, onnxruntime": "import numpy, onnxruntime",
    "and edgekit.runtime": "import numpy, onnxruntime\nimport edgekit.runtime, edgekit.runtime.onnxruntime",
}
WALL = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "edgekit --help": [str(Path(sys.executable).with_name("edgekit")), "--help"],
}


def imported(code: str) -> tuple[float, float]:
    """(ms, MB) of one import in a fresh process."""
    out = subprocess.run(
        [sys.executable, "-c", _HEAD + code + _TAIL], capture_output=True, text=True, check=True, env=ENVIRONMENT
    ).stdout
    ms, mb = map(float, out.split())
    return ms, mb


def wall_ms(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT)
    return (time.perf_counter() - start) * 1e3


def measure(rounds: int) -> dict[str, Any]:
    ms: dict[str, list[float]] = {name: [] for name in (*IMPORTS, *WALL)}
    mb: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for i in track(range(-2, rounds), "starting processes"):  # the first two fill the file cache
        for name in list(ms) if i % 2 else list(ms)[::-1]:
            if name in IMPORTS:
                took, rss = imported(IMPORTS[name])
                mb[name] += [rss] if i >= 0 else []
            else:
                took = wall_ms(WALL[name])
            ms[name] += [took] if i >= 0 else []
    base, ours = IMPORTS
    extra_ms = [b - a for a, b in zip(ms[base], ms[ours], strict=True)]
    extra_mb = [b - a for a, b in zip(mb[base], mb[ours], strict=True)]
    nothing, helped = (statistics.median(ms[name]) for name in WALL)
    figures = {"import_ms": statistics.median(extra_ms), "import_mb": statistics.median(extra_mb), "help_ms": helped}
    return {
        **figures,
        "help_over_pass_ratio": helped / nothing,
        "median_ms": {name: statistics.median(values) for name, values in ms.items()},
        "median_mb": {name: statistics.median(values) for name, values in mb.items()},
        "import_ms_quartiles": statistics.quantiles(extra_ms, n=4),
        "targets": TARGETS,
        "met": {name: figures[name] <= limit for name, limit in TARGETS.items()},
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    figures = measure(parser.parse_args().rounds)
    print(f"import edgekit.runtime: {figures['import_ms']:.1f} ms and {figures['import_mb']:.1f} MB over numpy and onnxruntime")
    print(f"edgekit --help: {figures['help_ms']:.0f} ms, {figures['help_over_pass_ratio']:.1f} times python -c pass")
    print(f"met: {figures['met']}")
    print(f"written to {save('import_cost', figures)}")


if __name__ == "__main__":
    main()

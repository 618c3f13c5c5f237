"""What every result file of this folder carries beside its figures: the machine, the versions, the day, the load."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from edgekit.benchmarking.device import fingerprint
from edgekit.files import atomic_write

RESULTS = Path(__file__).with_name("results")


def machine() -> dict[str, Any]:
    """``date``, ``cpu``, ``cores``, ``mhz``, ``memory_mb``, ``python``, ``versions``, ``load_1min`` and more, JSON-plain."""
    found = fingerprint()
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), **found, "load_1min": round(os.getloadavg()[0], 2)}


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/NAME.json``: the figures and the machine that they were taken on."""
    path = RESULTS / f"{name}.json"
    atomic_write(path, json.dumps({**figures, "machine": machine()}, indent=1, allow_nan=False).encode() + b"\n")
    return path

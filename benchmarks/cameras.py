"""Simulated cameras with the digits CNN: end-to-end latency and losses: cameras.py [--cameras N...] [--fps F] [--seconds S]

Each camera is `pattern:640x480@30` in a process of its own, as real cameras are; all of them go through one model (a
`depthwise` digits preset, an epoch of training: weights do not change its speed) into a JSON lines file. The latency of an
event runs from its frame's capture in the camera's process to the moment that the file has it: waiting, batching and the
way between processes are in it. It grows where the scan does not keep up, so the thirds of the run stand side by side.
Target: four cameras of 30 fps on two cores, the last third no slower than the first by more than a tenth, no frame lost.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from _machine import save

from edgekit.scanner import Scanner

WARM_S = 2.0


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def run(bundle: Path, folder: Path, cameras: int, fps: float, seconds: float) -> dict[str, Any]:
    sources = [{"address": f"pattern:640x480@{fps:g}", "name": f"camera {i}"} for i in range(cameras)]
    config = {"model": {"bundle": str(bundle)}, "source": sources, "sink": [{"address": f"jsonl:{folder}/{cameras}.jsonl"}]}
    seen: list[tuple[float, float]] = []  # when it was sent, and how long after its capture in ms

    def heard(event: dict[str, Any]) -> None:
        if "label" in event:
            now = time.time()
            seen.append((now, (now - datetime.fromisoformat(event["time"].replace("Z", "+00:00")).timestamp()) * 1e3))

    scanner = Scanner(config, on_event=heard)
    threading.Timer(WARM_S + seconds, scanner.stop).start()
    begun, used = time.monotonic(), cpu_seconds()
    summary = scanner.run()
    wall = time.monotonic() - begun
    begin = seen[0][0] + WARM_S
    times, ms = np.array([(at, took) for at, took in seen if at >= begin]).T
    thirds = np.array_split(ms, 3)
    lost = {reason: count for reason, count in summary.dropped.items() if reason != "stopped"}
    p50s, p99s = ([round(float(np.percentile(third, q)), 2) for third in thirds] for q in (50, 99))
    row = {
        "frames": len(ms),
        "fps_each": round(len(ms) / (times[-1] - begin) / cameras, 2),
        "p50_ms": round(float(np.percentile(ms, 50)), 2),
        "p99_ms": round(float(np.percentile(ms, 99)), 2),
        "max_ms": round(float(ms.max()), 1),
        "thirds_p50_ms": p50s,
        "thirds_p99_ms": p99s,
        "lost": lost,
        "batch": summary.model["batch"],
        "cores_used": round((cpu_seconds() - used) / wall, 2),
        "exact": summary.captured == summary.inferred + sum(summary.dropped.values()) + summary.in_flight,
    }
    row["met"] = bool(not lost and row["exact"] and p50s[-1] <= 1.1 * p50s[0] and row["fps_each"] >= 0.98 * fps)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = folder / "digits.edge"
        train = ["train", "--data", "digits", "--model", "depthwise", "--epochs", "1", "--out", str(bundle)]
        subprocess.run([sys.executable, "-m", "edgekit", *train], check=True)  # no torch in this process
        rows = {str(count): run(bundle, folder, count, options.fps, options.seconds) for count in options.cameras}
    for count, row in rows.items():
        print(f"{count} cameras at {options.fps:g} fps:", ", ".join(f"{key} {value}" for key, value in row.items()))
    print(f"written to {save('cameras', {'rows': rows, 'fps': options.fps, 'seconds': options.seconds})}")


if __name__ == "__main__":
    main()

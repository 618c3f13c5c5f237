"""The runtime beside others on the same model and input: runtime_peers.py [--rounds N] [--peers NAME ...]

For each: what importing it costs over an empty interpreter, and what one call costs over the bare `InferenceSession.run` that
it wraps, in turns within one process. Peers run in environments of their own (``--env FOLDER``), which are made where they are
missing. So ``overhead_us`` compares between peers; ``bare_us`` and ``call_us`` compare within a row only, though the processes
take turns and a row holds the medians of `TURNS` of them: another minute, another process and other builds of its libraries.
 The model: 2 convolutions on 28x28 grey, tensors in and out.

Not here: Ultralytics' `YOLO` needs torchvision and gigabytes for it, and reads its own metadata from a file; Roboflow's
`inference` runs models of its registry, with a key.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _machine import save
from _runtime_peers import IMPORTS
from model_overhead import DIGITS, write_bundle

from edgekit.bundle import FLOAT_GRAPH

PACKAGES = {"polygraphy": ["polygraphy==0.53.6", "onnxruntime==1.32.0", "onnx==1.23.2", "numpy"]}
STARTS = 9
TURNS = 5  # processes of each peer


def python_of(peer: str, folder: Path) -> str:
    """The interpreter of the peer's environment."""
    if peer not in PACKAGES:
        return sys.executable
    home = folder / peer
    if not (home / "bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [str(home / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", *PACKAGES[peer]]
        subprocess.run(install, check=True)
    return str(home / "bin/python")


def import_ms(pythons: dict[str, str]) -> dict[str, float]:
    """Median wall time over an empty interpreter's, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in pythons}
    for _ in range(STARTS):
        for name, python in pythons.items():
            times = []
            for code in (IMPORTS[name], "pass"):
                start = time.perf_counter()
                subprocess.run([python, "-c", code], check=True)
                times.append(time.perf_counter() - start)
            taken[name].append(1e3 * (times[0] - times[1]))
    return {name: round(statistics.median(values), 1) for name, values in taken.items()}


def _answer(text: str) -> dict[str, float]:
    """The JSON line: a peer prints lines of its own."""
    found: dict[str, float] = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5000)
    parser.add_argument("--peers", nargs="+", default=list(IMPORTS), choices=list(IMPORTS))
    parser.add_argument("--env", type=Path, default=Path("runs/peers"))
    options = parser.parse_args()
    pythons = {name: python_of(name, options.env) for name in options.peers}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = write_bundle(folder / "digits.edge", DIGITS)
        feeds = folder / "feeds.npz"
        np.savez(feeds, x=np.zeros((1, 1, 28, 28), np.float32))
        taken: dict[str, list[dict[str, float]]] = {peer: [] for peer in pythons}
        for _ in range(TURNS):
            for peer, python in pythons.items():
                command = [python, str(Path(__file__).with_name("_runtime_peers.py")), peer]
                command += [str(bundle.file(FLOAT_GRAPH)), str(feeds), str(options.rounds), str(bundle.path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                taken[peer].append(_answer(done.stdout))
    for peer, answers in taken.items():
        rows[peer] = {key: round(statistics.median(answer[key] for answer in answers), 2) for key in answers[0]}
    for peer, cost in import_ms(pythons).items():
        rows[peer]["import_ms"] = cost
        print(f"{peer:12} call {rows[peer]['overhead_us']:+7.2f} us over {rows[peer]['bare_us']:.1f}, import {cost:.0f} ms")
    save("runtime_peers", {"peers": rows, "rounds": options.rounds, "turns": TURNS})


if __name__ == "__main__":
    main()

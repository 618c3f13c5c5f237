"""How long an engine takes, first and with nothing changed: engine_build.py [BUNDLE...] [--target rtx-ada] [--repeat 5]

``process`` is the wall time of ``edgekit build`` from start to exit, ``inside`` what `edgekit.build` reports, ``python``
an empty interpreter, all in seconds, medians of ``--repeat`` runs. Bundles are copied, never changed. Writes
``results/engine_build.json``. Without bundles: the shipped presets of ``calibration/``. Targets: first build of the
digits CNN <= 3 s, cached <= 0.2 s inside the command.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from _machine import save

from edgekit.bundle import MANIFEST
from edgekit.manifest import decode_manifest, encode_manifest

COMMAND = [sys.executable, "-c", "from edgekit.cli import main; main()"]


def timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return seconds, done.stdout


def measure(bundle: Path, target: str, precision: str, repeat: int) -> dict[str, Any]:
    """Medians over ``repeat`` fresh copies, each built twice."""
    rows: dict[str, list[float]] = {
        key: [] for key in ("first_process", "first_inside", "cached_process", "cached_inside", "python")
    }
    answer: dict[str, Any] = {}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / bundle.name
            shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("engines"))
            forget_engines(copy)
            build = [*COMMAND, "build", str(copy), "--target", target, "--precision", precision, "--json"]
            for kind in ("first", "cached"):
                seconds, out = timed(build)
                answer = json.loads(out)
                if answer["cached"] != (kind == "cached"):
                    sys.exit(f"the {kind} build answered cached = {answer['cached']}")
                rows[f"{kind}_process"].append(seconds)
                rows[f"{kind}_inside"].append(answer["seconds"])
        rows["python"].append(timed([sys.executable, "-c", "pass"])[0])
    figures = {f"{key}_s": round(statistics.median(values), 4) for key, values in rows.items()}
    spread = {f"{key}_s": [round(min(values), 4), round(max(values), 4)] for key, values in rows.items()}
    chosen = {key: answer[key] for key in ("target", "precision", "tensorrt", "size_bytes")}
    return {
        **chosen,
        "float_graph_bytes": (bundle / "model.onnx").stat().st_size,
        "repeat": repeat,
        "median": figures,
        "range": spread,
    }


def forget_engines(bundle: Path) -> None:
    """Take engines out of a copy's manifest, so that the first build is a first build."""
    path = bundle / MANIFEST
    manifest = decode_manifest(path.read_bytes(), bundle)
    files = {name: digest for name, digest in manifest.files.items() if not name.startswith("engines/")}
    path.write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = sorted(Path(__file__).parents[1].glob("calibration/*/float.edge"))
    parser.add_argument(
        "bundles", type=Path, nargs="*", default=shipped, metavar="BUNDLE", help="default: calibration/*/float.edge"
    )
    parser.add_argument("--target", default="rtx-ada")
    parser.add_argument("--precision", default="best")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    results = {}
    for path in options.bundles:
        name = path.parent.name if path.stem == "float" else path.stem
        results[name] = measure(path, options.target, options.precision, options.repeat)
    print(json.dumps(results, indent=1))
    print(save("engine_build", {"bundles": results}))


if __name__ == "__main__":
    main()

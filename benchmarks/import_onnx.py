"""Seconds and memory that `edgekit import` takes for a file of 50 MB: import_onnx.py [FILE.onnx ...] [--megabytes 50]

Without files: a chain of 3x3 convolutions and one of matrix products, of float32 weights. ``memory_share``: peak memory of the
process that reads the graph, less that of the same process for a graph of 1 kB, over the size of the file. Writes
``results/import_onnx.json``. Targets: 10 s, 3 times the size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _machine import save
from onnx import TensorProto, helper, numpy_helper

# In a process of its own: the peak of the children of a process is that of the largest one so far.
MEASURE = """
import json, resource, sys, time, edgekit
started = time.perf_counter()
edgekit.import_onnx(sys.argv[1], out=sys.argv[2])
seconds = time.perf_counter() - started
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""


def chain(kind: str, megabytes: float, width: int, file: Path) -> Path:
    """``kind``: Conv or MatMul, as often as it takes."""
    shape = (width, width, 3, 3) if kind == "Conv" else (width, width)
    random, nodes, weights, last = np.random.default_rng(0), [], [], "x"
    for i in range(max(1, round(megabytes * 2**20 / (4 * np.prod(shape))))):
        weights.append(numpy_helper.from_array(random.normal(0, 0.02, shape).astype(np.float32), f"w{i}"))
        attributes = {"pads": [1] * 4} if kind == "Conv" else {}
        nodes.append(helper.make_node(kind, [last, f"w{i}"], [f"h{i}"], **attributes))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"]))
        last = f"r{i}"
    axes = ["n", width, 16, 16] if kind == "Conv" else ["n", width]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in ("x", last)]
    graph = helper.make_graph(nodes, kind, values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file.write_bytes(model.SerializeToString())
    return file


def measured(file: Path, folder: Path) -> tuple[float, int]:
    """Seconds, and bytes at the peak."""
    command = [sys.executable, "-c", MEASURE, str(file), str(folder / f"{file.stem}.edge")]
    seconds, peak = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--megabytes", type=float, default=50)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        least = measured(chain("MatMul", 0, 16, folder / "least.onnx"), folder)[1]
        files = options.files or [
            chain("Conv", options.megabytes, 512, folder / "convolutions.onnx"),
            chain("MatMul", options.megabytes, 1024, folder / "products.onnx"),
        ]
        for file in files:
            seconds, peak = measured(file, folder)
            size = file.stat().st_size
            rows[file.stem] = {
                "size_bytes": size,
                "seconds": round(seconds, 2),
                "peak_bytes": peak,
                "memory_share": round((peak - least) / size, 2),
                "met": seconds <= 10 and peak - least <= 3 * size,
            }
            print(f"{file.stem}: {size / 2**20:.0f} MB, {seconds:.1f} s, {rows[file.stem]['memory_share']} times its size")
    save("import_onnx", {"least_bytes": least, "files": rows})


if __name__ == "__main__":
    main()

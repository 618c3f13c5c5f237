"""How long a user waits for the first answer: from the start of a process, imports included."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edgekit.runtime import Model

from .inputs import Feeds

__all__ = ["process_start_ms"]

PATIENCE_S = 120.0  # for the first answer of a process
#: What an application does, and nothing else: the runtime, one model, one run.
_APPLICATION = """
import sys
import numpy
from edgekit.runtime import Model
path, backend, precision, threads, feeds = sys.argv[1:]
with Model.open(path, backend, precision=precision, threads=int(threads)) as model:
    model.runner.run(dict(numpy.load(feeds, allow_pickle=False)))
    print("answered", flush=True)
    sys.stdin.read()
"""


def process_start_ms(model: Model, precision: str, threads: int, feeds: Feeds, runs: int) -> float | None:
    """Milliseconds from starting Python to the first answer of ``model``, the median of ``runs``; None where it did not come
    within two minutes.

    The files were read before, so the disk is not part of it.
    """
    taken = []
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as folder:
        file = Path(folder) / "feeds.npz"
        save: Any = np.savez  # its stub takes the names of inputs for its own option
        save(file, **feeds)
        command = [sys.executable, "-c", _APPLICATION]
        command += [str(model.bundle.path.resolve()), model.runner.name, precision, str(threads), str(file)]
        for _ in range(runs):
            start = time.perf_counter()
            process = subprocess.Popen(  # noqa: S603  our own interpreter
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            with process:
                assert process.stdout is not None
                late = threading.Timer(PATIENCE_S, process.kill)
                late.start()
                answered = process.stdout.readline()
                taken.append(time.perf_counter() - start)
                late.cancel()
                process.kill()  # what it takes to leave is no concern of this
            if answered.strip() != b"answered":
                return None
    return 1e3 * median(taken)

"""Processes of their own: how long a user waits for the first answer, imports included, and what runs of one thing differ by.

Where a process lays its memory, and on which core it lands, moves a small model by percents for as long as it lives. No run
shows that of itself, so a gate needs several (Kalibera and Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from edgekit.runtime import Model

from .inputs import Feeds

__all__ = ["Starts", "processes"]

PATIENCE_S = 120.0  # for the first answer of a process
MEASURED_S = 0.4  # of a run beside the yardstick, once it has answered
SLOWEST_S = 0.05  # a call; of a slower model such runs would take longer than the bench itself
#: What an application does, and nothing else: the runtime, one model, one run. Then, if it is told so, a short run beside the
#: yardstick.
_APPLICATION = """
import sys
import numpy
from edgekit.runtime import Model
path, backend, precision, threads, feeds = sys.argv[1:]
with Model.open(path, backend, precision=precision, threads=int(threads)) as model:
    feeds = dict(numpy.load(feeds, allow_pickle=False))
    model.runner.run(feeds)
    print("answered", flush=True)
    if sys.stdin.readline().strip() == "measure":
        from edgekit.benchmarking.scenarios import single_stream, warm_up
        call = lambda: model.runner.run(feeds)
        warm_up(call, limit_s=0.5)
        run = single_stream(call, MEASURED_S, yardstick=True)
        print(float(numpy.median(run.yardstick["relative"])), flush=True)
    sys.stdin.read()
""".replace("MEASURED_S", str(MEASURED_S))


class Starts(NamedTuple):
    """``ms``: from starting Python to the first answer, the median; None where one did not come within two minutes.

    ``relative``: the median latency of each process over the yardstick's.
    """

    ms: float | None
    relative: list[float]


def processes(model: Model, precision: str, threads: int, feeds: Feeds, runs: int, measured: bool) -> Starts:
    """Start ``runs`` processes that run ``model`` once, and then, where it is ``measured``, for a moment beside the yardstick.

    The files were read before, so the disk is not part of it.
    """
    taken: list[float] = []
    relative: list[float] = []
    begin = time.perf_counter()
    model.runner.run(feeds)
    measured = measured and time.perf_counter() - begin <= SLOWEST_S
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
                late = threading.Timer(PATIENCE_S, process.kill)
                late.start()
                assert process.stdin is not None
                assert process.stdout is not None
                answered = process.stdout.readline()
                taken.append(time.perf_counter() - start)
                if measured and answered:
                    process.stdin.write(b"measure\n")
                    process.stdin.flush()
                    relative += [float(said) for said in [process.stdout.readline()] if said]
                late.cancel()
                process.kill()  # what it takes to leave is no concern of this
            if answered.strip() != b"answered":
                return Starts(None, [])
    return Starts(1e3 * median(taken), relative)

"""Processes of their own: how long a user waits for the first answer, imports included, and what runs of one thing differ by.

Where a process lays its memory, and on which core it lands, moves a small model by percents for as long as it lives. No run
shows that of itself, so a gate needs several (Kalibera and Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013).
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from edgekit.bundle import Bundle
from edgekit.runtime import Model
from edgekit.runtime.backends import ENGINE_MODULES, Runner, open_runner
from edgekit.runtime.cuda import open_cuda
from edgekit.runtime.model import Precision
from edgekit.runtime.tensorrt import TensorRtRunner

from .asked import Asked
from .device import resident_mb
from .inputs import Feeds, golden_or_none, least_batch, runner_feeds

__all__ = ["Starts", "on_cpu", "opened_and_timed", "processes", "started_anew"]

STARTS = 4  # processes started, for their first answer and a short run

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


@contextlib.contextmanager
def opened_and_timed(
    bundle: Bundle, backend: str, precision: Precision, threads: int
) -> Iterator[tuple[Model, Feeds, dict[str, Any]]]:
    """The model, open, what it is fed, and what opening it cost: ``cold_start_ms`` (with hash check and first inference) and
    ``memory``."""
    runner = open_runner(bundle, backend)  # imports the backend: once a process, and not the model's cost
    free = _free_on_gpu(runner)
    before, start = resident_mb(), time.perf_counter()
    with Model.open(bundle.path, backend, precision=precision, threads=threads) as model:
        loaded = time.perf_counter()
        feeds = runner_feeds(model.runner, golden_or_none(bundle), least_batch(model.runner))
        first = time.perf_counter()
        model.runner.run(feeds)
        cold_start = loaded - start + time.perf_counter() - first
        after = resident_mb()
        grown = after - before if before is not None and after is not None else None
        taken = None if free is None else (free - (_free_on_gpu(runner) or 0)) / 1e6
        memory = {"rss_mb": after, "model_mb": grown, "gpu_mb": taken}
        yield model, feeds, {"cold_start_ms": cold_start * 1e3, "memory": memory}


def started_anew(model: Model, precision: Precision, threads: int, feeds: Feeds, asked: Asked) -> Starts:
    """How long `STARTS` processes took to their first answer; and what they took beside the yardstick, single-stream and from
    a second on."""
    starts = STARTS if asked.seconds >= 1 else 1
    measured = starts > 1 and asked.scenario == "single-stream" and on_cpu(model.runner)
    return processes(model, precision, threads, feeds, starts, measured)


def on_cpu(runner: Runner) -> bool:
    """Whether the yardstick's pace is the runner's: a GPU's is not the CPU's."""
    return runner.name not in ENGINE_MODULES


def _free_on_gpu(runner: Runner) -> int | None:
    """Bytes that the GPU has left, None where nothing runs on one."""
    if not isinstance(runner, TensorRtRunner):
        return None
    cuda = open_cuda()
    with cuda.current():
        return cuda.free_bytes()

"""The TensorRT runner on a real GPU: answers against the golden outputs and ONNX Runtime, latency, threads, refusals.

    python benchmarks/tensorrt_runner.py BUNDLE...                          writes results/tensorrt_runner.json
    python benchmarks/tensorrt_runner.py BUNDLE... --without-tensorrt       and the runner's own cost, see _tensorrt_stand_in

Bundles should hold an engine for this GPU (edgekit build); one that is refused is recorded with the words of the refusal, and
with TensorRT's own. For each other: cold start with an empty and with a filled runtime
cache, the golden check, `edgekit compare`'s error against ONNX Runtime, and latency of `run` for batch 1 with CUDA graph,
without, and with zero-copy memory, interleaved; GPU time of upload, compute and download by CUDA events; throughput of 1, 2
and 4 threads with a context each on one engine. Then what is refused, with the words of the refusal.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from _machine import save

from edgekit.benchmarking import doctor
from edgekit.benchmarking.inputs import feeds_for, golden_or_none
from edgekit.benchmarking.statistics import percentiles
from edgekit.bundle import Bundle
from edgekit.errors import EdgekitError
from edgekit.runtime import Model, check_golden, compare_arrays, open_runner
from edgekit.runtime.cuda import open_cuda
from edgekit.runtime.engines import records
from edgekit.runtime.golden import load_golden, run_samples
from edgekit.runtime.tensorrt import TensorRtRtxRunner, TensorRtRunner
from edgekit.runtime.tensorrt_engine import load_library, registered_logger
from edgekit.trust import is_trusted

RUNNERS = {"tensorrt": TensorRtRunner, "tensorrt-rtx": TensorRtRtxRunner}
ROUNDS, RUNS, WARM_UP = 20, 50, 50
CHECKED = 50  # of a thread's answers, one in so many is held against the first


def timed(call: Callable[[], Any], runs: int) -> list[float]:
    """Milliseconds of each of ``runs`` calls."""
    found = []
    for _ in range(runs):
        start = time.perf_counter_ns()
        call()
        found.append((time.perf_counter_ns() - start) / 1e6)
    return found


def rounded(ranks: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in ranks.items() if key in ("p50", "p90", "p99", "min")}


def cold_start(bundle: Bundle, backend: str) -> dict[str, float]:
    """Milliseconds to the first answer: with an empty runtime cache, then with the one that this left."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        before, os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME"), cache
        for name in ("empty_cache", "filled_cache"):
            start = time.perf_counter_ns()
            with open_runner(bundle, backend) as runner:
                opened = time.perf_counter_ns()
                runner.run(feeds_for(runner.inputs, golden_or_none(bundle), 1))
                done = time.perf_counter_ns()
            found[name] = {"open_ms": round((opened - start) / 1e6, 1), "first_run_ms": round((done - opened) / 1e6, 1)}
        found["cache_bytes"] = sum(path.stat().st_size for path in Path(cache).rglob("*.cache"))
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before
    return found


def answers(bundle: Bundle, backend: str) -> dict[str, Any]:
    """Errors on the golden inputs: against the golden outputs, and against the same graph on ONNX Runtime."""
    inputs, _ = load_golden(bundle)
    try:
        golden = check_golden(bundle, backend=backend)
        verdict: dict[str, Any] = {"snr_db": round(golden.snr_db, 2), "relative": golden.relative, "within_tolerance": True}
    except EdgekitError as error:
        verdict = {"error": error.message, "within_tolerance": False}
    with open_runner(bundle, backend) as gpu, open_runner(bundle, "onnxruntime") as cpu:
        found, truth = run_samples(gpu, inputs), run_samples(cpu, inputs)
    against = [compare_arrays(truth[name], found[name]) for name in truth]
    return {
        "golden": verdict,
        "onnxruntime": {
            "snr_db": round(min(result.snr_db for result in against), 2),
            "relative": max(result.relative for result in against),
        },
    }


def latency(bundle: Bundle, backend: str, batch: int) -> dict[str, Any]:
    """`run` by variant, rounds interleaved so that a change of clocks hits all alike; ONNX Runtime beside them."""
    kind, graph = RUNNERS[backend], bundle.graph
    variants: dict[str, Any] = {
        "cuda_graph": kind(bundle, graph, 1),
        "no_graph": kind(bundle, graph, 1, cuda_graph=False),
        "zero_copy": kind(bundle, graph, 1, zero_copy=True),
        "onnxruntime": open_runner(bundle, "onnxruntime", graph, 1),
    }
    samples: dict[str, list[float]] = {name: [] for name in variants}
    answer: dict[str, Any] = {"batch": batch}
    for runner in variants.values():
        runner.__enter__()
    try:
        feeds = feeds_for(variants["cuda_graph"].inputs, golden_or_none(bundle), batch)
        for runner in variants.values():
            timed(lambda runner=runner: runner.run(feeds), WARM_UP)  # type: ignore[misc]
        for _ in range(ROUNDS):
            for name, runner in variants.items():
                runs = 5 if name == "onnxruntime" else RUNS
                samples[name] += timed(lambda runner=runner: runner.run(feeds), runs)  # type: ignore[misc]
        device = [variants["no_graph"].device_ms(feeds) for _ in range(RUNS)]
        answer["described"] = {name: runner.describe()["cuda_graph"] for name, runner in list(variants.items())[:3]}
    finally:
        for runner in variants.values():
            runner.__exit__(None, None, None)
    answer["ms"] = {name: rounded(percentiles(np.array(found))) for name, found in samples.items()}
    answer["device_ms_p50"] = {key: round(float(np.median([row[key] for row in device])), 4) for key in device[0]}
    return answer


def threads(bundle: Bundle, backend: str, seconds: float = 1.0) -> dict[str, Any]:
    """Inferences a second of 1, 2 and 4 threads, each with its own context; some answers are held against the first."""
    found: dict[str, Any] = {}
    with Model.open(bundle.path, backend) as model:
        feeds = feeds_for(model.inputs, golden_or_none(bundle), 1)
        truth = model.run(feeds)
        for count in (1, 2, 4):
            totals, wrong = [0] * count, [0] * count
            start = threading.Barrier(count + 1)

            def work(index: int, totals: list[int], wrong: list[int], start: threading.Barrier) -> None:
                with model.share() as own:
                    for _ in range(WARM_UP):
                        own.run(feeds)
                    start.wait()
                    end = time.perf_counter() + seconds
                    while time.perf_counter() < end:
                        answer = own.run(feeds)
                        totals[index] += 1
                        if totals[index] % CHECKED == 0:  # comparing costs more than running
                            wrong[index] += any(compare_arrays(truth[k], answer[k]).snr_db < 60 for k in truth)

            team = [threading.Thread(target=work, args=(i, totals, wrong, start)) for i in range(count)]
            for thread in team:
                thread.start()
            start.wait()
            for thread in team:
                thread.join()
            found[str(count)] = {"per_second": round(sum(totals) / seconds), "wrong_answers": sum(wrong)}
    return found


def refused(call: Callable[[], Any]) -> dict[str, str]:
    """What a call says when it is refused."""
    try:
        call()
    except EdgekitError as error:
        folders = re.compile(rf"{re.escape(tempfile.gettempdir())}/[^/ ]+/")  # whose names say nothing
        return {"kind": type(error).__name__, "error": folders.sub("", error.message), "hint": folders.sub("", error.hint)}
    return {"kind": "none", "error": "it was not refused", "hint": ""}


def _opened(bundle: Bundle, backend: str) -> None:
    with open_runner(bundle, backend):
        pass


def refusals(bundle: Bundle, backend: str) -> dict[str, dict[str, str]]:
    """Inputs that do not fit, and engines that must not load, by name."""
    found = {}
    with open_runner(bundle, backend) as runner:
        name = runner.inputs[0].name
        feeds = feeds_for(runner.inputs, golden_or_none(bundle), 1)
        most = runner.batches[1] if runner.batches else 1
        many = feeds_for(runner.inputs, golden_or_none(bundle), most + 1)
        found["too many samples"] = refused(lambda: runner.run(many))
        found["wrong type"] = refused(lambda: runner.run({**feeds, name: feeds[name].astype(np.float16)}))
        found["wrong rank"] = refused(lambda: runner.run({**feeds, name: feeds[name][0]}))
        found["wrong name"] = refused(lambda: runner.run({"nothing": feeds[name]}))
        found["after all these it still runs"] = {"error": str({k: v.shape for k, v in runner.run(feeds).items()}), "hint": ""}
    module = RUNNERS[backend].module
    record = next(record for record in records(bundle, module) if record.graph == bundle.graph)
    with tempfile.TemporaryDirectory() as folder:
        for title, change in {
            "another TensorRT": {"tensorrt": "9.9.9"},
            "another graph": {"sources": {bundle.graph: "0" * 64}},
            "another engine than the record's": {"engine_sha256": "0" * 64},
        }.items():
            copy = Path(folder) / f"{len(found)}.edge"
            shutil.copytree(bundle.path, copy)
            changed = {**msgspec.json.decode((copy / f"engines/{record.target}.json").read_bytes()), **change}
            Bundle.open(copy).extend({f"engines/{record.target}.json": msgspec.json.encode(changed)})
            found[title] = refused(lambda copy=copy: _opened(Bundle.open(copy), backend))  # type: ignore[misc]
        copy = Path(folder) / "foreign.edge"
        shutil.copytree(bundle.path, copy)
        data = bundle.file(record.file).read_bytes()[:-1] + b"\0\1"
        changed = msgspec.json.decode((copy / f"engines/{record.target}.json").read_bytes())
        changed["engine_sha256"] = hashlib.sha256(data).hexdigest()
        files = {record.file: data, f"engines/{record.target}.json": msgspec.json.encode(changed)}
        opened = Bundle.open(copy).extend(files)
        found["bytes that nobody here built"] = refused(lambda: _opened(opened, backend))
    return found


def tensorrt_says(bundle: Bundle, backend: str) -> list[str]:
    """Why TensorRT itself does not load the engines for this graph, which were built here; empty where it does."""
    try:
        trt = load_library(RUNNERS[backend].module)
    except EdgekitError as error:
        return [error.message]
    logger, log = registered_logger(trt)
    said = []
    for record in records(bundle, RUNNERS[backend].module):
        if record.graph == bundle.graph and is_trusted(record.engine_sha256):
            log.lines.clear()
            if trt.Runtime(logger).deserialize_cuda_engine(bundle.read(record.file)) is None:
                said.append(f"{record.target}: {log.take()}")
    return said


def without_tensorrt() -> dict[str, Any]:
    """The runner's own cost, by the size of input and output, and its refusals, with a device copy for an engine."""
    import _tensorrt_stand_in

    stand_in = _tensorrt_stand_in.install()
    with tempfile.TemporaryDirectory() as folder:
        made = [_tensorrt_stand_in.bundle(Path(folder), stand_in, size) for size in (28, 224, 640)]
        rows = [measure(bundle.path, "tensorrt-rtx") for bundle in made]
        for row in rows:
            del row["onnxruntime"], row["cold_start"]  # a copy beside a copy, a start without an engine: they say nothing
            for found in row["latency"]:
                del found["ms"]["onnxruntime"]
        return {"engine": "y = x, a copy on the device", "models": rows, "refusals": refusals(made[0], "tensorrt-rtx")}


def measure(path: Path, backend: str) -> dict[str, Any]:
    bundle = Bundle.open(path)
    row: dict[str, Any] = {"bundle": path.stem, "graph": bundle.graph}
    try:
        with open_runner(bundle, backend) as runner:
            row |= runner.describe()
            row["batches"] = runner.batches
    except EdgekitError as error:
        return row | {"refused": {"error": error.message, "hint": error.hint}, "tensorrt_says": tensorrt_says(bundle, backend)}
    row["cold_start"] = cold_start(bundle, backend)
    row |= answers(bundle, backend)
    most = runner.batches[1] if runner.batches else 1
    row["latency"] = [latency(bundle, backend, batch) for batch in dict.fromkeys((1, most))]
    row["contexts"] = threads(bundle, backend)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--without-tensorrt", action="store_true", help="Also measure with a device copy in TensorRT's place.")
    parser.add_argument("--backend", default="tensorrt-rtx", choices=list(RUNNERS))
    options = parser.parse_args()
    rows = [measure(path, options.backend) for path in options.bundles]
    works = [path for path, row in zip(options.bundles, rows, strict=True) if "refused" not in row]
    figures = {
        "backend": options.backend,
        "protocol": f"{ROUNDS} interleaved rounds of {RUNS} runs after {WARM_UP}; perf_counter_ns around run(), outputs copied",
        "models": rows,
        "refusals": refusals(Bundle.open(works[0]), options.backend) if works else None,
        "doctor": doctor()["backends"],
        "gpu": open_cuda().device()._asdict(),
    }
    if options.without_tensorrt:  # last: it takes the place of TensorRT in this process
        figures["without_tensorrt"] = without_tensorrt()
    print(save("tensorrt_runner", figures))


if __name__ == "__main__":
    main()

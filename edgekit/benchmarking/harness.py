"""`bench`: latency and throughput of a bundle, with the protocol, the device and what makes the figure doubtful.

The answer holds ``latency_ms`` (p50, p90, p95, p99, p999 from 10,000 samples on, min, mean, max), ``throughput``
(inferences/s), ``key`` (which of these MLPerf compares), ``cv`` (all samples) and ``drift`` (CV of the medians of twenty
stretches), ``jitter_ms`` (median change from one call to the next), ``yardstick`` (`yardstick`; None of a server, or on a GPU),
``passed`` (its gate's answer, None without one), ``histogram``, ``cold_start_ms`` (open, hash check
and first inference), ``process_start_ms`` (the same from the start of Python on), ``memory``, ``end_to_end`` (`Model`
called with a frame, judged by itself; image models, single-stream), ``energy`` (by power rail, in a run of its own; None
without rails),
``temperatures`` and ``clocks_mhz`` ``before`` and ``after``, ``trustworthy`` with ``reasons``, ``device``, ``load``,
``protocol``, ``samples_ms``.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BackendError, BudgetNotMet, DataError, UsageError
from edgekit.files import atomic_write, given_path
from edgekit.manifest import ImagePreprocessing
from edgekit.progress import say, short
from edgekit.runtime import Model
from edgekit.runtime.backends import Runner
from edgekit.runtime.model import Precision
from edgekit.runtime.tensorrt import TensorRtRunner

from .asked import STREAMS, Asked, check_threads
from .cold import Starts, on_cpu, opened_and_timed, started_anew
from .device import Sensors, fingerprint
from .doubts import doubts
from .gate import check_comparable, judge, load_earlier, parse_share, verdict_words
from .history import add, check_history
from .inputs import Feeds, batchable, frame_for, golden_or_none, least_batch, runner_feeds
from .profile import check_profile, layer_times, tensorrt_layers, times_chart
from .scenarios import KEY, Call, Run, multi_stream, offline, server, single_stream, warm_up
from .sensors import PowerMeter
from .statistics import coefficient_of_variation, histogram, jitter, percentiles, thin
from .stored import Stored

__all__ = ["bench"]

_BATCHES = (1, 4, 16, 64)
_MAX_BATCH_BYTES, _MAX_ASKED_BYTES = 64 << 20, 1 << 30
_FILE = "bench/{}-{}-{}.json"


def bench(
    bundle: Bundle | str | os.PathLike[str],
    *,
    backend: str = "auto",
    scenario: str = "single-stream",
    precision: Precision = "auto",
    threads: int = 1,
    seconds: float = 2.0,
    batch: int | None = None,
    streams: int | None = None,
    rate: float | None = None,
    against: str | os.PathLike[str] | None = None,
    fail_over: str | float | None = None,
    force: bool = False,
    layers: bool = False,
    plot: str | os.PathLike[str] | None = None,
    history: str | os.PathLike[str] | None = None,
    save: bool = True,
) -> dict[str, Any]:
    """Measure a bundle, write the result into it as ``bench/BACKEND-PRECISION-SCENARIO.json``, and return it.

    ``scenario``: ``single-stream``, ``multi-stream`` (``streams`` samples a query, default 8, in one batch where the graph
    takes it), ``offline`` (``batch`` fixes the batch; default: the fastest of 1, 4, 16, 64) or
    ``server`` (``rate``: arrivals a second; default: 70% of what the model can serve). ``threads``: CPU cores, 0 for
    all. ``seconds``: of the measurement proper, after a warm-up that lasts until the medians settle. ``against``: an
    earlier result file, a benched bundle, or a folder of results (`history.baseline`), whose batch, streams and rate are
    taken where none is given; ``fail_over``: ``"5%"`` raises `BudgetNotMet` where the run takes longer by more, and
    the 99% interval of the ratio lies above 1 (`judge`). ``force`` compares across models, devices and versions.
    ``layers``: also time each layer (`profile`); ``plot``: draw them as SVG. ``history``: a folder that the result is added
    to, with a picture of all that lie there. ``save=False`` leaves the bundle as it is.

    A failed gate never overwrites the file it was held against. What the answer holds stands at the head of this file.

    Raises `UsageError` for an unknown name or value, `BackendError` where nothing can run it.
    """
    (asked := Asked(scenario, seconds, batch, streams, rate)).check()
    plot, folder, against = _paths(plot=plot, history=history, against=against)
    limit = _checked_limit(precision, threads, folder, against, fail_over)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    with opened_and_timed(opened, backend, precision, threads) as (model, feeds, costs):
        graph = _graph(opened, precision)
        if profiled := layers or plot is not None:
            check_profile(model.runner.name, plot)
        name = _FILE.format(model.runner.name, "int8" if graph == INT8_GRAPH else "float", scenario)
        subject = {**_subject(opened, graph), "scenario": scenario, "device": fingerprint()}
        known = {**subject, **model.runner.describe(), **asked.given()}
        earlier = None if against is None else _earlier(against, folder, name, known, force)
        if earlier:
            asked = _like(asked, earlier, known, force)
        started = started_anew(model, precision, threads, feeds, asked)
        result = {**subject, **_measure(model, asked, started), **costs}
        if found := _profiled(model, graph, threads, seconds, plot) if profiled else _kept_profile(opened, name, result):
            result["profile"] = found
    comparison = judge(earlier, result, limit, force=force) if earlier else None
    result["passed"] = comparison["passed"] if comparison else None
    config = {"backend": backend, "precision": precision, "threads": threads, **asked._asdict()}
    keeps = result["passed"] is False and _same(opened.path / name, against)
    file = _save(opened, name, result, config) if save and not keeps else None
    written = {"bundle": str(opened.path), "file": file, "history": str(add(folder, result)) if folder else None}
    return _passed({**written, **result, "against": comparison})


def _paths(**given: str | os.PathLike[str] | None) -> list[Path | None]:
    return [None if path is None else given_path(path, name) for name, path in given.items()]


def _checked_limit(
    precision: str, threads: int, history: Path | None, against: object, fail_over: str | float | None
) -> float | None:
    """The gate's limit. Raises `UsageError` for what is wrong before anything is measured."""
    if precision not in get_args(Precision):
        raise UsageError(f"there is no precision {precision!r}", f"choose one of: {', '.join(get_args(Precision))}")
    check_threads(threads)
    if history is not None:
        check_history(history)
    limit = parse_share(fail_over)
    if limit is not None and against is None:
        raise UsageError("--fail-over needs a result to hold this one against", "add --against FILE")
    return limit


def _subject(bundle: Bundle, graph: str) -> dict[str, Any]:
    """What was measured, and when."""
    return {
        "model": bundle.manifest.name,
        "digest": bundle.digest,
        "graph": graph,
        "precision": "int8" if graph == INT8_GRAPH else "float",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _save(bundle: Bundle, name: str, result: dict[str, Any], config: dict[str, Any]) -> str:
    """The result as a file of the bundle, the few figures that others show in its history. Returns the file."""
    figures = {key: result["latency_ms"][key] for key in ("p50", "p90", "p99")}
    figures |= {key: result[key] for key in ("throughput", "graph", "backend", "trustworthy")}
    bundle.extend({name: msgspec.json.encode(result) + b"\n"}, bundle.entry("bench", config, figures))
    return str(bundle.path / name)


def _passed(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, where its gate lets it through. Raises `BudgetNotMet`."""
    comparison = answer["against"]
    if comparison is None or comparison["passed"] is not False:
        return answer
    message = (
        f"it takes {comparison['ratio'] - 1:.1%} longer than the earlier run, allowed is {comparison['limit']:.1%} "
        f"({verdict_words(comparison)}; "
        f"p50 {short(comparison['old_p50_ms'])} ms then, {short(comparison['new_p50_ms'])} ms now)"
    )
    hint = "find the change that made it slower, or raise --fail-over"
    if not comparison["both_trustworthy"]:
        hint = f"measure again on an idle machine: {'; '.join(answer['reasons']) or 'the earlier run was disturbed'}"
    raise BudgetNotMet(message, hint, answer)


def _same(file: Path, held_against: str | os.PathLike[str] | None) -> bool:
    """Whether that is this result file, or the bundle that holds it."""
    against = Path(held_against or "")
    return any(file.exists() and path.exists() and path.samefile(file) for path in (against, against / "bench" / file.name))


def _graph(bundle: Bundle, precision: str) -> str:
    return {"auto": bundle.graph, "float": FLOAT_GRAPH, "int8": INT8_GRAPH}[precision]


def _earlier(against: Path, history: Path | None, name: str, known: dict[str, Any], force: bool) -> Stored | None:
    """What the run is held against; None where the history that it is added to holds nothing like it yet."""
    founding = history is not None and history.resolve() == against.resolve()
    try:
        return load_earlier(against, name, known, force=force)
    except DataError as error:
        if not founding:
            raise
        say(f"{error.message}: this run is the first, and nothing is gated")
        return None


def _like(asked: Asked, earlier: Stored, known: dict[str, Any], force: bool) -> Asked:
    """What was asked for, and of the earlier run what was not. Raises `UsageError` where the two cannot be compared."""
    asked = asked.like(earlier)
    check_comparable(earlier, {**known, **asked.given()}, force=force)
    return asked


def _kept_profile(bundle: Bundle, name: str, result: dict[str, Any]) -> dict[str, Any] | None:
    """The layers that an earlier run of the same graph timed here: a run without them takes its place."""
    try:
        old = msgspec.json.decode((bundle.path / name).read_bytes())
    except (msgspec.DecodeError, OSError):
        return None
    same = all(old.get(key) == result[key] for key in ("digest", "graph", "threads", "batch"))
    same = same and all(old["device"].get(key) == result["device"][key] for key in ("cpu", "gpu", "versions"))
    kept: dict[str, Any] | None = old.get("profile") if same else None
    return kept


def _profiled(model: Model, graph: str, threads: int, seconds: float, plot: Path | None) -> dict[str, Any]:
    say("timing every layer")
    feeds = runner_feeds(model.runner, golden_or_none(model.bundle), least_batch(model.runner))
    if isinstance(model.runner, TensorRtRunner):
        found = tensorrt_layers(model.runner, feeds, seconds / 2)
    else:
        found = layer_times(model.bundle, graph, threads, feeds, seconds / 2)
    if plot is not None:
        atomic_write(plot, times_chart(found, f"{model.bundle.path.name}/{graph} on {model.runner.name}").encode())
    return found


def _measure(model: Model, asked: Asked, started: Starts) -> dict[str, Any]:
    """Warm up, run the scenario, and judge the run; ``started``: what processes of their own took."""
    runner, golden = model.runner, golden_or_none(model.bundle)
    feeds = runner_feeds(runner, golden, least_batch(runner))
    run_model = runner.run
    say(f"warming up {model.bundle.manifest.name} on {runner.name}")
    warm = warm_up(lambda: run_model(feeds), limit_s=min(2.0, max(0.2, asked.seconds)))
    before = Sensors()
    run, call = _run(runner, feeds, golden, asked)
    after = Sensors()
    load = after.since(before)
    cores = len(os.sched_getaffinity(0))
    threads = int(runner.describe().get("threads", 1))
    warm = run.warm_up or warm
    taken = runner_feeds(runner, golden, run.extra.get("batch", least_batch(runner)))
    reasons = [*doubts(run, warm, asked.scenario), *load.reasons(cores, threads)]
    reasons += [f"{threads} threads share {cores} cores"] if threads > cores else []
    reasons += [after.slow_governor] if after.slow_governor else []
    return {
        "batch": least_batch(runner),
        **runner.describe(),
        "latency_ms": percentiles(run.samples_ms),
        "throughput": run.throughput,
        "key": KEY[asked.scenario],
        "iterations": len(run.samples_ms),
        "seconds": run.seconds,
        "cv": coefficient_of_variation(run.samples_ms),
        "drift": coefficient_of_variation(run.windows_ms),
        "jitter_ms": jitter(run.samples_ms),
        "trustworthy": not reasons,
        "reasons": reasons,
        **run.extra,
        "end_to_end": _end_to_end(model, golden, asked.seconds) if asked.scenario == "single-stream" else None,
        "energy": _energy(call, run, asked.seconds),
        "temperatures": {"before": before.temperatures, "after": after.temperatures},
        "clocks_mhz": {"before": before.clocks_mhz, "after": after.clocks_mhz},
        "warm_up": warm._asdict(),
        "load": {**load._asdict(), "average_1min": after.load_average},
        "process_start_ms": started.ms,
        "yardstick": run.yardstick and {**run.yardstick, "processes": started.relative},
        "histogram": histogram(run.samples_ms),
        "inputs": {name: [str(array.dtype), *array.shape] for name, array in taken.items()},
        "protocol": {
            "clock": "perf_counter_ns around the backend's run",
            "transfers": "inputs and outputs in host memory",
            "percentile": "nearest rank",
            "input": "golden" if golden else "noise",
            "garbage_collector": "off",
        },
        "samples_ms": [round(float(sample), 6) for sample in thin(run.samples_ms)],
    }


def _run(runner: Runner, feeds: Feeds, golden: Feeds | None, asked: Asked) -> tuple[Run, Call]:
    """The scenario's run, and the call that it made over and over."""
    yardstick = on_cpu(runner)
    if asked.scenario == "offline":
        batches = _batches(runner, feeds, golden, asked.batch)
        run = offline(lambda n: _batch_call(runner, golden, n), batches, asked.seconds, yardstick)
        return run, _batch_call(runner, golden, run.extra["batch"])
    if asked.scenario == "multi-stream":
        streams = asked.streams or STREAMS
        batch, query = _query(runner, feeds, golden, streams)
        run = multi_stream(query, streams, asked.seconds, yardstick)
        run.extra.update(batch=batch, streams=streams)
        return run, query

    def call() -> Any:
        return runner.run(feeds)

    served = asked.scenario == "server"
    run = server(call, asked.seconds, asked.rate) if served else single_stream(call, asked.seconds, yardstick=yardstick)
    return replace(run, throughput=run.throughput * least_batch(runner)), call


def _query(runner: Runner, feeds: Feeds, golden: Feeds | None, streams: int) -> tuple[int, Call]:
    """One sample of each stream: in one batch where the graph takes it, else one after the other. Returns (batch, call)."""
    with contextlib.suppress(UsageError):
        _batches(runner, feeds, golden, streams)
        return streams, _batch_call(runner, golden, streams)

    batch = least_batch(runner)

    def one_by_one() -> None:
        for _ in range(-(-streams // batch)):
            runner.run(feeds)

    return batch, one_by_one


def _energy(call: Call, run: Run, seconds: float) -> dict[str, Any] | None:
    """Per inference, in a run of its own: reading the sensors takes time. None where the machine has no rails."""
    meter = PowerMeter()
    if not meter:
        return None
    with meter:
        again = single_stream(call, seconds / 2, "energy")
    per_call = round(run.throughput * run.seconds / len(run.samples_ms))
    return meter.energy.record(len(again.samples_ms) * per_call) if meter.energy else None


def _batch_call(runner: Runner, golden: Feeds | None, batch: int) -> Call:
    feeds = runner_feeds(runner, golden, batch)
    return lambda: runner.run(feeds)


def _batches(runner: Runner, one: Feeds, golden: Feeds | None, asked: int | None) -> list[int]:
    """The batches to try: those within the memory limit that the graph really takes.

    Raises `UsageError` where the batch that was asked for is not among them.
    """
    if not batchable(runner.inputs):
        fixed = least_batch(runner)
        if asked not in (None, fixed):
            raise UsageError(f"--batch {asked}: the graph's first axis is fixed at {fixed}", "import it again with --dynamic")
        return [fixed]
    size = sum(array.nbytes for array in one.values())
    taken = []
    for batch in [asked] if asked else _BATCHES:
        if batch * size > (_MAX_ASKED_BYTES if asked else _MAX_BATCH_BYTES):
            if asked:
                raise UsageError(
                    f"--batch {asked}: {batch * size} bytes of inputs", f"at most {_MAX_ASKED_BYTES}: lower --batch"
                )
            continue
        if runner.batches and not runner.batches[0] <= batch <= runner.batches[1]:
            if asked:
                least, most = runner.batches
                raise UsageError(
                    f"--batch {asked}: the engine takes {least} to {most}", "build one for more: edgekit build B --batch 1..N"
                )
            continue
        try:
            _batch_call(runner, golden, batch)()
        except BackendError as error:  # an axis that claims to be dynamic, before a reshape that is not
            if asked:
                raise UsageError(f"--batch {asked} does not run: {error.message}", "leave --batch out") from None
            continue
        taken.append(batch)
    return taken or [least_batch(runner)]


def _end_to_end(model: Model, golden: Feeds | None, seconds: float) -> dict[str, Any] | None:
    """``Model(frame)``, preprocessing and decoding included, for a frame of the model's own size; None of other models."""
    spec = model.bundle.manifest.preprocessing
    if not isinstance(spec, ImagePreprocessing):
        return None
    frame = frame_for(spec, golden)
    warm = warm_up(lambda: model(frame), limit_s=0.5, least_s=0.1)
    run = single_stream(lambda: model(frame), seconds / 4, "frame to answer")
    reasons = doubts(run, warm, "single-stream")
    return {
        "frame": list(frame.shape),
        "latency_ms": percentiles(run.samples_ms),
        "iterations": len(run.samples_ms),
        "trustworthy": not reasons,
        "reasons": reasons,
    }

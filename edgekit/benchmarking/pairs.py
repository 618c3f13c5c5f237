"""Two models timed in turns: what disturbs the machine falls on both alike, so a small difference shows where two runs, one
after the other, would drown it."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from edgekit.bundle import Bundle
from edgekit.errors import BudgetNotMet, UsageError
from edgekit.progress import say, track
from edgekit.runtime import Model
from edgekit.runtime.model import Precision

from .asked import Asked, check_threads
from .device import Sensors, fingerprint
from .gate import parse_share
from .inputs import batchable, golden_or_none, least_batch, runner_feeds
from .scenarios import PATIENCE, Call, no_collector, stretch, warm_up
from .statistics import paired_ratio, percentiles

__all__ = ["bench_pair", "in_turns"]

ROUNDS = 40  # at least, but of models so slow that they would take over PATIENCE times the seconds
FEWEST = 16  # below which `paired_ratio` gives no interval
BURST_S = 0.01  # of one model before the other has its turn
WIDE = 0.1  # of the interval's width, beyond which it says little


def bench_pair(
    first: Bundle | str | os.PathLike[str],
    second: Bundle | str | os.PathLike[str],
    *,
    backend: str = "auto",
    precision: Precision = "auto",
    threads: int = 1,
    seconds: float = 2.0,
    fail_over: str | float | None = None,
) -> dict[str, Any]:
    """Time ``second`` against ``first``: single inferences, in bursts that alternate and change their order every round.

    Both take the same batch, the least that both can. ``seconds``: of each. ``ratio``: median over the rounds of second's
    median over first's, with its 99% interval ``low`` .. ``high``; ``verdict``: whether ``second`` is ``slower``, ``faster``
    or the ``same`` (the interval holds 1). ``bundles``: each one's ``latency_ms`` and ``graph``. Nothing is written.
    ``fail_over``: ``"5%"`` raises `BudgetNotMet` where ``second`` takes longer by more, and the interval lies above 1.

    Raises `UsageError` for an unknown name or value and where no batch fits both, `BackendError` where nothing can run one.
    """
    limit = parse_share(fail_over)
    Asked("single-stream", seconds, None, None, None).check()
    check_threads(threads)
    bundles = [bundle if isinstance(bundle, Bundle) else Bundle.open(bundle) for bundle in (first, second)]
    models = [Model.open(bundle.path, backend, precision=precision, threads=threads) for bundle in bundles]
    with models[0], models[1]:
        batch = _batch(models)
        calls = [_call(model, batch) for model in models]
        say(f"warming up {bundles[0].path.name} and {bundles[1].path.name}")
        for call in calls:
            warm_up(call, limit_s=min(1.0, seconds))
        before = Sensors()
        samples, medians = in_turns(calls, seconds)
        load = Sensors().since(before)
        about = [_about(model, taken) for model, taken in zip(models, samples, strict=True)]
    interval = paired_ratio(medians[0], medians[1])
    reasons = load.slowed()
    if interval.high / interval.low > 1 + WIDE:
        reasons.append(f"the interval is wide ({interval.low:.3f} to {interval.high:.3f}): raise --seconds")
    answer = {
        "bundles": about,
        "batch": batch,
        **interval._asdict(),
        "verdict": interval.verdict,
        "rounds": len(medians[0]),
        "limit": limit,
        "passed": None if limit is None else not (interval.ratio > 1 + limit and interval.verdict == "slower"),
        "trustworthy": not reasons,
        "reasons": reasons,
        "load": load._asdict(),
        "device": fingerprint(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if answer["passed"] is False:
        raise BudgetNotMet(
            f"{bundles[1].path.name} takes {interval.ratio - 1:.1%} longer than {bundles[0].path.name}; "
            f"allowed is {limit:.1%} (99% interval of the ratio: {interval.low:.3f} to {interval.high:.3f})",
            "find the change that made it slower, or raise --fail-over",
            answer,
        )
    return answer


def _about(model: Model, taken: np.ndarray[Any, Any]) -> dict[str, Any]:
    """One of the two: what ran, and its latencies."""
    return {
        "bundle": str(model.bundle.path),
        "model": model.bundle.manifest.name,
        "digest": model.bundle.digest,
        **model.runner.describe(),
        "graph": getattr(model.runner, "graph", None),
        "latency_ms": percentiles(taken),
        "iterations": len(taken),
    }


def _batch(models: list[Model]) -> int:
    """The least batch that all take: four samples beside one would say nothing."""
    least = max(least_batch(model.runner) for model in models)
    for model in models:
        own = least_batch(model.runner)
        most = model.runner.batches[1] if model.runner.batches else least if batchable(model.runner.inputs) else own
        if least > most:
            raise UsageError(
                f"{model.bundle.path.name} takes batches of {most} at most, the other one of {least} at least",
                "build both for one batch: edgekit build B --batch N",
            )
    return least


def _call(model: Model, batch: int) -> Call:
    runner = model.runner
    feeds = runner_feeds(runner, golden_or_none(model.bundle), batch)
    return lambda: runner.run(feeds)


def in_turns(calls: list[Call], seconds: float) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """All latencies, and the median of every burst, in ms, of each call."""
    rounds = max(ROUNDS, round(seconds / BURST_S))
    samples: list[list[int]] = [[] for _ in calls]
    medians: list[list[float]] = [[] for _ in calls]
    late = time.monotonic() + PATIENCE * len(calls) * seconds
    with no_collector():
        for number in track(range(rounds), "in turns"):
            if number >= FEWEST and number % 2 == 0 and time.monotonic() > late:
                break
            for which in (0, 1) if number % 2 else (1, 0):  # the second of two finds the caches warm
                burst = stretch(calls[which], seconds / rounds, 1)
                samples[which] += burst
                medians[which].append(float(np.median(burst)) / 1e6)
    return [np.array(taken, np.float64) / 1e6 for taken in samples], [np.array(each) for each in medians]

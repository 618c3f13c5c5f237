"""What in a run itself makes its figures doubtful; what the machine did meanwhile, `device.Load` says."""

from __future__ import annotations

import math

import numpy as np

from edgekit.progress import short

from .scenarios import KEY, MIN_ITERATIONS, Run, WarmUp
from .statistics import coefficient_of_variation

__all__ = ["doubts"]

#: The medians of a run's twenty stretches may vary by this much (CV); beyond it the run was disturbed.
MAX_DRIFT = 0.05
#: The medians of its halves may differ by this much: a step or a ramp of a few percent hardly shows in the CV.
MAX_STEP = 0.03
TAIL = 10  # latencies that must lie beyond a percentile, before it is more than an accident
MAX_BEHIND = 0.02  # of the run, by which a server's last answer may come late
_FEW = 5, 10  # times the service that waits, and the last answer, may always take: queues of 100 arrivals do that by chance


def doubts(run: Run, warm: WarmUp, scenario: str) -> list[str]:
    """Reasons, in words; none where the run itself is sound. ``warm``: the warm-up of what was measured."""
    return [*_count(run, KEY[scenario]), *_steadiness(run, warm), *_queue(run)]


def _count(run: Run, key: str) -> list[str]:
    count = len(run.samples_ms)
    if count < MIN_ITERATIONS:
        return [f"{count} runs are too few, at least {MIN_ITERATIONS} are wanted: raise --seconds"]
    if not key.startswith("p"):
        return []
    beyond = count * (100 - int(key[1:])) // 100
    if beyond >= TAIL:
        return []
    seconds = 1.1 * run.seconds * TAIL * 100 / (100 - int(key[1:])) / count
    enough = math.ceil(seconds) if seconds > 5 else math.ceil(10 * seconds) / 10
    return [f"{key}, which {_ordinary(beyond)} of {count} runs exceed, is not sure: --seconds {enough:g} would do"]


def _ordinary(count: int) -> str:
    return f"only {count}" if count else "none"


def _steadiness(run: Run, warm: WarmUp) -> list[str]:
    reasons, windows = [], run.windows_ms
    drift = coefficient_of_variation(windows)
    halves = [float(np.median(part)) for part in np.array_split(windows, 2) if len(part)]
    if len(run.samples_ms) > 1 and run.samples_ms.min() == run.samples_ms.max():
        reasons.append(f"all {len(run.samples_ms)} runs took the same time: the clock is too coarse for them")
    if drift > MAX_DRIFT:
        reasons.append(f"the latency drifted: the medians of {len(windows)} stretches vary by {drift:.1%} (CV)")
    elif len(halves) == 2 and abs(halves[1] / halves[0] - 1) > MAX_STEP:
        reasons.append(f"the latency drifted: the second half's median is {halves[1] / halves[0] - 1:+.1%} off the first's")
    if not warm.steady:
        reasons.append(f"the warm-up did not settle in {warm.seconds:.1f} s")
    return reasons


def _queue(run: Run) -> list[str]:
    """Whether a server's queue only grew; judged by what waited, for beside short calls the loop takes its part of the time."""
    if "queue" not in run.extra:
        return []
    queue, service = run.extra["queue"], run.extra["service_ms"]["p50"]
    behind = queue["behind_ms"] > max(MAX_BEHIND * 1e3 * run.seconds, _FEW[1] * service)
    grown = queue["last_fifth_ms"] > 2 * queue["first_fifth_ms"] + _FEW[0] * service
    if not behind and not grown:
        return []
    return [
        f"{short(run.extra['rate'])} arrivals a second are more than it can serve: the queue grew, median wait "
        f"{short(queue['first_fifth_ms'], 3)} ms in the first fifth, {short(queue['last_fifth_ms'], 3)} ms in the last"
        + (f"; {queue['unserved']:,} more had come and are in no figure" if queue["unserved"] else "")
    ]

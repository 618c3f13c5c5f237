"""The regression gate: is this run slower than an earlier one, by how much, and how sure is that?"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgekit.bundle import MANIFEST, Bundle
from edgekit.errors import DataError, UsageError
from edgekit.files import read_file

from .history import baseline
from .statistics import Interval, median_ratio, runs_ratio
from .stored import Stored, Yardstick, differences, same_device
from .yardstick import BETWEEN

__all__ = ["check_comparable", "judge", "load_earlier", "parse_share", "verdict_words"]


def load_earlier(path: str | os.PathLike[str], name: str, now: Mapping[str, Any], *, force: bool = False) -> Stored:
    """A result file, the result called ``name`` of the bundle at ``path``, or of a folder of results its `baseline`.

    ``now``: what is known of the run before it is made: ``model``, ``graph``, ``backend``, ``scenario``, ``threads``,
    ``device``, and ``batch``, ``streams`` and ``rate`` where they were asked for. Raises `DataError` where there is none or
    it is no result of `bench`.
    """
    file = Path(path)
    if (file / MANIFEST).is_file():
        bundle = Bundle.open(file, verify=False)
        if not bundle.has(name):
            held = sorted(n for n in bundle.manifest.files if n.startswith("bench/"))
            measure = f"measure it as this run is: edgekit bench {file}"
            raise DataError(f"{file} has no {name}", f"name another: --against {file / held[0]}" if held else measure)
        file = bundle.file(name)
    elif file.is_dir():
        return baseline(file, now, force=force)
    hint = "name a file that edgekit bench wrote (B/bench/*.json, or its --json answer), or a bundle that was benched"
    try:
        found = msgspec.json.decode(read_file(file), type=Stored)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", hint) from None
    except msgspec.DecodeError as error:
        why = "it holds NaN or Infinity" if re.search(rb"[:,\[]\s*-?(NaN|Infinity)", file.read_bytes()) else str(error)
        raise DataError(f"{file} is no bench result: {why}", hint) from None
    if not found.comparable:
        raise DataError(f"{file} is no bench result: it needs at least 16 samples_ms, all positive, not all equal", hint)
    return found


def parse_share(value: str | float | None) -> float | None:
    """``"5%"``, ``"0.05"`` and 0.05 mean the same. Raises `UsageError` for what is neither, or not within 0..10 (1000%)."""
    if value is None:
        return None
    try:
        text = str(value).strip()
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    plain_number = isinstance(value, str) and not value.strip().endswith("%") and share >= 1
    if not 0 <= share <= 10 or plain_number:
        raise UsageError(f"{value!r} is not a share", "write a percentage, for example --fail-over 5%")
    return share


def check_comparable(earlier: Stored, now: Mapping[str, Any], *, force: bool) -> list[str]:
    """What differs beside the graph. ``now``: a result, or what is known of it before it is measured.

    Raises `UsageError` for another scenario, and, unless ``force``, for another model, device, set-up or version.
    """
    if earlier.scenario != now["scenario"]:
        raise UsageError(
            f"the earlier result is {earlier.scenario}, this one {now['scenario']}", f"add --scenario {earlier.scenario}"
        )
    differs = differences(earlier, now)
    if differs and not force:
        raise UsageError(
            f"the earlier result is of another model, device or set-up: {'; '.join(differs[:3])}",
            "measure both on one device, or compare them all the same with --force",
        )
    return differs


def judge(earlier: Stored, now: dict[str, Any], limit: float | None, *, force: bool) -> dict[str, Any]:
    """Compare ``now`` (a result of `bench`) with an earlier one.

    Returns ``method``; ``old_p50_ms``, ``new_p50_ms``; ``ratio``, its 99% interval ``low``..``high`` and ``verdict``
    (``slower``, ``faster`` or ``same``: the interval holds 1); ``differs`` (what else changed), ``earlier_trustworthy``,
    ``both_trustworthy``, ``limit``, ``passed`` (None without a limit) and ``caution`` (what a gate that was passed could not
    see, or None). A gate is passed unless the ratio exceeds 1 + ``limit`` *and* the interval lies above 1.

    ``method``: ``processes``, where both were also measured in processes of their own, beside the same yardstick on one
    device: the ratio of the means of all of them, and the interval holds what they differ by. ``yardstick``, where they were
    not: the ratio of the medians of the stretches relative to it, widened by `BETWEEN`. Else ``latency``: the ratio of p50,
    and an interval of the noise within the runs, which knows nothing of a machine that was slower that day.

    Raises `UsageError` for another scenario, and, unless ``force``, for another model, device, set-up or version.
    """
    differs = check_comparable(earlier, now, force=force)
    if earlier.graph != now["graph"]:
        differs = [f"graph: {earlier.graph}, now {now['graph']}", *differs]
    method, interval = _interval(earlier, now)
    exceeded = limit is not None and interval.ratio > 1 + limit and interval.verdict == "slower"
    return {
        "method": method,
        "old_p50_ms": earlier.latency_ms["p50"],
        "new_p50_ms": now["latency_ms"]["p50"],
        **interval._asdict(),
        "verdict": interval.verdict,
        "differs": differs,
        "earlier_trustworthy": earlier.trustworthy,
        "both_trustworthy": earlier.trustworthy and now["trustworthy"],
        "limit": limit,
        "passed": None if limit is None else not exceeded,
        "caution": None if limit is None or exceeded else _caution(interval, limit),
    }


def _caution(interval: Interval, limit: float) -> str | None:
    """What a gate that was passed could not have seen."""
    if interval.high <= 1 + limit or interval.verdict == "faster":
        return None
    return (
        f"it may be {interval.high - 1:.0%} slower all the same, the interval is wider than the limit of {limit:.0%}: "
        "compare in turns where both can run (edgekit bench A B)"
    )


def _interval(earlier: Stored, now: dict[str, Any]) -> tuple[str, Interval]:
    old, new = earlier.yardstick, msgspec.convert(now.get("yardstick"), Yardstick | None)
    if old and new and old.name == new.name and old.enough and new.enough and same_device(earlier, now):
        if old.runs and new.runs:
            return "processes", runs_ratio(np.array(old.runs), np.array(new.runs))
        return "yardstick", median_ratio(np.array(old.relative), np.array(new.relative), float(np.hypot(BETWEEN, BETWEEN)))
    interval = median_ratio(np.array(earlier.samples_ms), np.array(now["samples_ms"]))
    ratio = now["latency_ms"]["p50"] / earlier.latency_ms["p50"]  # of all samples; the stored ones are a part
    return "latency", Interval(ratio, min(interval.low, ratio), max(interval.high, ratio))


def verdict_words(comparison: Mapping[str, Any]) -> str:
    """``ratio 1.03 by the yardstick, 99% interval 0.98 to 1.08``."""
    of = {"processes": "by several processes, ", "yardstick": "by the yardstick, "}.get(
        comparison["method"], "of p50, within-run "
    )
    return f"ratio {comparison['ratio']:.3f} {of}99% interval {comparison['low']:.3f} to {comparison['high']:.3f}"

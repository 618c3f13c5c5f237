"""The regression gate: is this run slower than an earlier one, by how much, and how sure is that?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgekit.bundle import MANIFEST, Bundle
from edgekit.errors import DataError, UsageError

from .history import latest
from .statistics import median_ratio

__all__ = ["Earlier", "judge", "load_earlier", "parse_share"]

#: Parts of a device that must agree before two latencies may be compared.
_DEVICE = ("cpu", "cores", "architecture", "governor", "gpu", "driver", "jetson")


class Earlier(msgspec.Struct, frozen=True):
    """The part of a result file that a comparison needs; other keys are ignored."""

    scenario: str
    backend: str
    threads: int
    batch: int
    latency_ms: dict[str, float]
    samples_ms: list[float]
    device: dict[str, Any]
    trustworthy: bool
    rate: float | None = None

    def __post_init__(self) -> None:
        if len(self.samples_ms) < 16 or min(self.samples_ms) <= 0 or self.latency_ms.get("p50", 0) <= 0:
            raise ValueError("it needs at least 16 samples_ms, all positive")


def load_earlier(path: str | os.PathLike[str], name: str) -> Earlier:
    """A result file, the result called ``name`` of the bundle at ``path``, or the newest such one of a folder of results.

    Raises `DataError` where there is none or it is no result of `bench`.
    """
    file = Path(path)
    if (file / MANIFEST).is_file():
        file = Bundle.open(file, verify=False).file(name)
    elif file.is_dir():
        file = latest(file, name)
    hint = "name a file that edgekit bench wrote (B/bench/*.json, or its --json answer), or a bundle that was benched"
    try:
        return msgspec.json.decode(file.read_bytes(), type=Earlier)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", hint) from None
    except msgspec.DecodeError as error:
        raise DataError(f"{file} is no bench result: {error}", hint) from None


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


def judge(earlier: Earlier, now: dict[str, Any], limit: float | None, *, force: bool) -> dict[str, Any]:
    """Compare ``now`` (a result of `bench`) with an earlier one.

    Returns ``old_p50_ms``, ``new_p50_ms``, ``ratio``, its 99% interval ``low``..``high``, ``verdict`` (``slower``,
    ``faster`` or ``same``: the interval holds 1), ``differs`` (what else changed), ``limit`` and ``passed`` (None without
    a limit). A gate is passed unless the medians' ratio exceeds 1 + ``limit`` *and* the interval lies above 1.

    Raises `UsageError` for another scenario, and, unless ``force``, for another device, backend or version.
    """
    if earlier.scenario != now["scenario"]:
        raise UsageError(
            f"the earlier result is {earlier.scenario}, this one {now['scenario']}", f"add --scenario {earlier.scenario}"
        )
    differs = differences(earlier, now)
    if differs and not force:
        raise UsageError(
            f"the earlier result is of another device or set-up: {'; '.join(differs[:3])}",
            "measure both on one device, or compare them all the same with --force",
        )
    interval = median_ratio(np.array(earlier.samples_ms), np.array(now["samples_ms"]))
    old, new = earlier.latency_ms["p50"], now["latency_ms"]["p50"]  # of all samples; the stored ones are a part
    exceeded = limit is not None and new / old > 1 + limit and interval.verdict == "slower"
    return {
        "old_p50_ms": old,
        "new_p50_ms": new,
        "ratio": new / old,
        "low": interval.low,
        "high": interval.high,
        "verdict": interval.verdict,
        "differs": differs,
        "both_trustworthy": earlier.trustworthy and now["trustworthy"],
        "limit": limit,
        "passed": None if limit is None else not exceeded,
    }


def differences(earlier: Earlier, now: dict[str, Any]) -> list[str]:
    """What differs beside the model, in words: ``cpu: A, now B``."""
    pairs = [(key, earlier.device.get(key), now["device"].get(key)) for key in _DEVICE]
    pairs += [(key, getattr(earlier, key), now[key]) for key in ("backend", "threads", "batch")]
    pairs += [("rate", earlier.rate, now.get("rate"))]
    old, new = earlier.device.get("versions", {}), now["device"]["versions"]
    pairs += [(key, old.get(key), new.get(key)) for key in sorted({*old, *new} - {"edgekit"})]
    return [f"{key}: {was}, now {here}" for key, was, here in pairs if was != here]

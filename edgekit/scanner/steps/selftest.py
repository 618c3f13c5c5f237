"""Golden self-test: at load, every hour and when it is hot, the model still answers what it answered when it was made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from edgekit.errors import EdgekitError, UsageError
from edgekit.runtime.golden import Golden
from edgekit.scanner.events import Event, rfc3339
from edgekit.scanner.sources import Captured

from .answers import require

__all__ = ["ZONES", "SelfTest", "SelfTestOptions", "hottest"]

ZONES = "/sys/class/thermal"
_READ_S = 10.0  # between two looks at the temperature


class SelfTestOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``every_s``: 0 for never again after the first. ``hot_celsius``: from there on it runs each ``hot_every_s``; 0: never
    for heat. ``zones``: the folder of the kernel's thermal zones."""

    every_s: float = 3600.0
    hot_celsius: float = 85.0
    hot_every_s: float = 300.0
    zones: str = ZONES

    def __post_init__(self) -> None:
        require(0 <= self.every_s <= 1e9, f"every_s: 0 (once) or seconds, not {self.every_s:g}")
        require(0 < self.hot_every_s <= 1e9, f"hot_every_s: seconds above 0, not {self.hot_every_s:g}")
        require(0 <= self.hot_celsius <= 1000, f"hot_celsius: 0 (never) to 1000 degrees, not {self.hot_celsius:g}")


class SelfTest:
    """Runs the golden inputs through the scan's own model, between two frames. ``model``: a `Model`, or a `ShadowedModel`.

    An event ``selftest`` tells the result; ``healthy`` is False from a failed test to the next that passes. A model that was
    swapped is tested at once. Raises `UsageError` where the model has no runner.
    """

    name = "selftest"

    def __init__(self, model: Any, options: SelfTestOptions | None = None) -> None:
        if not hasattr(model, "runner"):
            raise UsageError("the self-test wants a model of a bundle", "give the Model that the scan reads with")
        self.options = options or SelfTestOptions()
        self.healthy = True
        self._model = model
        self._golden: Golden | None = None
        self._tested: Any = None  # the bundle
        self._next = self._look = self._hot_next = -math.inf
        self._celsius: float | None = None
        self._runs = self._failures = 0
        self._last: dict[str, Any] = {}

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        if not math.isfinite(monotonic):
            return []
        why = self._why(monotonic)
        return [self._run(why, monotonic, wall)] if why else []

    def status(self) -> dict[str, Any]:
        return {"healthy": self.healthy, "runs": self._runs, "failures": self._failures, **self._last}

    def close(self) -> None:
        self._golden = None

    def _why(self, monotonic: float) -> str:
        if self._model.bundle is not self._tested:
            return "load"
        if self.options.every_s and monotonic >= self._next:
            return "hourly" if self.options.every_s == 3600 else "due"
        if self.options.hot_celsius and monotonic >= max(self._look, self._hot_next):
            self._look = monotonic + _READ_S
            self._celsius = hottest(self.options.zones)
            if self._celsius is not None and self._celsius >= self.options.hot_celsius:
                return "hot"
        return ""

    def _run(self, why: str, monotonic: float, wall: float) -> Event:
        bundle = self._model.bundle
        event: Event = {"event": "selftest", "source": "", "time": rfc3339(wall), "why": why, "digest": bundle.digest}
        found: dict[str, Any]
        try:
            if self._golden is None or bundle is not self._tested:
                self._golden = Golden.of(self._model.runner)
            result = self._golden.check(self._model.runner)
            found = {"ok": True, "error": _rounded(result.relative), "snr_db": round(result.snr_db, 1)}
        except EdgekitError as error:
            result_of = getattr(error, "result", None)
            found = {"ok": False, "error": _rounded(result_of.relative) if result_of else None, "reason": error.message}
        if why == "hot":
            found["celsius"] = self._celsius
        self._tested = bundle
        self._next, self._hot_next = monotonic + self.options.every_s, monotonic + self.options.hot_every_s
        self.healthy = found["ok"]
        self._runs += 1
        self._failures += not found["ok"]
        self._last = found
        return {**event, **found}


def hottest(zones: str = ZONES) -> float | None:
    """Degrees Celsius of the hottest thermal zone; None where none can be read."""
    found = []
    for path in Path(zones).glob("thermal_zone*/temp"):
        try:
            found.append(int(path.read_text(encoding="ascii")) / 1000)
        except (OSError, ValueError):  # a zone that is switched off
            continue
    return max(found, default=None)


def _rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None

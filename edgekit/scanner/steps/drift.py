"""Drift watch: are the frames, and the model's confidence, still what they were when the model was made?"""

from __future__ import annotations

from typing import Any

import msgspec

from edgekit.scanner.events import Event
from edgekit.scanner.reading import FrameModel, Region
from edgekit.scanner.sources import Captured

__all__ = ["Drift", "DriftOptions"]


class DriftOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every ``every_frames``-th frame is measured; the last ``window_frames`` of those are held against the baseline.

    ``level_psi`` is the population stability index from which a part has drifted, ``back_psi`` from which it is back.
    ``learn_frames`` measured frames make the baseline where the bundle has none; ``baseline``: a JSON file that keeps it over
    restarts, "" for none.
    """

    every_frames: int = 5
    window_frames: int = 200
    learn_frames: int = 500
    level_psi: float = 0.25
    back_psi: float = 0.15
    baseline: str = ""

    def __post_init__(self) -> None:
        if min(self.every_frames, 1) < 1 or not 20 <= self.window_frames <= 100_000 or not 20 <= self.learn_frames <= 100_000:
            raise ValueError("every_frames is at least 1, window_frames and learn_frames are 20 to 100,000")
        if not 0 < self.back_psi <= self.level_psi:
            raise ValueError(f"back_psi {self.back_psi:g} lies above level_psi {self.level_psi:g}, or is not above 0")


class Drift:
    """``model`` is the scan's (its bundle tells the baseline and the preprocessing), ``region`` the part of a frame it sees."""

    name = "drift"

    def __init__(self, model: FrameModel, options: DriftOptions | None = None, region: Region | None = None) -> None:
        self.options = options or DriftOptions()
        self._model, self._region = model, region

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        return []

    def status(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

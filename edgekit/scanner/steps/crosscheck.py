"""The text of a label against the GS1 data of its codes: what agrees, what does not. Nothing is repaired."""

from __future__ import annotations

from typing import Any

import msgspec

from edgekit.scanner.events import Event
from edgekit.scanner.sources import Captured

__all__ = ["CrossCheck", "CrossCheckOptions"]


class CrossCheckOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``ais``: the application identifiers that are compared, empty for all."""

    ais: tuple[str, ...] = ()


class CrossCheck:
    """Compares ``text`` with ``codes`` of an event."""

    name = "crosscheck"

    def __init__(self, options: CrossCheckOptions | None = None) -> None:
        self.options = options or CrossCheckOptions()
        self._counts = {"agreement": 0, "doubtful": 0, "conflict": 0}

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        return []

    def status(self) -> dict[str, Any]:
        return dict(self._counts)

    def close(self) -> None:
        pass

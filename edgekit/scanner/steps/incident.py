"""Incidents: what came in the last seconds before one, in a file that `edgekit replay` runs again."""

from __future__ import annotations

from typing import Any

import msgspec

from edgekit.scanner.events import Event
from edgekit.scanner.sources import Captured

__all__ = ["IncidentOptions", "Incidents"]


class IncidentOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``folder``: where files go. ``seconds`` before an event whose ``event`` is one of ``on``; frames beyond
    ``most_megabytes``, in memory or in a file, are left out, the oldest first. No second file within ``cooldown_s``; of more
    than ``most_files`` the oldest is removed."""

    folder: str
    seconds: float = 10.0
    most_megabytes: float = 64.0
    on: tuple[str, ...] = ("no_read", "failed", "drift", "conflict")
    cooldown_s: float = 60.0
    most_files: int = 50

    def __post_init__(self) -> None:
        if not self.folder or not self.on:
            raise ValueError("folder and on are not empty")
        if not (self.seconds > 0 and self.most_megabytes > 0 and self.cooldown_s >= 0 and self.most_files >= 1):
            raise ValueError("seconds, most_megabytes and most_files are more than 0, cooldown_s is at least 0")


class Incidents:
    """A `Step`, the first of all, that keeps what comes; and a `Sink`, the last, that sees what is sent."""

    name = "incident"

    def __init__(self, options: IncidentOptions) -> None:
        self.options = options

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        return []

    def send(self, event: Event) -> None:
        """An event as it left."""

    def flush(self, patience_s: float = 0.0) -> None:
        """Wait for a file that is being written."""

    def status(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

"""The limits of an outbox, as a configuration names them, and where it lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from edgekit.errors import UsageError

__all__ = ["OutboxOptions", "default_outbox"]

LEAST_EVENTS = 100  # a batch in delivery is never dropped, so there must be room beside it


class OutboxOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of one sink may wait in the outbox, and what happens beyond.

    ``policy``: ``drop oldest`` (the default: the scan goes on, and a sink that comes back after hours wants to know the
    present), ``drop newest`` (keeps the beginning of an outage), ``stop`` (the scan ends with an error: nothing is ever
    dropped). Raises `UsageError` for a limit that is too small.
    """

    most_events: int = 1_000_000
    most_megabytes: float = 256
    policy: Literal["drop oldest", "drop newest", "stop"] = "drop oldest"

    def __post_init__(self) -> None:
        if self.most_events < LEAST_EVENTS or not self.most_megabytes > 0:
            found = f"most_events {self.most_events}, most_megabytes {self.most_megabytes:g}"
            raise UsageError(
                f"the outbox's limits are too small: {found}", f"most_events from {LEAST_EVENTS}, megabytes above 0"
            )
        if self.policy not in ("drop oldest", "drop newest", "stop"):
            raise UsageError(f"there is no outbox policy {self.policy!r}", "choose: drop oldest, drop newest, stop")


def default_outbox() -> Path:
    """systemd's ``StateDirectory``, else the user's state folder (XDG base directory specification)."""
    if state := os.environ.get("STATE_DIRECTORY"):
        return Path(state.split(":")[0]) / "outbox.sqlite"
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "edgekit" / "outbox.sqlite"

"""Events for an outbox, what waits in it, a disk that is full."""

from __future__ import annotations

from typing import Any

from edgekit.chaos.network import full_disk
from edgekit.scanner import Outbox

__all__ = ["event", "full_disk", "ids", "line_event"]


def event(i: int, size: int = 10) -> dict[str, Any]:
    return {"schema": 1, "id": f"run-{i}", "source": "s", "seq": i, "time": "2026-01-31T12:00:00.000Z", "text": "x" * size}


def line_event(i: int) -> dict[str, Any]:
    """Of a source whose name holds what ends a line in Unicode, and not in JSON lines."""
    return {"schema": 1, "id": f"run-{i}", "source": "Förderband\u20287", "seq": i, "time": "2026-01-31T12:00:00.000Z"}


def ids(outbox: Outbox, sink: str = "s") -> list[str]:
    return [each.id for each in outbox.head(sink, 10**6)]

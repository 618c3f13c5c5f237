"""What the outbox knows of its events: those that wait, and each sink's figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

__all__ = ["Held", "Queue", "Waiting"]


class Waiting(NamedTuple):
    """An undelivered event: its place in the queue (negative: in memory), its id, its JSON."""

    position: int
    id: str
    event: bytes


class Held(NamedTuple):
    """An event that has to be stored; its place is negative while it is in memory."""

    position: int
    sink: str
    id: str
    event: bytes

    @property
    def cost(self) -> int:
        return len(self.event) + 2 * (len(self.id) + len(self.sink)) + 64


@dataclass
class Queue:
    """One sink's figures. ``handed``: position -> bytes of the events in delivery; ``done``: delivered, to be removed."""

    waiting: int = 0
    refused: int = 0
    bytes: int = 0
    sent: int = 0  # in this run, as is delivered
    delivered: int = 0
    before: dict[str, Any] = field(default_factory=dict)  # what the file held at the start
    dropped: Counter[str] = field(default_factory=Counter)
    handed: dict[int, int] = field(default_factory=dict)
    done: int = 0
    said: bool = False

    def copy(self) -> Queue:
        return replace(self, dropped=self.dropped.copy(), handed=self.handed.copy())

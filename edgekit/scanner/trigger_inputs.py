"""Triggers from outside: a TCP line, an MQTT topic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["TRIGGER_INPUTS", "TriggerInput", "open_trigger_input"]

TRIGGER_INPUTS = ("tcp", "mqtt")
Fire = Callable[[str | None, str], bool]


class TriggerInput(Protocol):
    """``name`` holds no password."""

    name: str

    def status(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def open_trigger_input(spec: str, fire: Fire) -> TriggerInput:
    """``tcp://[HOST]:PORT`` or ``mqtt://[user:password@]HOST[:PORT]/TOPIC``. Raises `UsageError` for others."""
    raise NotImplementedError

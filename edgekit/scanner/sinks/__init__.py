"""Sinks: where events go. One file a kind, chosen by scheme from `SINKS`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any, Protocol

from edgekit.errors import UsageError
from edgekit.scanner.events import Event
from edgekit.scanner.outbox import Outbox

__all__ = ["FLUSH_S", "SINKS", "Sink", "open_sink", "without_secrets"]

#: How long `Sink.flush` goes on without a delivery before it leaves the rest on disk for the next run.
FLUSH_S = 5.0


class Sink(Protocol):
    """``name`` appears in summaries and messages; it holds no password."""

    name: str

    def send(self, event: Event) -> None:
        """Take one event. When it returns, the process may die and the event is not lost (each sink says how far)."""
        ...

    def flush(self, patience_s: float = FLUSH_S) -> None:
        """Bring all events out, or give up after ``patience_s`` seconds without progress; below a second, after so long."""
        ...

    def status(self) -> dict[str, Any]:
        """Figures for the summary: at least ``sink`` and ``sent``."""
        ...

    def close(self) -> None: ...


#: scheme -> (module, function ``(spec, outbox) -> Sink``). ``outbox()`` opens the scan's outbox on first use.
SINKS: dict[str, tuple[str, str]] = {
    "jsonl": ("edgekit.scanner.sinks.jsonl", "open_jsonl"),
    "sqlite": ("edgekit.scanner.sinks.sqlite", "open_sqlite"),
    "mqtt": ("edgekit.scanner.sinks.mqtt", "open_mqtt"),
    "mqtts": ("edgekit.scanner.sinks.mqtt", "open_mqtt"),
    "http": ("edgekit.scanner.sinks.http", "open_http"),
    "https": ("edgekit.scanner.sinks.http", "open_http"),
    "tcp": ("edgekit.scanner.sinks.lines", "open_tcp"),
    "serial": ("edgekit.scanner.sinks.lines", "open_serial"),
    "opc.tcp": ("edgekit.scanner.sinks.opcua", "open_opcua"),
}
_FORMS = (
    "jsonl:PATH, jsonl:- (stdout), sqlite:PATH, mqtt(s)://HOST:PORT/TOPIC, http(s)://HOST/PATH, tcp://HOST:PORT, "
    "serial:DEVICE?baud=9600, opc.tcp://HOST:PORT/PATH?node=NODE"
)


def without_secrets(spec: str) -> str:
    """An address as an error may show it: no user, no password, no query (which may hold a token).

    For text that may not be an address at all, so nothing behind the scheme is trusted once an @ follows.
    """
    scheme, _, rest = spec.partition(":")
    if not rest.startswith("//") or "@" in rest:
        return f"{scheme}:..."
    return f"{scheme}:{re.split('[?#;]', rest)[0]}"


def open_sink(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    """The sink that ``spec`` names. Raises `UsageError` for an unknown scheme or an incomplete address."""
    scheme, colon, rest = spec.partition(":")
    if scheme.lower() not in SINKS or not colon or not rest.strip("/"):
        known = scheme.lower() in SINKS and colon
        what = f"the sink {spec!r} does not say where" if known else f"there is no sink {without_secrets(spec)!r}"
        raise UsageError(what, f"choose one of: {_FORMS}")
    module, function = SINKS[scheme.lower()]
    sink: Sink = getattr(importlib.import_module(module), function)(spec, outbox)
    return sink

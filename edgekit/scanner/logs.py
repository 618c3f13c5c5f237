"""What a scan says of itself on stderr: plain lines, or one JSON object a line for a log collector.

Cameras that come and go, a model's verdict, drift and a failed self-test are said in either form. Only JSON has the whole life,
a line each with the field ``life``: ``starting``, ``ready``, ``stopping``, then ``ended`` with the figures (with ``forced``
alone where a frame or a sink hung), or ``failed``.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edgekit.progress import harmless, say, spoken_by
from edgekit.version import __version__

from .events import Event, encode_any, rfc3339
from .sources.address import shown

if TYPE_CHECKING:
    from .config import ScanConfig
    from .pipeline import Summary

__all__ = ["LEVELS", "Life", "LogOptions", "logging"]

LEVELS = ("debug", "info", "warning", "error")


class LogOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``format``: ``text`` for people, ``json`` for machines. Lines below ``level`` are left out."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class _Log:
    def __init__(self, options: LogOptions) -> None:
        self._json = options.format == "json"
        self._least = LEVELS.index(options.level)

    def __call__(self, message: str, level: str = "info", **about: Any) -> None:
        if LEVELS.index(level) < self._least:
            return
        line = shown(" ".join(message.split()))  # one line without a password, whatever a driver's message holds
        if self._json:
            fields = {"time": rfc3339(time.time()), "level": level, "message": line, **about}
            line = encode_any(fields).decode()
        else:
            line = harmless(line)
        # One write a line, so that two threads' lines do not mix; a log that nobody takes does not end the scan.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


@contextlib.contextmanager
def logging(options: LogOptions) -> Iterator[None]:
    """In the block all lines that edgekit says go out on stderr as ``options`` ask."""
    with spoken_by(_Log(options)):
        yield


class Life:
    """The events of the process's life. Left by an error it says so, and lets it through."""

    def __init__(self, options: LogOptions) -> None:
        self._whole = options.format == "json"

    def __enter__(self) -> Life:
        self._say("the scan starts", life="starting", version=__version__)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, GeneratorExit):
            words = getattr(error, "message", "") or str(error) or type(error).__name__
            self._say(words, "error", life="failed", hint=getattr(error, "hint", ""))

    def ready(self, config: ScanConfig, model: Mapping[str, Any], sinks: Sequence[str]) -> None:
        """``sinks``: their names, which hold no secrets."""
        sources = [source.name or shown(source.address) for source in config.source]
        words = f"the scan runs, on {', '.join(sources) or 'frames'}"
        self._say(words, life="ready", sources=sources, sinks=list(sinks), model=model)

    def stopping(self, signal: int) -> None:
        self._say("the scan stops" + (f" on signal {signal}" if signal else ""), life="stopping", signal=signal)

    def ended(self, summary: Summary) -> None:
        self._say(summary.line(), life="ended", **summary.figures())

    def hear(self, event: Event) -> None:
        """Each event that was sent: the few that are about the scan itself are said."""
        kind = event.get("event")
        if kind in _TOLD and (found := _TOLD[kind](event)):
            words, level = found
            say(shown(words), level, event=kind, source=event.get("source", ""))

    def _say(self, message: str, level: str = "info", **about: Any) -> None:
        if self._whole:
            say(message, level, **about)


def _camera(event: Event) -> tuple[str, str]:
    down, reason = event.get("state") == "down", event.get("reason", "")
    return f"{event['source']} is {event['state']}" + (f": {reason}" if reason else ""), "warning" if down else "info"


def _model(event: Event) -> tuple[str, str] | None:
    if event["state"] == "returned":  # said where it happened, before anything was loaded
        return None
    refused, reason = event["state"] == "refused", event.get("reason", "")
    return f"{event['source']} was {event['state']}" + (f": {reason}" if reason else ""), "warning" if refused else "info"


def _drift(event: Event) -> tuple[str, str]:
    away, source = event["state"] == "drifted", event.get("source") or "the input"
    return f"{source} {'has drifted' if away else 'is back'}: {event.get('reason', '')}", "warning" if away else "info"


def _selftest(event: Event) -> tuple[str, str] | None:
    return None if event.get("ok") else (f"the self-test failed: {event.get('reason', '')}", "error")


_TOLD = {"camera": _camera, "model": _model, "drift": _drift, "selftest": _selftest}

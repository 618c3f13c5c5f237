"""What a scan says of itself on stderr: plain lines, or one JSON object a line for a log collector."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal, TextIO

import msgspec

from edgekit.progress import spoken_by

from .events import rfc3339

__all__ = ["LEVELS", "LogOptions", "logging"]

LEVELS = ("debug", "info", "warning", "error")


class LogOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``format``: ``text`` for people, ``json`` for machines. Lines below ``level`` are left out."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class _Log:
    def __init__(self, options: LogOptions, stream: TextIO | None) -> None:
        self._json = options.format == "json"
        self._least = LEVELS.index(options.level)
        self._stream = stream

    def __call__(self, message: str, level: str = "info", **about: Any) -> None:
        if LEVELS.index(level) < self._least:
            return
        line = " ".join(message.split())  # one line, whatever a driver's message holds
        if self._json:
            fields = {"time": rfc3339(time.time()), "level": level, "message": line, **about}
            line = msgspec.json.encode(fields, enc_hook=str).decode()
        stream = self._stream or sys.stderr
        # One write a line, so that two threads' lines do not mix; a log that nobody takes does not end the scan.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.write(line + "\n")
            stream.flush()


@contextlib.contextmanager
def logging(options: LogOptions, stream: TextIO | None = None) -> Iterator[None]:
    """In the block all lines that edgekit says go out as ``options`` ask, to ``stream`` or stderr."""
    with spoken_by(_Log(options, stream)):
        yield

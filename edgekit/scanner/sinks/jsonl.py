"""``jsonl:PATH`` appends one line an event to a file; ``jsonl:-`` writes them to stdout."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import DataError
from edgekit.scanner.events import Event, encode
from edgekit.scanner.outbox import Outbox

from . import FLUSH_S, Sink

__all__ = ["JsonlSink", "StdoutSink", "open_jsonl"]


def open_jsonl(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    target = spec.partition(":")[2]
    return StdoutSink() if target == "-" else JsonlSink(Path(target))


class JsonlSink:
    """Every line goes to the operating system before `send` returns, so it outlives the process; `flush` syncs to disk.

    Raises `DataError` for a database, `OSError` for a path that cannot be written. On a full disk the half-written line
    is taken back.
    """

    def __init__(self, path: Path) -> None:
        self.name = f"jsonl:{path}"
        self._sent = 0
        refuse_inside_bundle(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._regular = stat.S_ISREG(os.fstat(self._handle).st_mode)
        size = os.fstat(self._handle).st_size
        if self._regular and os.pread(self._handle, 16, 0).startswith(b"SQLite format 3"):
            os.close(self._handle)
            raise DataError(f"{path} is an SQLite database", f"write sqlite:{path}, or name another file")
        if self._regular and size and os.pread(self._handle, 1, size - 1) != b"\n":
            self._write(b"\n")  # a line torn by a power cut stays alone; it is not ours to remove

    def send(self, event: Event) -> None:
        self._write(encode(event) + b"\n")
        self._sent += 1

    def flush(self, patience_s: float = FLUSH_S) -> None:
        if self._regular:
            os.fsync(self._handle)

    def status(self) -> dict[str, Any]:
        return {"sink": self.name, "sent": self._sent}

    def close(self) -> None:
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)

    def _write(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.write(self._handle, data[written:])
        except OSError as error:
            if written and self._regular:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, os.fstat(self._handle).st_size - written)
            raise OSError(error.errno, error.strerror, str(self._path)) from None


class StdoutSink:
    name = "jsonl:-"

    def __init__(self) -> None:
        if sys.stdout is None:
            raise DataError("stdout is closed", "name a file: --sink jsonl:PATH")
        self._sent = 0

    def send(self, event: Event) -> None:
        sys.stdout.buffer.write(encode(event) + b"\n")
        sys.stdout.buffer.flush()
        self._sent += 1

    def flush(self, patience_s: float = FLUSH_S) -> None:
        sys.stdout.buffer.flush()

    def status(self) -> dict[str, Any]:
        return {"sink": self.name, "sent": self._sent}

    def close(self) -> None:
        pass

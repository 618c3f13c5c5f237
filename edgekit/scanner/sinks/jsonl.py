"""``jsonl:PATH`` appends one line an event to a file; ``jsonl:-`` writes them to stdout.

Options behind the path: ``jsonl:events.jsonl?rotate=10M&keep=5&fsync=always``.

| option | what | default |
|---|---|---|
| ``rotate`` | a size (bytes, or with K, M, G) beyond which the file becomes ``PATH.000001``, ``.000002``, ...; never a part of an event | never |
| ``keep`` | how many of those stay; the oldest go, their events counted as ``dropped`` | 5 |
| ``fsync`` | ``always``: before `send` returns; ``interval``: each second; ``never``: at the end | ``interval`` |

A closed file keeps its number, so whoever collects the files knows which he has.
"""  # noqa: E501  a table row is one line

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import DataError, UsageError
from edgekit.progress import say
from edgekit.scanner.database import sync_folder
from edgekit.scanner.events import Event, encode
from edgekit.scanner.outbox import Outbox

from . import FLUSH_S, Sink
from .local import LocalSink

__all__ = ["JsonlOptions", "JsonlSink", "StdoutSink", "open_jsonl", "place_of"]

INTERVAL_S = 1.0
_OPTIONS = "options are ?rotate=10M&keep=5&fsync=always|interval|never"
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


class JsonlOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``rotate_bytes``: 0 never. ``keep``: rotated files that stay, from 1. ``fsync``: when lines are synced to disk."""

    rotate_bytes: int = 0
    keep: int = 5
    fsync: Literal["always", "interval", "never"] = "interval"


def open_jsonl(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    """Raises `UsageError` for an unknown option."""
    path, options = place_of(spec)
    return StdoutSink() if path is None else JsonlSink(path, options)


def place_of(spec: str) -> tuple[Path | None, JsonlOptions]:
    """The file that an address names, None for stdout. Raises `UsageError` for an unknown option."""
    target = spec.partition(":")[2]
    path, mark, asked = target.rpartition("?")
    if not mark or "=" not in asked or not path:
        path, asked = target, ""
    options = _options(asked)
    if path == "-":
        if asked:
            raise UsageError("stdout takes no options", "write jsonl:-, or name a file")
        return None, options
    return Path(path), options


def _options(asked: str) -> JsonlOptions:
    found: dict[str, Any] = {}
    for part in filter(None, asked.split("&")):
        name, _, value = part.partition("=")
        size = re.fullmatch(r"(\d{1,12})([KMG]?)B?", value.upper())
        if name == "rotate" and size and int(size[1]):
            found["rotate_bytes"] = int(size[1]) * _UNITS[size[2]]
        elif name == "keep" and re.fullmatch(r"[1-9]\d{0,5}", value):
            found["keep"] = int(value)
        elif name == "fsync" and value in ("always", "interval", "never"):
            found["fsync"] = value
        else:
            raise UsageError(f"the sink jsonl does not know {part!r}", _OPTIONS)
    if "keep" in found and "rotate_bytes" not in found:
        raise UsageError("keep= without rotate= keeps nothing: the file is never rotated", "add rotate=10M, or leave keep= out")
    return JsonlOptions(**found)


class JsonlSink(LocalSink):
    """Every line goes to the operating system before `send` returns, so it outlives the process; to disk as ``fsync`` says.

    Raises `DataError` for a database and, with rotation, a file that another scan writes; `OSError` for a path that cannot
    be written.
    """

    def __init__(self, path: Path, options: JsonlOptions | None = None) -> None:
        super().__init__(f"jsonl:{path}", path)
        self.options = options or JsonlOptions()
        refuse_inside_bundle(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()  # the handle changes when the file is rotated
        self._number = 0
        self._stuck = False
        self._lines: dict[int, int] = {}  # of the rotated files that this scan wrote, all of them
        self._handle = self._open()
        self._begin()
        self._regular = stat.S_ISREG(os.fstat(self._handle).st_mode)
        try:
            self._look_at_what_is_there()
        except BaseException:
            os.close(self._handle)
            raise
        self._dirty, self._closing = threading.Event(), threading.Event()
        self._syncing: threading.Thread | None = None
        if self._regular and self.options.fsync == "interval":
            self._syncing = threading.Thread(target=self._sync_each_second, name=f"sync {self.name}", daemon=True)
            self._syncing.start()

    def flush(self, patience_s: float = FLUSH_S) -> None:
        super().flush(patience_s)
        if self._regular:
            os.fsync(self._handle)

    def close(self) -> None:
        with self._lock:
            handle, self._handle = self._handle, -1
        if handle < 0:
            return
        self._closing.set()
        self._dirty.set()
        if self._syncing:
            self._syncing.join(0.3)
        os.close(handle)

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def _begin(self) -> None:
        """Count the lines of the file that is open; one that was there already is not known."""
        self._written, self._own = 0, os.fstat(self._handle).st_size == 0

    def _look_at_what_is_there(self) -> None:
        size = os.fstat(self._handle).st_size
        if self._regular and os.pread(self._handle, 16, 0).startswith(b"SQLite format 3"):
            raise DataError(f"{self._path} is an SQLite database", f"write sqlite:{self._path}, or name another file")
        if self._regular and self.options.rotate_bytes:
            self._claim(self._handle)
        if self._regular and size and os.pread(self._handle, 1, size - 1) != b"\n":
            self._append(b"\n")  # a line torn by a power cut stays alone; it is not ours to remove
        if self._regular:
            sync_folder(self._path)

    def _claim(self, handle: int) -> None:
        """Two scans would rotate the file under each other's hands."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another scan writes and rotates {self._path}", "give each scan its own file") from None

    def _write(self, event: Event) -> None:
        line = encode(event) + b"\n"
        if self._regular and self._moved():
            self._reopen()
        limit = self.options.rotate_bytes
        if limit and self._regular and (size := os.fstat(self._handle).st_size) > 0 and size + len(line) > limit:
            self._rotate()
        self._append(line)
        self._written += 1
        if self._regular and self.options.fsync == "always":
            os.fsync(self._handle)
        elif self._syncing:
            self._dirty.set()

    def _append(self, data: bytes) -> None:
        """All of it, or an error and nothing: a half-written line is taken back."""
        written = 0
        try:
            while written < len(data):
                written += os.write(self._handle, data[written:])
        except OSError as error:
            if written and self._regular:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, os.fstat(self._handle).st_size - written)
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def _waits(self, error: OSError) -> bool:
        return self._regular and super()._waits(error)

    def _rotate(self) -> None:
        """One rename, then a new file. Where either fails the old file goes on: too long, but whole."""
        numbers = self._numbers()
        self._number = max([self._number, *numbers]) + 1
        closed = self._numbered(self._number)
        try:
            if self.options.fsync != "never":
                os.fsync(self._handle)
            os.rename(self._path, closed)
            written = self._written if self._own else None
            try:
                self._reopen()
            except OSError:
                os.rename(closed, self._path)
                raise
        except OSError as error:
            if not self._stuck:
                self._stuck = True
                say(f"{self._path} cannot be rotated ({error.strerror}); it grows on")
            return
        self._stuck = False
        if written is not None:
            self._lines[self._number] = written
        for number in sorted([*numbers, self._number])[: -self.options.keep]:
            self._remove(number)

    def _reopen(self) -> None:
        handle = self._open()
        try:
            if self.options.rotate_bytes:
                self._claim(handle)
        except DataError:
            os.close(handle)
            raise
        with self._lock:
            old, self._handle = self._handle, handle
        self._begin()
        os.close(old)
        sync_folder(self._path)

    def _moved(self) -> bool:
        """Whether somebody else renamed or removed the file."""
        try:
            return os.stat(self._path).st_ino != os.fstat(self._handle).st_ino
        except FileNotFoundError:
            return True

    def _remove(self, number: int) -> None:
        """A rotated file beyond ``keep``; its events count as dropped. Only one of an earlier scan has to be read for that."""
        path = self._numbered(number)
        with contextlib.suppress(OSError):
            lines = self._lines.pop(number, None)
            if lines is None:
                with path.open("rb") as file:
                    lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
            path.unlink()
            self._dropped["rotated away"] += lines

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number:06d}")

    def _numbers(self) -> list[int]:
        """Of the rotated files that are there."""
        start = f"{self._path.name}."
        names = (entry.name for entry in os.scandir(self._path.parent) if entry.name.startswith(start))
        return [int(end) for name in names if re.fullmatch(r"\d{6,9}", end := name[len(start) :])]

    def _sync_each_second(self) -> None:
        while not self._closing.is_set():
            self._dirty.wait()
            self._dirty.clear()
            with self._lock:
                handle = os.dup(self._handle) if self._handle >= 0 else -1
            if handle >= 0:
                try:
                    os.fsync(handle)
                except OSError as error:
                    say(f"{self._path} cannot be synced: {error.strerror}")
                finally:
                    os.close(handle)
            self._closing.wait(INTERVAL_S)


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

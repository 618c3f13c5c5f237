"""A damaged outbox: what can still be read goes into a new one, the old file is kept beside it, and the scan starts."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from edgekit.progress import say

from .database import Damaged, OtherVersion, connect, sqlite_errors, sync_folder

__all__ = ["open_sound"]

_PARTS = ("-wal", "-shm", "")  # the database last: without its log it is an older one, not a damaged one
_HEADER = 100  # bytes (https://sqlite.org/fileformat.html, 1.3)
_LARGEST = 1 << 40
KEPT = 3  # old files
#: Beyond, SQLite would soon have no numbers left, and says that the disk is full.
LAST = 1 << 62
_ODD = """SELECT 1 FROM outbox WHERE typeof(sink) <> 'text' OR typeof(id) <> 'text' OR typeof(event) <> 'blob'
    OR typeof(coalesce(refused, '')) <> 'text' OR position NOT BETWEEN 1 AND :last
    UNION ALL SELECT 1 FROM dropped WHERE typeof(sink) <> 'text' OR typeof(reason) <> 'text' OR typeof(count) <> 'integer'
    UNION ALL SELECT 1 FROM sqlite_sequence WHERE seq > :last
    UNION ALL SELECT 1 FROM sqlite_master WHERE type IN ('trigger', 'view') LIMIT 1"""
_ROWS = "SELECT position, sink, id, event, refused FROM outbox WHERE position > ? ORDER BY position"


def open_sound(path: Path, schema: str, version: int, added: str) -> sqlite3.Connection:
    """The outbox's database; a new one where the old one cannot be used, which is said, and kept.

    Raises `DataError` for a database of another kind, `OSError` where there is no room for a new one.
    """
    _exchange(path)
    try:
        connection = connect(path, schema, version, added)
        try:
            why = _damage(connection, path)
            if not why:
                return connection
        except BaseException:
            connection.close()
            raise
        connection.close()
    except OtherVersion as error:
        newer = error.found >> 16 == version >> 16 and error.found > version
        if not newer and not list(_read(path, "SELECT position, sink, id, event FROM outbox LIMIT 1")):
            raise
        why = f"version {error.found}, of a newer edgekit, or damaged"
    except Damaged as error:
        why = error.message.rpartition(": ")[2]
    old, events = _set_aside(path, schema, version, added)
    words = f"it is kept as {old}, and {events} events read from it go on waiting"
    say(f"the outbox {path} cannot be used ({why}); {words}", "warning")
    return connect(path, schema, version, added)


def _damage(connection: sqlite3.Connection, path: Path) -> str:
    """What is wrong in the file. Its indices count: an event that is not in them would never be delivered."""
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if header[18:20] not in (b"", b"\2\2"):  # file format versions; another one makes it read-only for SQLite
        return "its header is damaged"
    with sqlite_errors(path):
        found = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
        return _odd(connection) if found == "ok" else found.splitlines()[-1]


def _odd(connection: sqlite3.Connection) -> str:
    """What SQLite takes and no scan has written: a damaged page may be sound for it, and one that somebody changed is."""
    if connection.execute(_ODD, {"last": LAST}).fetchone():
        return "there are rows in it that no scan has written"
    connection.text_factory = bytes
    try:
        for row in connection.execute(
            "SELECT sink, id, refused, event FROM outbox UNION ALL SELECT sink, reason, NULL, NULL FROM dropped"
        ):
            for text in row:
                if text is not None:
                    text.decode()
    except UnicodeDecodeError:
        return "there are texts in it that are none"
    finally:
        connection.text_factory = str
    return ""


def _set_aside(path: Path, schema: str, version: int, added: str) -> tuple[Path, int]:
    """Put a new database in the place of ``path``: where the old one lies, and how many of its events are in the new one.

    The new one is made beside it and gets the name that says that it is whole; then both change their names. Whatever fails
    before leaves the old file in its place, and what ends the process amid them is finished by the next start.
    """
    new = path.with_name(f"{path.name}.new")
    for part in _PARTS:
        Path(f"{new}{part}").unlink(missing_ok=True)
    connection = connect(new, schema, version, added)
    try:
        with sqlite_errors(new):
            with _whole(path):
                events = _save(path, connection)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.close()
    os.rename(new, _whole_one(path))
    sync_folder(path)
    return _exchange(path), events


def _whole_one(path: Path) -> Path:
    return path.with_name(f"{path.name}.salvaged")


def _exchange(path: Path) -> Path:
    """Where a whole new database lies beside ``path``: the old one's files go, what is left of them, and it takes the place."""
    numbers = [
        int(found[1])
        for each in path.parent.iterdir()
        if (found := re.fullmatch(re.escape(path.name) + r"\.old-(\d{1,9})", each.name))
    ]
    number = max(numbers, default=0) + 1
    old = path.with_name(f"{path.name}.old-{number}")
    if _whole_one(path).exists():
        for part in _PARTS:
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{path}{part}", f"{old}{part}")
        os.rename(_whole_one(path), path)
        sync_folder(path)
        _remove_oldest(path, number - KEPT)
    return old


def _remove_oldest(path: Path, last: int) -> None:
    """A disk with a bad place would fill with them."""
    for number in range(last, 0, -1):
        for part in _PARTS:
            Path(f"{path}.old-{number}{part}").unlink(missing_ok=True)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """While it runs, a file that was cut off has its full length: SQLite opens none that is shorter than its header says."""
    with path.open("r+b") as file:
        header, size = file.read(_HEADER), os.fstat(file.fileno()).st_size
        full = int.from_bytes(header[16:18], "big") * int.from_bytes(header[28:32], "big")
        longer = size < full <= _LARGEST
        with contextlib.suppress(OSError):  # a length that is damaged too
            if longer:
                file.truncate(full)
        try:
            yield
        finally:
            if longer:
                file.truncate(size)


def _save(path: Path, into: sqlite3.Connection) -> int:
    into.execute("BEGIN IMMEDIATE")
    before = into.total_changes
    into.executemany("INSERT OR IGNORE INTO outbox (position, sink, id, event, refused) VALUES (?, ?, ?, ?, ?)", _rows(path))
    saved = into.total_changes - before
    into.executemany("INSERT OR IGNORE INTO dropped VALUES (?, ?, ?)", _dropped(path))
    into.execute("COMMIT")
    return saved


def _rows(path: Path) -> Iterator[tuple[Any, ...]]:
    """Events from the first on, up to a page that cannot be read, then from the last on, down to one."""
    last = -1 << 63
    odd: list[tuple[Any, ...]] = []  # without a place of their own: they get one behind all others
    for row in _read(path, _ROWS, last):
        if isinstance(row[0], int) and row[0] > last:
            last = row[0]
            if 0 < last <= LAST:
                yield from _sound(row)
            else:
                odd += _sound(row)
    for row in _read(path, f"{_ROWS} DESC", last):
        yield from _sound(row)
    yield from odd


def _sound(row: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The row, where its event is one and has the id that the row names."""
    position, sink, event_id, event, refused = row
    with contextlib.suppress(UnicodeDecodeError, AttributeError, msgspec.DecodeError, TypeError):
        found = (position, sink.decode(), event_id.decode(), event, None if refused is None else refused.decode())
        body = msgspec.json.decode(event)
        if isinstance(position, int) and isinstance(body, dict) and body.get("id", found[2]) == found[2]:
            yield (position if 0 < position <= LAST else None, *found[1:])


def _dropped(path: Path) -> Iterator[tuple[Any, ...]]:
    for sink, reason, count in _read(path, "SELECT sink, reason, count FROM dropped"):
        with contextlib.suppress(UnicodeDecodeError, AttributeError):
            if isinstance(count, int) and count > 0:
                yield sink.decode(), reason.decode(), count


def _read(path: Path, query: str, *values: int) -> Iterator[tuple[Any, ...]]:
    """Rows as far as they can be read; text as bytes, for it may be none any more. Read only: the old file stays as it is."""
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
        old = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        with contextlib.closing(old):
            old.text_factory = bytes
            yield from old.execute(query, values)

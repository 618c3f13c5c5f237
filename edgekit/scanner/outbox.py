"""The outbox: events for sinks that may be down, in order, on disk, until the sink has acknowledged them.

One SQLite file for all network sinks of a scan. A row is committed before `append` returns and removed only after its
delivery, so a crash repeats events at worst; their ids make repeats identifiable (at-least-once).
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgekit.errors import DataError

from .database import connect, sqlite_errors

__all__ = ["Outbox", "Waiting", "default_outbox"]

_VERSION = 0x65640002
_SCHEMA = """CREATE TABLE outbox (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    sink TEXT NOT NULL,
    id TEXT NOT NULL,
    event BLOB NOT NULL,
    refused TEXT,
    UNIQUE (sink, id)
);
CREATE INDEX outbox_waiting ON outbox (sink, position) WHERE refused IS NULL"""


class Waiting(NamedTuple):
    """An undelivered event: its place in the queue, its id, its JSON."""

    position: int
    id: str
    event: bytes


def default_outbox() -> Path:
    """systemd's ``StateDirectory``, else the user's state folder (XDG base directory specification)."""
    if state := os.environ.get("STATE_DIRECTORY"):
        return Path(state.split(":")[0]) / "outbox.sqlite"
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "edgekit" / "outbox.sqlite"


class Outbox:
    """Usable from several threads; one process at a time.

    Raises `DataError` where another process holds the file or it is another database, `OSError` where it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not on the database itself: SQLite places its own locks there.
        self._held = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._connection = connect(self.path, _SCHEMA, _VERSION)
        except BlockingIOError:
            os.close(self._held)
            raise DataError(
                f"the outbox {self.path} is in use by another scan", "give each scan its own: --outbox PATH"
            ) from None
        except BaseException:
            os.close(self._held)
            raise

    def append(self, sink: str, event_id: str, event: bytes) -> None:
        with self._lock, sqlite_errors(self.path):
            self._connection.execute("INSERT OR IGNORE INTO outbox (sink, id, event) VALUES (?, ?, ?)", (sink, event_id, event))

    def head(self, sink: str, limit: int) -> list[Waiting]:
        """The oldest waiting events of a sink, in order."""
        query = "SELECT position, id, event FROM outbox WHERE sink = ? AND refused IS NULL ORDER BY position LIMIT ?"
        with self._lock, sqlite_errors(self.path):
            return [Waiting(*row) for row in self._connection.execute(query, (sink, limit))]

    def delivered(self, positions: Sequence[int]) -> None:
        """Forget events that their sink has acknowledged."""
        marks = ",".join("?" * len(positions))
        with self._lock, sqlite_errors(self.path):
            self._connection.execute(f"DELETE FROM outbox WHERE position IN ({marks})", tuple(positions))  # noqa: S608  marks only

    def refuse(self, position: int, reason: str) -> None:
        """Set aside an event that its sink will never take, so that it does not hold up the rest; it stays on disk."""
        with self._lock, sqlite_errors(self.path):
            self._connection.execute("UPDATE outbox SET refused = ? WHERE position = ?", (reason, position))

    def count(self, sink: str, *, refused: bool = False) -> int:
        """Events of a sink that wait, or that were refused."""
        query = f"SELECT count(*) FROM outbox WHERE sink = ? AND refused IS {'NOT ' if refused else ''}NULL"  # noqa: S608
        with self._lock, sqlite_errors(self.path):
            return int(self._connection.execute(query, (sink,)).fetchone()[0])

    def close(self) -> None:
        with self._lock, sqlite_errors(self.path):
            self._connection.close()
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

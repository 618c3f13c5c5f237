"""``sqlite:PATH``: a table ``events`` with one row an event.

Every event is committed and synced to disk before `send` returns; on a full disk it waits in memory, and that is said. An
event of no frame (a camera that is down) has ``seq`` -1. Ids are unique, so a repeated event adds no row::

    SELECT json_extract(event, '$.label'), count(*) FROM events GROUP BY 1;
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgekit.scanner.database import connect, sqlite_errors
from edgekit.scanner.events import Event, encode
from edgekit.scanner.outbox import Outbox

from . import Sink
from .local import LocalSink

__all__ = ["VERSION", "SqliteSink", "open_sqlite"]

VERSION = 0x65640001
_SCHEMA = """CREATE TABLE events (
    position INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    time TEXT NOT NULL,
    source TEXT NOT NULL,
    seq INTEGER NOT NULL,
    event TEXT NOT NULL
)"""


def open_sqlite(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    return SqliteSink(Path(spec.partition(":")[2]))


class SqliteSink(LocalSink):
    """Raises `DataError` for a file that is another database, `OSError` for a path that cannot be written."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"sqlite:{path}", path)
        self._connection = connect(path, _SCHEMA, VERSION)

    def _write(self, event: Event) -> None:
        row = (
            event["id"],
            event["time"],
            str(event.get("source", "")).encode("utf-8", "backslashreplace").decode(),
            event.get("seq", -1),
            encode(event).decode(),
        )
        with sqlite_errors(self._path):
            self._connection.execute("INSERT OR IGNORE INTO events (id, time, source, seq, event) VALUES (?, ?, ?, ?, ?)", row)

    def close(self) -> None:
        with sqlite_errors(self._path):
            self._connection.close()

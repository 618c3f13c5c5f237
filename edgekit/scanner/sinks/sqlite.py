"""``sqlite:PATH``: a table ``events`` with one row an event.

Every event is committed and synced to disk before `send` returns. Ids are unique, so a repeated event adds no row::

    SELECT json_extract(event, '$.label'), count(*) FROM events GROUP BY 1;
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit.scanner.database import connect, sqlite_errors
from edgekit.scanner.events import Event, encode
from edgekit.scanner.outbox import Outbox

from . import FLUSH_S, Sink

__all__ = ["SqliteSink", "open_sqlite"]

_VERSION = 0x65640001
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


class SqliteSink:
    """Raises `DataError` for a file that is another database, `OSError` for a full disk or an unwritable path."""

    def __init__(self, path: Path) -> None:
        self.name = f"sqlite:{path}"
        self._path = path
        self._sent = 0
        self._connection = connect(path, _SCHEMA, _VERSION)

    def send(self, event: Event) -> None:
        row = (event["id"], event["time"], event["source"], event["seq"], encode(event).decode())
        with sqlite_errors(self._path):
            self._connection.execute("INSERT OR IGNORE INTO events (id, time, source, seq, event) VALUES (?, ?, ?, ?, ?)", row)
        self._sent += 1

    def flush(self, patience_s: float = FLUSH_S) -> None:
        pass  # nothing is held back

    def status(self) -> dict[str, Any]:
        return {"sink": self.name, "sent": self._sent}

    def close(self) -> None:
        with sqlite_errors(self._path):
            self._connection.close()

"""The outbox: events for sinks that may be down, in order, on disk, until the sink has acknowledged them.

One SQLite file for all network sinks of a scan. A row is committed before `append` returns and removed only after its
delivery, so a crash repeats events at worst; their ids make repeats identifiable (at-least-once). What the limits of
`OutboxOptions` drop is counted in the same commit.

A file that is damaged, or of a newer edgekit, is kept beside a new one; the events that can be read of it go on waiting.

On a full disk the newest events wait in memory (`MOST_HELD`), still in order and still delivered; they are written as soon
as there is room. Only beyond that are they dropped, and counted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from edgekit.errors import DataError
from edgekit.progress import say

from .database import FULL, sqlite_errors
from .outage import MOST_HELD, MOST_HELD_BYTES, Outage, drop_reason
from .outbox_options import OutboxOptions, default_outbox
from .outbox_queue import Held, Queue, Waiting
from .salvage import open_sound

__all__ = ["Outbox", "OutboxOptions", "Waiting", "default_outbox"]

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
_ADDED = """CREATE TABLE IF NOT EXISTS dropped (
    sink TEXT NOT NULL,
    reason TEXT NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (sink, reason)
);
CREATE INDEX IF NOT EXISTS outbox_refused ON outbox (sink, position) WHERE refused IS NOT NULL"""
#: What a row takes in the file beside its event: id and sink stand in the row and in the indices.
_ROW_COST = "length(event) + 2 * (length(id) + length(sink)) + 64"


class Outbox:
    """Usable from several threads, one a sink for delivery; one process at a time. Limits hold for each sink.

    Raises `DataError` where another process holds the file or it is a database of another kind, `OSError` where it cannot be
    written.
    """

    def __init__(self, path: str | os.PathLike[str], options: OutboxOptions | None = None) -> None:
        self.path = Path(path)
        self.options = options or OutboxOptions()
        self._lock = threading.Lock()
        self._queues: dict[str, Queue] = {}
        self._held: deque[Held] = deque()
        self._held_bytes = self._held_count = 0
        self._moved: dict[int, int] = {}  # places in memory -> on disk, of events in delivery
        self._outage = Outage(self.path)
        self._unwritten: Counter[tuple[str, str]] = Counter()  # dropped, and not yet in the file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not on the database itself: SQLite places its own locks there.
        self._lock_file = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._connection = open_sound(self.path, _SCHEMA, _VERSION, _ADDED)
            self._read_figures()
        except BlockingIOError:
            os.close(self._lock_file)
            raise DataError(
                f"the outbox {self.path} is in use by another scan", "give each scan its own: --outbox PATH"
            ) from None
        except BaseException:
            os.close(self._lock_file)
            raise

    def append(self, sink: str, event_id: str, event: bytes) -> None:
        """Store an event. Raises under the policy ``stop`` where there is no room: `DataError` for a limit, `OSError` for a
        full disk."""
        with self._lock:
            self._held_count += 1
            new = Held(-self._held_count, sink, event_id, event)
            try:
                if problem := self._outage.locked():
                    raise problem
                self._store(new)
            except OSError as error:
                self._outage.failed(error)
                if error.errno not in FULL or (self.options.policy == "stop" and error.errno != errno.EBUSY):
                    raise
                self._hold(new, error)
            self._queue(sink).sent += 1

    def head(self, sink: str, limit: int) -> list[Waiting]:
        """The oldest waiting events of a sink, in order; until the next call they are in delivery, and not dropped."""
        query = f"""SELECT position, id, event, {_ROW_COST} FROM outbox
            WHERE sink = ? AND refused IS NULL AND position > ? ORDER BY position LIMIT ?"""  # noqa: S608
        with self._lock, sqlite_errors(self.path):
            queue = self._queue(sink)
            rows = self._connection.execute(query, (sink, queue.done, limit)).fetchall()
            waiting = [Waiting(*row[:3]) for row in rows]
            queue.handed = {row[0]: row[3] for row in rows}
            handed = {position for each in self._queues.values() for position in each.handed}
            self._moved = {old: new for old, new in self._moved.items() if new in handed}
            for each in self._held:
                if len(waiting) >= limit:
                    break
                if each.sink == sink:
                    waiting.append(Waiting(each.position, each.id, each.event))
                    queue.handed[each.position] = each.cost
            return waiting

    def delivered(self, sink: str, positions: Sequence[int]) -> None:
        """Forget events that their sink has acknowledged: the first ones of `head`, in order."""
        with self._lock:
            queue = self._queue(sink)
            gone = {self._moved.pop(position, position) for position in positions}
            for position in gone:
                if (cost := queue.handed.pop(position, None)) is not None:
                    queue.bytes -= cost
                    queue.waiting -= 1
                    queue.delivered += 1
            self._unhold(gone)
            queue.done = max(queue.done, *gone)
            if queue.waiting * 2 < self.options.most_events and queue.bytes < self.options.most_megabytes * 5e5:
                queue.said = False
            self._try_to_store()

    def refuse(self, sink: str, position: int, reason: str) -> None:
        """Set aside an event that its sink will never take, so that it does not hold up the rest; it stays on disk.

        Raises `OSError` on a full disk: the event then still waits.
        """
        with self._lock:
            self._store()  # an event held in memory gets its place on disk first
            queue = self._queue(sink)
            position = self._moved.pop(position, position)
            with sqlite_errors(self.path):
                self._connection.execute("UPDATE outbox SET refused = ? WHERE position = ?", (reason, position))
            if queue.handed.pop(position, None) is not None:
                queue.waiting -= 1
                queue.refused += 1

    def settle(self) -> None:
        """Write what waits in memory, if the disk has room again."""
        with self._lock:
            if self._unsettled():
                self._try_to_store()

    def _unsettled(self) -> bool:
        return bool(self._held or self._unwritten or any(queue.done for queue in self._queues.values()))

    def count(self, sink: str, *, refused: bool = False) -> int:
        """Events of a sink that wait (in memory too), or that were refused."""
        with self._lock:
            queue = self._queue(sink)
            return queue.refused if refused else queue.waiting

    def unsaved(self, sink: str) -> int:
        """Events of a sink that wait in memory, for the disk is full."""
        with self._lock:
            return sum(each.sink == sink for each in self._held)

    def dropped(self, sink: str) -> dict[str, int]:
        """What was dropped of a sink's events since the file is there, by reason."""
        with self._lock:
            return dict(self._queue(sink).dropped)

    def figures(self, sink: str) -> dict[str, Any]:
        """All of one moment: ``sent`` and ``delivered`` in this run; ``waiting``, ``unsaved``, ``refused`` and ``dropped`` by
        reason, of the file; ``before``: waiting, refused and dropped at the start. sent + all before = delivered + waiting +
        refused + all dropped."""
        with self._lock:
            queue = self._queue(sink)
            unsaved = sum(each.sink == sink for each in self._held)
            now = {"waiting": queue.waiting, "unsaved": unsaved, "refused": queue.refused, "dropped": dict(queue.dropped)}
            before = queue.before or {"waiting": 0, "refused": 0, "dropped": {}}
            return {"sent": queue.sent, "delivered": queue.delivered, **now, "before": before}

    def others(self, sinks: Container[str]) -> dict[str, int]:
        """How many events wait for whom that is not among ``sinks``."""
        with self._lock:
            return {name: queue.waiting for name, queue in self._queues.items() if queue.waiting and name not in sinks}

    def close(self) -> None:
        with self._lock:
            if self._lock_file < 0:
                return
            try:
                if self._unsettled():
                    self._try_to_store()
                if self._held:
                    say(f"{len(self._held)} events are lost: there was no room for them in {self.path}", "error")
            finally:
                os.close(self._lock_file)
                self._lock_file = -1
                with sqlite_errors(self.path):
                    self._connection.close()

    def _queue(self, sink: str) -> Queue:
        return self._queues.setdefault(sink, Queue())

    def _read_figures(self) -> None:
        with sqlite_errors(self.path):
            query = f"SELECT sink, refused IS NOT NULL, count(*), sum({_ROW_COST}) FROM outbox GROUP BY 1, 2"  # noqa: S608
            for sink, refused, count, size in self._connection.execute(query):
                queue = self._queue(sink)
                queue.bytes += size
                if refused:
                    queue.refused = count
                else:
                    queue.waiting = count
            for sink, reason, count in self._connection.execute("SELECT sink, reason, count FROM dropped"):
                self._queue(sink).dropped[reason] = count
        for queue in self._queues.values():
            queue.before = {"waiting": queue.waiting, "refused": queue.refused, "dropped": dict(queue.dropped)}

    def _store(self, new: Held | None = None) -> None:
        """All that has to be written, in one transaction; figures change only when it is committed."""
        before, moved = self._queues, dict(self._moved)
        self._queues = {sink: queue.copy() for sink, queue in before.items()}
        unwritten = self._unwritten.copy()
        try:
            with sqlite_errors(self.path):
                self._connection.execute("BEGIN IMMEDIATE")
                self._forget_done()
                for each in self._held:
                    self._insert(each, unwritten, accepted=True)
                if new:
                    queue = self._queue(new.sink)
                    queue.waiting, queue.bytes = queue.waiting + 1, queue.bytes + new.cost
                    self._insert(new, unwritten)
                for (sink, reason), count in unwritten.items():
                    self._connection.execute(
                        "INSERT INTO dropped VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
                        (sink, reason, count),
                    )
                self._connection.execute("COMMIT")
        except BaseException:
            self._queues, self._moved = before, moved
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        self._unwritten.clear()
        self._unhold({each.position for each in self._held})
        self._outage.over()

    def _try_to_store(self) -> None:
        """`_store`, except that a full disk leaves things as they are."""
        try:
            self._store()
        except OSError as error:
            if error.errno not in FULL:
                raise

    def _forget_done(self) -> None:
        for sink, queue in self._queues.items():
            if queue.done:
                self._connection.execute(
                    "DELETE FROM outbox WHERE sink = ? AND refused IS NULL AND position <= ?", (sink, queue.done)
                )
                queue.done = 0

    def _insert(self, row: Held, unwritten: Counter[tuple[str, str]], accepted: bool = False) -> None:
        """Store a row that its queue's figures count already, or drop what the limits ask for; under the policy ``stop`` none
        that was ``accepted``."""
        queue = self._queue(row.sink)
        limit = "" if accepted and self.options.policy == "stop" else self._exceeded(queue)
        if limit and not self._known(row) and not self._make_room(row, queue, limit, unwritten):
            self._drop(row.sink, limit, row.cost, unwritten)
            return
        added = self._connection.execute(
            "INSERT OR IGNORE INTO outbox (sink, id, event) VALUES (?, ?, ?)", (row.sink, row.id, row.event)
        )
        cost = queue.handed.pop(row.position, None)
        if not added.rowcount:  # it is there already
            queue.waiting, queue.bytes = queue.waiting - 1, queue.bytes - row.cost
        elif cost is not None and added.lastrowid:
            self._moved[row.position] = added.lastrowid
            queue.handed[added.lastrowid] = cost

    def _known(self, row: Held) -> bool:
        found = self._connection.execute("SELECT 1 FROM outbox WHERE sink = ? AND id = ?", (row.sink, row.id))
        return found.fetchone() is not None

    def _exceeded(self, queue: Queue, more: int = 0) -> str:
        """Which limit it is above, with an event of ``more`` bytes that it does not count yet."""
        if queue.waiting + queue.refused + bool(more) > self.options.most_events:
            return "most events"
        return "most megabytes" if queue.bytes + more > self.options.most_megabytes * 1e6 else ""

    def _make_room(self, row: Held, queue: Queue, limit: str, unwritten: Counter[tuple[str, str]]) -> bool:
        """Drop older events as the policy allows. False where the new one has to go."""
        if self.options.policy == "stop":
            raise self._full_error(row.sink, queue.waiting - 1, limit)
        if not queue.said:
            queue.said = True
            which = (
                "oldest events make room, and are counted" if self.options.policy == "drop oldest" else "new ones are dropped"
            )
            say(f"{row.sink}: the outbox is full ({limit}); the {which}", "warning")
        if self.options.policy == "drop newest":
            return False
        while limit := self._exceeded(queue):
            kept = max([queue.done, *queue.handed])
            oldest = None
            if queue.refused:
                oldest = self._oldest(row.sink, "refused IS NOT NULL", 0)
                limit = "refused"
            if oldest is None:
                oldest = self._oldest(row.sink, "refused IS NULL", kept)
            if oldest is None:
                return False
            position, cost, refused = oldest
            self._connection.execute("DELETE FROM outbox WHERE position = ?", (position,))
            self._drop(row.sink, limit, cost, unwritten, refused=bool(refused))
        return True

    def _full_error(self, sink: str, waiting: int, limit: str) -> DataError:
        words = f"the outbox {self.path} is full: {waiting} events wait for {sink} ({limit})"
        return DataError(words, "bring the sink up, allow more, or choose another outbox policy")

    def _oldest(self, sink: str, which: str, after: int) -> tuple[int, int, int] | None:
        query = f"""SELECT position, {_ROW_COST}, refused IS NOT NULL FROM outbox
            WHERE sink = ? AND {which} AND position > ? ORDER BY position LIMIT 1"""  # noqa: S608
        found: tuple[int, int, int] | None = self._connection.execute(query, (sink, after)).fetchone()
        return found

    def _drop(self, sink: str, reason: str, cost: int, unwritten: Counter[tuple[str, str]], *, refused: bool = False) -> None:
        queue = self._queue(sink)
        queue.bytes -= cost
        if refused:
            queue.refused -= 1
        else:
            queue.waiting -= 1
        queue.dropped[reason] += 1
        unwritten[sink, reason] += 1

    def _hold(self, new: Held, error: OSError) -> None:
        """Keep an event in memory while the disk is full, or locked; beyond `MOST_HELD` drop one and count it. Under the policy
        ``stop`` it is refused then: raises ``error``, or `DataError` for the limits."""
        queue = self._queue(new.sink)
        if self.options.policy == "stop":
            if len(self._held) >= MOST_HELD or self._held_bytes + new.cost > MOST_HELD_BYTES:
                raise error
            if limit := self._exceeded(queue, new.cost):
                raise self._full_error(new.sink, queue.waiting, limit)
        self._outage.waits(error)
        queue.waiting, queue.bytes = queue.waiting + 1, queue.bytes + new.cost
        self._held.append(new)
        self._held_bytes += new.cost
        while len(self._held) > MOST_HELD or self._held_bytes > MOST_HELD_BYTES:
            order = self._held if self.options.policy == "drop oldest" else reversed(self._held)
            gone = next(each for each in order if each.position not in self._queue(each.sink).handed)
            self._unhold({gone.position})
            self._drop(gone.sink, drop_reason(error), gone.cost, self._unwritten)
            self._outage.drops()

    def _unhold(self, positions: set[int]) -> None:
        if self._held:
            self._held = deque(each for each in self._held if each.position not in positions)
            self._held_bytes = sum(each.cost for each in self._held)

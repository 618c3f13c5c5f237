"""Store and forward: a sink over a network that may be down for hours.

`ForwardSink.send` writes the event into the outbox and returns; a thread delivers in order through a `Transport`,
retries with growing pauses, and removes what was acknowledged.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from typing import Any, Protocol

from edgekit.progress import say
from edgekit.scanner.database import FULL
from edgekit.scanner.events import Event, encode
from edgekit.scanner.outbox import Outbox, Waiting
from edgekit.scanner.stop import Stop

from . import FLUSH_S
from .words import plain

__all__ = ["ForwardSink", "Refused", "Transport", "Undelivered"]

BATCH = 32
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
#: A sink that asks for a longer pause is tried again after this one: a wrong clock there must not stop the line here.
LONGEST_ASKED_S = 300.0
HURRY_S = 1.0
STOPPED_S = 0.3
#: An answer that takes longer is told: a receiver may send it a byte at a time.
SLOW_S = 12.0
#: Between two words about a sink that flaps, or that refuses one event after another.
QUIET_S = 10.0


class Undelivered(Exception):
    """The sink could not be reached or did not acknowledge: try again, where it asked for a pause after ``after_s``."""

    def __init__(self, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.after_s = after_s


class Refused(Exception):
    """The sink will never take this event: set it aside."""


class Transport(Protocol):
    """Used from the delivery thread only."""

    def deliver(self, event_id: str, event: bytes) -> None:
        """Return once the other side has acknowledged. Raises `Undelivered` or `Refused`."""
        ...

    def close(self) -> None: ...


class ForwardSink:
    """Durable when `send` returns; delivered at least once, in order, as long as the outbox file lives."""

    def __init__(self, name: str, transport: Transport, outbox: Outbox) -> None:
        self.name = name
        self.stop: Stop | None = None  #: once it is set, a flush takes no more than `STOPPED_S`
        self._transport, self._outbox = transport, outbox
        self._moves = 0  # deliveries and refusals, as `flush` sees them: at once, not a batch at a time
        self._failure: Exception | None = None
        self._problem = ""
        self._asked: float | None = None  # since when it is asked for an answer
        self._told: set[str] = set()  # problems of this outage
        self._next_word = self._next_refusal = 0.0
        self._wake = threading.Event()  # there may be something to do
        self._hurry = threading.Event()  # do not pause between attempts
        self._closing = threading.Event()
        if waiting := outbox.count(name):
            say(f"{name}: {waiting} events of an earlier run wait in {outbox.path}")
        self._thread = threading.Thread(target=self._run, name=f"deliver {name}", daemon=True)
        self._thread.start()

    def send(self, event: Event) -> None:
        self._check()
        self._outbox.append(self.name, event["id"], encode(event))
        self._wake.set()

    def flush(self, patience_s: float = FLUSH_S) -> None:
        """Wait for deliveries; what is left after ``patience_s`` without one stays in the outbox, and is named.

        Less than `HURRY_S` is all the time there is: who asks for so little has to be gone, whatever is still to deliver.
        Raises `OSError` where a full disk leaves events in memory.
        """
        self._hurry.set()
        self._wake.set()
        progress, moved = time.monotonic(), self._moves
        while self._outbox.count(self.name) and time.monotonic() - progress < patience_s:
            self._check()
            if patience_s > HURRY_S and self.stop is not None and self.stop.is_set():
                progress, patience_s = time.monotonic(), STOPPED_S
            if self._moves != moved and patience_s >= HURRY_S:
                progress, moved = time.monotonic(), self._moves
            time.sleep(0.01)
        self._hurry.clear()
        self._outbox.settle()
        if unsaved := self._outbox.unsaved(self.name):
            raise OSError(errno.ENOSPC, f"No space left for {unsaved} events", str(self._outbox.path))
        if waiting := self._outbox.count(self.name):
            what = f"{waiting} events wait in {self._outbox.path}"
            say(f"{self.name}: {what}; the next scan with this --outbox sends them", "warning")

    def status(self) -> dict[str, Any]:
        """`Outbox.figures`; ``unsaved``: those that wait in memory only. ``down``, while it is: why, and what mends it."""
        problem = self._problem
        if not problem and (asked := self._asked) is not None and (waited := time.monotonic() - asked) > SLOW_S:
            problem = f"no answer for {waited:.0f} s"
        return {"sink": self.name, **self._outbox.figures(self.name), **({"down": problem} if problem else {})}

    def close(self) -> None:
        """Stop delivering. A delivery that hangs is left behind: its event is still in the outbox."""
        self._closing.set()
        self._wake.set()
        self._hurry.set()
        self._thread.join(0.05 if self.stop is not None and self.stop.is_set() else 0.3)

    def _check(self) -> None:
        if self._failure:
            raise self._failure

    def _run(self) -> None:
        try:
            self._deliver_all()
        except Exception as error:  # noqa: BLE001  a thread that dies in silence loses events: `send` says it
            if not self._closing.is_set():
                self._failure = error
        finally:
            self._transport.close()

    def _deliver_all(self) -> None:
        pause = FIRST_PAUSE_S
        while not self._closing.is_set():
            self._wake.clear()
            try:
                self._outbox.settle()
                waiting = self._outbox.head(self.name, BATCH)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                self._closing.wait(FIRST_PAUSE_S)
                continue
            if not waiting:
                self._wake.wait()
                continue
            moved = self._moves
            problem, asked = self._deliver(waiting)
            if self._moves != moved:
                pause = FIRST_PAUSE_S
            if not problem:
                continue
            self._down(problem)
            # A pause that the sink asks for holds for the flush at a scan's end too: it is asked for to be left alone.
            self._closing.wait(min(asked, LONGEST_ASKED_S))
            # Jitter keeps many devices from knocking at the same moment when a broker comes back.
            self._hurry.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311
            if self._hurry.is_set():
                self._closing.wait(0.1)
            pause = min(pause * 2, LONGEST_PAUSE_S)

    def _down(self, problem: str) -> None:
        """Each problem of an outage is said once; a sink that flaps is not spoken of all the time."""
        self._problem = problem = plain(problem)
        if problem not in self._told and time.monotonic() >= self._next_word and len(self._told) < 10:
            self._told.add(problem)
            self._next_word = time.monotonic() + QUIET_S
            say(f"{self.name} is down: {problem}; events wait in {self._outbox.path}", "warning")

    def _moved(self) -> None:
        """It answered for an event."""
        self._moves += 1
        self._problem = ""
        if self._told:
            self._told.clear()
            say(f"{self.name} is up again")

    def _refused(self, entry: Waiting, reason: str) -> None:
        reason = plain(reason)
        self._outbox.refuse(self.name, entry.position, reason)
        self._moved()
        if time.monotonic() >= self._next_refusal:
            self._next_refusal = time.monotonic() + QUIET_S
            count = self._outbox.count(self.name, refused=True)
            others = f", {count} in all" if count > 1 else ""
            say(f"{self.name} refuses event {entry.id}: {reason}; it is kept in {self._outbox.path}{others}", "warning")

    def _deliver(self, waiting: list[Waiting]) -> tuple[str, float]:
        """Deliver in order; returns why it stopped early ("" if it did not) and the pause that the sink asks for."""
        done: list[int] = []
        try:
            for entry in waiting:
                if self._closing.is_set():
                    break
                self._asked = time.monotonic()
                try:
                    self._transport.deliver(entry.id, entry.event)
                except Refused as error:
                    self._refused(entry, str(error))
                    continue
                done.append(entry.position)
                self._moved()
        except Undelivered as error:
            return str(error), error.after_s
        except OSError as error:  # a full disk has no room for what was refused
            if error.errno not in FULL:
                raise
            return str(error), 0.0
        finally:
            self._asked = None
            if done:
                self._outbox.delivered(self.name, done)
        return "", 0.0

"""Progress on long work: a bar on a terminal, one line elsewhere; always on stderr, so stdout stays the answer's."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import click

__all__ = ["Speaker", "bar", "first", "harmless", "say", "short", "spoken_by", "track"]

T = TypeVar("T")

QUIET = 30.0  # seconds
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def first() -> bool:
    """Whether this process is the one that speaks: all others that ``torchrun`` started beside it would only say it again."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def track(items: Iterable[T], label: str, length: int | None = None) -> Iterator[T]:
    """Yield ``items`` under a progress bar with the time left.

    Off a terminal (CI, a pipe) only the label is printed, once.
    """
    if not first():
        yield from items
        return
    with click.progressbar(items, length=length, label=label, file=sys.stderr, show_eta=True, show_pos=True) as shown:
        yield from shown


@contextlib.contextmanager
def bar(label: str, length: int) -> Iterator[Callable[[int, str], None]]:
    """A bar of ``length`` steps; call what it yields with (steps done since, a note to show behind the bar).

    With a note of 30 characters it fits into 80 columns. Off a terminal a line says the same now and then.
    """
    if not first():
        yield lambda steps, note: None
        return
    if not sys.stderr.isatty():
        yield _Lines(label, length).advance
        return
    with click.progressbar(
        length=length, label=label, file=sys.stderr, width=16, show_percent=False, show_pos=True, item_show_func=lambda n: n
    ) as shown:
        yield shown.update


class _Lines:
    """A bar for a log: the label, then a line every `QUIET` seconds."""

    def __init__(self, label: str, length: int) -> None:
        self.label, self.length, self.done = label, length, 0
        self.begun = self.said = time.monotonic()
        self.resumed: int | None = None  # steps that were done before
        say(label)

    def advance(self, steps: int, note: str) -> None:
        self.done += steps
        if self.resumed is None:
            self.resumed = self.done
        now = time.monotonic()
        if now - self.said < QUIET or self.done == self.resumed:
            return
        self.said = now
        left = (now - self.begun) / (self.done - self.resumed) * (self.length - self.done)
        say(f"{self.label} {self.done}/{self.length}, {datetime.timedelta(seconds=round(left))} left  {note}".rstrip())


class Speaker(Protocol):
    """Says one line in another form than plain text on stderr; called from any thread."""

    def __call__(self, message: str, level: str, **about: Any) -> None: ...


#: The last of those whose blocks run says it.
_speakers: list[Speaker] = []


def say(message: str, level: str = "info", **about: Any) -> None:
    """One line for the person who waits. ``level`` and the fields ``about`` it are for logs (`spoken_by`)."""
    if not first():
        return
    for speaker in _speakers[-1:]:  # another thread may take it away meanwhile
        speaker(message, level, **about)
        break
    else:
        # A log on a full disk, or one that nobody takes any more, does not end the work.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            click.echo(harmless(message), err=True)


def harmless(text: str) -> str:
    """Without what steers a terminal or turns the direction of writing: names in files and answers of servers are others'."""
    return _STEERING.sub("?", text)


@contextlib.contextmanager
def spoken_by(speaker: Speaker) -> Iterator[None]:
    """In the block ``speaker`` says what `say` is given, in all threads. Blocks of two threads may end in any order."""
    _speakers.append(speaker)
    try:
        yield
    finally:
        _speakers.remove(speaker)


def short(value: float, digits: int = 4) -> str:
    """A figure for people, of so many significant digits: 0.1587, 12,450; no powers of ten below 1e12."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if 10**digits <= abs(rounded) < 1e12 else f"{value:.{digits}g}"

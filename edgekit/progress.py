"""Progress on long work: a bar on a terminal, one line elsewhere; always on stderr, so stdout stays the answer's."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import click

__all__ = ["bar", "first", "say", "track"]

T = TypeVar("T")


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

    With a note of 30 characters it fits into 80 columns.
    """
    if not first():
        yield lambda steps, note: None
        return
    with click.progressbar(
        length=length, label=label, file=sys.stderr, width=16, show_percent=False, show_pos=True, item_show_func=lambda n: n
    ) as shown:
        yield shown.update


def say(message: str) -> None:
    """One line for the person who waits."""
    if first():
        click.echo(message, err=True)

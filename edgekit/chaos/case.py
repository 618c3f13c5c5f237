"""What a case is, and what it runs with."""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Bench", "Broken", "Case", "NotHere"]


class Broken(Exception):
    """What must hold does not: the case has failed."""


class NotHere(Exception):
    """The case cannot run on this machine: why, and what brings it. Never counted as passed."""


@dataclass(frozen=True)
class Case:
    """``done``: what is done to edgekit; ``holds``: what must hold. ``rounds``: how often by default, and how often at least
    (``--quick``). ``place``: module of this room and function."""

    name: str
    group: str
    done: str
    holds: str
    place: str
    quick: int
    rounds: int

    def load(self) -> Callable[[Bench], None]:
        module, function = self.place.split(":")
        found: Callable[[Bench], None] = getattr(importlib.import_module(f"edgekit.chaos.{module}"), function)
        return found


@dataclass
class Bench:
    """What a case's function gets: its own empty ``folder``, and the user's ``bundle`` and copied ``root``, if given.

    ``rounds``: 0 where only the time counts. A function fills ``figures`` and raises `Broken` or `NotHere`.
    """

    folder: Path
    rounds: int
    seconds: float
    quick: bool = False
    bundle: Path | None = None
    root: Path | None = None
    seed: int = 0
    tell: Callable[[int], None] = lambda done: None
    figures: dict[str, Any] = field(default_factory=dict)
    done: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)  # noqa: S311  chance, not secrets
        self._end = time.monotonic() + self.seconds

    def each(self) -> Iterator[int]:
        """Round by round, until all are done or the time is up; at least one."""
        while not self.done or ((not self.rounds or self.done < self.rounds) and time.monotonic() < self._end):
            yield self.done
            self.done += 1
            self.tell(self.done)

    def check(self, holds: object, otherwise: str) -> None:
        """Raises `Broken` with what was seen where it does not hold."""
        if not holds:
            raise Broken(otherwise)

    def count(self, name: str, number: int = 1) -> None:
        self.figures[name] = self.figures.get(name, 0) + number

    def longest(self, name: str, value: float) -> None:
        """Keeps the largest ``value``, rounded to milliseconds where it is seconds."""
        self.figures[name] = max(self.figures.get(name, 0.0), round(value, 3))

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
        """Poll until ``condition()`` is true. Raises `Broken` after ``seconds``."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                raise Broken(f"waited {seconds:g} s in vain: {what}")
            time.sleep(0.01)
        return value

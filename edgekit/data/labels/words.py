"""Words for invented labels: ``words.txt`` was written for edgekit, ``american.txt`` comes from a package (SOURCE.md)."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

__all__ = ["FILES", "invent", "words"]

#: ``# section``, then one entry a line.
FILES = tuple(Path(__file__).with_name(name) for name in ("words.txt", "american.txt"))


@lru_cache
def _sections() -> dict[str, tuple[str, ...]]:
    out: dict[str, list[str]] = {}
    entries: list[str] = []
    for line in (line for file in FILES for line in file.read_text("ascii").splitlines()):
        if line.startswith("# "):
            entries = out.setdefault(line[2:], [])
        else:
            entries.append(line)
    return {name: tuple(entries) for name, entries in out.items()}


def words(section: str) -> tuple[str, ...]:
    """The entries of a section of the word files, for example ``first names``."""
    return _sections()[section]


def invent(rng: random.Random) -> str:
    """A name that no list holds, so that a reader learns letters and not only words."""
    name = rng.choice(words("heads"))
    if name not in "AEIOU":
        name += rng.choice(words("middles"))
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        name += rng.choice(words("joints")) + rng.choice(words("middles"))
    return name + rng.choice(words("joints")) + rng.choice(words("tails"))

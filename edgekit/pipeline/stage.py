"""What a stage of a recipe is, where it runs, and what it answers."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgekit.bundle import Bundle
from edgekit.data import SOURCES, load
from edgekit.errors import OutputExists
from edgekit.files import printable, sha256_file

__all__ = ["Context", "Made", "Stage", "staging_name"]


class Made(NamedTuple):
    """What a stage wrote (paths in the output folder), the figures to remember, and whether it found its work done."""

    outputs: list[str]
    figures: dict[str, Any]
    cached: bool = False


@dataclass(frozen=True)
class Context:
    """Where a recipe runs, and what holds for all its stages."""

    folder: Path
    data: str | None
    seed: int
    on_event: Callable[[str], None] | None
    pictures: frozenset[str]  # folders that stages of the recipe make
    claim: Callable[[Iterable[str]], None]  # notes outputs before they appear

    def bundle(self, name: str) -> Bundle:
        """An earlier stage's bundle. What the model is gets checked here; a damaged engine or figure is its stage's to mend."""
        bundle = Bundle.open(self.path(name), verify=False)
        bundle.check_model()
        return bundle

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.edge"

    def resolve(self, name: str) -> Path:
        """A folder that a stage of the recipe makes, else a path of the user's."""
        return self.folder / name if name in self.pictures else Path(name)

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A hidden folder whose files move to the folder ``name`` when the block ends: a stage that is cut off leaves none.

        Raises `OutputExists` for a file of that name there, before anything moves.
        """
        work, target = self.folder / staging_name(name), self.folder / name
        work.mkdir()
        try:
            yield work
            files = sorted(work.iterdir())
            if there := next((path for file in files if os.path.lexists(path := target / file.name)), None):
                raise OutputExists(there)
            self.claim([f"{name}/{file.name}" for file in files])
            target.mkdir(exist_ok=True)
            for file in files:
                file.replace(target / file.name)
        finally:
            shutil.rmtree(work)

    def content(self, spec: str | None) -> str:
        """Digest of what ``spec`` names: a data set, a folder or a file."""
        if spec is None:
            return ""
        if spec.partition(":")[0] in SOURCES:  # a folder of that name may lie here
            return load(spec).digest
        path = self.resolve(spec)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            return " ".join(f"{printable(p.relative_to(path))}={sha256_file(p)}" for p in files)
        return sha256_file(path) if path.is_file() else ""  # its verb will say that it is not there


def staging_name(name: str) -> str:
    return f".{name}.making"


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=str.lower, tag_field="run", omit_defaults=True):
    """Fields left out are not passed on: the verb's own defaults hold. ``always`` stages look for themselves what is done."""

    always = False

    def label(self) -> str:
        """What the stage is called, on screen and in the state file."""
        raise TypeError(type(self).__name__)

    def bundles_read(self) -> tuple[str, ...]:
        return ()

    def claims(self) -> tuple[str, ...]:
        """The outputs whose names are known ahead, as paths in the output folder."""
        return ()

    def paths_read(self) -> tuple[str | None, ...]:
        """Files and folders beside the bundles: an earlier stage's, or the user's; None where the option is not stated."""
        return ()

    def intact(self, context: Context) -> bool:
        """Whether what it wrote into bundles, beside the outputs it lists, is still there."""
        return True

    def check(self, data: str | None) -> None:
        """Raise `UsageError` or `DataError` for a name that leads nowhere, before anything runs; ``data`` is the recipe's."""

    def contents_read(self, context: Context) -> dict[str, str]:
        """Digests of what decides the result beside the bundles and the options."""
        return {}

    def run(self, context: Context) -> Made:
        raise TypeError(type(self).__name__)

    def options(self, *without: str) -> dict[str, Any]:
        """The options that the recipe states, but for those the stage resolves itself."""
        stated = {name: getattr(self, name) for name in self.__struct_fields__ if name not in without}
        return {name: value for name, value in stated.items() if value is not None}

"""What is done in an output folder, on disk in ``pipeline.json``: it survives kill -9 at any moment.

A stage that runs again may be hours of training that then fails: what it made before is set aside as
``.NAME.edgekit-previous`` and comes back unless the stage succeeds, in this run or, where this run was killed, at the
start of the next. Only what the file lists is ever touched; what else lies in the folder is somebody's own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from edgekit.errors import BundleError
from edgekit.files import atomic_write

from .recipe import STATE

__all__ = ["Done", "State"]

_ASIDE = ".edgekit-previous"


class Done(msgspec.Struct, frozen=True):
    """A finished stage: its key, what it wrote, what it answered; ``missed`` names a budget that was not met.

    ``making``: the stage is running again, and these names were free when it began.
    """

    key: str = ""
    outputs: dict[str, str] = {}  # path in the output folder -> digest
    figures: dict[str, Any] = {}
    missed: str = ""
    making: tuple[str, ...] | None = None


class State:
    """Label of a stage -> `Done`, for one output folder."""

    def __init__(self, folder: Path) -> None:
        """Raises `BundleError` where the file is damaged, or names what lies outside: guessing could remove someone's files."""
        self._folder = folder
        self.done = _read(folder / STATE)
        self._settle()

    def owns(self, name: str) -> bool:
        """Whether the pipeline made the file or bundle ``name``."""
        return any(name in done.outputs for done in self.done.values())

    @contextlib.contextmanager
    def replacing(self, label: str, claims: tuple[str, ...], labels: set[str]) -> Iterator[None]:
        """Make room for a stage while the block runs it; `finish` in the block says that it succeeded.

        ``claims``: the outputs whose names are known ahead. ``labels``: the stages of the recipe; what a stage that it no
        longer has made under a claimed name is taken over.
        """
        before = self.done.get(label, Done())
        taken = [name for other, done in self.done.items() if other not in labels for name in claims if name in done.outputs]
        names = {*before.outputs, *taken}
        free = tuple(name for name in claims if name not in names and not os.path.lexists(self._folder / name))
        self.done[label] = msgspec.structs.replace(before, making=free)
        self._save()  # before anything moves: from here on `_settle` knows what to do
        try:
            for name in names:
                path = self._folder / name
                if os.path.lexists(path) and not any(parent.suffix == ".edge" for parent in path.parents):
                    path.rename(_aside(path))  # a file in a bundle is replaced by its verb
            yield
        finally:
            self._settle()

    def claim(self, names: Iterable[str]) -> None:
        """More outputs that the running stage is about to make; those that are there already are not its own."""
        for label, done in self.done.items():
            if done.making is not None:
                free = (name for name in names if name not in done.making and not os.path.lexists(self._folder / name))
                self.done[label] = msgspec.structs.replace(done, making=(*done.making, *free))
        self._save()

    def finish(self, label: str, done: Done) -> None:
        """Record a finished stage. A stage that made one of its outputs before, under another label, has to run again."""
        for other, earlier in list(self.done.items()):
            if other != label and (lost := earlier.outputs.keys() & done.outputs.keys()):
                kept = {name: digest for name, digest in earlier.outputs.items() if name not in lost}
                self.done[other] = msgspec.structs.replace(earlier, key="", outputs=kept)
        self.done[label] = done
        self._save()

    def _settle(self) -> None:
        """Where a stage was cut off: remove what it began and give the earlier results back; else drop those."""
        cut_off = {label: done for label, done in self.done.items() if done.making is not None}
        for name in (name for done in cut_off.values() for name in done.making or ()):
            _remove(self._folder / name)
        for aside in sorted(self._folder.rglob(f".*{_ASIDE}")):
            path = aside.with_name(aside.name[1 : -len(_ASIDE)])
            if cut_off:
                _remove(path)
                aside.rename(path)
            else:
                _remove(aside)
                if path.parent != self._folder:
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()  # only where it is empty now
        for label, done in cut_off.items():
            self.done[label] = msgspec.structs.replace(done, making=None)
        if cut_off:
            self._save()

    def _save(self) -> None:
        atomic_write(self._folder / STATE, msgspec.json.format(msgspec.json.encode(self.done)) + b"\n")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_ASIDE}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Done]:
    try:
        state = msgspec.json.decode(path.read_bytes(), type=dict[str, Done])
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}", "remove it, or choose another --out") from None
    root = path.parent.resolve()
    for name in (name for done in state.values() for name in (*done.outputs, *(done.making or ()))):
        where = Path(os.path.normpath(root / name))
        # What is listed here may be removed: nothing outside, nothing through a link, not the folder itself.
        if where == root or not where.is_relative_to(root) or not where.parent.resolve().is_relative_to(root):
            raise BundleError(f"{path} lists {name!r}, which is not inside its folder", "do not trust this folder")
    return state

"""What lies beside a study of `pareto`: the bundles on its front, the front as JSON and as a picture."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError, OutputExists, UsageError
from edgekit.files import atomic_write, locked
from edgekit.progress import say
from edgekit.reporting.front import FRONT_KIND, FRONT_SUFFIX
from edgekit.svg import checked_path

from .front_chart import MARK, front_chart

__all__ = ["Shelf"]

_BUNDLE = re.compile(r"trial-(\d+)\.edge")
_WORK = re.compile(r"\.trial-(\d+)")


class Shelf:
    """``STUDY.trials/``, ``STUDY.front.json`` and ``STUDY.svg``. Several processes write there, one at a time: `lock`."""

    def __init__(self, study: Path) -> None:
        self.study = study
        self.folder = study.with_name(f"{study.name}.trials")
        self.front = study.with_name(study.name + FRONT_SUFFIX)
        self.picture = study.with_name(f"{study.name}.svg")
        self.reference = self.folder / "reference.npz"

    def check(self) -> None:
        """Raise `UsageError` for files in the way that are not this study's, before any work."""
        if not self.study.exists() and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UsageError(f"{self.folder} is there, but not the study of its trials", "name another --study, or remove it")
        if self.front.is_dir() or (self.front.exists() and FRONT_KIND.encode() not in self.front.read_bytes()[:200]):
            raise OutputExists(self.front)
        checked_path(self.picture, MARK)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time: to measure, and to change what lies here."""
        with locked(self.folder, told=say):
            yield

    @contextlib.contextmanager
    def work(self, number: int) -> Iterator[Path]:
        """A folder for a trial's bundles, locked while it is used and then removed: an unlocked one is a dead trial's."""
        folder = self.folder / f".trial-{number}"
        with contextlib.ExitStack() as stack:
            with self.lock():
                folder.mkdir()
                stack.enter_context(locked(folder))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def bury(self) -> list[int]:
        """Remove what killed trials left; their numbers."""
        dead = []
        with self.lock():
            for path in self.folder.iterdir():
                if found := _WORK.fullmatch(path.name):
                    with contextlib.suppress(EdgekitError):  # somebody works there
                        with locked(path, wait=False):
                            shutil.rmtree(path)
                        dead.append(int(found[1]))
        return dead

    def bundle(self, number: int) -> Path:
        return self.folder / f"trial-{number}.edge"

    def update(self, found: Mapping[str, Any]) -> None:
        """Write the front and its picture; keep the bundles of trials on it, remove the others'. Under `lock`."""
        kept = {row["trial"] for row in found["trials"] if row["front"]}
        for path in self.folder.iterdir():
            if (named := _BUNDLE.fullmatch(path.name)) and int(named[1]) not in kept:
                shutil.rmtree(path)
        rows = [{**row, "bundle": self._relative(row)} for row in found["trials"]]
        atomic_write(self.front, json.dumps({"kind": FRONT_KIND, **found, "trials": rows}, indent=1).encode() + b"\n")
        atomic_write(self.picture, front_chart(found).encode())

    def _relative(self, row: Mapping[str, Any]) -> str | None:
        """The bundle of a row as seen from the JSON beside it, so that the folder may move."""
        path = self.bundle(row["trial"])
        return f"{self.folder.name}/{path.name}" if row["front"] and path.is_dir() else None

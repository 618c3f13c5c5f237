"""Data sets by spec: ``digits``, ``folder:PATH``, ``spam``, ``labels`` ... numpy only; samples are decoded when needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Literal, NamedTuple

from edgekit.errors import DataError, UsageError

from .dataset import MAX_DAMAGED_SHARE, Dataset, Split, check_damaged
from .tensors import Tensors

__all__ = [
    "MAX_DAMAGED_SHARE",
    "SOURCES",
    "Dataset",
    "Source",
    "Split",
    "Tensors",
    "check_damaged",
    "find",
    "known_specs",
    "load",
]


class Source(NamedTuple):
    """``module`` has ``load(path) -> Dataset``; ``path``: whether a spec must name one, may, must not, or is about another
    data set: ``spec``."""

    module: str
    path: Literal["required", "optional", "none", "spec"] = "none"


SOURCES: dict[str, Source] = {
    "digits": Source("edgekit.data.digits"),
    "spam": Source("edgekit.data.spam"),
    "labels": Source("edgekit.data.labels", "optional"),
    "watch": Source("edgekit.data.watch", "optional"),
    "folder": Source("edgekit.data.folder", "required"),
    "csv": Source("edgekit.data.csv_file", "required"),
    "npz": Source("edgekit.data.npz", "required"),
    "validation": Source("edgekit.data.validation", "spec"),
}
#: What follows the colon where something must.
_BEHIND = {"required": ":PATH", "spec": ":SHARE:SPEC"}


def known_specs() -> str:
    """Every kind of spec, as a person writes it."""
    return ", ".join(name + _BEHIND.get(source.path, "") for name, source in SOURCES.items())


def find(spec: str) -> tuple[str, str]:
    """(module, path) of the data set that ``spec`` names, nothing loaded.

    Raises `UsageError` for an unknown spec, `DataError` for a path that is not there.
    """
    name, colon, path = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if name not in SOURCES:
        raise UsageError(f"there is no data set {spec!r}", f"choose one of: {known_specs()}")
    source = SOURCES[name]
    if (source.path in _BEHIND and not path) or (colon and (source.path == "none" or not path)):
        cure = f"write {name}{_BEHIND[source.path]}" if source.path in _BEHIND else f"write {name}, without a path"
        raise UsageError(f"{spec!r} is not a data set", cure)
    if source.path == "spec":
        share, _, other = path.partition(":")
        if not 0 < _share(share) < 1 or other.partition(":")[0] == name:
            raise UsageError(f"{spec!r} is not a data set", "write validation:SHARE:SPEC, for example validation:0.15:digits")
        find(other)
    if source.path == "required" and not Path(path).exists():
        wanted = "folder:PATH wants one folder a class: PATH/CLASS/*.jpg" if name == "folder" else "mind the path"
        raise DataError(f"there is no {'folder' if name == 'folder' else 'file'} {path}", wanted)
    return source.module, path


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def load(spec: str) -> Dataset:
    """The data set that ``spec`` names. Raises `UsageError` for an unknown spec, `DataError` for missing or empty data."""
    module, path = find(spec)
    dataset: Dataset = importlib.import_module(module).load(path)
    if not len(dataset.test) or not len(dataset.all):
        raise DataError(
            f"{spec} has no samples to test on", "add samples: several different ones a class; equal ones stay together"
        )
    return dataset

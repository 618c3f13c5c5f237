"""Data sets by spec: ``digits``, ``folder:PATH``, ``npz:PATH``. numpy only; frames are decoded when they are needed."""

from __future__ import annotations

import importlib
from pathlib import Path

from edgekit.errors import DataError, UsageError

from .dataset import MAX_DAMAGED_SHARE, Dataset, Split, Tensors, check_damaged

__all__ = ["MAX_DAMAGED_SHARE", "SOURCES", "Dataset", "Split", "Tensors", "check_damaged", "find", "load"]

#: name -> (module with ``load(path) -> Dataset``, takes a path)
SOURCES: dict[str, tuple[str, bool]] = {
    "digits": ("edgekit.data.digits", False),
    "folder": ("edgekit.data.folder", True),
    "npz": ("edgekit.data.npz", True),
}


def find(spec: str) -> tuple[str, str]:
    """(module, path) of the data set that ``spec`` names, nothing loaded.

    Raises `UsageError` for an unknown spec, `DataError` for a path that is not there.
    """
    name, colon, path = spec.partition(":")
    if name not in SOURCES:
        known = ", ".join(f"{key}:PATH" if takes_path else key for key, (_, takes_path) in SOURCES.items())
        raise UsageError(f"there is no data set {spec!r}", f"choose one of: {known}")
    module, takes_path = SOURCES[name]
    if takes_path != bool(colon and path):
        raise UsageError(f"{spec!r} is not a data set", f"write {name}:PATH" if takes_path else f"write {name}, without a path")
    if takes_path and not Path(path).exists():
        wanted = "folder:PATH wants one folder a class: PATH/CLASS/*.jpg" if name == "folder" else "mind the path"
        raise DataError(f"there is no {'folder' if name == 'folder' else 'file'} {path}", wanted)
    return module, path


def load(spec: str) -> Dataset:
    """The data set that ``spec`` names. Raises `UsageError` for an unknown spec, `DataError` for missing or empty data."""
    module, path = find(spec)
    dataset: Dataset = importlib.import_module(module).load(path)
    if not len(dataset.test) or not len(dataset.all):
        raise DataError(f"{spec} has no images to test on", "add images: one folder a class, several images each")
    return dataset

"""Data sets by spec: ``digits``, ``folder:PATH``, ``npz:PATH``. numpy only; frames are decoded when they are needed."""

from __future__ import annotations

import importlib

from edgekit.errors import DataError, UsageError

from .dataset import MAX_DAMAGED_SHARE, Dataset, Split, Tensors, check_damaged

__all__ = ["MAX_DAMAGED_SHARE", "SOURCES", "Dataset", "Split", "Tensors", "check_damaged", "load"]

#: name -> (module with ``load(path) -> Dataset``, takes a path)
SOURCES: dict[str, tuple[str, bool]] = {
    "digits": ("edgekit.data.digits", False),
    "folder": ("edgekit.data.folder", True),
    "npz": ("edgekit.data.npz", True),
}


def load(spec: str) -> Dataset:
    """The data set that ``spec`` names. Raises `UsageError` for an unknown spec, `DataError` for missing or empty data."""
    name, colon, path = spec.partition(":")
    if name not in SOURCES:
        known = ", ".join(f"{key}:PATH" if takes_path else key for key, (_, takes_path) in SOURCES.items())
        raise UsageError(f"there is no data set {spec!r}", f"choose one of: {known}")
    module, takes_path = SOURCES[name]
    if takes_path != bool(colon and path):
        raise UsageError(f"{spec!r} is not a data set", f"write {name}:PATH" if takes_path else f"write {name}, without a path")
    dataset: Dataset = importlib.import_module(module).load(path)
    if not len(dataset.test) or not len(dataset.all):
        raise DataError(f"{spec} has no images to test on", "add images: one folder a class, several images each")
    return dataset

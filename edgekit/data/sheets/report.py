"""`data_report`: a data set on one picture, and as figures. Pillow is loaded when the picture is drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.data import find, load
from edgekit.files import atomic_write

from . import new_picture
from .inspection import SIDES, Inspection, inspect

__all__ = ["data_report", "figures_of"]


def data_report(spec: str, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Read every sample of the data set ``spec`` once and draw what it holds to ``out`` (PNG).

    Returns ``data``, ``task``, ``train``, ``held_out``, ``left_out`` (kept from training by the data set, because it is
    held out too), ``classes`` (label, train, held_out; of a text reader the characters), ``imbalance`` (largest over
    smallest class in training), ``unit`` and ``sizes`` (min, median, max; [width, height] of pictures), ``duplicates``
    (groups: ``samples`` with id, label and split; ``across``, whether it is on both sides of the split),
    ``conflicting`` (those with different labels), ``near`` (pairs of pictures that look alike; None where there are
    too many to compare, or no pictures to classify), ``damaged`` (id, split, reason), ``out``.

    Raises `OutputExists`, `UsageError` for an unknown spec, `DataError` for missing or empty data, `MissingExtra`.
    """
    path = new_picture(out)
    find(spec)
    from .panels import picture_of  # before a long scan, not after it: Pillow may be missing

    found = inspect(load(spec))
    atomic_write(path, picture_of(found))
    return {**figures_of(found), "out": str(path)}


def figures_of(found: Inspection) -> dict[str, Any]:
    """What `data_report` returns, without ``out``."""
    sides = np.bincount(found.sides, minlength=3)
    return {
        "data": found.dataset.spec,
        "task": found.dataset.task,
        "train": int(sides[0]),
        "held_out": int(sides[1]),
        "left_out": int(sides[2]),
        "classes": [{"label": label, "train": a, "held_out": b} for label, a, b in found.counts()],
        "imbalance": found.imbalance(),
        "unit": found.unit,
        "sizes": _sizes(found),
        "duplicates": [_group(found, group) for group in found.duplicates],
        "conflicting": [_group(found, group) for group in found.duplicates if found.contradicts(group)],
        "near": None if found.near is None else [_group(found, pair) for pair in found.near],
        "damaged": [
            {"id": found.samples.ids[i], "split": SIDES[found.sides[i]], "reason": why} for i, why in found.damaged.items()
        ],
    }


def _sizes(found: Inspection) -> dict[str, Any]:
    """Empty where every sample is damaged."""
    known = found.sizes[found.sizes[:, 1] > 0]
    if not len(known):
        return {}
    values = {"min": known.min(0), "median": np.median(known, 0).astype(int), "max": known.max(0)}
    if found.unit == "pixels":
        return {name: value.tolist() for name, value in values.items()}
    return {name: int(value[0]) for name, value in values.items()}


def _group(found: Inspection, group: Sequence[int]) -> dict[str, Any]:
    samples = [{"id": found.samples.ids[i], "label": found.label(i), "split": SIDES[found.sides[i]]} for i in group]
    return {"samples": samples, "across": found.crosses(group)}

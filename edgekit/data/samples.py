"""Held-out pictures as files, to scan and to explain."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from edgekit.errors import DataError, MissingExtra, OutputExists
from edgekit.manifest import ImagePreprocessing
from edgekit.progress import say

from .dataset import Dataset

__all__ = ["write_samples"]


def write_samples(dataset: Dataset, folder: str | os.PathLike[str], count: int) -> list[Path]:
    """Write ``count`` pictures of the test split, evenly spread over the classes, as ``NNN-LABEL.png``; returns the paths.

    Of a text reader's lines the name is the number. Damaged images are named and left out. Raises `DataError` for data
    that is no pictures, `OutputExists` where a file of such a name is there already.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("scan", "PIL") from None
    if not isinstance(dataset.preprocessing, ImagePreprocessing):
        raise DataError(f"{dataset.spec} holds no pictures", "samples are for data of pictures")
    reads = dataset.task == "text-recognition"
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    order = np.arange(len(dataset.test)) if reads else np.argsort(dataset.test.targets, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)]
    paths = []
    for number, index in enumerate(chosen):
        label = "" if reads else "-" + dataset.labels[int(dataset.test.targets[index])].replace("/", "_")
        path = target / f"{number:03d}{label}.png"
        try:
            frame = dataset.test.read(int(index))
        except DataError as error:
            say(f"skipped {dataset.test.ids[int(index)]}: {error.message}")
            continue
        if os.path.lexists(path):
            raise OutputExists(path)
        Image.fromarray(frame).save(path)
        paths.append(path)
    return paths

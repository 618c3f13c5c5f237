"""The built-in ``digits``: 5,000 real handwritten digits, 4,000 to train on and 1,000 held out. See SOURCE.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekit.data.dataset import Dataset, Split, digest_of, stratified
from edgekit.manifest import ImagePreprocessing

__all__ = ["load"]

FILE = Path(__file__).with_name("digits.npz")
TEST_SHARE = 0.2


def load(path: str = "") -> Dataset:
    """``path`` is unused: the data lies in the package."""
    with np.load(FILE, allow_pickle=False) as file:
        images, targets = file["images"], file["labels"].astype(np.int64)
    ids = tuple(f"digits/{i:04d}" for i in range(len(images)))
    every = Split(ids, targets, lambda i: images[i])
    train, test = stratified(targets, range(len(images)), TEST_SHARE)
    return Dataset(
        spec="digits",
        labels=tuple("0123456789"),
        digest=digest_of([images.tobytes(), targets.tobytes()]),
        train=every.take(train),
        test=every.take(test),
        all=every,
        preprocessing=ImagePreprocessing(28, 28, 1, mean=(0.1307,), std=(0.3081,), fit="letterbox"),
        augmentation="digits",
    )

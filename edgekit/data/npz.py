"""``npz:PATH``: arrays ``images`` (or ``x``) uint8 (N, H, W[, 3]) and ``labels`` (or ``y``) (N,); optional ``classes``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from edgekit.bundle import ImagePreprocessing
from edgekit.errors import DataError

from .dataset import Dataset, Split, digest_of, stratified

__all__ = ["load"]

TEST_SHARE = 0.2


def load(path: str) -> Dataset:
    """Raises `DataError` where the file is missing or its arrays do not fit each other."""
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as npz: {error}", "write it with numpy.savez(path, images=..., labels=...)"
        ) from None
    images, targets = arrays.get("images", arrays.get("x")), arrays.get("labels", arrays.get("y"))
    if (
        images is None
        or targets is None
        or images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or targets.shape != images.shape[:1]
    ):
        held = ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in arrays.items())
        raise DataError(f"{path} holds {held or 'nothing'}", "wanted: images uint8 (N, H, W[, 3]) and labels (N,)")
    values, indices = np.unique(targets, return_inverse=True)
    labels = tuple(str(c) for c in arrays.get("classes", values))
    if len(labels) != len(values) and "classes" in arrays:
        indices = targets.astype(np.int64)
    every = Split(tuple(f"{Path(path).name}/{i}" for i in range(len(images))), indices.astype(np.int64), lambda i: images[i])
    train, test = stratified(every.targets, [image.tobytes() for image in images], TEST_SHARE)
    channels: Literal[1, 3] = 1 if images.ndim == 3 or images.shape[3] == 1 else 3
    return Dataset(
        spec=f"npz:{path}",
        labels=labels,
        digest=digest_of([*labels, images.tobytes(), every.targets.tobytes()]),
        train=every.take(train),
        test=every.take(test),
        all=every,
        preprocessing=ImagePreprocessing(
            images.shape[2],
            images.shape[1],
            channels,
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
        ),
        augmentation="digits" if channels == 1 else "photos",
    )

"""``npz:PATH``: arrays ``images`` (or ``x``) uint8 (N, H, W[, 1 or 3]) and ``labels`` (or ``y``) (N,); optional ``classes``.

``labels`` are class indices from 0 where ``classes`` names them; without ``classes`` their distinct values are the names.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.files import npz_arrays, npz_problem
from edgekit.manifest import ImagePreprocessing

from .dataset import Dataset, Split, digest_of, stratified

__all__ = ["load"]

TEST_SHARE = 0.2
_HINT = "write it with numpy.savez(path, images=..., labels=...)"


def load(path: str) -> Dataset:
    """Raises `DataError` where the file is missing or its arrays do not fit each other."""
    arrays = _read(path)
    images, targets = arrays.get("images", arrays.get("x")), arrays.get("labels", arrays.get("y"))
    if images is None or targets is None or not _fit(images, targets):
        held = ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in arrays.items())
        raise DataError(
            f"{path} holds {held or 'nothing'}",
            "wanted: images uint8 (N, H, W[, 1 or 3]) and labels (N,), and classes, their names, where there are any",
        )
    labels, indices = _classes(path, targets, arrays.get("classes"))
    digests = tuple(hashlib.sha256(image.tobytes()).digest() for image in images)
    every = Split(tuple(f"{Path(path).name}/{i}" for i in range(len(images))), indices, lambda i: images[i], digests)
    train, test = stratified(every.targets, digests, TEST_SHARE)
    channels: Literal[1, 3] = 1 if images.ndim == 3 or images.shape[3] == 1 else 3
    return Dataset(
        spec=f"npz:{path}",
        labels=labels,
        digest=digest_of([*labels, str(images.shape), images.tobytes(), every.targets.tobytes()]),
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


def _read(path: str) -> dict[str, NDArray[Any]]:
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for, a device be read for ever
            raise DataError(f"{path} is no file but a folder, a pipe, a socket or a device", _HINT)
        with Path(path).open("rb") as stream:  # numpy would leave a file that is no zip open
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise DataError(f"{path} holds one array without a name (npy)", _HINT)
            with file:
                return npz_arrays(file)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  zipfile, zlib and numpy's header reader raise anything on hostile bytes
        raise DataError(f"{path} cannot be read: {npz_problem(Path(path), error)}", _HINT) from None


def _fit(images: NDArray[Any], targets: NDArray[Any]) -> bool:
    return (
        images.dtype == np.uint8
        and (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3)))
        and all(0 < side <= 8192 for side in images.shape[1:3])
        and targets.shape == images.shape[:1]
        and targets.dtype.kind in "iubUS"
    )


def _classes(path: str, targets: NDArray[Any], names: NDArray[Any] | None) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and the index (N,) of each sample. Raises `DataError` where ``classes`` do not cover the labels."""
    values, indices = np.unique(_text(targets), return_inverse=True)
    if len(values) < 2:
        raise DataError(f"{path} has {len(values)} classes", "two or more are needed to tell them apart")
    if names is None:
        return tuple(str(value) for value in values), indices.astype(np.int64)
    labels = tuple(str(name) for name in _text(names).ravel())
    if targets.dtype.kind in "iu" and len(values) and int(values[0]) >= 0 and int(values[-1]) < len(labels):
        return labels, targets.astype(np.int64)
    if set(map(str, values)) <= set(labels):
        return labels, np.array([labels.index(str(value)) for value in values], np.int64)[indices]
    raise DataError(
        f"{path} names {len(labels)} classes, but its labels run from {values[0]} to {values[-1]}",
        f"labels are indices 0..{len(labels) - 1} into classes, or their names",
    )


def _text(names: NDArray[Any]) -> NDArray[Any]:
    """Byte strings (numpy's S, from C or HDF5) as text; all else as it is."""
    return np.char.decode(names, "utf-8", "backslashreplace") if names.dtype.kind == "S" else names

"""What a data set is: named classes, a train and a test split, frames decoded on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.manifest import ImagePreprocessing
from edgekit.preprocess import Frame, Preprocessor
from edgekit.progress import say

__all__ = ["MAX_DAMAGED_SHARE", "Dataset", "Split", "Tensors", "check_damaged", "digest_of", "stratified"]

#: Above this share of undecodable images a data set is refused: it is not a few bad files but a wrong folder.
MAX_DAMAGED_SHARE = 0.05


class Tensors(NamedTuple):
    """A split in memory: ``x`` float32 (N, C, H, W), ``y`` int64 (N,), ``ids`` of the N, ``damaged`` ids left out."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    ids: tuple[str, ...]
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Samples with ids and class indices; ``read(i)`` decodes frame i to uint8 (H, W) or (H, W, 3)."""

    ids: tuple[str, ...]
    targets: NDArray[np.int64]  # (N,)
    read: Callable[[int], Frame] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Iterable[int]) -> Split:
        """The samples at ``indices``, in that order."""
        chosen = [int(i) for i in indices]
        read = self.read
        return Split(tuple(self.ids[i] for i in chosen), self.targets[chosen], lambda i: read(chosen[i]))

    def tensors(self, preprocessing: ImagePreprocessing) -> Tensors:
        """Decode and preprocess all of it, with the function that the device uses.

        Damaged images are named, left out and counted; `check_damaged` says whether they are too many.
        """
        preprocess = Preprocessor(preprocessing)
        x = np.empty((len(self), preprocessing.channels, preprocessing.height, preprocessing.width), np.float32)
        kept: list[int] = []
        damaged: list[str] = []
        for i in range(len(self)):
            try:
                x[len(kept)] = preprocess(self.read(i))[0]
            except DataError as error:
                damaged.append(self.ids[i])
                say(f"skipped {self.ids[i]}: {error.message}")
            else:
                kept.append(i)
        return Tensors(x[: len(kept)], self.targets[kept], tuple(self.ids[i] for i in kept), tuple(damaged))


def check_damaged(*parts: Tensors) -> None:
    """Raise `DataError` where more than `MAX_DAMAGED_SHARE` of all the images in ``parts`` could not be read, or all."""
    damaged = [name for part in parts for name in part.damaged]
    total = len(damaged) + sum(len(part.y) for part in parts)
    if len(damaged) > MAX_DAMAGED_SHARE * total:
        raise DataError(
            f"{len(damaged)} of {total} images cannot be read, over {MAX_DAMAGED_SHARE:.0%}; the first is {damaged[0]}",
            "repair or remove them",
        )


@dataclass(frozen=True)
class Dataset:
    """``test`` is held out from training for good. ``all`` judges models trained on other data: every sample, or the
    test folder where the data comes with one."""

    spec: str
    labels: tuple[str, ...]
    digest: str  # sha256 over ids, classes and contents
    train: Split
    test: Split
    all: Split
    preprocessing: ImagePreprocessing
    augmentation: str = "none"  # the policy that suits this kind of image


def digest_of(parts: Iterable[bytes | str]) -> str:
    """sha256 over length-prefixed parts, so that no two lists collide by concatenation."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part  # file names need not be UTF-8
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def stratified(targets: NDArray[np.int64], groups: Sequence[object], test_share: float) -> tuple[list[int], list[int]]:
    """Indices of (train, test): ``test_share`` of each class, the same on every machine.

    Samples of one group (equal content) stay on one side, also where the group spans classes: the first class decides.
    A class with one group goes to train.
    """
    train: list[int] = []
    test: list[int] = []
    held_out: dict[object, bool] = {}
    for label in np.unique(targets):
        members: dict[object, list[int]] = {}
        for i in np.flatnonzero(targets == label):
            members.setdefault(groups[int(i)], []).append(int(i))
        order = list(members)
        np.random.default_rng(int(label)).shuffle(order)
        wanted = round(test_share * sum(map(len, members.values()))) if len(order) > 1 else 0
        for key in order:
            group = members[key]
            out = held_out.setdefault(key, len(group) <= wanted)
            (test if out else train).extend(group)
            wanted -= len(group) if out else 0
    return sorted(train), sorted(test)

"""What a data set is: a task, named classes, a train and a test split, samples decoded on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.manifest import Preprocessing, SeriesPreprocessing, Task
from edgekit.preprocess import Preprocess, make_preprocessor

from .tensors import KEEP_BYTES, Tensors, read_tensors

__all__ = [
    "MAX_DAMAGED_SHARE",
    "Dataset",
    "Split",
    "check_damaged",
    "digest_of",
    "encode_lines",
    "normalised",
    "one_group_out",
    "stratified",
]

#: Above this share of undecodable samples a data set is refused: it is not a few bad files but a wrong folder.
MAX_DAMAGED_SHARE = 0.05


@dataclass(frozen=True)
class Split:
    """Samples with ids and what they are.

    ``targets``: int64 (N,) class indices, or for text readers (N, L) indices into the alphabet, -1 behind the line's end.
    ``read(i)`` gives sample i: a uint8 frame (H, W) or (H, W, 3), a str, or a float32 series (T, C); threads may share it.
    ``groups``: samples with equal entries (one content, one person) never straddle a split; empty: each stands alone.
    ``contents``, where groups are something else: of equal entries on both sides of `part`, those in the rest are dropped.
    """

    ids: tuple[str, ...]
    targets: NDArray[np.int64]
    read: Callable[[int], Any] = field(repr=False)
    groups: tuple[object, ...] = field(default=(), repr=False)
    contents: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Iterable[int]) -> Split:
        """The samples at ``indices``, in that order."""
        chosen = [int(i) for i in indices]
        read = self.read
        groups = tuple(self.groups[i] for i in chosen) if self.groups else ()
        contents = tuple(self.contents[i] for i in chosen) if self.contents else ()
        return Split(tuple(self.ids[i] for i in chosen), self.targets[chosen], lambda i: read(chosen[i]), groups, contents)

    def tensors(self, preprocessing: Preprocessing | Preprocess, keep_bytes: int = KEEP_BYTES) -> Tensors:
        """Decode and preprocess all of it, with the function that the device uses; `Tensors` says what stays in memory.

        Damaged samples are named, left out and counted; `check_damaged` says whether they are too many.
        """
        preprocess = preprocessing if callable(preprocessing) else make_preprocessor(preprocessing)
        return read_tensors(self.ids, self.targets, self.read, preprocess, keep_bytes)

    def part(self, share: float, seed: int = 0) -> tuple[Split, Split]:
        """(rest, part): ``share`` of each class set aside, whole groups only. Readers' lines are drawn without classes."""
        classes = self.targets if self.targets.ndim == 1 else np.zeros(len(self), np.int64)
        groups = self.groups or range(len(self))
        rest, part = stratified(classes, groups, share, seed)
        if not part and len(set(groups)) < len(self):  # a few people, each of them more than the share
            rest, part = one_group_out(groups, classes)
        if self.contents:
            aside = {self.contents[i] for i in part}
            rest = [i for i in rest if self.contents[i] not in aside]
        return self.take(rest), self.take(part)


def check_damaged(*parts: Tensors) -> None:
    """Raise `DataError` where more than `MAX_DAMAGED_SHARE` of all the samples in ``parts`` could not be read, or all."""
    damaged = [name for part in parts for name in part.damaged]
    total = len(damaged) + sum(len(part.y) for part in parts)
    if len(damaged) > MAX_DAMAGED_SHARE * total:
        raise DataError(
            f"{len(damaged)} of {total} samples cannot be read, over {MAX_DAMAGED_SHARE:.0%}; the first is {damaged[0]}",
            "repair or remove them",
        )


@dataclass(frozen=True)
class Dataset:
    """``test`` is held out from training for good. ``all`` judges models trained on other data: every sample, or the
    test folder where the data comes with one.

    ``labels``: the classes; for ``text-recognition`` the alphabet, the first entry CTC's blank, "".
    """

    spec: str
    labels: tuple[str, ...]
    digest: str  # sha256 over ids, classes and contents
    train: Split
    test: Split
    all: Split
    preprocessing: Preprocessing
    augmentation: str = "none"  # the policy that suits this kind of data
    task: Task = "image-classification"

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise DataError(f"{self.spec} has two classes called {twice!r}", "give each class a name of its own")


def digest_of(parts: Iterable[bytes | str]) -> str:
    """sha256 over length-prefixed parts, so that no two lists collide by concatenation."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part  # file names need not be UTF-8
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def encode_lines(lines: Sequence[str], labels: Sequence[str]) -> NDArray[np.int64]:
    """Lines of text -> int64 (N, longest) indices into the alphabet ``labels``, -1 behind each line's end.

    Raises `DataError` for a character that the alphabet lacks.
    """
    index = {character: i for i, character in enumerate(labels)}
    if strange := sorted({c for line in lines for c in line} - index.keys()):
        raise DataError(f"the character {strange[0]!r} is not in the alphabet", "add it to the alphabet, or leave it out")
    out = np.full((len(lines), max(map(len, lines), default=0)), -1, np.int64)
    for row, line in zip(out, lines, strict=True):
        row[: len(line)] = [index[c] for c in line]
    return out


def normalised(series: Sequence[NDArray[np.float32]], length: int) -> SeriesPreprocessing:
    """By mean and standard deviation of each channel over the steps of training ``series``, each (T, channels); 1 for a
    channel that stands still. ``length``: steps that a model sees."""
    steps = np.concatenate(series, dtype=np.float64)
    return SeriesPreprocessing(
        length,
        steps.shape[1],
        mean=tuple(float(np.float32(value)) for value in steps.mean(0)),
        std=tuple(float(np.float32(value)) if value > 1e-30 else 1.0 for value in steps.std(0)),
    )


def stratified(
    targets: NDArray[np.int64], groups: Sequence[object], test_share: float, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Indices of (train, test): ``test_share`` of each class, the same on every machine.

    Samples of one group (equal content) stay on one side, also where the group spans classes: the first class decides.
    Every class keeps one group in train at least. Classes too small for a sample of their own share one now and then.
    Groups named by text or bytes, as contents are, are drawn by a hash of it: where samples come or go later, few of the
    others change sides.
    """
    held_out: dict[object, bool] = {}
    owed = 0.0  # to the classes that were too small
    smallest: list[tuple[object, set[object]]] = []  # group of each class, and all groups of the class
    for label in np.unique(targets):
        members: dict[object, list[int]] = {}
        for i in np.flatnonzero(targets == label):
            members.setdefault(groups[int(i)], []).append(int(i))
        order = list(members)
        if all(isinstance(key, str | bytes) for key in order):
            order.sort(key=lambda key: digest_of([str(seed), key]))  # type: ignore[list-item]
        else:
            np.random.default_rng([seed, int(label)] if seed else int(label)).shuffle(order)
        least = min(order, key=lambda key: len(members[key]))
        smallest.append((least, set(order)))
        count = sum(map(len, members.values()))
        wanted = round(test_share * count)
        if not wanted:
            owed += test_share * count
            wanted = round(owed)
            owed -= wanted
        wanted = min(wanted, count - len(members[least]))
        for key in order:
            out = held_out.setdefault(key, len(members[key]) <= wanted)
            wanted -= len(members[key]) if out else 0
    for least, keys in smallest:  # where other classes have decided for all groups of this one
        if all(held_out[key] for key in keys):
            held_out[least] = False
    train = [i for i in range(len(targets)) if not held_out[groups[i]]]
    return train, [i for i in range(len(targets)) if held_out[groups[i]]]


def one_group_out(groups: Sequence[object], targets: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Indices of (train, test) for a few large groups, each above the share that is wanted: the smallest one that leaves
    every class in train is held out, the first of equals; none where each class has but one group."""
    holders: dict[int, set[object]] = {}
    classes: dict[object, list[int]] = {}
    for group, target in zip(groups, targets.tolist(), strict=True):
        holders.setdefault(target, set()).add(group)
        classes.setdefault(group, []).append(target)
    spare = [group for group in classes if all(len(holders[target]) > 1 for target in classes[group])]
    chosen = min(spare, key=lambda group: len(classes[group]), default=None)
    held_out = [i for i, group in enumerate(groups) if group == chosen and spare]
    return [i for i, group in enumerate(groups) if group != chosen or not spare], held_out

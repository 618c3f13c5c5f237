"""What a data set holds: samples a class, sizes, equal contents, contradicting labels, damage. numpy only.

Each sample is read once and forgotten: some 20 bytes of it stay, so that millions of samples fit into memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.data import csv_file, folder
from edgekit.data.dataset import Dataset, Split
from edgekit.errors import DataError, InputError
from edgekit.manifest import ImagePreprocessing, Preprocessing, SeriesPreprocessing
from edgekit.preprocess import Preprocessor, SeriesPreprocessor, canonical_frame
from edgekit.progress import track

__all__ = ["SIDES", "Inspection", "inspect", "near_pairs"]

#: Where a sample is. ``left out``: the data set keeps it from training, because what it shows is held out too.
SIDES = ("train", "held out", "left out")
_CHUNK = 32
#: Near duplicates are found by comparing all with all: 20,000 pictures take a second or two.
NEAR_LIMIT = 20_000
#: Of the 64 bits of the difference hash so many may differ; then the small pictures themselves decide.
NEAR_BITS = 6
#: Mean difference of their pixels at mean 0 and deviation 1. Another encoding, size or exposure stays below 0.05 on photos;
#: two digits of one class seldom do.
NEAR_DIFFERENCE = 0.05
_SMALL = (16, 18)  # twice the 8 x 9 of the hash


@dataclass(frozen=True)
class Inspection:
    """``samples``: the N of both splits and what is left out; ``sides`` int8 (N,) into `SIDES`.

    ``sizes`` int32 (N, 2): width and height of pictures in pixels, or a length and 1; 0 where a sample is ``damaged``
    (index to reason). ``duplicates``: groups of samples with equal contents. ``near``: pairs of pictures that look
    alike though their bytes differ, None where none were looked for.
    """

    dataset: Dataset
    samples: Split
    sides: NDArray[np.int8]
    sizes: NDArray[np.int32]
    damaged: dict[int, str]
    duplicates: list[list[int]]
    near: list[tuple[int, int]] | None

    @property
    def reads_text(self) -> bool:
        """Whether the targets are lines of characters instead of classes."""
        return self.samples.targets.ndim == 2

    @property
    def unit(self) -> str:
        """What ``sizes`` counts."""
        if isinstance(self.dataset.preprocessing, ImagePreprocessing):
            return "pixels"
        return "steps" if isinstance(self.dataset.preprocessing, SeriesPreprocessing) else "characters"

    def label(self, i: int) -> str:
        """The class of sample ``i``, or what is written on it."""
        labels = self.dataset.labels
        return "".join(labels[int(target)] for target in np.atleast_1d(self.samples.targets[i]) if target >= 0)

    def counts(self) -> list[tuple[str, int, int]]:
        """(class, train, held out) in the order of the labels; of a text reader each character and how often it is written."""
        found = []
        for side in (0, 1):
            targets = self.samples.targets[self.sides == side]
            found.append(np.bincount(targets[targets >= 0], minlength=len(self.dataset.labels)))
        rows = [(label, int(a), int(b)) for label, a, b in zip(self.dataset.labels, *found, strict=True)]
        return rows[1:] if self.reads_text else rows  # the first of an alphabet is CTC's blank

    def imbalance(self) -> float | None:
        """Training samples of the largest class over those of the smallest that has any."""
        present = [train for _, train, _ in self.counts() if train]
        return max(present) / min(present) if present else None

    def contradicts(self, group: Sequence[int]) -> bool:
        """Whether the labels in ``group`` differ."""
        return len({self.label(i) for i in group}) > 1

    def crosses(self, group: Sequence[int]) -> bool:
        """Whether ``group`` is on both sides of the split, before the data set left anything out."""
        return len({bool(self.sides[i] == 1) for i in group}) > 1


def inspect(dataset: Dataset) -> Inspection:
    """Read every sample once. Damaged ones are counted, never raised. Raises `MissingExtra` where reading needs one."""
    parts = [dataset.train, dataset.test, _left_out(dataset)]
    samples = _joined(parts)
    pictures = dataset.task == "image-classification" and len(samples) <= NEAR_LIMIT
    seen = _scan(samples, _examiner(dataset.preprocessing, pictures), pictures)
    groups = _groups(seen.keys, set(seen.damaged))
    near = None
    if pictures:
        repeated = {i for group in groups for i in group[1:]} | set(seen.damaged)
        rows = [i for i in range(len(samples)) if i not in repeated]
        near = [(rows[a], rows[b]) for a, b in near_pairs(seen.small[rows])]
    sides = np.repeat(np.arange(3, dtype=np.int8), [len(part) for part in parts])
    return Inspection(dataset, samples, sides, seen.sizes, seen.damaged, groups, near)


class _Look(NamedTuple):
    key: int
    size: tuple[int, int]
    small: NDArray[np.uint8] | None = None


class _Scan(NamedTuple):
    keys: NDArray[np.uint64]
    sizes: NDArray[np.int32]
    small: NDArray[np.uint8]
    damaged: dict[int, str]


def _examiner(spec: Preprocessing, pictures: bool) -> Callable[[Any], _Look]:
    """What is kept of a sample. It raises `InputError` for one that the model could not take."""
    if isinstance(spec, ImagePreprocessing):
        height, width = _SMALL
        shrink = Preprocessor(ImagePreprocessing(width, height, 1, (0.0,), (1 / 255,)))

        def picture(sample: Any) -> _Look:
            frame = canonical_frame(sample)
            small = np.rint(shrink(frame)[0, 0]).astype(np.uint8) if pictures else None
            return _Look(_key(str(frame.shape).encode(), frame), (frame.shape[1], frame.shape[0]), small)

        return picture
    if isinstance(spec, SeriesPreprocessing):
        check = SeriesPreprocessor(spec)

        def series(sample: Any) -> _Look:
            check(sample)
            return _Look(_key(str(sample.shape).encode(), sample), (len(sample), 1))

        return series

    def text(sample: Any) -> _Look:
        # Equal but for case and spaces is equal, as csv: sees it.
        plain = " ".join(sample.casefold().split())
        return _Look(_key(plain.encode("utf-8", "surrogatepass")), (len(sample), 1))

    return text


def _key(*parts: bytes | NDArray[Any]) -> int:
    """64 bits of a hash over the content: of a million samples two differing ones share it once in 40 million sets."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return int.from_bytes(digest.digest(), "big")


def _scan(samples: Split, examine: Callable[[Any], _Look], pictures: bool) -> _Scan:
    """Look at all of ``samples`` by threads: decoders and hashes release the interpreter."""

    def attempt(chunk: range) -> list[_Look | str]:
        found: list[_Look | str] = []
        for i in chunk:
            try:
                found.append(examine(samples.read(i)))
            except (DataError, InputError) as error:
                found.append(error.message)
        return found

    count = len(samples)
    scan = _Scan(
        np.zeros(count, np.uint64),
        np.zeros((count, 2), np.int32),
        np.zeros((count if pictures else 0, *_SMALL), np.uint8),
        {},
    )
    chunks = [range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = pool.map(attempt, chunks)
        shown = track(results, f"reading {count:,} samples", len(chunks)) if count > 1000 else results
        for chunk, looks in zip(chunks, shown, strict=True):
            for i, look in zip(chunk, looks, strict=True):
                if isinstance(look, str):
                    scan.damaged[i] = look
                    continue
                scan.keys[i], scan.sizes[i] = look.key, look.size
                if look.small is not None:
                    scan.small[i] = look.small
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return scan


def _groups(keys: NDArray[np.uint64], damaged: set[int]) -> list[list[int]]:
    """Indices with equal keys, two or more each, in the order of their first."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    members: dict[int, list[int]] = {}
    for i in np.flatnonzero(counts[inverse] > 1).tolist():
        if i not in damaged:
            members.setdefault(int(inverse[i]), []).append(i)
    return [group for group in members.values() if len(group) > 1]


def near_pairs(small: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """(earlier, later) of grey pictures uint8 (N, 16, 18) that look alike: each later one with the earlier one most like it.

    The difference hash (is a pixel brighter than its left neighbour, over 8 x 9 pixels) proposes, the pictures decide.
    """
    flat = small.reshape(-1, _SMALL[0] * _SMALL[1]).astype(np.float32)
    contrast = flat.std(1)
    flat = (flat - flat.mean(1, keepdims=True)) / np.maximum(contrast, 1)[:, None]
    tiny = small.reshape(-1, 8, 2, 9, 2).mean((2, 4), dtype=np.float32)
    bits = np.where(tiny[:, :, 1:] > tiny[:, :, :-1], np.float32(1), np.float32(-1)).reshape(-1, 64)
    pairs = []
    for start in range(0, len(small), 256):
        rows = np.arange(start, min(start + 256, len(small)))
        alike = bits[rows] @ bits.T  # (rows, N): 64 - 2 x the bits that differ
        alike[np.arange(len(small))[None, :] >= rows[:, None]] = -np.inf
        nearest = alike.argmax(1)
        for i, j in zip(rows.tolist(), nearest.tolist(), strict=True):
            close = alike[i - start, j] >= 64 - 2 * NEAR_BITS
            if close and min(contrast[i], contrast[j]) > 2 and np.abs(flat[i] - flat[j]).mean() < NEAR_DIFFERENCE:
                pairs.append((j, i))
    return pairs


def _joined(parts: Sequence[Split]) -> Split:
    """The splits behind each other."""
    starts = np.cumsum([0, *map(len, parts)])

    def read(i: int) -> Any:
        part = int(np.searchsorted(starts, i, "right")) - 1
        return parts[part].read(i - int(starts[part]))

    shapes = [part.targets.shape[1:] for part in parts]
    targets = np.full((int(starts[-1]), *max(shapes)), -1, np.int64)
    for start, part in zip(starts, parts, strict=False):
        place = targets[start : start + len(part)]
        if place.ndim == 1:
            place[:] = part.targets
        else:
            place[:, : part.targets.shape[1]] = part.targets
    return Split(tuple(name for part in parts for name in part.ids), targets, read)


def _left_out(dataset: Dataset) -> Split:
    """What the data set itself keeps from training: equal samples on both sides are just what one wants to see."""
    name, _, path = dataset.spec.partition(":")
    every, used = dataset.all, {*dataset.train.ids, *dataset.test.ids}
    if name == "folder" and dataset.all is dataset.test:  # its ids are relative to val/, those of train to train/
        whole = folder.load(str(Path(path) / "train"))
        every, used = whole.all, set(dataset.train.ids if whole.labels == dataset.labels else whole.all.ids)
    elif name == "csv":
        every = _rows(path, dataset)
    return every.take(i for i, name in enumerate(every.ids) if name not in used)


def _rows(path: str, dataset: Dataset) -> Split:
    """All samples of a CSV file, by the functions that loaded it: a ``split`` column makes ``all`` the held-out part."""
    table = csv_file._read(path)
    values, samples = csv_file._texts(table) if "text" in table.columns else csv_file._series(table)
    targets = np.array([dataset.labels.index(label) for label in samples.labels], np.int64)
    return Split(tuple(f"{table.name}/{name}" for name in samples.ids), targets, lambda i: values[i])

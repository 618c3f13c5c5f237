"""The built-in ``spam``: 2002's real mail, wanted and unwanted, a fifth of it held out. See SOURCE.md."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np

from edgekit.data.dataset import Dataset, Split, digest_of, stratified
from edgekit.manifest import TextPreprocessing

__all__ = ["load"]

FILE = Path(__file__).with_name("spam.tsv.xz")
LABELS = ("ham", "spam")
TEST_SHARE = 0.2


def load(path: str = "") -> Dataset:
    """Texts are the subject, a newline, and the first 400 characters of the body. ``path`` is unused.

    Near duplicates are one group, so they never straddle the split.
    """
    rows = [line.split("\t") for line in lzma.decompress(FILE.read_bytes()).decode().splitlines()]
    texts = [f"{subject}\n{body}" for _, _, _, subject, body in rows]
    every = Split(
        ids=tuple(f"spam/{row[0]}" for row in rows),
        targets=np.array([LABELS.index(row[1]) for row in rows], np.int64),
        read=texts.__getitem__,
        groups=tuple(int(row[2]) for row in rows),
    )
    train, test = stratified(every.targets, every.groups, TEST_SHARE)
    return Dataset(
        spec="spam",
        labels=LABELS,
        digest=digest_of([*every.ids, every.targets.tobytes(), *map(str, every.groups), *texts]),
        train=every.take(train),
        test=every.take(test),
        all=every,
        preprocessing=TextPreprocessing(length=192),
        augmentation="text",
        task="text-classification",
    )

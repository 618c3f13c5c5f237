"""``labels``: synthetic parcel labels, drawn when they are read. Lines of text to read, and whole labels to sort.

Nothing in it is a real shipment: see SOURCE.md. Test fonts and test texts occur nowhere in the train split.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekit.data.dataset import Dataset, Split, digest_of, encode_lines
from edgekit.errors import UsageError
from edgekit.manifest import ImagePreprocessing

from .conditions import CLASSES, CONDITIONS, Condition, condition_of
from .fonts import TEST_FONTS, TRAIN_FONTS, font_bytes
from .text import ALPHABET, generate, seeded
from .words import FILES

__all__ = ["ALPHABET", "load"]

#: Changes with every change of what is drawn or written, for the digest: rendering all of it would take a minute.
VERSION = 1
LINES, TEST_LINES = 20_000, 1_000  # test lines of each condition
WHOLE, TEST_WHOLE = 3_000, 300
MAX_COUNT = 200_000
_HINT = "write lines or whole, then clean or degraded to judge on one half, and a number of training samples: lines,clean,2000"


class _Options(NamedTuple):
    kind: str
    conditions: tuple[Condition, ...]
    samples: int
    tests: int  # of each condition


def load(path: str = "") -> Dataset:
    """Synthetic labels. ``path`` is a list by commas, each part optional:

    - ``lines`` (also where ``path`` is empty): uint8 (20..64, W) crops, task ``text-recognition``; or ``whole``: uint8
      (320, 320, 3) labels in six classes by handling mark. The frames of ``whole`` need zxing-cpp.
    - ``clean`` or ``degraded``: only that half of the test split; the train split stays the same.
    - a number: that many training samples; a test half then has a quarter of it at most.

    Raises `UsageError` for any other part. Without Pillow the first ``read`` raises `MissingExtra`.
    """
    options = _parse(path)
    return _lines(path, options) if options.kind == "lines" else _whole(path, options)


def _parse(path: str) -> _Options:
    kinds: list[str] = []
    conditions: list[Condition] = []
    counts: list[int] = []
    for part in path.split(",") if path else ():
        if part in ("lines", "whole"):
            kinds.append(part)
        elif part in CONDITIONS:
            conditions.append(part)
        elif part.isdecimal() and part.isascii() and 0 < int(part[:9]) <= MAX_COUNT:
            counts.append(int(part[:9]))
        else:
            raise UsageError(f"the data set labels has no option {part!r}", _HINT)
    for given in (kinds, conditions, counts):
        if len(given) > 1:
            raise UsageError(f"labels:{path} says both {given[0]} and {given[1]}", _HINT)
    kind = kinds[0] if kinds else "lines"
    train, test = (LINES, TEST_LINES) if kind == "lines" else (WHOLE, TEST_WHOLE)
    count = counts[0] if counts else train
    return _Options(kind, tuple(conditions) or CONDITIONS, count, min(test, max(12, count // 4)))


def _ids(kind: str, part: str, count: int) -> list[str]:
    return [f"labels/{kind}/{part}/{i:05d}" for i in range(count)]


def _digest(options: _Options, labels: tuple[str, ...]) -> str:
    return digest_of([f"labels {VERSION} {options}", *labels, *(file.read_bytes() for file in FILES), *font_bytes()])


@lru_cache
def _held_out_texts() -> frozenset[str]:
    """Every text of the full test split: none of them is trained on, whatever the options."""
    keys = [key for condition in CONDITIONS for key in _ids("lines", condition, TEST_LINES)]
    return frozenset(_text(key) for key in keys)


def _text(key: str, avoid: frozenset[str] = frozenset()) -> str:
    rng = seeded(f"{key}/text")
    while (line := generate(rng)) in avoid:
        pass
    return line


def _lines(path: str, options: _Options) -> Dataset:
    labels = ("", *ALPHABET)
    train_ids = _ids("lines", "train", options.samples)
    test_ids = [key for condition in options.conditions for key in _ids("lines", condition, options.tests)]
    held_out = _held_out_texts()
    test = _line_split(test_ids, [_text(key) for key in test_ids], labels, TEST_FONTS)
    return Dataset(
        spec=f"labels:{path}" if path else "labels",
        labels=labels,
        digest=_digest(options, labels),
        train=_line_split(train_ids, [_text(key, held_out) for key in train_ids], labels, TRAIN_FONTS),
        test=test,
        all=test,
        # 80 steps of 4 pixels: 2.5 for each of 32 characters, so that CTC can put a blank between two equal ones.
        preprocessing=ImagePreprocessing(320, 32, 1, mean=(0.5,), std=(0.25,), fit="line"),
        augmentation="lines",
        task="text-recognition",
    )


def _line_split(ids: list[str], texts: list[str], labels: tuple[str, ...], fonts: tuple[str, ...]) -> Split:
    def read(i: int) -> NDArray[np.uint8]:
        from .lines import render_line

        return render_line(texts[i], ids[i], fonts, condition_of(ids[i]))

    return Split(tuple(ids), encode_lines(texts, labels), read, groups=tuple(texts))


def _whole(path: str, options: _Options) -> Dataset:
    test_ids = [key for condition in options.conditions for key in _ids("whole", condition, options.tests)]
    test = _label_split(test_ids, TEST_FONTS)
    return Dataset(
        spec=f"labels:{path}",
        labels=CLASSES,
        digest=_digest(options, CLASSES),
        train=_label_split(_ids("whole", "train", options.samples), TRAIN_FONTS),
        test=test,
        all=test,
        preprocessing=ImagePreprocessing(112, 112, 3, mean=(0.5,) * 3, std=(0.25,) * 3, fit="letterbox"),
        augmentation="logistics",
    )


def _label_split(ids: list[str], fonts: tuple[str, ...]) -> Split:
    def read(i: int) -> NDArray[np.uint8]:
        from .whole import render_label

        return render_label(CLASSES[i % len(CLASSES)], ids[i], fonts, condition_of(ids[i]))

    targets = np.arange(len(ids), dtype=np.int64) % len(CLASSES)
    return Split(tuple(ids), targets, read)

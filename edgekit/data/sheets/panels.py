"""The picture of a data set, block by block, from the top of the page to its end. Pillow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgekit.errors import DataError, InputError
from edgekit.manifest import ImagePreprocessing, Preprocessing, SeriesPreprocessing, TextPreprocessing
from edgekit.preprocess import SeriesPreprocessor

from .drawing import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    RED,
    WIDTH,
    Image,
    ImageDraw,
    as_seen,
    blank,
    histogram,
    paste,
    png,
    section,
    spark,
    thumb,
    width_of,
    wrap,
    write,
)
from .inspection import SIDES, Inspection

__all__ = ["input_words", "picture_of"]

#: More classes than this: the largest and the smallest halves of it.
ROWS = 40
SAMPLES_X = 500  # where a class's samples begin
LISTED = 8  # groups of duplicates, damaged samples
THUMB = 52


def picture_of(found: Inspection) -> bytes:
    """PNG bytes of the whole page."""
    contents = _characters(found) if found.reads_text else [_classes(found)]
    return png([_title(found), _tiles(found), *_notes(found), *contents, *_sizes(found), *_repeated(found), _damaged(found)])


def input_words(spec: Preprocessing) -> str:
    """The model's input in a few words."""
    if isinstance(spec, ImagePreprocessing):
        return f"input {spec.width} x {spec.height}, {'grey' if spec.channels == 1 else 'colour'}, {spec.fit}"
    if isinstance(spec, TextPreprocessing):
        return f"input {spec.length} tokens"
    return f"input {spec.length} steps of {spec.channels} channels"


def _title(found: Inspection) -> Image.Image:
    dataset, image = found.dataset, blank(62)
    write(image, (0, 18), dataset.spec, 30, width=WIDTH)
    words = f"{dataset.task}, {input_words(dataset.preprocessing)}, augmentation {dataset.augmentation}"
    write(image, (0, 50), words, 15, GREY, WIDTH)
    return image


def _tiles(found: Inspection) -> Image.Image:
    """Large figures with a small word below each."""
    train, held_out, left_out = np.bincount(found.sides, minlength=3).tolist()
    conflicts = sum(map(found.contradicts, found.duplicates))
    copies = sum(len(group) - 1 for group in found.duplicates)
    ratio = found.imbalance()
    tiles = [
        (f"{train:,}", "train", INK),
        (f"{held_out:,}", "held out", INK),
        (f"{train + held_out + left_out:,}", "all", INK),
        (f"{len(found.counts()):,}", "characters" if found.reads_text else "classes", INK),
        ("-" if ratio is None else f"{ratio:,.1f}", "largest : smallest", INK),
        (f"{copies:,}", "duplicates", ORANGE if copies else INK),
        (f"{conflicts:,}", "with other labels", RED if conflicts else INK),
        (f"{len(found.damaged):,}", "damaged", RED if found.damaged else INK),
    ]
    image = blank(58)
    for i, (figure, word, colour) in enumerate(tiles):
        x = i * WIDTH / len(tiles)
        write(image, (x, 18), figure, 26, colour)
        write(image, (x, 47), word, 13, GREY)
    return image


def _notes(found: Inspection) -> list[Image.Image]:
    """What is odd about the split, in words."""
    counts = found.counts()
    thing = "characters are never written" if found.reads_text else "classes have no sample"
    notes = []
    for place, where in ((1, "in train"), (2, "held out")):
        names = [str(row[0]) for row in counts if not row[place]]
        if names:
            notes.append(f"{len(names)} of {len(counts)} {thing} {where}: {', '.join(names)}")
    if left_out := int((found.sides == 2).sum()):
        notes.append(f"left out of training, because what they show is held out too: {left_out:,}")
    if not notes:
        return []
    image = blank(22 * len(notes))
    for i, note in enumerate(notes):
        ImageDraw.Draw(image).rectangle((0, 22 * i + 3, 3, 22 * i + 18), ORANGE)
        write(image, (14, 22 * i + 11), note, 14, width=WIDTH - 14)
    return [image]


def _key(image: Image.Image, x: float, y: float) -> None:
    """Which colour is which side."""
    for word, colour in (("train", BLUE), ("held out", ORANGE)):
        ImageDraw.Draw(image).rectangle((x, y - 5, x + 10, y + 5), colour)
        write(image, (x + 16, y), word, 13, GREY)
        x += 30 + width_of(word)


def _bar(image: Image.Image, at: tuple[float, float], width: float, counts: tuple[int, int], largest: int) -> None:
    """Train, then held out behind it, to scale; a side that has samples is never less than a pixel wide."""
    x, y = at
    for count, colour in zip(counts, (BLUE, ORANGE), strict=True):
        if count:
            end = x + max(1, round(width * count / largest)) - 1
            ImageDraw.Draw(image).rectangle((x, y - 7, end, y + 7), colour)
            x = end + 1


def _classes(found: Inspection) -> Image.Image:
    """A row a class: name, bar, counts, samples; by size."""
    counts = found.counts()
    order = sorted(range(len(counts)), key=lambda i: -sum(counts[i][1:]))
    largest = max(1, max(sum(row[1:]) for row in counts))
    note = ""
    rows: list[int | None] = [*order]
    if len(order) > ROWS + 8:  # to leave out three would save nothing
        rows = [*order[: ROWS // 2], None, *order[-ROWS // 2 :]]
        note = f"the {ROWS // 2} largest and the {ROWS // 2} smallest of {len(order)}"
    show = _shower(found, len(rows))
    drawn = []
    for row in rows:
        if row is None:
            between = blank(24)
            write(between, (0, 12), f"and {len(order) - ROWS} classes between", 13, GREY)
            drawn.append(between)
            continue
        label, train, held_out = counts[row]
        samples = show(_some(found, row))
        line = blank(max(30, samples.height + 8))
        middle = line.height / 2
        write(line, (0, middle), label, 14, width=150)
        _bar(line, (160, middle), 210, (train, held_out), largest)
        write(line, (380, middle), f"{train:,} + {held_out:,}", 13, GREY, 112)
        paste(line, samples, SAMPLES_X, middle - samples.height / 2)
        drawn.append(line)
    image = blank(sum(line.height for line in drawn) + 24)
    _key(image, 160, 8)
    y = 24
    for line in drawn:
        paste(image, line, 0, y)
        y += line.height
        ImageDraw.Draw(image).line((0, y - 1, WIDTH, y - 1), (240, 242, 244))
    return section("Classes", note, image)


def _some(found: Inspection, label: int) -> list[int]:
    """Indices of up to 24 readable samples of a class, spread over it; training samples first."""
    chosen: list[int] = []
    for side in (0, 1):
        rows = np.flatnonzero((found.samples.targets == label) & (found.sides == side))
        rows = rows[found.sizes[rows, 1] > 0]
        room = min(24 - len(chosen), len(rows))
        chosen += rows[np.linspace(0, len(rows) - 1, room).astype(int)].tolist() if room > 0 else []
    return chosen


def _read(found: Inspection, i: int) -> Any:
    """Sample ``i``, None where it can no longer be read."""
    try:
        return found.samples.read(i)
    except (DataError, InputError):
        return None


def _shower(found: Inspection, rows: int) -> Callable[[list[int]], Image.Image]:
    """What draws the samples of one class: thumbnails, sparklines, or the beginnings of texts. Few classes: more of each."""
    spec = found.dataset.preprocessing
    room = WIDTH - SAMPLES_X
    if isinstance(spec, TextPreprocessing):
        lines = max(2, min(10, 24 // rows))
        return lambda chosen: _texts(found, chosen[:lines], room)
    if isinstance(spec, SeriesPreprocessing):
        return lambda chosen: _strip([_sketch(found, i, 118) for i in chosen[:5]], 10)
    width = max(8, min(room, round(THUMB * spec.width / spec.height)))
    count = max(1, (room + 6) // (width + 6))
    return lambda chosen: _strip([_sketch(found, i, width) for i in chosen[:count]], 6)


def _sketch(found: Inspection, i: int, width: int) -> Image.Image:
    """One picture or series, small."""
    spec, sample = found.dataset.preprocessing, _read(found, i)
    if sample is None or isinstance(spec, TextPreprocessing):
        return blank(THUMB, width)
    if isinstance(spec, SeriesPreprocessing):
        series = SeriesPreprocessor(spec)(sample)[0]
        return spark(series[series[:, -1] > 0, :-1], spec, width, 14 if spec.channels > 1 else 40, steps=spec.length)
    return thumb(as_seen(sample, spec), width, THUMB)


def _strip(pieces: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pieces beside each other."""
    image = blank(max((p.height for p in pieces), default=1), sum(p.width + gap for p in pieces))
    x = 0
    for piece in pieces:
        paste(image, piece, x, 0)
        x += piece.width + gap
    return image


def _texts(found: Inspection, chosen: Sequence[int], width: int) -> Image.Image:
    image = blank(18 * len(chosen), width)
    for row, i in enumerate(chosen):
        write(image, (0, 18 * row + 9), str(_read(found, i) or ""), 13, width=width)
    return image


def _characters(found: Inspection) -> list[Image.Image]:
    """Of a text reader: how often each character is written, and lines with what is written on them."""
    counts = sorted(found.counts(), key=lambda row: -sum(row[1:]))
    largest = max(1, max(sum(row[1:]) for row in counts))
    columns, shown = 4, counts[: 4 * ROWS]
    deep = -(-len(shown) // columns)
    image = blank(24 + 20 * deep)
    _key(image, 0, 8)
    for i, (label, train, held_out) in enumerate(shown):
        x, y = i // deep * WIDTH / columns, 24 + i % deep * 20 + 10
        write(image, (x, y), "space" if label == " " else label, 14)
        _bar(image, (x + 52, y), 120, (train, held_out), largest)
        write(image, (x + 180, y), f"{train:,} + {held_out:,}", 12, GREY, 100)
    note = f"how often each is written{'' if len(shown) == len(counts) else f'; the {len(shown)} most frequent'}"
    return [section("Characters", note, image), section("Lines", "as the model sees them", _lines(found))]


def _lines(found: Inspection) -> Image.Image:
    """Crops in three columns, train before held out, what is written below each."""
    spec = found.dataset.preprocessing
    assert isinstance(spec, ImagePreprocessing)
    chosen: list[int] = []
    for side, wanted in ((0, 15), (1, 9)):
        rows = np.flatnonzero((found.sides == side) & (found.sizes[:, 1] > 0))
        chosen += rows[np.linspace(0, len(rows) - 1, min(wanted, len(rows))).astype(int)].tolist() if len(rows) else []
    cell, room = WIDTH // 3, WIDTH // 3 - 24
    pictures = [
        thumb(as_seen(frame, spec), room, 60) if (frame := _read(found, i)) is not None else blank(32, 9) for i in chosen
    ]
    tall = max((p.height for p in pictures), default=1)
    image = blank((tall + 34) * -(-len(chosen) // 3))
    for place, (i, picture) in enumerate(zip(chosen, pictures, strict=True)):
        x, y = place % 3 * cell, place // 3 * (tall + 34)
        paste(image, picture, x, y)
        write(image, (x, y + tall + 11), found.label(i), 13, width=room - 66)
        write(image, (x + room, y + tall + 11), SIDES[found.sides[i]], 12, GREY, anchor="rm")
    return image


def _sizes(found: Inspection) -> list[Image.Image]:
    """Smallest, median and largest; how they are spread, unless all are equal."""
    known = found.sizes[found.sizes[:, 1] > 0]
    if not len(known):
        return []
    low, middle, high = known.min(0), np.median(known, 0).astype(int), known.max(0)
    pictures = found.unit == "pixels"

    def words(size: Any) -> str:
        return f"{size[0]:,} x {size[1]:,}" if pictures else f"{size[0]:,}"

    if (low == high).all():
        return [section("Sizes" if pictures else "Lengths", f"every sample has {words(low)} {found.unit}")]
    note = f"smallest {words(low)}, median {words(middle)}, largest {words(high)} {found.unit}"
    values, what = (known.max(1), "longer side, pixels") if pictures else (known[:, 0], f"{found.unit} a sample")
    return [section("Sizes" if pictures else "Lengths", note, histogram(values, what))]


def _repeated(found: Inspection) -> list[Image.Image]:
    """Equal and nearly equal samples; those whose labels contradict each other first."""
    wrong = [group for group in found.duplicates if found.contradicts(group)]
    plain = [group for group in found.duplicates if not found.contradicts(group)]
    crossing = sum(map(found.crosses, found.duplicates))
    blocks = _groups(found, "Same content, different labels", "one of the labels is wrong", wrong, RED)
    if plain:
        words = f"{len(found.duplicates):,} groups in all, {crossing:,} of them in train and held out"
        blocks += _groups(found, "Same content, same label", words, sorted(plain, key=found.crosses, reverse=True), ORANGE)
    if not found.duplicates:
        words = "no two samples have the same content" + ("" if found.near != [] else ", no two pictures look alike")
        blocks.append(section("Duplicates", words))
    if found.near is None:
        words = "are looked for among up to 20,000 pictures to classify"
        return blocks + ([section("Near duplicates", words)] if found.dataset.task == "image-classification" else [])
    pairs: list[Sequence[int]] = sorted(found.near, key=lambda p: (not found.contradicts(p), not found.crosses(p)))
    if not pairs:
        return blocks
    crossing, other = sum(map(found.crosses, pairs)), sum(map(found.contradicts, pairs))
    words = f"{len(pairs):,} pictures look like another: {crossing:,} across the split, {other:,} with another label"
    return blocks + _groups(found, "Near duplicates", words, pairs, ORANGE)


def _groups(found: Inspection, title: str, note: str, groups: Sequence[Sequence[int]], colour: Any) -> list[Image.Image]:
    """The first `LISTED` groups, a row each: up to three of their samples."""
    if not groups:
        return []
    rows = []
    for group in groups[:LISTED]:
        row = blank(68)
        ImageDraw.Draw(row).rectangle((0, 4, 3, 60), colour)
        for place, i in enumerate(group[:3]):
            _member(row, 14 + place * 360, found, i)
        if len(group) > 3:
            write(row, (WIDTH, 32), f"+ {len(group) - 3:,}", 13, GREY, anchor="rm")
        rows.append(row)
    image = blank(68 * len(rows) + (22 if len(groups) > LISTED else 0))
    for place, row in enumerate(rows):
        paste(image, row, 0, 68 * place)
    if len(groups) > LISTED:
        write(image, (14, image.height - 10), f"and {len(groups) - LISTED:,} more: --json lists them", 13, GREY)
    return [section(f"{title}: {len(groups):,}", note, image)]


def _member(row: Image.Image, x: int, found: Inspection, i: int) -> None:
    """A sample of a group: what it is at the left, label, side and id beside it."""
    spec = found.dataset.preprocessing
    names = f"{found.label(i)}  ({SIDES[found.sides[i]]})", found.samples.ids[i]
    if isinstance(spec, TextPreprocessing):
        for line, text in enumerate(wrap(str(_read(found, i) or ""), 336, 12, 2)):
            write(row, (x, 40 + 14 * line), text, 12, GREY)
        write(row, (x, 10), names[0], 13, width=336)
        write(row, (x, 25), names[1], 12, GREY, 336)
        return
    wide = isinstance(spec, ImagePreprocessing) and spec.width > 3 * spec.height
    width = 150 if wide else THUMB
    sketch = _sketch(found, i, width)
    sketch = sketch.crop((0, 0, width, min(sketch.height, 60)))  # of a series the first channels
    paste(row, sketch, x, 32 - sketch.height / 2)
    write(row, (x + width + 12, 22), names[0], 13, width=340 - width - 12)
    write(row, (x + width + 12, 42), names[1], 12, GREY, 340 - width - 12)


def _damaged(found: Inspection) -> Image.Image:
    if not found.damaged:
        return section("Damaged samples", "none: every sample can be read")
    shown = list(found.damaged.items())[:LISTED]
    image = blank(20 * len(shown))
    for row, (i, why) in enumerate(shown):
        write(image, (14, 20 * row + 10), found.samples.ids[i], 13, width=380)
        write(image, (410, 20 * row + 10), SIDES[found.sides[i]], 13, GREY)
        write(image, (490, 20 * row + 10), why, 13, GREY, WIDTH - 490)
    share = len(found.damaged) / len(found.samples)
    return section(f"Damaged samples: {len(found.damaged):,}", f"{share:.1%} of all; training leaves them out", image)

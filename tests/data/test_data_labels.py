"""The synthetic labels: the same on every call and in every thread, texts that are what they claim, codes that read."""

from __future__ import annotations

import itertools
import random
import string
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.data import Dataset
from edgekit.data.labels import ALPHABET, degrade, load, text
from edgekit.data.labels.conditions import CLASSES, condition_of
from edgekit.data.labels.fonts import FOLDER, FONTS, TEST_FONTS, TRAIN_FONTS, load_font
from edgekit.data.labels.lines import HEIGHTS, render_line
from edgekit.data.labels.whole import SIDE, code_of, render_label
from edgekit.errors import UsageError
from edgekit.preprocess import Preprocessor

seeds = st.integers(0, 2**32).map(lambda n: text.seeded(str(n)))


@pytest.fixture(scope="module")
def lines() -> Dataset:
    return load("lines,400")


def test_the_full_sizes_and_what_stands_in_the_splits() -> None:
    full = load("")
    assert (len(full.train), len(full.test), full.task) == (20_000, 2_000, "text-recognition")
    assert full.all is full.test
    assert full.labels == ("", *ALPHABET)
    assert full.train.ids[12] == "labels/lines/train/00012"
    texts, seen = set(full.train.groups), set(full.test.groups)
    assert not texts & seen, "a test text is trained on"
    assert len(texts) > 19_000
    assert {c for line in texts for c in str(line)} == set(ALPHABET), "a character that is never trained"
    assert max(len(str(line)) for line in texts | seen) <= text.MAX_LENGTH


def test_a_line_has_steps_enough_for_ctc(lines: Dataset) -> None:
    width = lines.preprocessing.width  # type: ignore[union-attr]
    assert width / 4 / text.MAX_LENGTH >= 2.2


def test_targets_are_the_texts(lines: Dataset) -> None:
    for part in (lines.train, lines.test):
        decoded = ["".join(lines.labels[k] for k in row if k >= 0) for row in part.targets]
        assert decoded == list(part.groups)
        assert (part.targets != 0).all(), "the blank is no character"


def test_options_choose_halves_and_sizes(lines: Dataset) -> None:
    clean, degraded = load("lines,clean,400"), load("400,degraded")
    assert (len(lines.train), len(lines.test), len(clean.test), len(degraded.test)) == (400, 200, 100, 100)
    assert clean.train.ids == degraded.train.ids == lines.train.ids
    assert lines.test.ids == clean.test.ids + degraded.test.ids
    assert {condition_of(key) for key in clean.test.ids} == {"clean"}
    assert len({part.digest for part in (lines, clean, degraded, load("lines,401"))}) == 4
    assert load("lines,400").digest == lines.digest
    assert load("clean,400").spec == "labels:clean,400"
    assert len(load("whole").train) == 3_000
    assert len(load("whole").test) == 600


@pytest.mark.parametrize("path", ["whloe", "lines,whole", "clean,degraded", "0", "-3", "9999999999", "5,6", ",", "lines,,"])
def test_what_is_no_option_is_refused(path: str) -> None:
    with pytest.raises(UsageError) as error:
        load(path)
    assert "lines or whole" in error.value.hint


def test_a_sample_is_the_same_in_every_thread(lines: Dataset) -> None:
    whole = load("whole,60")
    for dataset, count in ((lines, 60), (whole, 12)):
        again = load(dataset.spec.partition(":")[2])
        once = [dataset.train.read(i) for i in range(count)]
        with ThreadPoolExecutor(8) as pool:
            twice = list(pool.map(again.train.read, reversed(range(count))))[::-1]
        assert all(np.array_equal(a, b) for a, b in zip(once, twice, strict=True))
        assert not np.array_equal(once[0], once[len(CLASSES)])


def test_train_and_test_share_no_font() -> None:
    family = {name: name.rpartition("-")[0] for name in FONTS}
    assert not {family[n] for n in TRAIN_FONTS} & {family[n] for n in TEST_FONTS}
    assert len(TEST_FONTS) >= 4
    contents = [(FOLDER / f"{name}.ttf").read_bytes() for name in FONTS]
    assert len(set(contents)) == len(FONTS)
    assert {p.stem for p in FOLDER.glob("*.ttf")} == set(FONTS)
    assert {p.stem for p in FOLDER.glob("*.LICENSE")} == set(family.values())
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 700_000


@pytest.mark.parametrize("name", FONTS)
def test_every_font_draws_every_character(name: str) -> None:
    font = load_font(name, 40)
    shapes = {c: bytes(font.getmask(c)) for c in ALPHABET if c != " "}
    missing = bytes(font.getmask("\u4e2d"))
    assert all(any(shape) and shape != missing for shape in shapes.values())
    alike = [a + b for a, b in itertools.combinations(shapes, 2) if shapes[a] == shapes[b]]
    assert not alike, "two characters that no reader could tell apart"


@given(seeds)
def test_check_digits_are_right(rng: random.Random) -> None:
    sscc = "".join(c for c in text.sscc(rng)[4:] if c.isdigit())
    assert len(sscc) == 18
    assert sum(int(d) * (3 if i % 2 == 0 else 1) for i, d in enumerate(sscc)) % 10 == 0
    usps = text.usps(rng).replace(" ", "")
    assert len(usps) == 22
    assert sum(int(d) * (1 if i % 2 else 3) for i, d in enumerate(usps)) % 10 == 0
    s10 = text.s10(rng).replace(" ", "")
    assert len(s10) == 13
    total = sum(int(d) * w for d, w in zip(s10[2:10], (8, 6, 4, 2, 3, 5, 9, 7), strict=True))
    assert (total + int(s10[10])) % 11 == 0 or (total % 11, s10[10]) in ((0, "5"), (1, "0"))
    ups = text.ups(rng).replace(" ", "")
    values = [int(c) if c.isdigit() else (string.ascii_uppercase.index(c) + 2) % 10 for c in ups[2:]]
    assert len(ups) == 18
    assert (sum(values[0:15:2]) + 2 * sum(values[1:15:2]) + values[15]) % 10 == 0


def test_check_digits_of_published_numbers() -> None:
    assert text.check_s10("47312482") == 9  # RR473124829GB, UPU S10's example
    assert text.check_ups("5R8939035756712") == 7  # 1Z5R89390357567127
    assert text.check_weighted("37610425002123456") == 9  # GS1's example of an SSCC, 376104250021234569


@given(seeds, st.sampled_from([*text.KINDS, ""]))
def test_every_generated_line_fits_alphabet_and_length(rng: random.Random, kind: str) -> None:
    line = text.generate(rng, kind)
    assert set(line) <= set(ALPHABET)
    assert 3 <= len(line) <= text.MAX_LENGTH
    assert line == line.strip()
    assert "  " not in line


@pytest.mark.parametrize("condition", ["clean", "degraded", "mixed"])
def test_every_line_frame_is_whole_and_shows_ink(condition: str) -> None:
    preprocess = Preprocessor(load("lines,clean,4").preprocessing)  # type: ignore[arg-type]
    for i in range(150):
        key = f"test/{condition}/{i}"
        frame = render_line(text.generate(text.seeded(key)), key, FONTS, condition)  # type: ignore[arg-type]
        assert frame.dtype == np.uint8
        assert frame.ndim == 2
        assert HEIGHTS[0] <= frame.shape[0] <= HEIGHTS[1]
        assert 8 <= frame.shape[1] <= 1200
        dark, light = np.percentile(frame, (4, 96))
        assert light - dark >= 18, f"{key} shows nothing"
        assert np.isfinite(preprocess(frame)).all()


@pytest.mark.parametrize("line", ["1.2", "W" * 32, ".,-", "iil", "(00) 3 4012345 123456789 1"])
def test_any_text_can_be_drawn(line: str) -> None:
    for i in range(20):
        frame = render_line(line, f"any/{line}/{i}", FONTS, "degraded")
        assert HEIGHTS[0] <= frame.shape[0] <= HEIGHTS[1]
        assert frame.max() > frame.min()


DAMAGE = [
    *(degrade.blur, degrade.motion, degrade.low_resolution, degrade.jpeg, degrade.dirt),
    *(degrade.glare, degrade.uneven, degrade.low_light, degrade.low_contrast),
]


@given(seeds, st.sampled_from(DAMAGE), st.sampled_from([(8, 20), (20, 8), (31, 200), (24, 40, 3)]), st.floats(0, 1))
def test_damage_keeps_the_shape_and_stays_finite(
    rng: random.Random, damage: degrade.Damage, shape: tuple[int, ...], strength: float
) -> None:
    picture = np.random.default_rng(1).uniform(0, 255, shape).astype(np.float32)
    before = picture.copy()
    out = damage(picture, rng, 14.0, strength)
    assert out.shape == shape
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert np.array_equal(picture, before), "the input was changed"


def test_the_code_on_a_clean_label_reads_back() -> None:
    zxingcpp = pytest.importorskip("zxingcpp")
    dataset = load("whole,clean,160")
    formats = set()
    for i, key in enumerate(dataset.test.ids):
        code = code_of(key)
        formats.add(code.format)
        found = {found.text for found in zxingcpp.read_barcodes(dataset.test.read(i))}
        assert code.text in found, f"{key}: {code} not among {found}"
    assert formats == {"Code128", "QRCode", "DataMatrix"}


def test_whole_labels_have_six_classes_and_one_shape() -> None:
    dataset = load("whole,60")
    assert dataset.labels == CLASSES
    assert dataset.task == "image-classification"
    assert np.bincount(dataset.train.targets).tolist() == [10] * 6
    for i in range(24):
        frame = dataset.test.read(i)
        assert frame.shape == (SIDE, SIDE, 3)
        assert frame.dtype == np.uint8
        assert frame.std() > 8
    fragile, plain = (render_label(name, "one/key/x", TEST_FONTS, "clean") for name in ("fragile", "plain"))
    assert not np.array_equal(fragile, plain)

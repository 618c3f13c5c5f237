"""Data sets: the built-in digits, folders of images, npz files; damaged input is named, counted, and refused when much."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgekit.data import SOURCES, Dataset, check_damaged, load
from edgekit.data.dataset import digest_of, stratified
from edgekit.errors import DataError, EdgekitError, UsageError
from edgekit.manifest import ImagePreprocessing

SMALL = ImagePreprocessing(8, 8, 1, mean=(0.5,), std=(0.5,))


def picture(path: Path, seed: int, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 20 and 10 different images."""
    root = tmp_path / "photos"
    for i in range(20):
        picture(root / "cat" / f"{i:02d}.png", i)
    for i in range(10):
        picture(root / "dog" / f"{i:02d}.png", 100 + i)
    return root


def straddling(dataset: Dataset) -> set[bytes]:
    """Contents that are on both sides of the split."""
    train = {dataset.train.read(i).tobytes() for i in range(len(dataset.train))}
    return train & {dataset.test.read(i).tobytes() for i in range(len(dataset.test))}


# digits


def test_digits_are_split_4000_to_1000_by_class_without_overlap() -> None:
    dataset = load("digits")
    assert (len(dataset.train), len(dataset.test), len(dataset.all)) == (4000, 1000, 5000)
    assert Counter(dataset.train.targets.tolist()) == dict.fromkeys(range(10), 400)
    assert Counter(dataset.test.targets.tolist()) == dict.fromkeys(range(10), 100)
    assert set(dataset.train.ids) | set(dataset.test.ids) == set(dataset.all.ids)
    assert not set(dataset.train.ids) & set(dataset.test.ids)
    assert not straddling(dataset)
    assert dataset.labels == tuple("0123456789")


def test_the_digits_and_their_split_are_fixed() -> None:
    """Figures of different days compare only if this never changes: the digests are those of the first release."""
    dataset = load("digits")
    assert dataset.digest == "40693227190fb287046d111a965b447a28570fb22068e589ad66b90a644ade8f"
    assert digest_of(dataset.test.ids) == "42e3c37076f2fff22c737a3fe241c48d8a9843b801baf3f38d945f559461028f"


def test_digits_look_like_digits() -> None:
    """The mean image of the ones is narrow and of the zeros hollow: labels and pixels belong together."""
    dataset = load("digits")
    tensors = dataset.test.tensors(dataset.preprocessing)
    assert tensors.x.shape == (1000, 1, 28, 28)
    assert tensors.x.dtype == np.float32
    mean = [tensors.x[tensors.y == digit].mean(0)[0] for digit in (0, 1)]
    assert mean[1][10:18, 12:16].mean() > mean[0][10:18, 12:16].mean() + 1


# specs


@pytest.mark.parametrize("spec", ["", "nonsense", "digits:path", "folder", "folder:", "npz", "tsv:x.tsv"])
def test_an_unknown_spec_lists_the_known(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(spec)
    assert caught.value.hint


@pytest.mark.parametrize("spec", ["folder:none", "npz:none.npz"])
def test_missing_data_is_one_clear_error(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="none"):
        load(spec)


def test_a_validation_part_is_of_the_training_split() -> None:
    other, part = load("digits"), load("validation:0.15:digits")
    assert sorted(part.train.ids + part.test.ids) == sorted(other.train.ids)
    assert part.all.ids == other.train.ids
    assert Counter(part.test.targets.tolist()) == dict.fromkeys(range(10), 60)
    assert (part.digest, part.labels, part.spec) == (other.digest, other.labels, "validation:0.15:digits")
    assert load("validation:0.15:digits").test.ids == part.test.ids


@pytest.mark.parametrize(
    "path",
    [
        "",
        ":",
        ":0:digits",
        ":1:digits",
        ":x:digits",
        ":0.1",
        ":0.1:",
        ":nan:digits",
        ":0.1:nonsense",
        ":0.1:validation:0.1:digits",
    ],
)
def test_a_validation_part_of_nothing_is_refused(path: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(f"validation{path}")
    assert caught.value.hint


def test_a_validation_part_needs_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8), labels=[0, 1] * 3)
    with pytest.raises(DataError, match="is none"):
        load(f"validation:0.01:npz:{tmp_path}/few.npz")


def test_every_kind_of_data_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)[:`]", text, re.M)
    assert set(rows) == set(SOURCES)
    assert len(load("labels:whole,500").train) == 500
    assert len(load("labels:lines,degraded").test) == 1000


# folders


def test_a_folder_is_split_by_class_and_the_same_twice(folder: Path) -> None:
    dataset, again = load(f"folder:{folder}"), load(f"folder:{folder}")
    assert dataset.labels == ("cat", "dog")
    assert Counter(dataset.test.targets.tolist()) == {0: 4, 1: 2}
    assert dataset.test.ids == again.test.ids
    assert dataset.digest == again.digest
    assert not straddling(dataset)


def test_train_and_val_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", i)
    for i in range(4):
        picture(tmp_path / "val" / "ab"[i % 2] / f"{i}.png", 50 + i)
    picture(tmp_path / "val" / "a" / "learnt.png", 0)  # the same picture as train/a/0.png
    dataset = load(f"folder:{tmp_path}")
    assert len(dataset.test) == 5
    assert len(dataset.train) == 5
    assert not straddling(dataset)
    picture(tmp_path / "val" / "c" / "0.png", 99)
    with pytest.raises(DataError, match="'c'"):
        load(f"folder:{tmp_path}")


def test_a_train_folder_alone_gives_a_share_of_itself(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "whole").mkdir()
    folder.rename(tmp_path / "whole" / "train")
    dataset = load(f"folder:{tmp_path / 'whole'}")
    assert "a fifth of train/ is held out" in capsys.readouterr().err
    assert dataset.labels == ("cat", "dog")
    assert (len(dataset.train), len(dataset.test)) == (24, 6)


def test_a_moved_picture_changes_the_digest(tmp_path: Path) -> None:
    """The last of one class becoming the first of the next is the same list of contents, and another data set."""
    for i in range(6):
        picture(tmp_path / "train" / "ab"[i // 3] / f"{i}.png", i)
        picture(tmp_path / "val" / "ab"[i // 3] / f"{i}.png", 10 + i)
    before = load(f"folder:{tmp_path}").digest
    (tmp_path / "train" / "a" / "2.png").rename(tmp_path / "train" / "b" / "2.png")
    assert load(f"folder:{tmp_path}").digest != before


def test_duplicates_never_straddle(tmp_path: Path) -> None:
    """Ten pictures, four copies each, some under another class too."""
    for i in range(10):
        for copy in range(4):
            picture(tmp_path / ("a" if i < 7 else "b") / f"{i}-{copy}.png", i)
        picture(tmp_path / "b" / f"mislabelled-{i}.png", i)
    dataset = load(f"folder:{tmp_path}")
    assert len(dataset.test)
    assert not straddling(dataset)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=60),
    st.floats(0.05, 0.5),
)
@settings(deadline=None)
def test_a_split_covers_all_and_parts_no_group(samples: list[tuple[int, int]], share: float) -> None:
    targets = np.array([target for target, _ in samples])
    groups = [group for _, group in samples]
    train, test = stratified(targets, groups, share)
    assert sorted(train + test) == list(range(len(samples)))
    assert not {groups[i] for i in train} & {groups[i] for i in test}
    assert (train, test) == stratified(targets, groups, share)


def test_every_class_keeps_something_to_train_on() -> None:
    """Also where another class has decided for all of its groups, and at a share that would take all."""
    targets = np.array([0] * 6 + [1, 1])
    for seed in range(20):
        train, test = stratified(targets, [0, 1, 2, 3, 4, 5, 2, 2], 0.5, seed)
        assert set(targets[train]) == {0, 1}
        assert len({i in train for i in (2, 6, 7)}) == 1  # one group
        assert sorted(train + test) == list(range(8))
    train, test = stratified(np.array([0, 0, 1, 1]), range(4), 0.9)
    assert [len(train), len(test)] == [2, 2]


def test_what_is_added_to_a_folder_hardly_moves_the_others(folder: Path) -> None:
    """A model of before is judged on the new held-out split: it must not be what the model was trained on."""
    before = load(f"folder:{folder}")
    picture(folder / "cat" / "aa.png", 500)
    picture(folder / "dog" / "zz.png", 501)
    after = load(f"folder:{folder}")
    assert len(set(after.test.ids) & set(before.train.ids)) <= 1
    assert len(after.all) == len(before.all) + 2


def test_classes_too_small_for_a_sample_share_some() -> None:
    """A tenth of four is none: the best of 300 epochs would be chosen by one picture."""
    from edgekit.data.dataset import Split

    targets = np.repeat(np.arange(50), 4)
    split = Split(tuple(map(str, range(200))), targets, str)
    rest, part = split.part(0.1)
    assert len(part) == 20
    assert len(set(part.targets.tolist())) == 20
    assert len(rest) == 180
    assert len(split.take(range(8)).part(0.1)[1]) == 1
    assert len(split.take(range(4)).part(0.1)[1]) == 0  # nothing, not one for all


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    """All truths would be taken for the first of them, and every answer be right."""
    np.savez(tmp_path / "d.npz", images=np.zeros((20, 8, 8), np.uint8), labels=np.arange(20) % 2, classes=["a", "a"])
    with pytest.raises(DataError, match="two classes called 'a'"):
        load(f"npz:{tmp_path / 'd.npz'}")


def test_one_class_or_an_empty_class_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "only" / "0.png", 0)
    with pytest.raises(DataError, match="1 class"):
        load(f"folder:{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        load(f"folder:{tmp_path}")
    picture(tmp_path / "test" / "only" / "0.png", 0)
    (tmp_path / "test" / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):  # as a folder of its own it is trained on
        load(f"folder:{tmp_path / 'test'}")


def test_one_image_a_class_leaves_nothing_to_test_on(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "0.png", 0)
    picture(tmp_path / "b" / "0.png", 1)
    with pytest.raises(DataError, match="no samples to test on"):
        load(f"folder:{tmp_path}")


def test_damaged_images_are_named_skipped_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    tensors = load(f"folder:{folder}").all.tensors(SMALL)
    assert tensors.damaged == ("cat/broken.png",)
    assert len(tensors.x) == len(tensors.y) == len(tensors.ids) == 30
    assert "cat/broken.png" not in tensors.ids
    assert np.isfinite(tensors.x).all()
    assert "skipped cat/broken.png" in capsys.readouterr().err


def test_more_than_a_twentieth_damaged_is_a_wrong_folder(folder: Path) -> None:
    good = (folder / "cat" / "00.png").read_bytes()
    (folder / "cat" / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "cat" / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 32 .* over 5%"):
        check_damaged(load(f"folder:{folder}").all.tensors(SMALL))


def test_damage_is_counted_over_all_splits_together(folder: Path) -> None:
    """One damaged picture of 31 is few, even where it is one of six in its split."""
    (folder / "cat" / "empty.png").write_bytes(b"")
    dataset = load(f"folder:{folder}")
    check_damaged(dataset.train.tensors(SMALL), dataset.test.tensors(SMALL))


def test_a_dangling_link_is_a_damaged_image(folder: Path) -> None:
    (folder / "dog" / "gone.png").symlink_to("nowhere.png")
    assert load(f"folder:{folder}").all.tensors(SMALL).damaged == ("dog/gone.png",)


def test_what_is_no_image_by_name_is_not_looked_at(folder: Path) -> None:
    before = load(f"folder:{folder}").digest
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / "._00.png").write_bytes(b"a file manager's")
    (folder / "cat" / "album.png").mkdir()
    (folder / ".cache").mkdir()
    assert load(f"folder:{folder}").digest == before


def test_names_that_are_not_utf8(folder: Path) -> None:
    os.rename(folder / "cat" / "00.png", os.fsencode(folder / "cat") + b"/\xff.png")
    assert len(load(f"folder:{folder}").all) == 30
    os.rename(folder / "cat", os.fsencode(folder) + b"/c\xff")
    with pytest.raises(DataError, match="UTF-8"):
        load(f"folder:{folder}")


# npz


def save(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return f"npz:{path}"


def images(n: int = 20, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *(shape or (6, 7))), dtype=np.uint8)


@pytest.mark.parametrize(("shape", "channels"), [((6, 7), 1), ((6, 7, 1), 1), ((6, 7, 3), 3)])
def test_npz_images_arrive_in_their_own_size(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    dataset = load(save(tmp_path / "d.npz", images=images(20, *shape), labels=np.arange(20) % 2))
    tensors = dataset.all.tensors(dataset.preprocessing)
    assert tensors.x.shape == (20, channels, 6, 7)
    assert dataset.labels == ("0", "1")
    assert len(dataset.test) == 4


def test_npz_class_names(tmp_path: Path) -> None:
    by_index = load(save(tmp_path / "i.npz", x=images(), y=np.arange(20) % 2 + 1, classes=["a", "b", "c"]))
    assert by_index.labels == ("a", "b", "c")
    assert set(by_index.all.targets.tolist()) == {1, 2}
    by_name = load(save(tmp_path / "n.npz", x=images(), y=np.array(["c", "a"] * 10), classes=["a", "b", "c"]))
    assert by_name.all.targets.tolist() == [2, 0] * 10
    with pytest.raises(DataError, match="run from 0 to 3"):
        load(save(tmp_path / "w.npz", x=images(), y=np.arange(20) % 4, classes=["a", "b", "c"]))
    with pytest.raises(DataError, match="run from -1"):
        load(save(tmp_path / "m.npz", x=images(), y=np.arange(20) % 4 - 1, classes=["a", "b", "c"]))


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"images": images()},
        {"images": images(), "labels": np.zeros(19, int)},
        {"images": images().astype(np.float32), "labels": np.zeros(20, int)},
        {"images": images(20, 6, 7, 2), "labels": np.zeros(20, int)},
        {"images": images(20, 6, 0), "labels": np.zeros(20, int)},
        {"images": images(20, 6), "labels": np.zeros(20, int)},
        {"images": images(2, 1, 9000), "labels": np.zeros(2, int)},
        {"images": images(), "labels": np.full(20, np.nan)},
        {"images": np.zeros((0, 6, 7), np.uint8), "labels": np.zeros(0, int)},
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(DataError):
        load(save(tmp_path / "d.npz", **arrays))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    buffer = io.BytesIO()
    np.save(buffer, images())
    good = Path(save(path, images=images(), labels=np.zeros(20, int)).removeprefix("npz:")).read_bytes()
    pickled = io.BytesIO()
    np.savez(pickled, images=np.array([{}], object), labels=np.zeros(1, int), allow_pickle=True)
    for content in (b"", b"junk", b"PK\x03\x04junk", good[:-30], good[: len(good) // 2], buffer.getvalue(), pickled.getvalue()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"d\.npz"):
            load(f"npz:{path}")
    path.write_text("images,labels\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"d\.npz cannot be read: it is no \.npz"):
        load(f"npz:{path}")
    with pytest.raises(DataError):
        load(f"npz:{tmp_path}")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_mutated_npz_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images(4), labels=np.arange(4) % 2)
    mutated = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.npz"
    path.write_bytes(mutated)
    with contextlib.suppress(EdgekitError):
        load(f"npz:{path}")

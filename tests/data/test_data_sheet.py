"""`edgekit data` and `edgekit augment`: what they find, what they draw, and what they never do."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgekit.data import load
from edgekit.data.augment import POLICIES
from edgekit.data.sheets.contact import VERSIONS, augmentation_sheet
from edgekit.data.sheets.drawing import clean, shorten, width_of, wrap
from edgekit.data.sheets.inspection import inspect, near_pairs
from edgekit.data.sheets.report import data_report, figures_of
from edgekit.errors import DataError, MissingExtra, OutputExists, UsageError


def scene(seed: int, side: int = 40) -> Image.Image:
    """A coarse random picture, as unlike another as two photos are."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize((side, side + seed % 3), Image.Resampling.BICUBIC)


def folder_of(root: Path) -> Path:
    """train/ and val/ of three classes, without a fault."""
    seed = 0
    for part, count in (("train", 6), ("val", 3)):
        for label in ("cup", "dish", "pan"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                seed += 1
                scene(seed).save(root / part / label / f"{i}.png")
    return root


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """The same with one of each fault."""
    root = folder_of(tmp_path / "faulty")
    copy = (root / "train/cup/0.png").read_bytes()
    (root / "train/pan/wrong.png").write_bytes(copy)  # another label
    (root / "val/dish/leak.png").write_bytes((root / "train/dish/1.png").read_bytes())  # in both splits
    (root / "train/pan/twin.png").write_bytes((root / "train/pan/2.png").read_bytes())
    again = scene(5).resize((90, 88))  # train/cup/4.png at another size, as JPEG, held out
    again.save(root / "val/cup/again.jpg", quality=60)
    (root / "train/dish/text.png").write_bytes(b"no picture")
    (root / "val/dish/cut.png").write_bytes((root / "train/dish/3.png").read_bytes()[:200])
    return root


def texts_file(path: Path) -> str:
    rows = [f"this is wanted number {i},ham,{'test' if i % 4 == 0 else 'train'}" for i in range(12)]
    rows += [f"buy cheap thing {i},spam,{'test' if i % 4 == 0 else 'train'}" for i in range(8)]
    rows += ["Buy  CHEAP thing 4,spam,train", "both,ham,train", "both,spam,train"]
    path.write_text("text,label,split\n" + "\n".join(rows), encoding="utf-8")
    return f"csv:{path}"


def series_file(path: Path) -> str:
    rng = np.random.default_rng(0)
    lines = ["series,label,a,b"]
    for i in range(16):
        length = 12 + i % 5
        for a, b in rng.normal(i % 2, 1, (length, 2)):
            lines.append(f"s{i},{'up' if i % 2 else 'down'},{a:.3f},{b:.3f}")
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"csv:{path}"


def tiny(kind: str, tmp_path: Path) -> str:
    if kind == "text":
        return texts_file(tmp_path / "texts.csv")
    if kind == "series":
        return series_file(tmp_path / "series.csv")
    return "labels:lines,24" if kind == "lines" else f"folder:{folder_of(tmp_path / 'plain')}"


KINDS = ["pictures", "lines", "text", "series"]


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.copy()


def ids(groups: list[dict[str, Any]]) -> list[set[str]]:
    return [{sample["id"] for sample in group["samples"]} for group in groups]


# data: what is found


def test_faults_are_found(cli: Any, faulty: Path, tmp_path: Path) -> None:
    out = tmp_path / "data.png"
    done = cli("data", "--data", f"folder:{faulty}", "--out", out, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert (found["data"], found["task"], found["out"]) == (f"folder:{faulty}", "image-classification", str(out))
    assert (found["train"], found["held_out"], found["left_out"]) == (20, 12, 1)  # left out: what leaked
    assert found["classes"] == [
        {"label": "cup", "train": 6, "held_out": 4},
        {"label": "dish", "train": 6, "held_out": 5},
        {"label": "pan", "train": 8, "held_out": 3},
    ]
    assert found["imbalance"] == pytest.approx(8 / 6)
    assert sorted(map(sorted, ids(found["duplicates"]))) == [
        ["cup/0.png", "pan/wrong.png"],
        ["dish/1.png", "dish/leak.png"],
        ["pan/2.png", "pan/twin.png"],
    ]
    across = {min(names): group["across"] for names, group in zip(ids(found["duplicates"]), found["duplicates"], strict=True)}
    assert across == {"cup/0.png": False, "dish/1.png": True, "pan/2.png": False}
    (wrong,) = found["conflicting"]
    assert {(sample["id"], sample["label"], sample["split"]) for sample in wrong["samples"]} == {
        ("cup/0.png", "cup", "train"),
        ("pan/wrong.png", "pan", "train"),
    }
    assert ids(found["near"]) == [{"cup/4.png", "cup/again.jpg"}]
    assert found["near"][0]["across"]
    assert {(sample["id"], sample["split"]) for sample in found["damaged"]} == {
        ("dish/text.png", "train"),
        ("dish/cut.png", "held out"),
    }
    assert all(sample["reason"] for sample in found["damaged"])
    assert (found["unit"], found["sizes"]["min"][0], found["sizes"]["max"]) == ("pixels", 40, [90, 88])
    image = opened(out)
    assert image.width == 1200
    assert 800 < image.height < 4000


def test_contradictions_are_named_in_words(cli: Any, faulty: Path, tmp_path: Path) -> None:
    done = cli("data", "--data", f"folder:{faulty}", "--out", tmp_path / "data.png")
    assert done.code == 0
    assert "equal samples with different labels: 1" in done.out
    assert "cup | pan" in done.out
    assert "damaged samples: 2" in done.out
    assert f"picture: {tmp_path / 'data.png'}" in done.out


def test_a_clean_set_has_nothing_to_hide(tmp_path: Path) -> None:
    found = data_report(f"folder:{folder_of(tmp_path / 'clean')}", tmp_path / "data.png")
    assert [found[key] for key in ("duplicates", "conflicting", "near", "damaged", "left_out")] == [[], [], [], [], 0]


def test_equal_texts_are_equal_whatever_their_case(tmp_path: Path) -> None:
    found = data_report(texts_file(tmp_path / "texts.csv"), tmp_path / "data.png")
    equal = [{"texts.csv/18", "texts.csv/22"}, {"texts.csv/23", "texts.csv/24"}]
    assert sorted(ids(found["duplicates"]), key=min) == equal
    (leak,) = [group for group in found["duplicates"] if group["across"]]
    assert {sample["split"] for sample in leak["samples"]} == {"held out", "left out"}
    (wrong,) = found["conflicting"]
    assert {sample["label"] for sample in wrong["samples"]} == {"ham", "spam"}
    assert (found["left_out"], found["unit"], found["near"]) == (1, "characters", None)


def test_equal_series_are_found(tmp_path: Path) -> None:
    spec = series_file(tmp_path / "series.csv")
    path = tmp_path / "series.csv"
    lines = path.read_text().splitlines()
    again = [line.replace("s0,down", "copy,up") for line in lines if line.startswith("s0,")]
    path.write_text("\n".join(lines + again))
    found = data_report(spec, tmp_path / "data.png")
    assert ids(found["conflicting"]) == [{"series.csv/s0", "series.csv/copy"}]
    assert (found["unit"], found["sizes"]) == ("steps", {"min": 12, "median": 14, "max": 16})


def test_of_a_reader_characters_are_counted(tmp_path: Path) -> None:
    dataset = load("labels:lines,24")
    found = inspect(dataset)
    written = [found.label(i) for i in range(len(dataset.train))]
    counts = {row["label"]: row["train"] for row in figures_of(found)["classes"]}
    assert counts == {c: "".join(written).count(c) for c in dataset.labels[1:]}
    assert found.near is None


def test_equal_pictures_of_an_npz_file(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (30, 9, 9), np.uint8)
    images[7] = images[3]
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(30) % 3)
    found = data_report(f"npz:{tmp_path / 'set.npz'}", tmp_path / "data.png")
    assert ids(found["conflicting"]) == [{"set.npz/3", "set.npz/7"}]
    assert found["train"] + found["held_out"] == 30


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn(kind: str, cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "data.png"
    spec = tiny(kind, tmp_path)
    done = cli("data", "--data", spec, "--out", out, "--json")
    assert done.code == 0, done.err
    dataset = load(spec)
    assert (done.json["train"], done.json["held_out"]) == (len(dataset.train), len(dataset.test))
    image = opened(out)
    assert image.width == 1200
    assert 400 < image.height < 4000
    assert np.asarray(image).std() > 5
    assert not [path.name for path in out.parent.iterdir() if path != out]


def test_many_odd_classes_fit_on_a_page(tmp_path: Path) -> None:
    names = [f"{'very ' * 30}long\n{i}" if i % 2 else f"größe 品 \x07{i}" for i in range(60)]
    images = np.random.default_rng(0).integers(0, 255, (240, 8, 30, 3), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.arange(240) % 60, classes=np.array(names))
    found = data_report(f"npz:{tmp_path / 'set.npz'}", tmp_path / "data.png")
    assert len(found["classes"]) == 60
    assert 1500 < opened(tmp_path / "data.png").height < 4000


def test_more_damage_than_training_takes_is_shown_not_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"")
    found = data_report(f"folder:{root}", tmp_path / "data.png")
    assert len(found["damaged"]) == found["held_out"] == 9


def test_pictures_that_look_alike() -> None:
    def small(image: Image.Image) -> Any:
        return np.asarray(image.convert("L").resize((18, 16), Image.Resampling.BILINEAR))

    pictures = [scene(seed, 120) for seed in range(30)]
    buffer = io.BytesIO()
    pictures[4].resize((75, 80)).save(buffer, "JPEG", quality=40)
    darker = Image.eval(pictures[9], lambda value: int(value * 0.8))
    flat = [Image.new("L", (20, 20), 90)] * 3  # nothing on them: alike without meaning
    rows = [*pictures, Image.open(buffer), darker, *flat]
    assert near_pairs(np.stack([small(image) for image in rows])) == [(4, 30), (9, 31)]
    assert near_pairs(np.zeros((0, 16, 18), np.uint8)) == []


def test_too_many_pictures_are_not_compared(faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.data.sheets.inspection.NEAR_LIMIT", 10)
    found = data_report(f"folder:{faulty}", tmp_path / "data.png")
    assert found["near"] is None
    assert len(found["duplicates"]) == 3


# data: what is refused


@pytest.mark.parametrize("command", [("data", "--out"), ("augment", "--show")])
def test_an_existing_file_stays(cli: Any, few_digits: str, tmp_path: Path, command: tuple[str, str]) -> None:
    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    done = cli(command[0], "--data", few_digits, command[1], mine)
    assert done.code == 2
    assert "exists already" in done.err
    assert mine.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


@pytest.mark.parametrize("command", [("data", "--out"), ("augment", "--show")])
def test_only_a_png_is_named_so(cli: Any, few_digits: str, tmp_path: Path, command: tuple[str, str]) -> None:
    done = cli(command[0], "--data", few_digits, command[1], tmp_path / "mine.jpg")
    assert done.code == 2
    assert "mine.png" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("data", "--out"), ("augment", "--show")])
@pytest.mark.parametrize(("spec", "code"), [("nonsense", 2), ("folder:", 2), ("folder:/no/such/folder", 1)])
def test_bad_specs(cli: Any, tmp_path: Path, command: tuple[str, str], spec: str, code: int) -> None:
    done = cli(command[0], "--data", spec, command[1], tmp_path / "x.png", "--json")
    assert done.code == code
    assert done.json["error"]
    assert not list(tmp_path.iterdir())


def test_without_pillow_its_extra_is_named_before_the_scan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for name in ("panels", "drawing"):
        monkeypatch.delitem(sys.modules, f"edgekit.data.sheets.{name}", raising=False)
    monkeypatch.setattr("edgekit.data.sheets.report.inspect", lambda dataset: pytest.fail("it was scanned"))
    with pytest.raises(MissingExtra) as caught:
        data_report("digits", tmp_path / "x.png")
    assert caught.value.module == "PIL"


# augment


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_augmented(kind: str, cli: Any, tmp_path: Path) -> None:
    spec = tiny(kind, tmp_path)
    done = cli("augment", "--data", spec, "--show", tmp_path / "sheet.png", "--json")
    assert done.code == 0, done.err
    dataset = load(spec)
    answer = done.json
    assert (answer["policy"], answer["versions"]) == (dataset.augmentation, VERSIONS)
    assert len(answer["samples"]) == 8
    if dataset.train.targets.ndim == 1:
        shown = {int(dataset.train.targets[dataset.train.ids.index(name)]) for name in answer["samples"]}
        assert shown == set(range(len(dataset.labels)))
    image = opened(tmp_path / "sheet.png")
    assert image.width == 1200
    assert 500 < image.height < 4000


def test_the_seed_decides(few_digits: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for path, seed in zip(files, (1, 1, 2), strict=True):
        augmentation_sheet(few_digits, path, seed=seed)
    one, two, three = (path.read_bytes() for path in files)
    assert one == two
    assert one != three


def test_no_policy_shows_the_original_eight_times(few_digits: str, tmp_path: Path) -> None:
    """So normalisation is undone exactly."""
    augmentation_sheet(few_digits, tmp_path / "sheet.png", policy="none")
    page = np.asarray(opened(tmp_path / "sheet.png"))
    rows = np.flatnonzero((page[:, 32:60] < 20).all((1, 2)))  # the digits' black ground
    row = page[rows[len(rows) // 2]]
    cell = (1136 - 16) // 9
    first = row[32 : 32 + cell - 8]
    for place in range(VERSIONS):
        start = 32 + 16 + cell * (place + 1)
        assert np.array_equal(row[start : start + cell - 8], first)


def test_dropped_tokens_are_marked(cli: Any, tmp_path: Path) -> None:
    spec = texts_file(tmp_path / "texts.csv")
    reds = []
    for policy in ("none", "text"):
        done = cli("augment", "--data", spec, "--policy", policy, "--show", tmp_path / f"{policy}.png")
        assert done.code == 0, done.err
        page = np.asarray(opened(tmp_path / f"{policy}.png")).astype(int)
        reds.append(int(((page[:, :, 0] > 150) & (page[:, :, 1] < 60)).sum()))
    assert reds[0] == 0
    assert reds[1] > 100


def test_options_that_do_not_fit(cli: Any, few_digits: str, tmp_path: Path) -> None:
    show = ("--show", tmp_path / "x.png")
    wrong_kind = cli("augment", "--data", few_digits, *show, "--policy", "text")
    unknown = cli("augment", "--data", few_digits, *show, "--policy", "nonsense")
    no_picture = cli("augment", "--data", series_file(tmp_path / "s.csv"), *show, "--size", "64")
    assert [done.code for done in (wrong_kind, unknown, no_picture)] == [2, 2, 2]
    assert "for text" in wrong_kind.err
    assert "--size 64 is for pictures" in no_picture.err
    assert not show[1].exists()
    with pytest.raises(UsageError):
        augmentation_sheet(texts_file(tmp_path / "t.csv"), show[1])  # without a tokenizer
    with pytest.raises(OutputExists):
        augmentation_sheet(few_digits, tmp_path)


def test_damaged_samples_are_passed_over(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "set")
    for path in sorted((root / "train").rglob("*.png"))[1:]:
        path.write_bytes(b"")
    answer = augmentation_sheet(f"folder:{root}", tmp_path / "sheet.png", policy="logistics", size=48)
    assert answer["samples"] == ["cup/0.png"]
    (root / "train/cup/0.png").write_bytes(b"")
    with pytest.raises(DataError, match="no training sample"):
        augmentation_sheet(f"folder:{root}", tmp_path / "none.png")


def test_the_help_names_every_policy(cli: Any) -> None:
    told = " ".join(cli("augment", "--help").out.split())
    assert " | ".join(POLICIES) in told


# text that fits


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.integers(10, 300))
def test_text_never_runs_over(text: str, width: int) -> None:
    assert width_of(shorten(text, width)) <= width
    lines = wrap(text, width, most=2)
    assert len(lines) <= 2
    assert all(width_of(line) <= width for line in lines)
    assert "\n" not in clean(text)


def test_what_the_font_lacks_loses_its_accents() -> None:
    assert clean("Größe  Čáp\n–€") == "Grosse Cap -EUR"
    assert shorten("a label that is long", 60).endswith("…")

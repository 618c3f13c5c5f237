"""The built-in recipes: each is valid and listed; each runs from end to end on little data."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.data import load
from edgekit.errors import DataError, UsageError
from edgekit.pipeline import built_in_recipes, pipeline, read_recipe

RECIPES = built_in_recipes()
FOLDERS = ("medical", "parcels", "signs")


def reduced(name: str) -> str:
    """The recipe with one epoch a training, no patience, small pictures, small networks and few cuts."""
    text = re.sub(
        r"^(epochs|validation|patience|size) = .*\n", "", RECIPES[name].read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    text = re.sub(r'^run = "(train|prune)"$', r'run = "\1"\nepochs = 1', text, flags=re.MULTILINE)
    text = text.replace('"depthwise-s"', '"depthwise-n"').replace("keep = 0.5", "keep = 0.9")
    if name in FOLDERS:
        text = text.replace('run = "train"', 'run = "train"\nsize = 32')
    text = re.sub(r"^max_drop = .*\n", "", text, flags=re.MULTILINE)
    return re.sub(r'^run = "bench"$', 'run = "bench"\nseconds = 0.05', text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes of 16 pictures each that colour and shape tell apart."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for label, colour in (("blue", (40, 60, 200)), ("red", (200, 40, 50)), ("yellow", (210, 200, 40))):
        (root / label).mkdir()
        for i in range(16):
            frame = random.integers(0, 90, (72, 80, 3), np.uint8)
            top, left = random.integers(4, 24, 2)
            frame[top : top + 40, left : left + 40] = np.array(colour) + random.integers(-30, 30, 3)
            Image.fromarray(frame).save(root / label / f"{i}.png")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def mails(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fourteenth of the recipe's mails."""
    path = tmp_path_factory.mktemp("mails") / "mails.csv"
    spam = load("spam").all
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([spam.read(i), ("ham", "spam")[spam.targets[i]]] for i in range(0, len(spam.ids), 14))
    return f"csv:{path}"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"digits"}))
def test_a_recipe_runs_from_end_to_end(name: str, folder: str, mails: str, short_texts: None, tmp_path: Path, cli):
    recipe = tmp_path / f"{name}.toml"
    recipe.write_text(reduced(name), encoding="utf-8")
    data = {"reading": "labels:lines,200", "spam": mails}.get(name, folder if name in FOLDERS else None)
    words = ["--data", data] if data else []
    outcome = cli("pipeline", recipe, "--out", tmp_path / "out", *words, "--json")
    assert outcome.code in (0, 3), outcome.err  # a budget may be missed after one epoch
    if outcome.code == 0:
        answer = outcome.json
        assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
        assert answer["engines"]
        assert answer["kits"]
        assert all(row["top1"] is not None for row in answer["table"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid(name: str, folder: str, cli):
    assert read_recipe(name, folder if name in FOLDERS else None).name == name
    shown = cli("pipeline", name, "--show")
    assert shown.code == 0
    assert shown.out.strip() == RECIPES[name].read_text(encoding="utf-8").strip()


def test_a_folder_of_the_recipes_name_is_no_recipe(folder: str, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The recipe reads `folder:parcels`: it is what lies there."""
    (tmp_path / "parcels").symlink_to(folder.removeprefix("folder:"))
    monkeypatch.chdir(tmp_path)
    assert read_recipe("parcels").data == "folder:parcels"
    assert cli("pipeline", "parcels", "--show").code == 0


def test_a_recipe_for_folders_asks_for_one(cli, tmp_path: Path):
    with pytest.raises(DataError, match="there is no folder signs"):
        read_recipe("signs")
    outcome = cli("pipeline", "signs", "--out", tmp_path / "out")
    assert outcome.code == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_recipe_lists_the_built_in_ones():
    with pytest.raises(UsageError, match="there is no recipe nonsense") as caught:
        read_recipe("nonsense")
    assert all(name in caught.value.hint for name in RECIPES)


def test_a_file_takes_precedence_over_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_digits: str):
    (tmp_path / "spam").write_text('name = "mine"\ndata = "digits"\n[[stage]]\nrun = "train"\nout = "a"')
    monkeypatch.chdir(tmp_path)
    assert read_recipe("spam").name == "mine"
    with pytest.raises(UsageError):
        pipeline("spam", data="nonsense")
    assert read_recipe("spam", few_digits).data == few_digits

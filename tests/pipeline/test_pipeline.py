"""The main job by recipe, on a few digits: everything is made, nothing is made twice, mistakes are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle import Bundle
from edgekit.errors import UsageError
from edgekit.pipeline import pipeline, read_recipe

RECIPE = """
name = "few"
data = "{data}"
seed = 1
[[stage]]
run = "train"
out = "small"
epochs = {epochs}
batch = 32
[[stage]]
run = "quantize"
bundle = "small"
out = "small8"
[[stage]]
run = "eval"
bundles = ["small", "small8"]
[[stage]]
run = "build"
bundle = "small8"
target = "rtx-ada"
[[stage]]
run = "bench"
bundles = ["small8"]
seconds = 0.2
[[stage]]
run = "samples"
out = "images"
count = 5
[[stage]]
run = "report"
bundles = ["small", "small8"]
[[stage]]
run = "scan"
bundle = "small8"
source = "images"
"""


def how(answer: dict) -> dict[str, str]:
    return {row["stage"].split()[0]: row["how"] for row in answer["stages"]}


def test_a_recipe_makes_everything_once(cli, tmp_path: Path, few_digits: str):
    recipe = tmp_path / "few.toml"
    recipe.write_text(RECIPE.format(data=few_digits, epochs=3))
    out = tmp_path / "out"
    first = cli("pipeline", recipe, "--out", out)
    assert first.code == 0, first.err
    events = [json.loads(line) for line in first.out.splitlines() if line.startswith("{")]
    assert len(events) == 5
    assert all(event["label"] in set("0123456789") for event in events)
    assert "top-1" in first.out
    assert (out / "small8.edge/engines/rtx-ada.engine").stat().st_size > 1000
    assert (out / "report.html").read_text().startswith("<!")

    again = pipeline(recipe, out=out)
    assert [stage for stage, was in how(again).items() if was == "run"] == ["scan"]

    recipe.write_text(RECIPE.format(data=few_digits, epochs=4))
    changed = how(pipeline(recipe, out=out))
    assert changed["train"] == changed["quantize"] == changed["build"] == changed["report"] == "run"
    assert changed["samples"] == "kept"
    assert Bundle.open(out / "small.edge").last("train").config["epochs"] == 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, few_digits: str) -> tuple[Path, Path]:
    """A recipe and the folder it made; tests copy both."""
    folder = tmp_path_factory.mktemp("made")
    recipe = folder / "few.toml"
    recipe.write_text(RECIPE.format(data=few_digits, epochs=2))
    pipeline(recipe, out=folder / "out")
    return recipe, folder / "out"


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    shutil.copy(made[0], tmp_path / "few.toml")
    shutil.copytree(made[1], tmp_path / "out")
    return tmp_path / "few.toml", tmp_path / "out"


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("small8.edge/engines/rtx-ada.engine", {"build", "report", "scan"}),
        ("small8.edge/bench/onnxruntime-int8-single-stream.json", {"bench", "report", "scan"}),
        ("small8.edge/model.int8.onnx", {"quantize", "eval", "build", "bench", "report", "scan"}),
        ("images/000-0.png", {"samples", "scan"}),
    ],
)
def test_a_damaged_output_costs_its_stage_and_no_other(copy: tuple[Path, Path], file: str, again: set[str]):
    recipe, out = copy
    damaged = bytearray((out / file).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (out / file).write_bytes(damaged)
    done = how(pipeline(recipe, out=out))
    assert {stage for stage, was in done.items() if was == "run"} <= again
    assert done["train"] == "kept"
    assert done[min(again - {"report", "scan"}, key=list(done).index)] == "run"
    Bundle.open(out / "small8.edge")


def test_a_file_of_the_users_among_the_outputs_stays(copy: tuple[Path, Path]):
    recipe, out = copy
    (out / "images/mine.txt").write_text("keep me")
    assert how(pipeline(recipe, out=out))["samples"] == "kept"
    recipe.write_text(recipe.read_text().replace("count = 5", "count = 6"))
    assert how(pipeline(recipe, out=out))["samples"] == "run"
    assert (out / "images/mine.txt").read_text() == "keep me"
    assert len(list((out / "images").glob("*.png"))) == 6


def test_changed_calibration_data_quantizes_again(copy: tuple[Path, Path], tmp_path: Path, few_digits: str):
    recipe, out = copy
    calib = tmp_path / "calib.npz"
    shutil.copy(few_digits.removeprefix("npz:"), calib)
    recipe.write_text(recipe.read_text().replace('out = "small8"', f'out = "small8"\ncalib = "npz:{calib}"'))
    assert how(pipeline(recipe, out=out))["quantize"] == "run"
    assert how(pipeline(recipe, out=out))["quantize"] == "kept"
    with np.load(calib) as file:
        np.savez(calib.with_name("new.npz"), images=file["images"][::-1], labels=file["labels"][::-1])
    calib.with_name("new.npz").replace(calib)
    assert how(pipeline(recipe, out=out))["quantize"] == "run"


def test_a_foreign_folder_in_the_way_is_not_removed(cli, tmp_path: Path, few_digits: str):
    recipe = tmp_path / "few.toml"
    recipe.write_text(RECIPE.format(data=few_digits, epochs=1))
    mine = tmp_path / "out/small.edge"
    mine.mkdir(parents=True)
    (mine / "precious").write_text("keep me")
    outcome = cli("pipeline", recipe, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "not overwritten" in outcome.err
    assert (mine / "precious").read_text() == "keep me"


def test_the_built_in_recipe_is_valid_and_can_be_shown(cli):
    assert [type(stage).__name__ for stage in read_recipe().stage][-1] == "Scan"
    shown = cli("pipeline", "--show")
    assert shown.code == 0
    assert 'run = "train"' in shown.out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "x"\nspeed = 1\nstage = []', "unknown field `speed`"),
        ('name = "x"\n[[stage]]\nrun = "train"\nout = "a"\ndata = "digits"\nepoch = 3', "unknown field `epoch`"),
        ('name = "x"\n[[stage]]\nrun = "fly"\nout = "a"', "Invalid value 'fly'"),
        ('name = "x"\n[[stage]]\nrun = "train"\nout = "a"\ndata = "digits"\nepochs = "many"', "Expected `int"),
        ('name = "x"\n[[stage]]\nrun = "train"\nout = "a"', "there is no data"),
        ('name = "x"\ndata = "digits"\n[[stage]]\nrun = "train"\nout = "a"\nmodel = "resnet"', "there is no model 'resnet'"),
        ('name = "x"\ndata = "digitz"\n[[stage]]\nrun = "train"\nout = "a"', "there is no data set 'digitz'"),
        (
            'name = "x"\ndata = "digits"\n[[stage]]\nrun = "train"\nout = "a"\n'
            + '[[stage]]\nrun = "build"\nbundle = "a"\ntarget = "rtx-adda"',
            "there is no target 'rtx-adda'",
        ),
        ('name = "x"\n[[stage]]\nrun = "build"\nbundle = "b"\ntarget = "rtx-ada"', "no earlier stage writes"),
        ('name = "x"\ndata = "digits"\n[[stage]]\nrun = "train"\nout = "../a"', "plain name"),
        ('name = "x"\ndata = "digits"\n' + '[[stage]]\nrun = "train"\nout = "a"\n' * 2, "is there twice"),
        ("name = ", "Invalid value"),
        ('name = "../x"\nstage = []', "plain word"),
        ('name = "x"\ndata = "digits"\n[[stage]]\nrun = "train"\nout = "a:b"', "plain name"),
        ('name = "x"\ndata = "digits"\n[[stage]]\nrun = "samples"\nout = "a"\ncount = 0', ">= 1"),
        (
            'name = "x"\ndata = "digits"\n[[stage]]\nrun = "train"\nout = "a"\n'
            + '[[stage]]\nrun = "eval"\nbundles = ["a"]\n' * 2,
            "twice",
        ),
    ],
)
def test_a_mistaken_recipe_is_named_before_anything_runs(cli, tmp_path: Path, text: str, words: str):
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    outcome = cli("pipeline", recipe, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 4
    assert not (tmp_path / "out").exists()


def test_missing_data_is_named_before_anything_runs(cli, tmp_path: Path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "x"\ndata = "folder:/no/such"\n[[stage]]\nrun = "train"\nout = "a"')
    outcome = cli("pipeline", recipe, "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "stage 1 (train a): there is no folder /no/such" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe():
    with pytest.raises(UsageError, match="there is no recipe"):
        read_recipe("no-such.toml")

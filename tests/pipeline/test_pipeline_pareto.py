"""`pareto`: the front of a study that several processes share, its bundles and pictures; every trial the whole way."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgekit
from edgekit.bundle import Bundle
from edgekit.data import Dataset, load, validation
from edgekit.errors import DataError, EdgekitError, GraphError, OutputExists, UsageError
from edgekit.pipeline.front_chart import front_chart
from edgekit.pipeline.pareto import pareto
from edgekit.pipeline.stopwatch import Stopwatch
from edgekit.pipeline.trial import Maker, Setting, Space
from edgekit.reporting.front import FRONT_SUFFIX, read_front
from edgekit.training.journal import Journal
from edgekit.training.plan import make_plan
from edgekit.training.search import search
from edgekit.training.train import fit_config

LINEAR = """
from torch import nn
def make(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))
"""
DEFAULT = Setting(1.0, 28, 1.0, "float")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a net that trains in no time, and that has one layer and one size: two settings, float and int8."""
    (tmp_path / "linear_nets.py").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def options(few_digits: str) -> dict[str, Any]:
    return {"data": few_digits, "study": "few.study", "epochs": 1}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, digits_bundle: Bundle) -> Iterator[list[Any]]:
    """Trials with the accuracy and the latency that the list holds; an exception is raised, a function called first.

    ``seen`` in it has the settings. The bundles are copies of one.
    """
    script: list[Any] = []
    answers: dict[Path, tuple[float, float]] = {}

    def make(self: Maker, setting: Setting, out: Path) -> Bundle:
        SEEN.append(setting)
        outcome = script.pop(0)
        if callable(outcome):
            outcome = outcome()
        if isinstance(outcome, BaseException):
            raise outcome
        answers[out] = outcome
        shutil.copytree(digits_bundle.path, out)
        return Bundle.open(out)

    def judge(self: Maker, bundle: Bundle) -> tuple[float, dict[str, Any]]:
        return answers[bundle.path][0], {"macs": 10, "parameters": 5, "size_bytes": bundle.size_bytes(), "int8": None}

    def latency(self: Maker, bundle: Bundle, stopwatch: Stopwatch) -> dict[str, Any]:
        return {"latency_ms": answers[bundle.path][1]}

    for name, function in (("make", make), ("judge", judge), ("latency", latency)):
        monkeypatch.setattr(Maker, name, function)
    SEEN.clear()
    yield script
    assert not script, "fewer trials than expected"


SEEN: list[Setting] = []


def beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether it is as good in both, and better in one."""
    pair = [(row["accuracy"], -row["latency_ms"]) for row in (one, other)]
    return pair[0] != pair[1] and all(a >= b for a, b in zip(*pair, strict=True))


def test_a_search_for_two_objectives_goes_the_whole_way(cli, few_digits: str):
    arguments = ["--data", few_digits, "--model", "linear_nets:make", "--epochs", "2", "--study", "few.study"]
    done = cli("search", *arguments, "--objective", "accuracy,latency", "--trials", "9", "--json")
    assert done.code == 0, done.err
    answer = done.json
    assert (answer["trials"], answer["failed"], answer["prediction"], answer["metric"]) == (2, 0, False, "top-1")
    assert "everything was tried: 2 settings" in done.err
    assert sorted(row["precision"] for row in answer["all"]) == ["float", "int8"]
    assert answer["all"][0]["precision"] == "float", "the first trial is of the defaults"
    assert answer["notes"]
    assert [row for row in answer["all"] if not any(beats(other, row) for other in answer["all"])]
    for row in answer["front"]:
        bundle = Bundle.open(row["bundle"])
        assert bundle.last("search").figures["latency_ms"] == row["latency_ms"] > 0
        assert bundle.has("model.int8.onnx") == (row["precision"] == "int8")
        assert (row["macs"], row["parameters"], row["size_bytes"]) == (7840, 7850, bundle.size_bytes())
        judged = edgekit.evaluate(bundle, bundle.last("train").config["data"])
        assert (judged["top1"], judged["samples"]) == (row["accuracy"], 50)
        assert edgekit.evaluate(bundle, few_digits)["samples"] == len(load(few_digits).test), "not those that it has seen"
    assert {path.name for path in Path("few.study.trials").iterdir()} == {
        "reference.npz", *(Path(row["bundle"]).name for row in answer["front"]),
    }  # fmt: skip
    seen = cli("search", *arguments, "--objective", "latency, accuracy", "--trials", "2")
    assert seen.code == 0, seen.err
    assert seen.out.splitlines()[0].startswith("few.study: 2 trials, 0 failed; ")
    assert "edgekit report few.study" in seen.out
    page = cli("report", "few.study", "--json")
    assert page.json["bundles"] == [row["bundle"] for row in answer["front"]]


def test_a_trial_trains_prunes_and_quantizes_without_the_held_out_split(
    tmp_path: Path, few_digits: str, monkeypatch: pytest.MonkeyPatch
):
    """On the validation part alone; its commands make it of everything."""

    def watched(spec: str) -> Dataset:
        def forbidden(i: int) -> Any:
            raise AssertionError("a held-out sample was read")

        dataset = load(spec)
        return dataclasses.replace(dataset, test=dataclasses.replace(dataset.test, read=forbidden))

    monkeypatch.setattr(validation, "load_other", watched)
    spec = f"validation:0.2:{few_digits}"
    plan = make_plan(spec)
    maker = Maker(spec, {"epochs": 1, "seed": 3, "batch": 32}, fit_config(plan, 1, seed=3), None)
    setting = Setting(0.5, 16, 0.5, "int8")
    bundle = maker.make(setting, tmp_path / "small.edge")
    manifest = bundle.manifest
    assert [entry.stage for entry in manifest.history] == ["train", "prune", "quantize"]
    assert manifest.model.args["widths"] == [8, 24, 48]
    assert (manifest.preprocessing.height, manifest.preprocessing.width) == (16, 16)
    assert bundle.last("prune").figures["macs_share"] <= 0.5
    assert {entry.config["data"] for entry in manifest.history if "data" in entry.config} == {spec}
    accuracy, figures = maker.judge(bundle)
    assert accuracy == edgekit.evaluate(bundle, spec)["top1"]
    assert figures["macs"] == bundle.last("prune").figures["macs"]
    assert maker.commands(setting, "digits", "few-7") == [
        "edgekit train --data digits --epochs 1 --seed 3 --batch 32 --width 0.5 --size 16 --out few-7.edge",
        "edgekit prune few-7.edge --keep 0.5 --epochs 1 --seed 3 --out few-7-pruned.edge",
        "edgekit quantize few-7-pruned.edge --seed 3 --out few-7-int8.edge",
    ]


def test_the_commands_of_a_trial_are_taken(cli, options: dict[str, Any], scripted: list[Any]):
    scripted += [(0.5, 1.0)] * 3
    for row in pareto(**options, trials=3)["all"]:
        for command in row["commands"]:
            words = shlex.split(command)
            assert words[0] == "edgekit"
            assert cli(*words[1:], "--help").code == 0


def test_the_front_is_what_no_other_trial_beats(options: dict[str, Any], scripted: list[Any]):
    draw = np.random.default_rng(5)
    scripted += [(float(a) / 10, float(b)) for a, b in draw.integers(1, 8, (16, 2))]
    answer = pareto(**options, trials=16)
    front = [row["trial"] for row in answer["front"]]
    best = [row for row in answer["all"] if not any(beats(other, row) for other in answer["all"])]
    assert {(row["accuracy"], row["latency_ms"]) for row in best} == {
        (row["accuracy"], row["latency_ms"]) for row in answer["front"]
    }
    assert len(front) < len(answer["all"])
    assert [row["latency_ms"] for row in answer["front"]] == sorted({row["latency_ms"] for row in best})
    assert {path.name for path in Path("few.study.trials").glob("*.edge")} == {f"trial-{number}.edge" for number in front}
    assert not list(Path("few.study.trials").glob(".trial-*"))
    settings = [Setting(*(row[name] for name in Setting._fields)) for row in answer["all"]]
    assert settings[0] == DEFAULT
    assert len(set(settings)) == 16, "one was tried twice"


def test_a_study_goes_on_and_its_files_follow(options: dict[str, Any], scripted: list[Any]):
    scripted += [(0.5, 1.0), (0.6, 2.0)]
    first = pareto(**options, trials=2)
    assert [row["trial"] for row in first["front"]] == [0, 1]
    assert Path(first["picture"]).read_text().count('class="front"') == 2
    scripted += [(0.7, 0.5)]
    after = pareto(**options, trials=3)
    assert [row["bundle"] for row in after["front"]] == ["few.study.trials/trial-2.edge"]
    stored = json.loads(Path(after["file"]).read_text())
    assert [(row["trial"], row["front"], row["bundle"]) for row in stored["trials"]] == [
        (0, False, None), (1, False, None), (2, True, "few.study.trials/trial-2.edge"),
    ]  # fmt: skip
    assert pareto(**options, trials=1)["trials"] == 3


def test_the_same_search_tries_the_same(options: dict[str, Any], scripted: list[Any]):
    scripted += [(0.1 * i, 1.0 + i % 3) for i in range(1, 8)] * 2
    for name in ("a.study", "b.study"):
        pareto(**{**options, "study": name}, trials=7)
    assert SEEN[:7] == SEEN[7:]
    assert len(set(SEEN)) == 7


def test_two_workers_share_a_study(options: dict[str, Any], scripted: list[Any]):
    """The second begins and ends while the first one's trial runs; neither tries what the other does."""

    def another() -> tuple[float, float]:
        assert pareto(**options, trials=2)["trials"] == 2
        return 0.9, 9.0

    scripted += [another, (0.5, 1.0), (0.6, 2.0)]
    answer = pareto(**options, trials=3)
    assert [row["trial"] for row in answer["front"]] == [1, 2, 0]
    assert all(Path(row["bundle"]).is_dir() for row in answer["front"])
    assert SEEN[0] == DEFAULT
    assert len(set(SEEN)) == 3


def test_a_failed_trial_has_a_reason_and_the_search_goes_on(options: dict[str, Any], scripted: list[Any]):
    scripted += [(0.5, 1.0), GraphError("what cannot be cut is 60% of the MACs"), (0.6, 2.0)]
    answer = pareto(**options, trials=3)
    assert (answer["trials"], answer["failed"]) == (3, 1)
    failed = [row for row in answer["all"] if row["accuracy"] is None]
    assert [(row["trial"], row["reason"], row["front"]) for row in failed] == [
        (1, "what cannot be cut is 60% of the MACs", False)
    ]
    assert "1 more failed" in Path(answer["picture"]).read_text()


def test_what_failed_in_float_is_not_tried_in_int8(options: dict[str, Any], scripted: list[Any]):
    scripted += [EdgekitError("it cannot be made")]
    with pytest.raises(EdgekitError, match="all 1 trials failed"):
        pareto(**{**options, "model": "linear_nets:make"}, trials=2)
    assert [setting.precision for setting in SEEN] == ["float"]


def test_where_every_trial_fails_the_reason_is_said(options: dict[str, Any], scripted: list[Any]):
    scripted += [EdgekitError("the loss is no longer finite")] * 2
    with pytest.raises(EdgekitError, match="all 2 trials failed; the last: the loss is no longer finite"):
        pareto(**options, trials=2)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("the data are gone")])
def test_what_an_interrupted_trial_tried_is_tried_again(options: dict[str, Any], scripted: list[Any], error: BaseException):
    scripted += [error]
    with pytest.raises(type(error)):
        pareto(**options, trials=1)
    scripted += [(0.5, 1.0)]
    answer = pareto(**options, trials=1)
    assert (answer["trials"], answer["failed"]) == (1, 0)
    assert SEEN == [DEFAULT, DEFAULT]


def test_a_killed_trial_leaves_nothing_and_is_tried_again(options: dict[str, Any], scripted: list[Any]):
    scripted += [(0.5, 1.0)]
    pareto(**options, trials=1)
    journal = Journal(Path("few.study"), {"seed": 0}, ("maximize", "minimize"))
    killed = journal.ask()
    setting = Space.around(make_plan(options["data"]), None).draw(killed)
    left = Path(f"few.study.trials/.trial-{killed.number}")
    (left / "trained.edge").mkdir(parents=True)
    scripted += [(0.6, 2.0)]
    answer = pareto(**options, trials=2)
    assert answer["trials"] == 2
    assert SEEN[0] == DEFAULT
    assert SEEN[1:] == [setting]
    assert not left.exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": "digits"}, "is of another data"),
        ({"model": "residual"}, "is of another model"),
        ({"epochs": 3}, "is of another epochs: 1, not 3"),
        ({"on": "jetson-orin-nano"}, "is of another on: None, not jetson-orin-nano"),
        ({"size": 20}, "is of another input"),
    ],
)
def test_a_study_of_something_else_is_refused(
    options: dict[str, Any], scripted: list[Any], changed: dict[str, Any], words: str
):
    scripted += [(0.5, 1.0)]
    pareto(**options, trials=1)
    with pytest.raises(UsageError, match=words):
        pareto(**{**options, **changed}, trials=2)


def test_a_study_of_the_other_kind_is_refused(options: dict[str, Any], scripted: list[Any]):
    scripted += [(0.5, 1.0)]
    pareto(**options, trials=1)
    with pytest.raises(UsageError, match="is of another objective"):
        search(**options, trials=2)
    search(**{**options, "study": "one.study", "model": "linear_nets:make", "augment": "none"}, trials=1)
    with pytest.raises(UsageError, match="is of another objective"):
        pareto(**{**options, "study": "one.study"}, trials=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objective", "speed"], "there is no objective 'speed'"),
        (["--objective", "latency"], "there is no objective 'latency'"),
        (["--on", "jetson-orin-nano"], "--on jetson-orin-nano is where latency is predicted for"),
        (["--objective", "accuracy,latency", "--on", "nowhere"], "there is no target 'nowhere'"),
        (["--objective", "accuracy,latency", "--data", "spam", "--size", "20"], "--size 20 is for pictures"),
    ],
)
def test_a_wrong_call_is_one_line_and_a_cure(cli, arguments: list[str], words: str):
    done = cli("search", "--data", "digits", "--study", "few.study", *arguments)
    assert (done.code, done.out) == (2, "")
    error, hint = done.err.splitlines()
    assert error.startswith(f"error: {words}")
    assert hint.startswith("hint: ")
    assert not Path("few.study").exists()


def test_files_in_the_way_are_left_alone(options: dict[str, Any]):
    for name, error in (("few.study.svg", OutputExists), ("few.study.front.json", OutputExists)):
        Path(name).write_text("mine")
        with pytest.raises(error):
            pareto(**options)
        assert Path(name).read_text() == "mine"
        Path(name).unlink()
    Path("few.study.trials/trial-0.edge").mkdir(parents=True)
    with pytest.raises(UsageError, match="not the study of its trials"):
        pareto(**options)
    assert Path("few.study.trials/trial-0.edge").is_dir()


def test_latency_for_a_target_is_a_prediction(few_digits: str):
    made = pareto(data=few_digits, study="orin.study", model="linear_nets:make", epochs=1, trials=2, on="jetson-orin-nano")
    assert made["prediction"] is True
    assert made["latency"] == "predicted for jetson-orin-nano"
    for row in made["all"]:
        assert row["runs_as"] == ("int8" if row["precision"] == "int8" else "fp16")
    for row in made["front"]:
        assert row["latency_ms"] == edgekit.estimate(row["bundle"], target="jetson-orin-nano")["latency_ms"]
    assert not Path("orin.study.trials/reference.npz").exists()


@pytest.mark.parametrize(
    ("data", "model", "sizes", "axes"),
    [
        ("digits", None, (16, 20, 24, 28, 36), {"width", "size", "keep", "precision"}),
        ("digits", "textbook", (20, 24, 28, 36), {"size", "keep", "precision"}),
        ("digits", "linear_nets:make", (28,), {"precision"}),
        ("digits", "gru-rows", (16, 20, 24, 28, 36), {"width", "size", "precision"}),
        ("spam", None, (None,), {"width", "precision"}),
    ],
)
def test_the_space_is_what_the_model_and_its_data_have(data: str, model: str | None, sizes: tuple[Any, ...], axes: set[str]):
    space = Space.around(make_plan(data, model), None)
    assert space.axes["size"] == sizes
    assert set(space.params(space.default)) == axes
    assert space.setting(space.params(space.default)) == space.default
    assert space.default in set(space.all())


def test_a_stopwatch_has_one_reference(digits_bundle: Bundle, tiny_bundle: Bundle, tmp_path: Path):
    """Graphs with inputs of other sizes are held against the first that was measured."""
    watch = Stopwatch(tmp_path / "reference.npz")
    first = watch.measure(digits_bundle)
    kept = watch.file.read_bytes()
    assert 0.5 < first["ratio"] < 2, "it is the reference itself"
    other = watch.measure(tiny_bundle)
    assert watch.file.read_bytes() == kept
    assert other["reference_ms"] == first["reference_ms"]
    assert other["latency_ms"] == pytest.approx(other["ratio"] * other["reference_ms"])
    watch.file.write_bytes(b"x")
    with pytest.raises(UsageError, match="cannot be read"):
        watch.measure(digits_bundle)


rows = st.builds(
    lambda *values: dict(zip(("trial", "accuracy", "latency_ms", "front", "size"), values, strict=True))
    | {"width": 0.5, "keep": 0.25, "precision": "int8"},
    st.integers(0, 999), st.none() | st.floats(0, 1), st.floats(1e-6, 1e6), st.booleans(), st.none() | st.just(28),
)  # fmt: skip


@given(st.lists(rows, max_size=12))
def test_the_picture_holds_every_trial(found: list[dict[str, Any]]):
    good = [row for row in found if row["accuracy"] is not None]
    for row in found:
        row["front"] = row is min(good, key=lambda r: r["latency_ms"], default=None) or (row["front"] and row in good)
    about = {"study": "<&\x00", "model": "m", "data": "d", "metric": "top-1", "latency": "here"}
    root = ElementTree.fromstring(front_chart({**about, "trials": found}))  # noqa: S314
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    dots = [node for node in root.iter() if node.tag.endswith("circle")]
    assert len(dots) == len(good)
    for node in root.iter():
        places = {key: float(node.attrib[key]) for key in ("cx", "cy", "x1", "x2", "y1", "y2") if key in node.attrib}
        assert all(0 <= value <= (width if "x" in key else height) for key, value in places.items()), (node.attrib, found)


def test_a_front_that_is_none_is_refused(tmp_path: Path):
    for text in ("", "[]", "{}", '{"kind": "other", "trials": []}'):
        path = tmp_path / f"x{FRONT_SUFFIX}"
        path.write_text(text)
        with pytest.raises(DataError, match="holds no front"):
            read_front(path)


def test_optuna_agrees(options: dict[str, Any], scripted: list[Any]):
    draw = np.random.default_rng(1)
    scripted += [(float(a), float(b) + 0.1) for a, b in draw.random((10, 2))]
    answer = pareto(**options, trials=10)
    best = Journal(Path("few.study"), {"seed": 0}, ("maximize", "minimize")).study.best_trials
    assert {row["trial"] for row in answer["front"]} == {trial.number for trial in best}


@pytest.mark.slow
def test_two_processes_share_a_study(few_digits: str):
    """Neither tries what the other does; each may do one trial more than wanted."""
    command = [sys.executable, "-m", "edgekit", "search", "--data", few_digits, "--objective", "accuracy,latency"]
    command += ["--epochs", "1", "--study", "few.study", "--trials", "2"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    answer = pareto(data=few_digits, study="few.study", epochs=1, trials=2)
    assert 2 <= answer["trials"] <= 3
    settings = {tuple(row[name] for name in Setting._fields) for row in answer["all"]}
    assert len(settings) == answer["trials"]
    assert {path.name for path in Path("few.study.trials").iterdir()} == {
        "reference.npz", *(Path(row["bundle"]).name for row in answer["front"]),
    }  # fmt: skip

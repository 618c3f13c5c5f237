"""`search`: a study that several processes share, goes on, prunes, forgives, and ends with a command that `train` takes."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import Bundle
from edgekit.data import Dataset, load
from edgekit.errors import DataError, EdgekitError, MissingExtra, UsageError
from edgekit.training import plan as planning
from edgekit.training.journal import Journal
from edgekit.training.search import search

LOOP = sys.modules["edgekit.training.search"]
SETTINGS = ("lr", "batch", "weight_decay", "smoothing")
LINEAR = """
from torch import nn
def make(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a net that trains in no time."""
    (tmp_path / "quick_nets.py").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def options(few_digits: str) -> dict[str, Any]:
    return {"data": few_digits, "study": "few.study", "model": "quick_nets:make", "epochs": 2, "augment": "none"}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Trainings that score what the list holds, one entry each, at every epoch; an exception is raised."""
    script: list[Any] = []

    def fit(module: Any, data: Any, watched: Any, config: Any, *, on_epoch: Callable[[int, float], None], **_: Any) -> None:
        outcome = script.pop(0)
        for epoch in range(config.epochs):
            if isinstance(outcome, BaseException):
                raise outcome
            on_epoch(epoch, outcome)

    monkeypatch.setattr(LOOP, "fit", fit)
    yield script
    assert not script, "fewer trials than expected"


def test_a_search_ends_with_a_command_that_trains_what_it_found(cli, few_digits: str):
    arguments = ["--data", few_digits, "--model", "quick_nets:make", "--epochs", "2", "--seed", "4", "--study", "few.study"]
    done = cli("search", *arguments, "--trials", "4", "--json")
    assert done.code == 0, done.err
    answer = done.json
    assert {key: answer[key] for key in ("study", "trials", "pruned", "failed", "metric")} == {
        "study": "few.study", "trials": 4, "pruned": 0, "failed": 0, "metric": "top1",
    }  # fmt: skip
    best = answer["best"]
    assert best == max(answer["top"], key=lambda row: row["score"])
    assert len(answer["top"]) == 4
    assert any((row["lr"], row["weight_decay"], row["smoothing"]) == (1e-3, 0.05, 0.1) for row in answer["top"])
    assert "4 of 4 done" in done.err
    assert "[I " not in done.err, "Optuna speaks"
    command = shlex.split(answer["command"])
    assert command[:2] == ["edgekit", "train"]
    assert cli(*command[1:]).code == 0
    config = Bundle.open("few.edge").manifest.history[-1].config
    assert {key: config[key] for key in SETTINGS} == {key: best[key] for key in SETTINGS}
    assert (config["epochs"], config["seed"], config["model"]) == (2, 4, "quick_nets:make")


def test_people_see_a_table_of_the_best_five(cli, few_digits: str, scripted: list[Any]):
    scripted += [0.5] * 6
    done = cli("search", "--data", few_digits, "--study", "few.study", "--epochs", "1", "--trials", "6")
    lines = done.out.splitlines()
    assert lines[0] == "few.study: 6 trials, 0 given up early, 0 failed"
    assert lines[2].split() == ["trial", "score", *SETTINGS]
    assert len(lines) == 11
    assert lines[-1].startswith("edgekit train --data ")


def test_a_study_goes_on(options: dict[str, Any], scripted: list[Any]):
    scripted += [0.1, 0.2, 0.3]
    assert search(**options, trials=3)["trials"] == 3
    scripted += [0.4, 0.5]
    assert search(**options, trials=5)["trials"] == 5
    assert search(**options, trials=4)["trials"] == 5


def test_the_same_search_tries_the_same(options: dict[str, Any]):
    tops = [search(**{**options, "study": f"{i}.study"}, trials=7)["top"] for i in range(2)]
    assert tops[0] == tops[1]
    assert len({row["lr"] for row in tops[0]}) == 5


def test_a_hopeless_trial_is_given_up(options: dict[str, Any], scripted: list[Any], capfd: pytest.CaptureFixture[str]):
    """After five that were good; not before a third of the epochs."""
    scripted += [0.8, 0.8, 0.8, 0.8, 0.8, 0.1]
    answer = search(**{**options, "epochs": 6}, trials=6)
    assert (answer["trials"], answer["pruned"], answer["failed"]) == (6, 1, 0)
    assert "trial 5: given up after 3 of 6 epochs; 6 of 6 done" in capfd.readouterr().err


def test_a_diverging_trial_has_failed_and_the_search_goes_on(options: dict[str, Any], scripted: list[Any]):
    scripted += [0.5, EdgekitError("the loss is no longer finite"), 0.6]
    answer = search(**options, trials=3)
    assert (answer["trials"], answer["failed"]) == (3, 1)
    assert {row["trial"] for row in answer["top"]} == {0, 2}


def test_where_every_trial_fails_the_reason_is_said(options: dict[str, Any], scripted: list[Any]):
    scripted += [EdgekitError("the loss is no longer finite")] * 2
    with pytest.raises(EdgekitError, match="all 2 trials failed; the last: the loss is no longer finite"):
        search(**options, trials=2)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("a file is gone")], ids=["interrupted", "wrong"])
def test_a_trial_that_ends_the_search_does_not_count(options: dict[str, Any], scripted: list[Any], error: BaseException):
    scripted += [0.5, error]
    with pytest.raises(type(error)):
        search(**options, trials=3)
    trials = Journal(Path(options["study"]), {}).trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL"]
    scripted += [0.5, 0.5]
    answer = search(**options, trials=3)
    assert (answer["trials"], answer["failed"]) == (3, 0)


def test_samples_are_read_once_and_the_held_out_ones_never(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    reads: list[int] = []

    def watched(spec: str) -> Dataset:
        dataset = load(spec)

        def read(i: int) -> Any:
            reads.append(i)
            return dataset.train.read(i)

        def forbidden(i: int) -> Any:
            raise AssertionError("a held-out sample was read")

        splits = {"train": dataclasses.replace(dataset.train, read=read)}
        return dataclasses.replace(dataset, **splits, test=dataclasses.replace(dataset.test, read=forbidden))

    monkeypatch.setattr(planning, "load", watched)
    search(**options, trials=3)
    assert sorted(reads) == list(range(320))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": "digits"}, "is of another data"),
        ({"model": "textbook"}, "is of another model"),
        ({"epochs": 3}, "is of another epochs: 2, not 3"),
        ({"validation": 0.3}, "is of another validation"),
        ({"size": 20}, "is of another input"),
    ],
)
def test_a_study_of_something_else_is_refused(
    options: dict[str, Any], scripted: list[Any], changed: dict[str, Any], words: str
):
    scripted += [0.5]
    search(**options, trials=1)
    with pytest.raises(UsageError, match=words):
        search(**{**options, **changed}, trials=2)
    assert search(**options, trials=1)["trials"] == 1


@pytest.mark.parametrize("content", [b"no newline", b"mine\nyours\n", b'{"a": 1}\n', b"3\n", b"\xff\x00\n"])
def test_a_file_that_is_no_study_is_refused_and_left_alone(options: dict[str, Any], content: bytes):
    Path("few.study").write_bytes(content)
    with pytest.raises(UsageError, match="is no study"):
        search(**options)
    assert Path("few.study").read_bytes() == content


def test_a_damaged_study_is_refused(options: dict[str, Any], scripted: list[Any]):
    scripted += [0.5]
    search(**options, trials=1)
    path = Path("few.study")
    path.write_bytes(path.read_bytes()[:-20] + b'\n{"op_code":0}\n')
    with pytest.raises(UsageError, match="is damaged"):
        search(**options, trials=2)


def test_a_last_line_that_was_cut_short_is_left_out(options: dict[str, Any], scripted: list[Any]):
    scripted += [0.5, 0.6]
    search(**options, trials=1)
    path = Path("few.study")
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:-9])
    assert search(**options, trials=2)["trials"] == 2
    assert path.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_wrong_calls(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, trained_bundle: Bundle):
    for wrong in (
        {"trials": 0},
        {"validation": 0.0},
        {"validation": 1.0},
        {"study": "."},
        {"study": trained_bundle.path / "s"},
    ):
        with pytest.raises(UsageError):
            search(**{**options, **wrong})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun"):
        search(**options)


def test_without_optuna_the_extra_is_named(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra) as caught:
        search(**options)
    assert "edgekit[search]" in caught.value.hint


def test_optuna_is_loaded_by_a_search_only():
    code = "import sys, edgekit.training, edgekit.training.search, edgekit.cli.search; assert 'optuna' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_two_processes_share_a_study(options: dict[str, Any], few_digits: str):
    """Neither tries what the other does; each may do one trial more than wanted."""
    command = [sys.executable, "-m", "edgekit", "search", "--data", few_digits, "--model", "quick_nets:make", "--epochs", "20"]
    command += ["--augment", "none", "--study", "few.study", "--trials", "12"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    answer = search(**{**options, "epochs": 20}, trials=12)
    assert 12 <= answer["trials"] <= 13
    labels = [line for err in said for line in err.splitlines() if " lr " in line]
    assert len(labels) == len(set(labels)) == answer["trials"]

"""What train can be told: a teacher, a model of one's own, a validation split, balance, SGD, logs; and what a run survives."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgekit.bundle import Bundle
from edgekit.data import Tensors, load
from edgekit.data.augment import policy_named
from edgekit.errors import EdgekitError, UsageError
from edgekit.models.module import load as load_module
from edgekit.training import FitConfig, fit, train
from edgekit.training.fit import Watched, outputs_of
from edgekit.training.objective import Classification
from edgekit.training.plan import class_weights

NETS = """
import torch
from torch import nn
def good(classes, channels, height, width):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 32), nn.ReLU(), nn.Linear(32, classes))
def greedy(**anything):
    return good(**anything)
class Net:
    @staticmethod
    def make(classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))
def frozen(classes):
    return Net.make(classes).requires_grad_(False)
def no_module(classes):
    return "a string"
def odd(classes, depth):
    return good(classes, 1, 28, 28)
def failing(classes):
    raise AttributeError("no such layer")
def few(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))
def narrow(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(100, classes))
class Tied(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.a = nn.Linear(784, classes)
        self.b = nn.Linear(784, classes)
        self.b.weight = self.a.weight
    def forward(self, x):
        return self.a(x.flatten(1)) + self.b(x.flatten(1))
class Branching(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.a = nn.Linear(784, classes)
    def forward(net, x):
        return net.a(x.flatten(1)) if x.sum() > 1e9 else net.a(-x.flatten(1))
number = 3
"""


@pytest.fixture(scope="module")
def tensors(few_digits: str) -> Tensors:
    dataset = load(few_digits)
    return dataset.train.tensors(dataset.preprocessing)


def linear(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Rigged(Classification):
    """Scores by a script; ``poisoned``: the step from which the loss is no number."""

    def __init__(self, scores: list[float], poisoned: int | None = None) -> None:
        super().__init__(10, 0.1, policy_named("none"))
        self.scores, self.poisoned, self.steps = list(scores), poisoned, 0

    def score(self, outputs: Any, y: Any) -> float:
        return self.scores.pop(0)

    def loss(self, module: Any, x: Any, y: Any) -> Any:
        self.steps += 1
        loss = super().loss(module, x, y)
        return loss if self.poisoned is None or self.steps <= self.poisoned else loss * float("nan")


# A teacher


def test_a_student_learns_from_a_teacher(tmp_path: Path, few_digits: str, trained_bundle: Bundle, tensors: Tensors):
    """From samples whose classes are shuffled there is nothing to learn but what the teacher says of them."""
    split = load(few_digits).all
    shuffled = np.random.default_rng(0).permutation(split.targets)
    np.savez(tmp_path / "s.npz", images=np.stack([split.read(i) for i in range(len(split))]), labels=shuffled)
    options: dict[str, Any] = {"data": f"npz:{tmp_path / 's.npz'}", "model": "textbook", "epochs": 12, "batch": 16}
    alone = train(out=tmp_path / "alone.edge", **options)
    taught = train(out=tmp_path / "taught.edge", teacher=trained_bundle.path, **options)
    own, *found = (outputs_of(load_module(bundle), tensors.x).argmax(1) for bundle in (trained_bundle, alone, taught))
    agreed = [float((answers == own).mean()) for answers in found]
    assert agreed[0] < 0.3
    assert agreed[1] > 0.4
    assert taught.manifest.history[-1].config["teacher"] == trained_bundle.digest
    assert "teacher" not in alone.manifest.history[-1].config


def test_a_teacher_of_another_picture_size_teaches(tmp_path: Path, few_digits: str, trained_bundle: Bundle):
    """The loss is that against the teacher: without one it is another from the first epoch on."""
    options: dict[str, Any] = {"data": few_digits, "model": "textbook", "size": 20, "epochs": 1, "batch": 32}
    taught = train(out=tmp_path / "s.edge", teacher=trained_bundle, **options)
    alone = train(out=tmp_path / "a.edge", **options)
    assert taught.manifest.inputs[0].shape[2:] == (20, 20)
    losses = [bundle.manifest.history[-1].figures["curve"][0]["loss"] for bundle in (taught, alone)]
    assert abs(losses[0] - losses[1]) > 0.05


def test_a_teacher_that_knows_other_classes_is_refused(cli, tmp_path: Path, few_digits: str, trained_bundle: Bundle):
    images = np.random.default_rng(0).integers(0, 255, (60, 28, 28), np.uint8)
    np.savez(tmp_path / "two.npz", images=images, labels=np.arange(60) % 2)
    for teacher, data in ((trained_bundle.path, f"npz:{tmp_path / 'two.npz'}"), (tmp_path / "none.edge", few_digits)):
        outcome = cli("train", "--data", data, "--out", tmp_path / "m.edge", "--teacher", teacher, "--epochs", "1")
        assert outcome.code in (1, 2)
        error, hint = outcome.err.splitlines()
        assert error.startswith("error: the teacher" if data != few_digits else "error: there is no bundle")
        assert hint.startswith("hint: ")
    assert not list(tmp_path.glob("m.edge*"))


# A model of one's own


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's modules, where the command is given."""
    (tmp_path / "my_nets.py").write_text(NETS)
    (tmp_path / "broken_nets.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    monkeypatch.delenv("EDGEKIT_MODELS", raising=False)
    return tmp_path


@pytest.mark.parametrize("factory", ["good", "greedy", "Net.make"])
def test_a_model_of_ones_own_trains(nets: Path, few_digits: str, factory: str):
    bundle = train(data=few_digits, out="own.edge", model=f"my_nets:{factory}", epochs=6, batch=32, lr=0.01, augment="none")
    assert bundle.manifest.history[-1].figures["top1"] > 0.3
    assert bundle.manifest.model is not None
    assert bundle.manifest.model.name == f"my_nets:{factory}"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("my_nets:no_module", "made a str"),
        ("my_nets:odd", "cannot be called: TypeError: missing a required argument"),
        ("my_nets:absent", "cannot be imported"),
        ("my_nets:number", "cannot be called: TypeError"),
        ("my_nets:failing", "(classes=10) failed: AttributeError: no such layer"),
        ("my_nets:few", "answers (2, 3) to two samples"),
        ("my_nets:narrow", "cannot be run"),
        ("my_nets:Tied", "tied weights"),
        ("my_nets:frozen", "no parameters to train"),
        ("pretrained", "hf:FOLDER"),
        ("hf:", "hf:FOLDER"),
        ("my_nets:Branching", "cannot be traced in Branching (Branching, line "),
        ("broken_nets:good", "no_such_module_anywhere"),
        ("no_nets:good", "No module named 'no_nets'"),
    ],
)
def test_a_factory_that_is_not_one_is_refused(cli, nets: Path, few_digits: str, model: str, words: str):
    outcome = cli("train", "--data", few_digits, "--out", "m.edge", "--model", model, "--epochs", "1")
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.splitlines()) == 2
    assert not list(nets.glob("m.edge*"))


def test_a_bundle_does_not_choose_the_code_that_is_run(nets: Path, few_digits: str):
    """Only the user does, by the environment: in a fresh process the name in the bundle is not enough."""
    train(data=few_digits, out="own.edge", model="my_nets:good", epochs=1)
    (nets / "my_nets.py").write_text(NETS + "print('the code has run')\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False, env={**environment, **more}
        )

    refused = run("-m", "edgekit", "prune", "own.edge", "--out", "p.edge")
    assert refused.returncode == 2
    assert "export EDGEKIT_MODELS=my_nets:good" in refused.stderr
    assert "the code has run" not in refused.stdout
    code = "from edgekit.bundle import Bundle; from edgekit.models.module import load; load(Bundle.open('own.edge'))"
    for near in ("others", "my_nets", "my_nets:odd"):  # a module is not enough: the bundle would choose what of it is called
        assert run("-c", code, EDGEKIT_MODELS=near).returncode == 1
    trusted = run("-c", code, EDGEKIT_MODELS="others:a,my_nets:good")
    assert trusted.returncode == 0, trusted.stderr
    assert "the code has run" in trusted.stdout
    assert run("-m", "edgekit", "eval", "own.edge", "--data", few_digits).returncode == 0  # the graph needs no code


# The best epoch


SCORES = [0.1, 0.6, 0.5, 0.3, 0.2, 0.1]


def averaged_after(epoch: int, data: Tensors, checkpoint: Path) -> Any:
    """The averaged weights of a run of six epochs, stopped after ``epoch``; its checkpoint is left."""

    def stop(done: int, score: float) -> None:
        if done + 1 == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(linear(), data, Watched(data, True), CONFIG, objective=Rigged(SCORES), checkpoint=checkpoint, on_epoch=stop)
    return torch.load(checkpoint, weights_only=True)["average"]


CONFIG = FitConfig(6, 0.01, batch=80)


def test_the_best_epoch_is_kept_where_it_may_be_chosen(tmp_path: Path, tensors: Tensors):
    best = averaged_after(2, tensors, tmp_path / "c")
    chosen, last = linear(), linear()
    curve = fit(chosen, tensors, Watched(tensors, True), CONFIG, objective=Rigged(SCORES))
    assert [row["top1"] for row in curve] == SCORES
    assert same(chosen.state_dict(), best)
    fit(last, tensors, Watched(tensors), CONFIG, objective=Rigged(SCORES))
    assert not same(last.state_dict(), best)


@pytest.mark.parametrize("stopped", [1, 2, 4])
def test_a_run_that_goes_on_keeps_the_best_epoch_of_before(tmp_path: Path, tensors: Tensors, stopped: int):
    straight, resumed = linear(), linear()
    fit(straight, tensors, Watched(tensors, True), CONFIG, objective=Rigged(SCORES))
    averaged_after(stopped, tensors, tmp_path / "c")
    rest = Rigged(SCORES[stopped:])
    curve = fit(resumed, tensors, Watched(tensors, True), CONFIG, objective=rest, checkpoint=tmp_path / "c")
    assert [row["top1"] for row in curve] == SCORES
    assert same(resumed.state_dict(), straight.state_dict())


def test_epochs_are_judged_by_what_would_be_written(tmp_path: Path, few_digits: str):
    """Averaged batch norms remember the first steps for long: judged with those, every early epoch looks like chance."""
    bundle = train(data=few_digits, out=tmp_path / "v.edge", epochs=8, batch=32, seed=1, validation=0.25)
    figures = bundle.manifest.history[-1].figures
    assert figures["curve"][0]["top1"] < 0.3  # or there would be nothing to choose
    assert figures["top1"] > 0.5
    last = train(data=few_digits, out=tmp_path / "l.edge", epochs=8, batch=32, seed=1).manifest.history[-1].figures
    assert last["top1"] == last["curve"][-1]["top1"]


def test_patience_ends_a_run_also_one_that_went_on(tmp_path: Path, tensors: Tensors):
    config = FitConfig(6, 0.01, batch=80, patience=2)
    curve = fit(linear(), tensors, Watched(tensors, True), config, objective=Rigged(SCORES), checkpoint=tmp_path / "c")
    assert [row["epoch"] for row in curve] == [1, 2, 3, 4]
    idle = Rigged([])
    assert fit(linear(), tensors, Watched(tensors, True), config, objective=idle, checkpoint=tmp_path / "c") == curve
    assert idle.steps == 0


def test_the_validation_split_is_taken_from_the_training_split(
    tmp_path: Path, few_digits: str, capfd: pytest.CaptureFixture[str]
):
    bundle = train(data=few_digits, out=tmp_path / "v.edge", model="textbook", epochs=2, validation=0.25, patience=1)
    assert "240 samples to train on, 80 held out" in capfd.readouterr().err
    entry = bundle.manifest.history[-1]
    assert (entry.config["validation"], entry.config["patience"]) == (0.25, 1)
    for wrong in ({"patience": 3}, {"validation": 1.0}, {"validation": -0.1}, {"smoothing": 1.0}, {"weight_decay": -1.0}):
        with pytest.raises(UsageError):
            train(data=few_digits, out=tmp_path / "w.edge", epochs=1, **wrong)


# Classes of unequal size


def test_a_class_without_a_training_sample_is_refused(cli, tmp_path: Path):
    frame = np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)
    for part, labels in (("train", "ab"), ("val", "abc")):
        for label in labels:
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.roll(frame, 97 * i + ord(label) + 13 * len(part))).save(tmp_path / part / label / f"{i}.png")
    outcome = cli("train", "--data", f"folder:{tmp_path}", "--size", "28", "--out", tmp_path / "m.edge", "--epochs", "1")
    assert outcome.code == 1
    assert "'c'" in outcome.err
    assert not list(tmp_path.glob("m.edge*"))


def test_balance_weighs_the_classes_alike():
    """A net that sees nothing learns how often the classes occur; weighed alike, it holds them for equally likely."""
    y = np.repeat([0, 1, 2], [200, 40, 20])
    weights = class_weights(y, 4, balance=True)
    assert weights is not None
    assert weights[y].mean() == pytest.approx(1)
    assert weights[:3] * np.bincount(y) == pytest.approx(weights[0] * 200)
    assert weights[3] == 0  # no sample of it
    blind = Tensors(np.zeros((260, 1), np.float32), y, tuple(map(str, range(260))), ())
    learnt = []
    for given in (None, weights):
        torch.manual_seed(0)
        module = torch.nn.Linear(1, 3)
        objective = Classification(3, 0.0, policy_named("none"))
        objective.weigh(None if given is None else given[:3])
        fit(module, blind, blind, FitConfig(40, 0.1, batch=130, weight_decay=0.0), objective=objective)
        learnt.append(module.bias.detach().softmax(0).numpy())
    assert learnt[0] == pytest.approx([200 / 260, 40 / 260, 20 / 260], abs=0.03)
    assert learnt[1] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_an_unbalanced_set_is_named_and_weighed_on_request(tmp_path: Path, few_digits: str, capfd: pytest.CaptureFixture[str]):
    split = load(few_digits).train
    chosen = [i for i in range(len(split)) if split.targets[i] == 0 or (split.targets[i] == 1 and i % 6 == 0)]
    np.savez(
        tmp_path / "u.npz", images=np.stack([split.read(i) for i in chosen]), labels=(split.targets[chosen] == 1).astype(int)
    )
    data = f"npz:{tmp_path / 'u.npz'}"
    train(data=data, out=tmp_path / "a.edge", model="textbook", epochs=1)
    assert "--balance weighs them alike" in capfd.readouterr().err
    bundle = train(data=data, out=tmp_path / "b.edge", model="textbook", epochs=1, balance=True)
    assert "--balance" not in capfd.readouterr().err
    assert bundle.manifest.history[-1].config["balance"] is True


# The optimizer, its settings, the logs


def test_sgd_trains(tmp_path: Path, few_digits: str):
    bundle = train(
        data=few_digits, out=tmp_path / "s.edge", epochs=6, batch=32, optimizer="sgd", weight_decay=1e-3, smoothing=0
    )
    entry = bundle.manifest.history[-1]
    assert entry.figures["top1"] > 0.5
    assert (entry.config["optimizer"], entry.config["weight_decay"], entry.config["smoothing"]) == ("sgd", 1e-3, 0)


def events(folder: Path) -> list[dict[str, tuple[int, float]]]:
    """What each event file of a folder says: a TFRecord is length, checksum, protobuf, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, place, said = file.read_bytes(), 0, {}
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            said.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
            place += length + 16
        found.append(said)
    return found


def test_the_logs_hold_the_curve(tmp_path: Path, few_digits: str):
    bundle = train(data=few_digits, out=tmp_path / "m.edge", model="textbook", epochs=3, batch=64, logs=tmp_path / "logs")
    (said,) = events(tmp_path / "logs")
    for row in bundle.manifest.history[-1].figures["curve"]:
        for name in ("loss", "top1", "lr"):
            assert said[f"train/{name}", row["epoch"]] == pytest.approx(row[name], rel=1e-5)
    assert len(said) == 9


# What a run survives


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(
    tmp_path: Path, tensors: Tensors, capfd: pytest.CaptureFixture[str]
):
    """In the third epoch of four steps each; the run that goes on ends as one that never met it."""
    straight, resumed = linear(), linear()
    fit(straight, tensors, tensors, CONFIG, objective=Rigged(SCORES))
    with pytest.raises(EdgekitError, match="epoch 3, step 2") as caught:
        fit(linear(), tensors, tensors, CONFIG, objective=Rigged(SCORES, poisoned=9), checkpoint=tmp_path / "c")
    assert "lower --lr (now" in caught.value.hint
    state = torch.load(tmp_path / "c", weights_only=True)
    assert len(state["curve"]) == 2
    assert all(tensor.isfinite().all() for tensor in state["module"].values())
    fit(resumed, tensors, tensors, CONFIG, objective=Rigged(SCORES[2:]), checkpoint=tmp_path / "c")
    assert "resuming after epoch 2 of 6" in capfd.readouterr().err
    assert same(resumed.state_dict(), straight.state_dict())


def test_a_checkpoint_of_another_model_or_objective_is_not_taken(
    tmp_path: Path, tensors: Tensors, capfd: pytest.CaptureFixture[str]
):
    """Nor of the same model from other starting weights, nor of classes weighed otherwise."""
    balanced = Rigged(SCORES)
    balanced.weigh(np.linspace(0.5, 1.5, 10, dtype=np.float32))
    others = [
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10, bias=False)), Rigged(SCORES)),
        (linear(seed=1), Rigged(SCORES)),
        (linear(), balanced),
    ]
    for module, objective in others:
        for left in tmp_path.iterdir():
            left.unlink()
        averaged_after(2, tensors, tmp_path / "c")
        capfd.readouterr()
        curve = fit(module, tensors, tensors, CONFIG, objective=objective, checkpoint=tmp_path / "c")
        said = capfd.readouterr().err
        assert "belongs to other settings or data; starting again, the longest of such runs is kept as c.old" in said
        assert len(torch.load(tmp_path / "c.old", weights_only=True)["curve"]) == 2  # it may be hours of work
        assert len(curve) == 6
        assert objective.steps == 24
    (tmp_path / "c").unlink()
    averaged_after(1, tensors, tmp_path / "c")
    fit(linear(seed=5), tensors, tensors, CONFIG, objective=Rigged(SCORES), checkpoint=tmp_path / "c")
    assert len(torch.load(tmp_path / "c.old", weights_only=True)["curve"]) == 2  # the shorter one is not worth it

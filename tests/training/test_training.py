"""Training end to end on a few digits: figures, resume, bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edgekit.bundle import FLOAT_GRAPH, WEIGHTS, Bundle
from edgekit.data import load
from edgekit.data.augment import make_augmentation
from edgekit.errors import EdgekitError, UsageError
from edgekit.evaluation import evaluate
from edgekit.models import PRESETS
from edgekit.models.module import load as load_module
from edgekit.runtime import check_golden
from edgekit.training import FitConfig, fit, train
from edgekit.training.plan import make_plan, read_splits


def test_a_trained_bundle_is_complete_and_its_figures_are_what_the_runtime_measures(trained_bundle: Bundle, few_digits: str):
    figures = trained_bundle.manifest.history[-1].figures
    assert figures["top1"] > 0.5
    assert evaluate(trained_bundle, few_digits)["top1"] == pytest.approx(figures["top1"])
    assert check_golden(trained_bundle).relative <= 1e-4
    assert figures["golden_tolerance"] == 1e-4
    assert len(figures["curve"]) == 6
    assert figures["curve"][0]["loss"] > figures["curve"][-1]["loss"]


def test_the_graph_names_no_file_of_this_machine(trained_bundle: Bundle):
    graph = trained_bundle.file(FLOAT_GRAPH).read_bytes()
    assert b".py" not in graph
    assert b"site-packages" not in graph


def test_loaded_weights_answer_like_the_graph(trained_bundle: Bundle, few_digits: str):
    from edgekit.runtime import Model

    dataset = load(few_digits)
    x = dataset.test.tensors(dataset.preprocessing).x[:16]
    with torch.no_grad():
        expected = load_module(trained_bundle)(torch.from_numpy(x)).numpy()
    with Model.open(trained_bundle.path) as model:
        found = model.run({"x": x})["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.task == "image-classification"])
def test_every_preset_for_pictures_learns(name: str, few_digits: str):
    """Written it is by the tests of the presets: an export takes longer than these epochs."""
    plan = make_plan(few_digits, name)
    resizes = PRESETS[name].resizes
    augmentation = make_augmentation(plan.augmentation, plan.preprocessing, resizes=resizes)
    splits = read_splits(plan.dataset, plan.preprocessing, augmentation)
    config = FitConfig(epochs=4, lr=PRESETS[name].lr, batch=32, augmentation=plan.augmentation)
    module = plan.module(seed=1)
    curve = fit(module, splits.train, splits.held_out, config, augmentation=augmentation)
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["top1"] > 0.15  # one of ten by chance


def test_same_seed_same_weights(tmp_path: Path, few_digits: str):
    """With several threads, whatever the other tests run with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made = [train(data=few_digits, out=tmp_path / f"{i}.edge", epochs=1, seed=3) for i in range(2)]
    finally:
        torch.set_num_threads(threads)
    assert made[0].manifest.files[WEIGHTS] == made[1].manifest.files[WEIGHTS]
    assert made[0].digest == made[1].digest


TRAIN = """
import os, sys
from edgekit.cli import main
from edgekit.training import fit
loop = sys.modules["edgekit.training.fit"]
save = loop.save_checkpoint
def save_and_stop(path, state):
    save(path, state)
    if len(state["curve"]) == int(sys.argv[4]):
        os.kill(os.getpid(), int(sys.argv[5]))
loop.save_checkpoint = save_and_stop
main(["train", "--data", sys.argv[1], "--out", sys.argv[2], "--epochs", sys.argv[3], "--batch", "16", "--seed", "5",
      "--model", "textbook"])
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, few_digits: str) -> Bundle:
    """A training that nothing stopped; of a model that is soon exported. One with batch norms resumes in two processes."""
    out = tmp_path_factory.mktemp("whole") / "whole.edge"
    return train(data=few_digits, out=out, model="textbook", epochs=5, batch=16, seed=5)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_training_resumes_to_the_same_weights(whole: Bundle, tmp_path: Path, few_digits: str, sent: signal.Signals):
    """The signal is real, and comes after the second epoch however busy the machine is."""
    out = tmp_path / "stopped.edge"
    command = [sys.executable, "-c", TRAIN, few_digits, str(out), "5"]
    stopped = subprocess.run([*command, "2", str(int(sent))], capture_output=True, text=True, check=False)
    checkpoint, err = out.with_name("stopped.edge.checkpoint"), stopped.stderr
    assert not out.exists()
    assert "Traceback" not in err
    assert checkpoint.exists()
    if sent == signal.SIGINT:
        assert stopped.returncode == 1
        assert "run the same command again" in err
    again = subprocess.run([*command, "0", "0"], capture_output=True, text=True, check=True)
    assert "resuming after epoch 2 of 5" in again.stderr
    assert not checkpoint.exists()
    resumed, straight = load_file(Bundle.open(out).file(WEIGHTS)), load_file(whole.file(WEIGHTS))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_full_disk_during_training_is_named(tmp_path: Path, few_digits: str):
    """RLIMIT_FSIZE stands for the full disk: writing beyond it fails with EFBIG, and nothing is left half written."""
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from edgekit.cli import main; main()"
    )
    arguments = ["train", "--data", few_digits, "--out", str(tmp_path / "m.edge"), "--epochs", "2"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "defect" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_readable_held_out_image_nothing_is_trained(cli, tmp_path: Path):
    """Its figures would be invented: 0% of nothing."""
    for split, count in (("train", 30), ("val", 1)):
        for label in "ab":
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)).save(
                    folder / f"{label}{i}.png"
                )
    for file in (tmp_path / "data" / "val").rglob("*.png"):
        file.write_bytes(b"broken")
    outcome = cli("train", "--data", f"folder:{tmp_path / 'data'}", "--out", tmp_path / "m.edge", "--epochs", "1")
    assert outcome.code == 1
    assert "none of the held-out samples" in outcome.err
    assert not (tmp_path / "m.edge").exists()


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path, few_digits: str, capfd: pytest.CaptureFixture[str]):
    out = tmp_path / "m.edge"
    out.with_name("m.edge.checkpoint").write_bytes(b"no checkpoint")
    train(data=few_digits, out=out, model="textbook", epochs=1)
    assert "cannot be read; starting again" in capfd.readouterr().err


def test_a_diverging_loss_stops_with_a_cure(few_digits: str):
    dataset = load(few_digits)
    tensors = dataset.train.tensors(dataset.preprocessing)
    tensors.x[0, 0, 0, 0] = np.nan
    with pytest.raises(EdgekitError, match="no longer finite") as caught:
        fit(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), tensors, tensors, FitConfig(1, 0.01))
    assert "--lr" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--data", "nonsense"], 2, "choose one of: digits"),
        (["--data", "folder:/no/such/folder"], 1, "there is no folder"),
        (["--data", "digits", "--model", "nonsense"], 2, "choose one of: textbook"),
        (["--data", "digits", "--model", "textbook", "--size", "8"], 2, "try another model or image size"),
        (["--data", "digits", "--epochs", "0"], 2, "epochs"),
        (["--data", "digits", "--model", "resnet"], 2, "package.module:factory"),
    ],
)
def test_bad_input(cli, tmp_path: Path, arguments: list[str], code: int, words: str):
    outcome = cli("train", "--out", tmp_path / "m.edge", *arguments)
    assert outcome.code == code
    assert words in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_exists_is_refused_before_any_work(cli, tmp_path: Path):
    (tmp_path / "m.edge").mkdir()
    outcome = cli("train", "--data", "digits", "--out", tmp_path / "m.edge", "--json")
    assert outcome.code == 2
    assert "not overwritten" in json.loads(outcome.out)["error"]


@pytest.mark.parametrize("epochs", [1, 2, 5, 10])
def test_a_cycle_of_any_length_works(few_digits: str, epochs: int):
    """A warm-up of exactly one step once divided by zero (5 steps at a warm-up of 0.2)."""
    dataset = load(few_digits)
    tensors = dataset.test.tensors(dataset.preprocessing)
    curve = fit(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), tensors, tensors, FitConfig(epochs, 0.01, batch=80)
    )
    assert len(curve) == epochs


def test_a_checkpoint_of_other_pictures_is_not_resumed(tmp_path: Path, few_digits: str, capfd: pytest.CaptureFixture[str]):
    dataset = load(few_digits)
    tensors = dataset.test.tensors(dataset.preprocessing)

    def run(data):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
        return fit(module, data, tensors, FitConfig(2, 0.01), checkpoint=tmp_path / "c")

    run(tensors)
    capfd.readouterr()
    run(tensors)
    assert "resuming after epoch 2" in capfd.readouterr().err
    run(tensors._replace(x=tensors.x + 1))
    assert "belongs to other settings or data" in capfd.readouterr().err


def test_fit_config_is_checked():
    with pytest.raises(UsageError):
        FitConfig(epochs=1, lr=0.0)

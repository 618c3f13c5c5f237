"""``calibration/``: every shipped preset's int8 graph comes back bit for bit, without training data."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import edgekit
from edgekit.bundle import CALIBRATION, FLOAT_GRAPH, INT8_GRAPH, TOKENIZER, WEIGHTS, Bundle
from edgekit.data import load
from edgekit.errors import EdgekitError
from edgekit.preprocess import make_preprocessor
from edgekit.quantization import read_calibration, rebuild
from edgekit.quantization.record import digest

ROOT = Path(__file__).parents[2] / "calibration"
PRESETS = (
    "digits-depthwise", "digits-gru-rows", "digits-lstm-rows", "digits-textbook", "digits-vit", "spam-lstm-text",
    "spam-transformer-text", "watch-gru-series",
)  # fmt: skip


def test_every_shipped_preset_has_a_folder() -> None:
    assert tuple(sorted(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_the_int8_graph_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = ROOT / name
    expected = (folder / f"{INT8_GRAPH}.sha256").read_text().split()[0]
    source = Bundle.open(folder / "float.edge")
    assert not source.has(WEIGHTS)
    graph = source.file(FLOAT_GRAPH).read_bytes()
    calibration = read_calibration(folder / CALIBRATION)
    assert hashlib.sha256(rebuild(graph, calibration)).hexdigest() == expected
    written = edgekit.quantize(source, out=tmp_path / "int8.edge", calib=folder / CALIBRATION)
    assert written.manifest.files[INT8_GRAPH] == expected
    assert expected in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", PRESETS)
def test_the_samples_are_balanced_training_samples(name: str) -> None:
    calibration = read_calibration(ROOT / name / CALIBRATION)
    drawn, dataset = calibration.samples, load(name.split("-")[0])
    assert drawn.data_digest == dataset.digest
    assert not set(drawn.ids) & set(dataset.test.ids)
    where = {sample: i for i, sample in enumerate(dataset.train.ids)}
    chosen = dataset.train.take(where[sample] for sample in drawn.ids)
    counts, there = np.bincount(chosen.targets), np.bincount(dataset.train.targets)
    assert all(counts[there > counts] >= counts.max() - 1)  # but for classes of which there are no more
    assert calibration.preprocessing is not None
    bundle = Bundle.open(ROOT / name / "float.edge")
    preprocess = make_preprocessor(calibration.preprocessing, bundle.read(TOKENIZER) if bundle.has(TOKENIZER) else None)
    source = bundle.manifest.inputs[0].name
    assert tuple(digest({source: preprocess(chosen.read(i))}) for i in range(len(chosen))) == drawn.digests


@pytest.mark.parametrize("name", PRESETS)
def test_the_frozen_graph_keeps_the_accuracy(name: str, tmp_path: Path) -> None:
    source = Bundle.open(ROOT / name / "float.edge")
    written = edgekit.quantize(source, out=tmp_path / "int8.edge", calib=ROOT / name / CALIBRATION, data=name.split("-")[0])
    entry = written.last("quantize")
    assert entry is not None
    assert entry.figures["top1_float"] - entry.figures["top1"] <= 0.005


@pytest.fixture
def freeze(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("freeze", ROOT / "freeze.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "COUNTS", (16, 256))
    monkeypatch.setattr(module, "SEEDS", (0,))
    return module


def test_freeze_writes_such_a_folder(digits_bundle: Bundle, tmp_path: Path, freeze: ModuleType) -> None:
    folder = tmp_path / "frozen" / "digits-linear"
    freeze.freeze(digits_bundle.path, folder, False)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CALIBRATION, "float.edge", f"{INT8_GRAPH}.sha256"]
    again = tmp_path / "again.edge"
    written = edgekit.quantize(folder / "float.edge", out=again, calib=folder / CALIBRATION)
    assert written.manifest.files[INT8_GRAPH] in (folder / "README.md").read_text()
    with pytest.raises(EdgekitError, match="exists already"):
        freeze.freeze(digits_bundle.path, folder, False)
    shutil.rmtree(again)
    freeze.freeze(digits_bundle.path, folder, True)
    assert [p for p in folder.parent.iterdir() if p != folder] == []


def test_freeze_answers_in_one_line(
    tiny_bundle: Bundle, tmp_path: Path, freeze: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["freeze.py", str(tiny_bundle.path), str(tmp_path / "frozen")])
    assert freeze.main() == 2
    assert "was not trained on a data set" in capsys.readouterr().err
    assert not (tmp_path / "frozen").exists()

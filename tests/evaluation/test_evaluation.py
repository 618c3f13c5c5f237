"""Accuracy: the figures are right, and nothing is judged on what it was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle import Bundle
from edgekit.data import load
from edgekit.errors import UsageError
from edgekit.evaluation import RECORDED_CLASSES, Accuracy, accuracy, evaluate, evaluation_split
from edgekit.manifest import history_entry


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_accuracy_counts(pairs: list[tuple[int, int]]):
    truth, answers = (np.array(side) for side in zip(*pairs, strict=True))
    found = accuracy(truth, answers, 5)
    assert found.top1 == pytest.approx((truth == answers).mean())
    assert found.confusion.sum() == len(pairs)
    assert all(found.confusion[t, a] == pairs.count((t, a)) for t in range(5) for a in range(5))
    assert 0 <= found.macro_f1 <= 1
    assert (found.macro_f1 == 1) == (found.top1 == 1)


def test_its_own_data_is_judged_on_the_held_out_split_and_other_data_whole(digits_bundle: Bundle, few_digits: str):
    assert len(evaluation_split(digits_bundle, load("digits"))) == 1000
    assert len(evaluation_split(digits_bundle, load(few_digits))) == 400


def test_a_folder_changed_since_training_is_still_judged_held_out(digits_bundle: Bundle, capfd: pytest.CaptureFixture[str]):
    changed = replace(load("digits"), digest="another")
    assert len(evaluation_split(digits_bundle, changed)) == 1000
    assert "has changed since training" in capfd.readouterr().err


def test_a_changed_folder_is_known_by_every_spelling_of_its_path(
    digits_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    entry = history_entry("train", {"data": "folder:goods", "data_digest": "of before"}, {})
    manifest = msgspec.structs.replace(digits_bundle.manifest, history=(entry,))
    bundle = Bundle(digits_bundle.path, manifest)
    monkeypatch.chdir(tmp_path)
    for spec in ("folder:goods", "folder:goods/", "folder:./goods", f"folder:{tmp_path}/goods"):
        assert len(evaluation_split(bundle, replace(load("digits"), spec=spec))) == 1000
    for spec in ("folder:other", "npz:goods", "goods"):
        assert len(evaluation_split(bundle, replace(load("digits"), spec=spec))) == 5000


def test_what_was_trained_on_is_no_validation_part(digits_bundle: Bundle):
    with pytest.raises(UsageError, match="was trained on digits, with the samples of validation"):
        evaluation_split(digits_bundle, load("validation:0.1:digits"))
    entry = history_entry("train", {"data": "validation:0.1:digits", "data_digest": load("digits").digest}, {})
    chosen = Bundle(digits_bundle.path, msgspec.structs.replace(digits_bundle.manifest, history=(entry,)))
    assert len(evaluation_split(chosen, load("validation:0.1:digits"))) == 400
    assert evaluation_split(chosen, load("digits")).ids == load("digits").test.ids
    with pytest.raises(UsageError, match="was trained on"):
        evaluation_split(chosen, load("validation:0.2:digits"))


def test_eval_records_its_figures_for_the_report(cli, digits_bundle: Bundle):
    outcome = cli("eval", digits_bundle.path, "--data", "digits", "--json")
    assert outcome.code == 0
    entry = Bundle.open(digits_bundle.path).last("eval")
    assert entry is not None
    assert entry.figures["data_digest"] == load("digits").digest
    assert entry.figures["top1"] == outcome.json["top1"]
    assert entry.figures["confusion"] == outcome.json["confusion"]
    before = Bundle.open(digits_bundle.path).manifest
    assert cli("eval", digits_bundle.path, "--data", "digits", "--no-save").code == 0
    assert Bundle.open(digits_bundle.path).manifest == before


def test_many_classes_do_not_bloat_the_history():
    size = RECORDED_CLASSES + 1
    assert "confusion" not in Accuracy(1.0, 1.0, np.eye(size, dtype=np.int64)).record()


def test_a_class_the_model_does_not_know(cli, digits_bundle: Bundle, tmp_path: Path):
    np.savez(
        tmp_path / "d.npz",
        images=np.zeros((20, 8, 8), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None],
        labels=["cat", "dog"] * 10,
    )
    outcome = cli("eval", digits_bundle.path, "--data", f"npz:{tmp_path / 'd.npz'}")
    assert outcome.code == 2
    assert "has the class 'cat'" in outcome.err


def test_a_raw_graph_has_no_classes(tiny_bundle: Bundle):
    with pytest.raises(Exception, match="no classes to evaluate"):
        evaluate(tiny_bundle, "digits")

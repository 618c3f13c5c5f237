"""Float and int8 side by side: one picture, the agreement of the two maps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import load_from_string, numpy_helper
from PIL import Image

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.data import load
from edgekit.explanation.agreement import spearman


@pytest.fixture
def both(tmp_path: Path, digits_bundle: Bundle, digits_graph: bytes) -> Bundle:
    """The digit classifier, and for its int8 graph the same with a last layer rounded to a coarse grid."""
    model = load_from_string(digits_graph)
    for weight in model.graph.initializer:
        if weight.name == "w3":
            values = numpy_helper.to_array(weight)
            step = np.abs(values).max() / 31
            weight.CopyFrom(numpy_helper.from_array((values / step).round().astype(np.float32) * step, "w3"))
    with Bundle.create(tmp_path / "both.edge") as draft:
        draft.write(FLOAT_GRAPH, digits_graph)
        draft.write(INT8_GRAPH, model.SerializeToString())
        draft.manifest = msgspec.structs.replace(digits_bundle.manifest, golden={}, name="both")
    return Bundle.open(tmp_path / "both.edge")


@pytest.mark.parametrize("method", ["lime", "occlusion"])
def test_two_maps_stand_in_one_picture(cli: Callable[..., Any], both: Bundle, tmp_path: Path, method: str) -> None:
    Image.fromarray(load("digits").test.read(420)).save(tmp_path / "four.png")
    asked = ("explain", both.path, tmp_path / "four.png", "--method", method, "--samples", 200, "--compare")
    answer = cli(*asked, "--out", tmp_path / "why", "--json")
    assert answer.code == 0, answer.err
    row = answer.json["images"][0]
    compared = row["compared"]
    assert answer.json["graph"] == INT8_GRAPH
    assert 0.8 < compared["spearman"] < 1
    assert compared["float"]["label"] == compared["int8"]["label"] == "4"
    assert compared["int8"]["deletion_auc"] == row["deletion_auc"] != compared["float"]["deletion_auc"]
    for graph in ("float", "int8"):
        assert compared[graph]["deletion_auc"] < compared[graph]["misplaced_auc"]
        assert compared[graph]["insertion_auc"] > compared[graph]["misplaced_insertion_auc"]
    with Image.open(tmp_path / "why" / row["overlay"]) as picture:
        assert picture.width > 2.5 * picture.height  # the frame and two maps
    assert "float_deletion_auc" in cli(*asked, "--out", tmp_path / "why").out


def test_what_cannot_be_compared_is_refused_with_the_fix(
    cli: Callable[..., Any], both: Bundle, digits_bundle: Bundle, tmp_path: Path
) -> None:
    Image.fromarray(load("digits").test.read(420)).save(tmp_path / "four.png")
    tail = (tmp_path / "four.png", "--out", tmp_path / "why", "--compare")
    lacking = cli("explain", digits_bundle.path, *tail)
    assert lacking.code == 2
    assert INT8_GRAPH in lacking.err
    assert "edgekit quantize" in lacking.err
    activations = cli("explain", both.path, *tail, "--method", "activations")
    assert (activations.code, "occlusion or lime" in activations.err) == (2, True)
    precision = cli("explain", both.path, *tail, "--precision", "float")
    assert (precision.code, "leave --precision out" in precision.err) == (2, True)
    assert not (tmp_path / "why").exists()


def test_ranks_agree_whatever_the_scale() -> None:
    values = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    assert spearman(values, np.exp(values)) == pytest.approx(1)
    assert spearman(values, -(values**3)) == pytest.approx(-1)
    assert spearman(values, np.ones_like(values)) is None
    tied = np.array([1, 2, 2, 3], np.float32)
    assert spearman(tied, np.array([1, 2, 3, 4], np.float32)) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)  # by hand

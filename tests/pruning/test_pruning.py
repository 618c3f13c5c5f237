"""Pruning: channels are really gone, the budget is kept or refused, every layout survives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.models.module import load as load_module
from edgekit.pruning import prune, recover
from edgekit.pruning.sparsity import Mask24, is_24
from edgekit.runtime import Model, check_golden

HALF: dict[str, Any] = {"keep": 0.5, "epochs": 2}


@pytest.fixture(scope="module")
def halved(trained_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`trained_bundle` pruned by `HALF`; read only."""
    return prune(trained_bundle, out=tmp_path_factory.mktemp("halved") / "p.edge", **HALF)


def test_pruned_channels_are_gone_from_graph_and_weights(trained_bundle: Bundle, halved: Bundle):
    pruned = halved
    figures = pruned.manifest.history[-1].figures
    assert figures["macs_share"] <= 0.5
    assert figures["parameters"] < figures["parameters_before"] / 1.2
    assert pruned.manifest.history[-1].parent == trained_bundle.digest
    graphs = [onnx.load(b.file(FLOAT_GRAPH)).graph for b in (trained_bundle, pruned)]
    sizes = [sum(int(np.prod(i.dims)) for i in graph.initializer) for graph in graphs]
    assert sizes[1] < sizes[0] / 1.2
    check_golden(pruned)
    module = load_module(pruned)
    assert sum(p.numel() for p in module.parameters()) == figures["parameters"]
    with Model.open(pruned.path) as model:
        assert model(np.zeros((28, 28), np.uint8)).label in set("0123456789")


def test_a_stopped_run_goes_on_from_its_cut(
    trained_bundle: Bundle, halved: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    epochs = []

    def stopping(epoch: int, score: float) -> None:
        epochs.append(epoch)
        if epochs == [0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(recover, "fit", partial(recover.fit, on_epoch=stopping))
    with pytest.raises(KeyboardInterrupt):
        prune(trained_bundle, out=tmp_path / "p.edge", **HALF)
    assert not (tmp_path / "p.edge").exists()
    capfd.readouterr()
    pruned = prune(trained_bundle, out=tmp_path / "p.edge", **HALF)
    said = capfd.readouterr().err
    assert "going on from the cut" in said
    assert "cut blocks" not in said
    assert epochs == [0, 1]
    weights = [b.file("weights.safetensors").read_bytes() for b in (pruned, halved)]
    assert weights[0] == weights[1]
    assert [path.name for path in tmp_path.iterdir()] == ["p.edge"]


def test_24_sparsity_is_in_the_exported_graph(trained_bundle: Bundle, tmp_path: Path):
    pruned = prune(trained_bundle, out=tmp_path / "s.edge", sparsity="2:4", epochs=1)
    assert pruned.manifest.history[-1].figures["sparse_share"] == pytest.approx(0.5)
    assert pruned.manifest.history[-1].figures["macs_share"] == 1
    graph = onnx.load(pruned.file(FLOAT_GRAPH)).graph
    weights = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    pointwise = [weights[n.input[1]] for n in graph.node if n.op_type == "Conv" and weights[n.input[1]].shape[2:] == (1, 1)]
    assert pointwise
    assert all(is_24(w) for w in pointwise)


def test_mask_keeps_the_two_largest_of_four():
    layer = torch.nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -4, 3, 2, 0, 1, 2, 3]] * 2))
    Mask24(layer)()
    assert layer.weight[0].tolist() == [0, -4, 3, 0, 0, 0, 2, 3]


def test_a_missed_budget_exits_3_and_keeps_the_best(cli, trained_bundle: Bundle, tmp_path: Path):
    asked = ("--keep", "0.1", "--max-drop", "0", "--epochs", "1", "--json")
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "p.edge", *asked)
    assert outcome.code == 3
    assert outcome.json["drop"] > 0
    assert "allowed 0" in outcome.json["error"]
    assert Bundle.open(tmp_path / "p.edge")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "0.5", "--speedup", "2"], "give one of them"),
        (["--keep", "1.5"], "not a share"),
        (["--speedup", "0.5"], "how many times faster"),
        (["--data", "digits:x"], "without a path"),
    ],
)
def test_wrong_usage(cli, trained_bundle: Bundle, tmp_path: Path, arguments: list[str], words: str):
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "p.edge", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert not (tmp_path / "p.edge").exists()


def test_a_bundle_without_weights_is_refused(cli, tiny_bundle: Bundle, tmp_path: Path):
    outcome = cli("prune", tiny_bundle.path, "--out", tmp_path / "p.edge", "--data", "digits")
    assert outcome.code == 1
    assert "no PyTorch weights" in outcome.err

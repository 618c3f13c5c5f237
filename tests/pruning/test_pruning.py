"""Pruning: channels are really gone, the budget is kept or refused, every layout survives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.models.module import load as load_module
from edgekit.pruning import prune
from edgekit.pruning.sparsity import Mask24, is_24
from edgekit.runtime import Model, check_golden


def test_pruned_channels_are_gone_from_graph_and_weights(trained_bundle: Bundle, tmp_path: Path):
    pruned = prune(trained_bundle, out=tmp_path / "p.edge", keep=0.5, epochs=1)
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


def test_a_pruned_bundle_can_be_pruned_again(trained_bundle: Bundle, tmp_path: Path):
    once = prune(trained_bundle, out=tmp_path / "a.edge", keep=0.8, epochs=1)
    twice = prune(once, out=tmp_path / "b.edge", keep=0.8, epochs=1)
    stages = [entry.stage for entry in twice.manifest.history]
    assert stages == ["train", "prune", "prune"]
    assert twice.manifest.history[-1].figures["macs"] < once.manifest.history[-1].figures["macs"]


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
    outcome = cli("prune", trained_bundle.path, "--out", tmp_path / "p.edge", "--speedup", "90", "--epochs", "1", "--json")
    assert outcome.code == 3
    assert outcome.json["speedup"] < 90
    assert "asked 90x" in outcome.json["error"]
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

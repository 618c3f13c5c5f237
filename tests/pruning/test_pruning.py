"""Pruning: channels are really gone, the budget is kept or refused, every layout survives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.models.cnn import Depthwise, Inverted, Residual, Textbook
from edgekit.models.module import adopt_shapes
from edgekit.models.module import load as load_module
from edgekit.models.module import macs as macs_of
from edgekit.pruning import prune
from edgekit.pruning.groups import groups_of, remove_channels
from edgekit.pruning.search import cut_path
from edgekit.pruning.sparsity import Mask24, is_24
from edgekit.runtime import Model, check_golden

#: Few blocks: each step measures every group, and this family has many.
SMALL_INVERTED = partial(Inverted, widths=(16, 32, 48), depths=(2, 1), head=64)


def test_pruned_channels_are_gone_from_graph_and_weights(trained_bundle: Bundle, tmp_path: Path):
    pruned = prune(trained_bundle, out=tmp_path / "p.edge", keep=0.5, epochs=1)
    figures = pruned.manifest.history[-1].figures
    assert figures["macs_share"] <= 0.5
    assert figures["parameters"] < figures["parameters_before"] / 1.5
    assert pruned.manifest.history[-1].parent == trained_bundle.digest
    graphs = [onnx.load(b.file(FLOAT_GRAPH)).graph for b in (trained_bundle, pruned)]
    sizes = [sum(int(np.prod(i.dims)) for i in graph.initializer) for graph in graphs]
    assert sizes[1] < sizes[0] / 1.5
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


@pytest.mark.parametrize(
    ("make", "channels", "size"),
    [(Depthwise, 3, 64), (SMALL_INVERTED, 3, 32), (Residual, 3, 32), (Textbook, 1, 28)],
    ids=["depthwise", "inverted", "residual", "textbook"],
)
def test_every_cut_runs_and_widths_stay_multiples_of_16(make: Callable[..., torch.nn.Module], channels: int, size: int):
    module = make(7, channels, size, size)
    samples = torch.randn(8, channels, size, size)
    macs = macs_of(module, samples)
    steps = list(cut_path(module, samples, frozenset({"classifier"})))
    assert steps
    for step in steps:
        assert step.macs < macs
        macs = step.macs
        assert step.after % 16 == 0
        assert step.module(samples).shape == (8, 7)
    state = steps[-1].module.state_dict()
    fresh = make(7, channels, size, size)
    adopt_shapes(fresh, state)
    fresh.load_state_dict(state)
    assert torch.allclose(fresh.eval()(samples), steps[-1].module(samples))


def test_removing_a_dead_channel_changes_nothing():
    module = Textbook(10).eval()
    with torch.no_grad():
        module.features[0].weight[3] = 0
        module.features[0].bias[3] = 0
    x = torch.randn(4, 1, 28, 28)
    expected = module(x)
    weakest = next(g for g in groups_of(module, x, frozenset({"classifier"})) if g.root == "features.0").ranking[0]
    assert weakest == 3
    remove_channels(module, x, "features.0", [3])
    assert module.features[0].out_channels == 31
    assert torch.allclose(module(x), expected, atol=1e-5)


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

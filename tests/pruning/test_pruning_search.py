"""The path of cuts, what networks cost, and the table of timed layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from edgekit.errors import UsageError
from edgekit.models.cnn import Depthwise, Inverted, Residual, Textbook
from edgekit.models.module import adopt_shapes, edit, macs
from edgekit.models.rnn import Crnn, RowsRnn
from edgekit.models.transformer import Vit
from edgekit.pruning import search
from edgekit.pruning.coupling import Operation
from edgekit.pruning.groups import analyse
from edgekit.pruning.importance import importance_named
from edgekit.pruning.price import LatencyPrice, RooflinePrice, macs_price, size_price
from edgekit.pruning.search import Judge, cut_path, narrowest, sensitivity, spared
from edgekit.pruning.table import LatencyTable
from edgekit.pruning.target import Target, target_of
from edgekit.targets import Figure, target_named

#: Few blocks: each step measures every group, and these families have many.
SMALL_INVERTED = partial(Inverted, widths=(16, 16, 32), depths=(2, 1), head=32)
SMALL_RESIDUAL = partial(Residual, widths=(16, 32, 48), depths=(1, 2))
SMALL_VIT = partial(Vit, dim=48, depth=1)


def judge_of(module: nn.Module, samples: Tensor) -> Judge:
    return Judge.of(module, samples, torch.zeros(len(samples), dtype=torch.long), importance_named("magnitude"))


@pytest.mark.parametrize(
    ("make", "channels", "size"),
    [
        (partial(Depthwise, widths=(16, 32, 48), depths=(2, 2)), 3, 32),
        (SMALL_INVERTED, 3, 32),
        (SMALL_RESIDUAL, 3, 32),
        (Textbook, 1, 28),
        (SMALL_VIT, 1, 28),
        (partial(RowsRnn, hidden=32), 1, 28),
    ],
    ids=["depthwise", "inverted", "residual", "textbook", "vit", "rnn"],
)
def test_every_step_is_cheaper_and_runs_and_is_kept_by_its_weights(make: Callable[..., nn.Module], channels: int, size: int):
    module = make(7, channels, size, size).eval()
    samples = torch.randn(4, channels, size, size)
    network = analyse(module, samples)
    least, cost = macs_price(narrowest(network)), macs_price(network)
    assert cost == macs(module, samples)
    steps = list(cut_path(network, judge_of(module, samples), macs_price))
    assert steps
    for step in steps:
        assert step.price < cost
        cost = step.price
        multiple = 4 if step.name.endswith("rnn") else 8  # half of the unit, where it is narrow
        assert step.kind != "channels" or step.after % multiple == 0 or step.name.endswith(("query", "value"))
        assert step.network.module(samples).shape == (4, 7)
    last = steps[-1].network
    assert cost == pytest.approx(least)
    assert cost == macs(last.module, samples)
    assert size_price(last) == 4 * sum(v.numel() for v in last.module.state_dict().values() if v.is_floating_point())
    fresh = make(7, channels, size, size)
    edit(fresh, last.edits)
    adopt_shapes(fresh, last.module.state_dict())
    fresh.load_state_dict(last.module.state_dict())
    assert torch.allclose(fresh.eval()(samples), last.module(samples))


def test_a_reader_loses_units_in_both_directions_of_both_layers():
    module = Crnn(7, 1, 32, 64, widths=(16, 16, 16, 16, 32), hidden=16).eval()
    samples = torch.randn(4, 1, 32, 64)
    network = analyse(module, samples)
    steps = list(cut_path(network, judge_of(module, samples), macs_price))  # to the end
    assert "rnn" in {step.name for step in steps}
    assert steps[-1].network.module(samples).shape == (4, 16, 7)
    assert steps[-1].price == macs(steps[-1].network.module, samples)


def test_a_path_ends_where_the_limit_is_met():
    module = Textbook(10).eval()
    samples = torch.randn(4, 1, 28, 28)
    network = analyse(module, samples)
    whole = macs_price(network)
    steps = list(cut_path(network, judge_of(module, samples), macs_price, 0.6 * whole))
    assert steps[-1].price <= 0.6 * whole
    assert all(step.price > 0.6 * whole for step in steps[:-1])


def test_cuts_that_later_ones_made_needless_are_taken_back():
    module = Textbook(10).eval()
    samples = torch.randn(8, 1, 28, 28)
    network, judge = analyse(module, samples), judge_of(module, samples)
    steps = list(cut_path(network, judge, macs_price, 0.5 * macs_price(network)))
    assert spared(network, steps, judge, macs_price, steps[-1].price) == (steps, [])
    limit = max(macs_price(network) - (macs_price(network) - steps[0].price) / 2, steps[0].price)  # one step would do
    kept, needless = spared(network, steps, judge, macs_price, limit)
    assert len(kept) == 1
    assert len(needless) == len(steps) - 1
    assert kept[0].price <= limit
    assert kept[0].price == macs(kept[0].network.module, samples)
    assert kept[0].before == network.width(next(g for g in network.groups if g.name == kept[0].name))


def test_without_the_cut_that_made_a_width_even_the_others_do() -> None:
    """50 channels are cut to 48, 32, 16: without the first cut the second leaves 48, not 34."""
    module = nn.Sequential(nn.Conv2d(1, 50, 3), nn.ReLU(), nn.Conv2d(50, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    samples = torch.randn(8, 1, 12, 12)
    network, judge = analyse(module, samples), judge_of(module, samples)
    steps = list(cut_path(network, judge, macs_price, 0.4 * macs_price(network)))
    assert [step.after for step in steps] == [48, 32, 16]
    for share in (0.98, 0.7, 0.5):
        kept, _ = spared(network, steps, judge, macs_price, share * macs_price(network))
        assert kept[-1].price <= share * macs_price(network)
        assert kept[-1].network.module[0].out_channels in (16, 32, 48)


def test_heads_go_one_at_a_time_and_again_where_a_path_is_made_anew():
    samples = torch.randn(4, 1, 28, 28)
    network = replace(analyse(Vit(7, dim=64, depth=1, heads=8).eval(), samples), blocks=())
    judge = judge_of(network.module, samples)
    steps = list(cut_path(network, judge, macs_price))
    heads = [step for step in steps if step.kind == "heads"]
    assert heads
    assert all(step.before - step.after == 1 for step in heads)
    last = heads[-1].network
    counts = {name.rpartition(".")[2]: count for name, count in last.edits.attributes.items()}
    assert counts == {"heads": heads[-1].after}
    first = next(i for i, step in enumerate(steps) if step.kind == "heads")
    before = steps[first - 1].network if first else network
    limit = steps[first].price + 1e-3 * macs_price(network)
    again, _ = spared(before, steps[first : first + 2], judge, macs_price, limit)
    assert [(step.kind, step.before, step.after) for step in again][:1] == [("heads", heads[0].before, heads[0].after)]
    assert again[0].price == macs(again[0].network.module, samples)


def test_healing_is_the_same_each_time():
    samples = torch.randn(8, 1, 28, 28)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))
    judge = judge_of(module, samples)
    healed = []
    for _ in range(2):
        torch.rand(3)  # whoever else draws
        other = copy.deepcopy(module)
        nn.init.zeros_(other[1].weight[:8])
        judge.heal(other)
        healed.append(other[1].weight)
    assert torch.equal(*healed)


def test_healing_learns_from_other_samples_than_those_that_judge():
    original, judged, taught = Textbook(10).eval(), torch.randn(8, 1, 28, 28), torch.randn(32, 1, 28, 28)
    judge = Judge.of(original, judged, torch.zeros(8, dtype=torch.long), importance_named("magnitude"), taught)
    cut = next(cut_path(analyse(original, judged), judge, macs_price)).network.module
    learnt: list[Tensor] = []
    cut.register_forward_pre_hook(lambda module, given: learnt.extend(given[0]) if torch.is_grad_enabled() else None)
    far = judge.kl(cut)
    assert judge.heal(cut) <= far  # and back where it led away
    assert learnt
    assert all(any(torch.equal(one, sample) for sample in taught) for one in learnt)


def test_what_bears_nothing_is_not_cut_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "CAPACITY", 0.0)  # a net with fresh weights answers nothing that a cut could change much
    module = Textbook(10).eval()
    with torch.no_grad():  # half of the second convolution's filters are dead
        module.features[3].weight[::2] = 0
        module.features[3].bias[::2] = 0
    samples = torch.randn(16, 1, 28, 28)
    network = analyse(module, samples)
    step = next(cut_path(network, judge_of(module, samples), macs_price))
    assert step.name == "features.3"
    assert step.kl < 1e-3
    curves = sensitivity(network, judge_of(module, samples))
    assert set(curves) == {"features.0", "features.3", "features.6", "dense"}
    assert all(curve[0] == (1.0, 0.0) for curve in curves.values())
    assert dict(curves["features.3"])[0.5] == pytest.approx(0, abs=1e-5)
    assert min(kl for _, kl in curves["features.6"][1:]) > 1e-5


def test_the_table_times_a_shape_once_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edgekit.pruning.table.DISTURBED", 1e9)  # whatever else this machine does
    network = analyse(Textbook(10).eval(), torch.randn(2, 1, 28, 28))
    table = LatencyTable(tmp_path)
    price = LatencyPrice(table)
    first = price(network)
    assert first > 0
    assert table.measured == 6
    assert price(network) == first
    assert table.measured == 6
    table.save()
    again = LatencyTable(tmp_path)
    assert LatencyPrice(again)(network) == first
    assert again.measured == 0
    assert len(json.loads(table.path.read_bytes())) == 6
    assert price.anchored(network, 3.0)(network) == pytest.approx(3.0)


@pytest.mark.parametrize("kind", ["transcendental", "product", "attention"])
def test_what_is_narrower_is_timed_as_such(tmp_path: Path, kind: str):
    dims = {"product": 2, "attention": 2}.get(kind, 1)
    numbers = tuple(torch.arange(64) for _ in range(dims))
    shape = {"attention": (2, 4, 49, 49), "product": (8, 49, 49, 16)}.get(kind, (2 * 49 * 64,))
    operation = Operation(kind, numbers, shape)
    table = LatencyTable(tmp_path)
    wide, narrow = (table.microseconds(operation, (width,) * dims, 2) for width in (64, 16))
    assert table.measured == 2
    table.save()
    keys = json.loads(table.path.read_bytes())
    shapes = {key.partition(" - ")[2] for key in keys}
    assert len(shapes) == 2
    assert min(wide, narrow) > 0


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"a": null}', b'{"a": 1.0}', b'{"a": [1]}'])
def test_a_damaged_table_is_measured_again(tmp_path: Path, damage: bytes):
    LatencyTable(tmp_path).path.write_bytes(damage)
    table = LatencyTable(tmp_path)
    assert LatencyPrice(table)(analyse(Textbook(10).eval(), torch.randn(2, 1, 28, 28))) > 0
    assert table.measured == 6


def test_convolutions_are_timed_as_the_ones_they_are(tmp_path: Path):
    table = LatencyTable(tmp_path)

    def microseconds(layer: nn.Module) -> float:
        network = analyse(nn.Sequential(nn.Conv2d(3, 128, 1), layer), torch.randn(2, 3, 12, 12))
        (operation,) = (o for o in network.operations if o.module == "1")
        return table.microseconds(operation, network.sizes(operation), 2)

    dense = microseconds(nn.ConvTranspose2d(128, 128, 5))
    depthwise = microseconds(nn.ConvTranspose2d(128, 128, 5, groups=128))
    assert depthwise < dense / 3  # by arithmetic a 128th
    microseconds(nn.Conv2d(128, 16, 3, padding=4, dilation=4))
    microseconds(nn.Conv2d(128, 16, 3, padding=1))
    microseconds(nn.ConvTranspose2d(128, 128, 5, dilation=2))
    assert table.measured == 5


def test_times_that_cannot_be_are_measured_again(tmp_path: Path):
    operation = Operation("transcendental", (torch.arange(64),), (4096,))
    table = LatencyTable(tmp_path)
    table.microseconds(operation, (64,), 2)
    table.save()
    kept = json.loads(table.path.read_bytes())
    table.path.write_text(json.dumps({key: [float("nan"), 1.0] for key in kept}))
    again = LatencyTable(tmp_path)
    assert again.microseconds(operation, (64,), 2) > 0
    assert again.measured == 1


def test_what_was_timed_on_a_busy_machine_is_timed_again(tmp_path: Path):
    table = LatencyTable(tmp_path)
    operations = [Operation("transcendental", (torch.arange(64),), (size,)) for size in (4096, 8192)]
    quiet, busy = (table.microseconds(operation, (64,), 2) for operation in operations)
    table.save()
    first, second = json.loads(table.path.read_bytes())
    table.path.write_text(json.dumps({first: [quiet, 20.0], second: [busy, 20.0]}))
    again = LatencyTable(tmp_path)
    assert [again.microseconds(operation, (64,), 2) for operation in operations] == [quiet, busy]
    assert again.measured == 0
    table.path.write_text(json.dumps({first: [quiet, 20.0], second: [1e6, 30.0]}))
    again = LatencyTable(tmp_path)
    assert again.microseconds(operations[0], (64,), 2) == quiet
    assert again.microseconds(operations[1], (64,), 2) < 1e5
    assert again.measured == 1


def test_a_table_that_cannot_be_kept_costs_time_only(tmp_path: Path):
    (tmp_path / "file").write_text("")
    LatencyTable(tmp_path / "file").save()


def test_a_larger_layer_takes_longer(tmp_path: Path):
    network = analyse(Vit(10).eval(), torch.randn(2, 1, 28, 28))
    table = LatencyTable(tmp_path)
    price = LatencyPrice(table)
    assert price(narrowest(network)) < 0.7 * price(network)
    kinds = {operation.kind for operation in network.operations}
    assert kinds == {"attention", "convolution", "linear", "normalisation", "pointwise", "transcendental"}


def test_the_roofline_of_a_named_target():
    network = analyse(Vit(10).eval(), torch.randn(2, 1, 28, 28))
    price = RooflinePrice(target_named("jetson-orin-nano"), "fp16")
    launches = sum(1 for _ in network.operations) * 5e-3
    assert price(network) > launches
    assert 0 < price(narrowest(network)) < price(network)
    with pytest.raises(UsageError, match="has no fp16 peak"):
        RooflinePrice(target_named("x86-cpu"), "fp16")
    slower = Figure(20, "measured on a board")
    assert RooflinePrice(msgspec.structs.replace(price.target, launch_us=slower), "fp16")(network) > 2 * price(network)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, Target("macs", 0.5)),
        ({"keep": 0.4}, Target("macs", 0.4)),
        ({"speedup": 4}, Target("speedup", 0.25)),
        ({"latency_ms": 5}, Target("latency", 5.0)),
        ({"size": 1e5}, Target("size", 1e5)),
    ],
)
def test_targets(stated: dict[str, float], expected: Target):
    options = {"keep": None, "size": None, "speedup": None, "latency_ms": None, **stated}
    assert target_of(**options) == expected
    assert expected.limit(1000) == (expected.value * 1000 if expected.kind in ("macs", "speedup") else expected.value)


@pytest.mark.parametrize("stated", [{"keep": 0}, {"keep": True}, {"size": -1}, {"latency_ms": float("nan")}, {"speedup": 1}])
def test_impossible_targets(stated: dict[str, float]):
    options = {"keep": None, "size": None, "speedup": None, "latency_ms": None, **stated}
    with pytest.raises(UsageError):
        target_of(**options)

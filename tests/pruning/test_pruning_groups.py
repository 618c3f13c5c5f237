"""Channels that go together: found in every layout, removable to any width, and the price follows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgekit.errors import GraphError
from edgekit.models.export import export_onnx
from edgekit.models.module import macs
from edgekit.pruning.groups import Group, Network, analyse
from edgekit.pruning.importance import CRITERIA
from edgekit.pruning.price import macs_price
from edgekit.runtime.onnxruntime import session

from .layouts import (
    IMAGE,
    LAYOUTS,
    SEQUENCE,
    Attention,
    Net,
    Positions,
    analysed,
    attention,
    chain,
    conv,
    equal,
    example_of,
    pooled,
    reloaded,
    some,
    transposed,
)
from .silent import silenced


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_a_layout_are_found(layout: str):
    network, _ = analysed(layout)
    assert {g.name: (len(g.rows), len(g.rows[0])) for g in network.groups if not g.heads} == LAYOUTS[layout][2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_stay_and_say_so(layout: str):
    network, example = analysed(layout)
    held = [name for name, why in network.kept.items() if why == "it is the model's output"]
    assert len(held) == 1
    assert all(held[0] != name.rpartition(".")[0] for g in network.groups for name, _ in g.makers)
    cut = network.without([c for g in network.groups if not g.heads for c in some(network, g)])
    assert cut.module(example).shape == network.module(example).shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_removed_channels_are_gone(layout: str):
    network, example = analysed(layout)
    for group in network.groups:
        channels = some(network, group, network.width(group) // 2)
        cut = network.without(channels, group.attributes) if not group.heads else heads_cut(network, group)
        if not group.heads:
            assert cut.width(group) == network.width(group) - network.width(group) // 2
        before, after = network.module.state_dict(), cut.module.state_dict()
        for name, axis in group.makers:
            assert after[name].shape[axis] < before[name].shape[axis]
        assert sum(v.numel() for n, v in after.items() if v.is_floating_point()) == sum(cut.elements().values())
        assert equal(reloaded(LAYOUTS[layout][0], cut), cut.module, example)
        assert macs_price(cut) == macs(cut.module, example) < macs_price(network)
        if not group.normalised and not group.name.startswith("attention.q"):  # whose scale follows the width
            assert equal(silenced(network, channels), network.without(channels).module, example)


def heads_cut(network: Network, group: Group) -> Network:
    return network.without(some(network, group), group.attributes)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("attention")])
def test_heads_go_whole_with_their_count(layout: str):
    network, example = analysed(layout)
    (heads,) = [g for g in network.groups if g.heads]
    assert (len(heads.rows), network.width(heads), heads.attributes) == (1, 4, ("attention.num_heads",))
    twice = heads_cut(heads_cut(network, heads), heads)
    assert twice.edits.attributes == {"attention.num_heads": 2}
    assert twice.width(heads) == 2
    assert twice.module.attention.out.weight.shape == (12, 8)
    assert equal(silenced(network, [*heads.rows[0][2:]]), twice.module, example)
    columns = next(g for g in network.groups if g.name.startswith("attention.") and not g.heads)
    narrow = twice.without(some(twice, columns))
    assert len(twice.rows(columns)) == len(columns.rows) // 2
    assert equal(reloaded(LAYOUTS[layout][0], narrow), narrow.module, example)
    assert macs_price(narrow) == macs(narrow.module, example) < macs_price(twice)


def test_a_wrong_count_of_heads_is_not_taken_for_a_cut():
    """(N, T, -1, width) runs with any width that divides, but on other heads."""

    class ByWidth(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    net = attention(True, True)
    net.attention = ByWidth(True, True)
    network = analyse(net, torch.randn(SEQUENCE))
    assert {g.name: g.heads for g in network.groups} == {"embed": False, "up": False, "attention.qkv": True}
    assert "cannot run narrower" in network.kept["attention.qkv"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = conv(8, 6), nn.BatchNorm2d(6), conv(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.norm(self.a(x))))


def tower() -> nn.Module:
    return nn.Sequential(conv(3, 8), Block(), nn.ReLU(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_a_block_is_left_out_and_the_rest_still_cut():
    example = torch.randn(IMAGE)
    network = analyse(tower(), example)
    assert network.blocks == ("1", "3")
    assert [g.name for g in network.groups] == ["0", "1.a", "3.a"]
    skipped = network.skipping("1")
    assert (skipped.blocks, skipped.edits.skipped) == (("3",), ("1",))
    assert [g.name for g in skipped.groups] == ["0", "3.a"]
    assert macs_price(network.bypassed("1")) == macs_price(skipped) == macs(skipped.module, example)
    channels = [c for g in skipped.groups for c in some(skipped, g, 3)]
    cut = skipped.without(channels)
    assert equal(reloaded(tower, cut), cut.module, example)
    assert equal(silenced(skipped, channels), cut.module, example)
    assert macs_price(cut) == macs(cut.module, example) < macs_price(skipped)
    again = analyse(cut.module, example, cut.edits)
    assert again.edits.skipped == ("1",)
    assert [g.name for g in again.groups] == ["0", "3.a"]


def test_a_block_that_is_left_out_after_a_cut_takes_its_channels_along():
    example = torch.randn(IMAGE)
    network = analyse(tower(), example)
    group = network.groups[1]
    both = network.without(some(network, group, 2)).skipping("1")
    assert equal(both.module, network.skipping("1").module, example)
    assert equal(reloaded(tower, both), both.module, example)


def test_a_block_without_a_residual_stays():
    """Its answer has the shape of its input, and other channels."""
    inner = nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8))
    plain = nn.Sequential(conv(3, 8), nn.ReLU(), inner, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    network = analyse(plain, torch.randn(IMAGE))
    assert network.blocks == ()
    assert [g.name for g in network.groups] == ["0", "2.0", "2.2"]


def test_a_stored_index_keeps_what_it_picks_from():
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)
            self.register_buffer("order", torch.arange(7, -1, -1))

        def forward(self, x: Tensor) -> Tensor:
            return pooled(self.b(torch.index_select(self.a(x), 1, self.order)))

    network = analyse(Shuffled(), torch.randn(IMAGE))
    assert "aten.index_select" in network.kept["a"]


def test_a_frozen_layer_keeps_its_width():
    example = torch.randn(IMAGE)
    network = analyse(tower(), example, frozen=("1.a",))
    assert network.kept["1.a"] == "1.a is frozen"
    assert [g.name for g in network.groups] == ["0", "3.a"]
    assert network.blocks == ("3",)  # without block 1, its layer would be gone
    network = analyse(tower(), example, frozen=("1.*",))
    assert [g.name for g in network.groups] == ["3.a"]  # 1.b is added to what 0 makes
    network = analyse(tower(), example, frozen=("1.*", "3"))
    assert (network.groups, network.blocks) == ((), ())  # what holds layers stands for them
    assert analyse(transposed(), example, frozen=("2",)).kept["2"] == "2 is frozen"
    assert analyse(Positions(), example_of((2, 5)), frozen=("embed",)).kept["embed"] == "embed is frozen"


def test_the_last_channel_stays():
    network = analyse(nn.Sequential(conv(3, 1), nn.ReLU(), conv(1, 4), nn.ReLU(), conv(4, 2)), torch.randn(IMAGE))
    assert network.kept["0"] == "it has one channel"
    assert [g.name for g in network.groups] == ["2"]


def test_an_operator_without_a_rule_keeps_what_it_reads():
    net = Net(lambda m, x: m.head(m.b(torch.fft.rfft(m.a(x)).real)), a=nn.Linear(6, 6), b=nn.Linear(4, 8), head=nn.Linear(8, 2))
    network = analyse(net, torch.randn(2, 6))
    assert [g.name for g in network.groups] == ["b"]
    assert "aten.fft_rfft" in network.kept["a"]


def test_a_branch_on_data_is_named_in_one_line():
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(GraphError) as caught:
        analyse(nn.Sequential(conv(3, 4), Branch(), conv(4, 2)), torch.randn(IMAGE))
    message = caught.value.message
    assert "in 1 (Branch, line " in message
    assert "\n" not in message
    assert "Traceback" not in message


def test_a_parameter_of_two_names_is_cut_under_both():
    network, _ = analysed("tied")
    cut = network.without(some(network, network.groups[0], 3))
    assert cut.module.a.weight.shape == cut.module.b.weight.shape == (5, 5)


def deaden(module: nn.Module, criterion: str) -> None:
    """Make channel 2 of the first convolution useless in a way that the criterion must see."""
    with torch.no_grad():
        if criterion == "norm-scale":
            module[1].weight[2] = 0
        elif criterion == "magnitude":
            for value in (module[0].weight, module[0].bias, module[1].weight, module[1].bias):
                value[2] = 0
            module[3].weight[:, 2] = 0
        elif criterion == "taylor":  # large weights, and nothing reads them
            module[0].weight[2] *= 10
            module[3].weight[:, 2] = 0
        else:  # large weights, and the ReLU lets nothing through
            module[3].weight[:, 2] *= 10
            module[1].bias[2] = -10


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_dead_channel_is_the_weakest(criterion: str):
    torch.manual_seed(1)
    module, example = chain().eval(), torch.randn(16, *IMAGE[1:])
    deaden(module, criterion)
    network = analyse(module, example)
    group = network.groups[0]
    scores = CRITERIA[criterion](module, example, torch.randint(0, 4, (16,)))
    assert network.weakest(group, scores, 1)[0] is group.rows[0][2]
    cut = network.without(some(network, group, 3))
    scores = CRITERIA[criterion](cut.module, example, torch.randint(0, 4, (16,)))
    assert cut.weakest(group, scores, 1)[0] is group.rows[0][2]


KINDS = ("plain", "norm", "depthwise", "grouped", "residual", "concat", "gate")


class Drawn(nn.Module):
    """Layers of drawn kinds and widths, one after the other."""

    def __init__(self, layers: list[tuple[str, int]], end: str) -> None:
        super().__init__()
        self.kinds, self.layers, width = [kind for kind, _ in layers], nn.ModuleList(), 3
        for kind, after in layers:
            after = {"residual": width, "depthwise": 2 * width}.get(kind, after)
            groups = {"depthwise": width, "grouped": 2 if width % 2 == 0 else 1}.get(kind, 1)
            parts = [conv(width, 2 * after if kind == "gate" else after, groups=groups)]
            self.layers.append(nn.Sequential(*parts, *[nn.BatchNorm2d(after)] * (kind == "norm")))
            width = width + after if kind == "concat" else after
        self.end, self.rnn = end, nn.LSTM(width, 4, batch_first=True) if end == "lstm" else None
        self.head = nn.Linear({"flat": 16 * width, "mean": width, "lstm": 4}[end], 3)

    def forward(self, x: Tensor) -> Tensor:
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            made = layer(x)
            if kind == "gate":
                first, second = made.chunk(2, 1)
                made = first * torch.sigmoid(second)
            x = F.relu(x + made if kind == "residual" else torch.cat([x, made], 1) if kind == "concat" else made)
        if self.rnn is not None:
            return self.head(self.rnn(x.flatten(2).transpose(1, 2))[0])
        return self.head(x.flatten(1) if self.end == "flat" else x.mean((2, 3)))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    layers=st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from((2, 4, 6))), min_size=2, max_size=4),
    end=st.sampled_from(("flat", "mean", "lstm")),
    data=st.data(),
)
def test_any_net_can_be_cut(layers: list[tuple[str, int]], end: str, data: st.DataObject):
    """Down to two channels: a convolution of several groups with one input each would be read as depthwise."""
    torch.manual_seed(0)
    example = torch.randn(2, 3, 4, 4)
    network = analyse(Drawn(layers, end), example)
    assert macs_price(network) == macs(network.module, example)
    for group in network.groups:
        network = network.without(some(network, group, data.draw(st.integers(0, max(network.width(group) - 2, 0)))))
    assert network.module(example).shape[-1] == 3
    assert macs_price(network) == macs(network.module, example)
    assert equal(reloaded(lambda: Drawn(layers, end), network), network.module, example)


@pytest.mark.parametrize("layout", ["dense", "lstm2", "attention"])
def test_what_is_left_exports(layout: str):
    network, example = analysed(layout)
    for group in network.groups:
        network = network.without(some(network, group), group.attributes)
    wanted = network.module(example).detach().numpy()
    found = session(export_onnx(network.module, example)).run(None, {"x": example.numpy()})[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)

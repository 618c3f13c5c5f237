"""Layers with a rule of their own, and what is said of those without one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekit.models.module import COMPUTED, adopt_shapes
from edgekit.pruning.groups import analyse
from edgekit.pruning.importance import activation, magnitude
from edgekit.pruning.price import macs_price
from edgekit.pruning.search import Judge, cut_path

IMAGE = (2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self, middle: nn.Module, last: int = 12) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 12, 3), middle, nn.Linear(last, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.middle(F.relu(self.stem(x)))
        return self.head(made.mean((2, 3)))  # type: ignore[no-any-return]


class Gate(nn.Module):
    """CBAM's map (arXiv:1807.06521): one for all channels, from their sum; and a gain that is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.gain = nn.Conv2d(1, 1, 3, padding=1), nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("offset", torch.ones(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.map(x.sum(1, keepdim=True)).sigmoid() * self.gain + 0 * self.offset


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return (x.movedim(1, -1) @ self.weight).movedim(-1, 1)


@pytest.mark.parametrize(
    "middle",
    [
        lambda: nn.PReLU(12),
        lambda: nn.PReLU(),
        lambda: nn.ConvTranspose2d(12, 12, 2, 2, groups=12),
        lambda: nn.ConvTranspose2d(12, 12, 2, 2, groups=12, bias=False),
        Gate,
        Product,
    ],
    ids=["prelu", "one prelu", "depthwise transposed", "without bias", "gate", "product"],
)
def test_channels_go_through(middle: Callable[[], nn.Module]) -> None:
    """As if they were silent, and a fresh module takes the narrower weights."""
    torch.manual_seed(0)
    net, example = Net(middle()).eval(), torch.randn(IMAGE)
    network = analyse(net, example)
    assert [(group.name, network.width(group)) for group in network.groups] == [("stem", 12)]
    (row,) = network.groups[0].rows
    cut = network.without(row[:5]).module
    silent = copy.deepcopy(net)
    state = silent.state_dict()
    for channel in row[:5]:
        for (name, axis), index in channel.slices.items():
            state[name].index_fill_(axis, index, 0)
    fresh = Net(middle())
    adopt_shapes(fresh, cut.state_dict())
    fresh.load_state_dict(cut.state_dict())
    with torch.no_grad():
        assert torch.allclose(cut(example), silent(example), atol=1e-5)
        assert torch.equal(fresh.eval()(example), cut(example))


@pytest.mark.parametrize(
    ("middle", "layer", "why"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 3)), "middle", COMPUTED),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(12, 12, 3)), "middle", COMPUTED),
        (lambda: nn.ConvTranspose2d(12, 12, 2, groups=3), "middle", "middle runs aten.conv_transpose with groups on it"),
        (lambda: nn.ConvTranspose2d(12, 12, 2, groups=3), "stem", "middle runs aten.conv_transpose with groups on it"),
    ],
    ids=["weight norm", "spectral norm", "groups", "what it reads"],
)
def test_every_layer_that_stays_says_why(middle: Callable[[], nn.Module], layer: str, why: str) -> None:
    network = analyse(Net(middle()), torch.randn(IMAGE))
    assert network.kept[layer].startswith(why)
    held = {name.partition(".")[0] for group in network.groups for name, _ in group.makers}
    assert {"stem", "middle", "head"} <= held | set(network.kept)


def test_computed_weights_are_loaded_as_they_are() -> None:
    net = Net(nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 3)))
    adopt_shapes(net, net.state_dict())
    assert net(torch.randn(IMAGE)).shape == (2, 4)


class Roll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(4, 1)


class Tail(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :-4].tanh(), x[:, -4:]], 1)


class Blend(nn.Module):
    """The channels as a line that a convolution runs along (ECA, arXiv:1910.03151)."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.along(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


@pytest.mark.parametrize(
    ("middle", "why"), [(Roll, "its code does not follow"), (Tail, "its code does not follow"), (Blend, "mixed")]
)
def test_what_depends_on_the_place_of_a_channel_stays(middle: type[nn.Module], why: str) -> None:
    """Without its first channel such a module answers as with that silent; not without others."""
    network = analyse(Net(middle()), torch.randn(IMAGE))
    assert network.groups == ()
    assert why in network.kept["stem"]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))  # type: ignore[no-any-return]


def test_a_block_whose_owner_looks_into_it_stays() -> None:
    """`nn.TransformerEncoder` asks its first layer for its attention."""
    example = torch.randn(2, 5, 8)
    network = analyse(Encoder(), example)
    assert "body.layers.0" not in network.blocks
    for block in network.blocks:
        network.skipping(block).module(example)


def test_a_frozen_norm_or_holder_keeps_the_width() -> None:
    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)))
    net.add_module("end", nn.Sequential(nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)))
    for pattern in ("stem", "stem.1", "st*"):
        network = analyse(net, torch.randn(IMAGE), frozen=[pattern])
        assert [group.name for group in network.groups] == ["end.0"]
        assert network.kept["stem.0"] == f"{pattern} is frozen"


def test_a_projected_recurrence_keeps_its_sizes() -> None:
    layer = nn.LSTM(6, 8, proj_size=4, batch_first=True)
    adopt_shapes(layer, layer.state_dict())
    assert (layer.hidden_size, layer.proj_size) == (8, 4)


class Readers(nn.Module):
    """A line that a transposed convolution reads, and both directions of a recurrence do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv1d(6, 12, 1), nn.ConvTranspose1d(12, 4, 1)
        self.both = nn.GRU(12, 4, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.up(x).mean(2), self.both(x.transpose(1, 2))[0].mean(1)], 1)


@pytest.mark.parametrize("reader", ["up.weight", "both.weight_ih_l0_reverse"])
def test_activation_sees_every_reader(reader: str) -> None:
    """Channel 3 matters to one reader alone, and much."""
    torch.manual_seed(0)
    net, example = Readers().eval(), torch.randn(4, 6, 5)
    state = net.state_dict()
    with torch.no_grad():
        for name in ("up.weight", "both.weight_ih_l0", "both.weight_ih_l0_reverse"):
            part = state[name][3] if name == "up.weight" else state[name][:, 3]
            part.mul_(50) if name == reader else part.zero_()
    network = analyse(net, example)
    group = next(group for group in network.groups if group.name == "stem")
    order = network.weakest(group, activation(net, example, torch.zeros(4, dtype=torch.long)), 12)
    assert order[-1] is group.rows[0][3]


def test_a_block_that_no_longer_fits_is_not_skipped() -> None:
    """No residual goes around it: once it is narrower inside than before it, its input cannot take its place."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(3, 32, 3, padding=1))
    net.add_module("block", nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()))
    net.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)))
    samples = torch.randn(8, 3, 8, 8)
    network = analyse(net, samples, frozen=["stem"])
    assert network.blocks == ("block",)
    (group,) = network.groups
    narrow = network.without(group.rows[0][:16])
    judge = Judge.of(net, samples, torch.zeros(8, dtype=torch.long), magnitude)
    assert all(step.kind == "channels" for step in cut_path(narrow, judge, macs_price))

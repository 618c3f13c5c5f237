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

IMAGE = (2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self, middle: nn.Module, last: int = 12) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 12, 3), middle, nn.Linear(last, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.middle(F.relu(self.stem(x)))
        return self.head(made.mean((2, 3)))  # type: ignore[no-any-return]


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
        Product,
    ],
    ids=["prelu", "one prelu", "depthwise transposed", "without bias", "product"],
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

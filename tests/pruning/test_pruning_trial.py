"""What is tried of a group before it may be cut: several places, rows against each other, and what norms count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekit.models.module import macs
from edgekit.pruning.groups import analyse
from edgekit.pruning.importance import magnitude
from edgekit.pruning.price import MacsPrice, macs_price
from edgekit.pruning.search import Judge, cut_path

from .silent import silenced

IMAGE = (2, 3, 8, 8)


class Shuffled(nn.Module):
    """ShuffleNet's unit (arXiv:1707.01083): the rows of the first convolution are dealt out to both groups of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 1, groups=2)
        self.second, self.head = nn.Conv2d(32, 32, 1, groups=2), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.relu(self.stem(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.second(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_rows_that_are_dealt_out_lose_the_same_places():
    torch.manual_seed(0)
    module, x = Shuffled().eval(), torch.randn(IMAGE)
    network = analyse(module, x)
    group = next(g for g in network.groups if g.name == "first")
    assert group.aligned
    assert not next(g for g in network.groups if g.name == "stem").aligned
    with torch.no_grad():
        for count in (1, 5):
            channels = network.weakest(group, magnitude(module, x, x), count)
            torch.testing.assert_close(network.without(channels).module(x), silenced(network, channels)(x))


class Normed(nn.Module):
    """A norm, and ``how`` the channels go on."""

    def __init__(self, norm: nn.Module, how: Callable[[Tensor], Tensor], read: int = 32) -> None:
        super().__init__()
        self.stem, self.norm, self.how = nn.Conv2d(3, 32, 3), norm, how
        self.next, self.head = nn.Conv2d(read, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.next(self.how(F.relu(self.norm(self.stem(x)))))).mean((2, 3)))  # type: ignore[no-any-return]


def _halves(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x[:, :half] * torch.sigmoid(x[:, half:])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(32), nn.GroupNorm(1, 32), nn.GroupNorm(4, 32)], ids=["batch", "one", "four"])
@pytest.mark.parametrize(("how", "read"), [(lambda x: x.roll(4, 1), 32), (_halves, 16)], ids=["roll", "halves"])
def test_code_that_counts_channels_behind_a_norm_is_not_followed(norm: nn.Module, how: Callable[[Tensor], Tensor], read: int):
    torch.manual_seed(0)
    module, x = Normed(norm, how, read).eval(), torch.randn(IMAGE)
    network = analyse(module, x)
    with torch.no_grad():
        for group in network.groups:  # what may be cut can be cut anywhere
            width = network.width(group)
            for count in range(1, width):
                network.without(network.weakest(group, magnitude(module, x, x), count)).module(x)
    if how is not _halves:
        assert "stem" not in {group.name for group in network.groups}


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 32), nn.GroupNorm(4, 32), nn.GroupNorm(8, 32, affine=False)])
def test_a_norm_counts_what_is_left(norm: nn.Module):
    torch.manual_seed(0)
    module, x = Normed(norm, lambda x: x * 2).eval(), torch.randn(IMAGE)
    for value in norm.parameters():
        nn.init.normal_(value)
    network = analyse(module, x)
    group = next(g for g in network.groups if g.name == "stem")
    assert group.normalised
    assert not group.aligned


class Rotary(nn.Module):
    """Attention whose queries and keys are turned by the same angles in all heads (arXiv:2104.09864)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.head = nn.Linear(12, 32), nn.Linear(12, 32), nn.Linear(12, 32), nn.Linear(32, 5)
        self.register_buffer("cosine", torch.randn(6, 8))
        self.register_buffer("sine", torch.randn(6, 8))

    def turned(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cosine + torch.cat([-b, a], -1) * self.sine

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        answer = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.head(answer.transpose(1, 2).flatten(2).mean(1))  # type: ignore[no-any-return]


def test_what_heads_share_is_there_without_one_of_them():
    module, x = Rotary().eval(), torch.randn(2, 6, 12)
    network = analyse(module, x)
    assert network.groups
    for group in network.groups:
        cut = network.without([row[0] for row in network.rows(group)], group.attributes)
        assert macs_price(cut) == macs(cut.module, x) < macs_price(network)
        assert all(cut.width(other) for other in cut.groups)


class Routed(nn.Module):
    """The strongest of the gate's channels chooses a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.table, self.head = nn.Linear(12, 32), nn.Embedding(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1) if self.training else self.gate(x).max(-1)[1]
        return self.head(self.table(chosen))  # type: ignore[no-any-return]


def test_channels_whose_place_is_an_answer_stay():
    network = analyse(Routed().eval(), torch.randn(2, 12))
    assert "its place among the channels is an answer" in network.kept["gate"]
    assert "gate" not in {group.name for group in network.groups}


class Patches(nn.Module):
    """Four patches of a picture, each a sample of the same convolution; each row of what comes a series."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rows, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.LSTM(16, 16, batch_first=True), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        patches = F.relu(self.conv(x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(-1, 1, 4, 4)))
        rows, _ = self.rows(patches.flatten(2).transpose(1, 2))
        return self.head(rows[:, -1].reshape(n, -1))  # type: ignore[no-any-return]


class Asked(nn.Module):
    """Attention with a learnt query: a parameter that goes into a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 32))
        self.attention, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        answer, _ = self.attention(self.query.expand(len(x), -1, -1), x, x)
        return self.head(answer[:, 0])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("make", "shape"), [(Patches, (2, 1, 8, 8)), (Shuffled, IMAGE)])
def test_the_price_counts_the_macs_of_a_sample(make: Callable[[], nn.Module], shape: tuple[int, ...]):
    module, x = make().eval(), torch.randn(shape)
    assert macs_price(analyse(module, x)) == macs(module, x)


def test_a_parameter_that_a_module_is_called_with_does_not_stop_the_count():
    module, x = Asked().eval(), torch.randn(2, 6, 32)
    module.head.bias.requires_grad_(False)
    products = 2 * 6 * 32  # of queries with keys, of these with values
    assert macs(module, x) == (1 + 6 + 6 + 1) * 32 * 32 + products + 32 * 5
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["head.bias"]


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.cell, self.head = (
            nn.Linear(8, 64),
            nn.Linear(64, 16),
            nn.GRUCell(16, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 16)
        for step in range(x.shape[1]):
            state = self.cell(self.second(F.relu(self.first(x[:, step]))), state)
        return self.head(state)  # type: ignore[no-any-return]


def test_macs_that_cannot_be_followed_stay():
    module, x = Cell().eval(), torch.randn(8, 3, 8)
    network, whole = analyse(module, x[:2]), macs(module, x)
    price = MacsPrice.of(network, whole)
    assert price(network) == whole > macs_price(network)
    judge = Judge.of(module, x, torch.zeros(8, dtype=torch.long), magnitude)
    for step in cut_path(network, judge, price):
        assert step.price == macs(step.network.module, x)

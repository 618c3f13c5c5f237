"""Networks of every layout that channels go through, and what is done to all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekit.models.module import adopt_shapes, edit
from edgekit.pruning.groups import Channel, Group, Network, analyse

IMAGE = (2, 3, 8, 8)
SEQUENCE = (2, 5, 6)  # N, T, features


class Net(nn.Module):
    """A module of named parts and a function of them."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(before: int, after: int, size: int = 3, **more: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, **more)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def chain() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))  # fmt: skip


def residual() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.b(F.relu(m.a(x)))
        return m.head(pooled(F.relu(x)))

    return Net(run, stem=conv(3, 8), a=conv(8, 6), b=conv(6, 8), head=nn.Linear(8, 4))


def depthwise() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 16, groups=8), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 12, 1),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=2), nn.ReLU(), conv(12, 5), nn.ReLU(), nn.Flatten(),
                         nn.Linear(5 * 64, 4))  # fmt: skip


def transposed() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4))


def dense() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = torch.cat([x, m.a(F.relu(x))], 1)
        x = torch.cat([x, m.b(F.relu(m.norm(x)))], 1)
        return m.head(pooled(x))

    parts = {"stem": conv(3, 8), "a": conv(8, 4), "norm": nn.BatchNorm2d(12), "b": conv(12, 4), "head": nn.Linear(16, 4)}
    return Net(run, **parts)


def squeeze_excite() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
        return m.head(pooled(x * gate))

    return Net(run, stem=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), head=nn.Linear(8, 4))


def shuffled() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.head(pooled(F.relu(m.b(x))))

    return Net(run, a=conv(3, 8), b=conv(8, 12, groups=2), head=nn.Linear(12, 4))


def gated() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, 1)
        x = F.glu(m.b(a * torch.sigmoid(b)), 1)
        return m.head(pooled(x))

    return Net(run, a=conv(3, 12), b=conv(6, 10), head=nn.Linear(5, 4))


def pixels() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 3))


def recurrent(kind: type[nn.RNNBase], layers: int, both: bool) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.head(m.rnn(F.relu(m.embed(x)))[0])

    rnn = kind(7, 8, layers, batch_first=True, bidirectional=both)
    return Net(run, embed=nn.Linear(6, 7), rnn=rnn, head=nn.Linear(16 if both else 8, 4))


class Attention(nn.Module):
    """By hand: packed or apart, of matrix products or fused; heads are counted by an attribute."""

    def __init__(self, packed: bool, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.packed, self.fused = 4, packed, fused
        if packed:
            self.qkv = nn.Linear(12, 3 * 16)
        else:
            self.q, self.k, self.v = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 16)
        self.out = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.packed:
            q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (layer(x).view(n, t, self.num_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def attention(packed: bool, fused: bool) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.attention(m.norm(x))
        x = x + m.down(F.gelu(m.up(x)))
        return m.head(x.mean(1))

    return Net(run, embed=nn.Linear(6, 12), norm=nn.LayerNorm(12), attention=Attention(packed, fused), up=nn.Linear(12, 10),
               down=nn.Linear(10, 12), head=nn.Linear(12, 4))  # fmt: skip


class Positions(nn.Module):
    """Embedded tokens with a position and a class token, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.position = nn.Parameter(torch.randn(1, 6, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        return self.head(self.norm(y)[:, 0])


def group_norm() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 6), nn.GroupNorm(1, 6), nn.ReLU(), nn.Flatten(),
                         nn.Linear(6 * 64, 4))  # fmt: skip


def twice() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        x = F.relu(m.shared(F.relu(m.shared(x))))
        return m.head(pooled(x))

    return Net(run, stem=conv(3, 8), shared=conv(8, 8), head=nn.Linear(8, 4))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 4))


def tied() -> nn.Module:
    """One parameter under two names."""
    net = Net(lambda m, x: m.head(F.relu(m.b(F.relu(m.a(F.relu(m.stem(x))))))), stem=nn.Linear(6, 8), a=nn.Linear(8, 8),
              b=nn.Linear(8, 8), head=nn.Linear(8, 4))  # fmt: skip
    net.b.weight = net.a.weight
    return net


Expected = dict[str, tuple[int, int]]  # group -> rows, channels in each
LAYOUTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Expected]] = {
    "chain": (chain, IMAGE, {"0": (1, 8), "3": (1, 12)}),
    "residual": (residual, IMAGE, {"stem": (1, 8), "a": (1, 6)}),
    "depthwise": (depthwise, IMAGE, {"0": (1, 8), "5": (1, 12)}),
    "grouped": (grouped, IMAGE, {"0": (1, 4), "2": (2, 6), "4": (1, 5)}),
    "transposed": (transposed, IMAGE, {"0": (1, 8), "2": (1, 6)}),
    "dense": (dense, IMAGE, {"stem": (1, 8), "a": (1, 4), "b": (1, 4)}),
    "squeeze_excite": (squeeze_excite, IMAGE, {"stem": (1, 8), "down": (1, 4)}),
    "shuffled": (shuffled, IMAGE, {"a": (2, 2), "b": (2, 6)}),
    "gated": (gated, IMAGE, {"a": (1, 6), "b": (1, 5)}),
    "pixels": (pixels, IMAGE, {"0": (1, 8), "2": (1, 4)}),
    "lstm": (lambda: recurrent(nn.LSTM, 1, False), SEQUENCE, {"embed": (1, 7), "rnn": (1, 8)}),
    "lstm2": (lambda: recurrent(nn.LSTM, 2, True), SEQUENCE, {"embed": (1, 7), "rnn": (4, 8)}),
    "gru": (lambda: recurrent(nn.GRU, 1, True), SEQUENCE, {"embed": (1, 7), "rnn": (2, 8)}),
    "gru2": (lambda: recurrent(nn.GRU, 2, False), SEQUENCE, {"embed": (1, 7), "rnn": (2, 8)}),
    "group_norm": (group_norm, IMAGE, {"0": (2, 4), "3": (1, 6)}),
    "twice": (twice, IMAGE, {"stem": (1, 8)}),
    "tied": (tied, (2, 6), {"stem": (1, 8)}),
    "positions": (Positions, (2, 5), {"embed": (1, 8)}),
    "encoder": (encoder, SEQUENCE, {"1.linear1": (1, 12)}),
    "attention-packed": (lambda: attention(True, True), SEQUENCE, {"embed": (1, 12), "attention.qkv": (8, 4), "up": (1, 10)}),
    "attention-packed-products": (
        lambda: attention(True, False), SEQUENCE, {"embed": (1, 12), "attention.qkv": (8, 4), "up": (1, 10)}),
    "attention": (
        lambda: attention(False, True), SEQUENCE,
        {"embed": (1, 12), "attention.q": (4, 4), "attention.v": (4, 4), "up": (1, 10)}),
    "attention-products": (
        lambda: attention(False, False), SEQUENCE,
        {"embed": (1, 12), "attention.q": (4, 4), "attention.v": (4, 4), "up": (1, 10)}),
}  # fmt: skip


def example_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) if shape != (2, 5) else torch.randint(0, 9, shape)


@lru_cache
def analysed(layout: str) -> tuple[Network, Tensor]:
    """Of seeded weights, so that every norm has something to normalise."""
    torch.manual_seed(0)
    make, shape, _ = LAYOUTS[layout]
    example = example_of(shape)
    return analyse(make(), example), example


def some(network: Network, group: Group, count: int = 1) -> list[Channel]:
    return [channel for row in network.rows(group) for channel in row[len(row) - count :]]


def reloaded(make: Callable[[], nn.Module], network: Network) -> nn.Module:
    """A fresh module with the network's edits and weights, as a bundle is loaded."""
    fresh, state = make(), network.module.state_dict()
    edit(fresh, network.edits)
    adopt_shapes(fresh, state)
    fresh.load_state_dict(state)
    return fresh.eval()


def equal(first: nn.Module, second: nn.Module, example: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(first(example), second(example), rtol=1e-4, atol=1e-5)

"""Where to cut: the step that loses least for the cost it saves, again and again.

The loss of a step is measured, not guessed: how far the KL divergence of the answers from the original's grows on
training samples, with batch norms re-estimated (without that a small cut looks like ruin), on a model that has recovered
from the cuts before. Steps remove channels down to the next multiple of ``unit``, because a width beside it costs as much
as the next multiple (blocked layouts on a CPU, tensor cores on a GPU), a whole attention head, or a whole block that a
residual goes around.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groups import Channel, Group, Network
from .importance import Importance
from .price import Price

__all__ = ["Judge", "Step", "cut_path", "narrowest", "sensitivity"]

HEALING, HEALED, HEALING_RATE = 24, 32, 1e-3  # steps after each cut, of so many samples
LARGE = 4  # a step takes a part of this of a wide group, at least


class Step(NamedTuple):
    """The network after a cut: ``name`` went from ``before`` to ``after`` channels, heads or, skipped, from 1 to 0.

    ``kl``: of its answers from the original's, nats; ``price`` in the target's unit.
    """

    network: Network
    kind: str
    name: str
    before: int
    after: int
    kl: float
    price: float


@dataclass(frozen=True)
class Judge:
    """``samples`` (N, ...) with ``targets`` (N,) that judge a cut, and the original's ``reference`` log-probabilities."""

    samples: Tensor
    targets: Tensor
    reference: Tensor
    importance: Importance

    @classmethod
    def of(cls, module: nn.Module, samples: Tensor, targets: Tensor, importance: Importance) -> Judge:
        with torch.no_grad():
            return cls(samples, targets, F.log_softmax(module.eval()(samples), -1), importance)

    def kl(self, module: nn.Module) -> float:
        """Nats by which the answers of ``module`` differ; its batch norms are re-estimated in place."""
        answers = F.log_softmax(_settled(module, self.samples), -1)
        return float(F.kl_div(answers, self.reference, reduction="sum", log_target=True)) / math.prod(answers.shape[:-1])


def _heal(module: nn.Module, judge: Judge) -> None:
    """A few steps towards the original's answers, in place. A ruined model bears anything: what the next cut costs can only
    be seen on one that has recovered."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(module.parameters(), HEALING_RATE)
    module.train()
    for _ in range(HEALING):
        chosen = torch.randint(len(judge.samples), (min(HEALED, len(judge.samples)),), generator=generator)
        answers = F.log_softmax(module(judge.samples[chosen]), -1).flatten(0, -2)
        wanted = judge.reference[chosen].flatten(0, -2)
        loss = F.kl_div(answers, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    module.eval()


def _settled(module: nn.Module, samples: Tensor) -> Tensor:
    """Answers, after the batch norms took mean and variance from ``samples``; the module ends in eval mode."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in norms]
    with torch.no_grad():
        for layer in norms:
            layer.train()
            layer.momentum = 1.0
        answers: Tensor = module(samples)
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
        module.eval()
    return answers


class _Move(NamedTuple):
    """What could go next."""

    kind: str  # channels, heads or block
    name: str
    before: int
    after: int
    make: Callable[[Network], Network]
    masked: Callable[[Network], Network]


def cut_path(network: Network, judge: Judge, price: Price, limit: float = 0.0, unit: int = 16) -> Iterator[Step]:
    """Yield ever cheaper networks, one cut each, until ``price`` is at most ``limit``, or until nothing can be cut.

    ``unit``: widths end on multiples of it; narrow ones on multiples of half of it.
    """
    kl, cost = judge.kl(copy.deepcopy(network.module)), price(network)
    losses: dict[tuple[str, str], float] = {}
    while cost > limit:
        weights = judge.importance(network.module, judge.samples, judge.targets)
        moves = {(m.kind, m.name): m for m in _moves(network, weights, unit)}
        saved = {key: min(cost - price(move.masked(network)), cost - limit) for key, move in moves.items()}
        useful = [key for key in moves if saved[key] > 1e-9 * cost]
        if not useful:
            return
        now: set[tuple[str, str]] = set()
        while True:
            for key in useful:
                if key not in losses:
                    losses[key] = max(judge.kl(moves[key].make(network).module) - kl, 0.0)
                    now.add(key)
            # A loss of nothing is worth more the more it saves.
            best = min(useful, key=lambda key: (losses[key] + 1e-6) / saved[key])
            if best in now:
                break
            del losses[best]  # it was measured on a network that could bear more
        move = moves[best]
        network = move.make(network)
        _heal(network.module, judge)
        kl, cost = judge.kl(network.module), price(network)
        if move.kind == "block":
            losses.clear()
        losses = {key: loss for key, loss in losses.items() if key[1] != move.name}
        yield Step(network, move.kind, move.name, move.before, move.after, kl, cost)


def _moves(network: Network, weights: Mapping[str, Tensor], unit: int) -> Iterator[_Move]:
    for group in network.groups:
        before = network.width(group)
        after = _next(before, _unit(group, network, unit))
        if after < group.least:
            continue
        weakest = network.weakest(group, weights, before - after)
        yield _Move("heads" if group.heads else "channels", group.name, before, after, *_removal(weakest, group))
    for name in network.blocks:
        yield _Move("block", name, 1, 0, lambda n, b=name: n.skipping(b), lambda n, b=name: n.bypassed(b))  # type: ignore[misc]


def _removal(channels: Sequence[Channel], group: Group) -> tuple[Callable[[Network], Network], Callable[[Network], Network]]:
    attributes = group.attributes if group.heads else ()
    return lambda n: n.without(channels, attributes), lambda n: n.masked(channels)


def _unit(group: Group, network: Network, unit: int) -> int:
    """Channels of a row that make up ``unit``s."""
    if group.heads:
        return 1
    rows = len(network.rows(group))
    return unit if group.recurrent else max(unit // math.gcd(unit, rows), 1)


def _next(width: int, unit: int) -> int:
    """The next width below ``width`` that is worth having; 0 where there is none."""
    if width <= unit:
        unit = max(unit // 2, 1)
    step = max(unit, width // LARGE // unit * unit)
    return max((width - 1) // unit * unit - (step - unit), 0)


def narrowest(network: Network, unit: int = 16) -> Network:
    """The network with all cut that can be; its module is as it was."""
    for name in network.blocks:
        network = network.bypassed(name)
    for group in network.groups:
        step = 1 if group.heads else _unit(group, network, unit)
        kept = min(network.width(group), max(step // 2 if not group.heads else 1, group.least))
        network = network.masked(channel for row in network.rows(group) for channel in row[kept:])
    return network


def sensitivity(network: Network, judge: Judge, unit: int = 16, points: int = 4) -> dict[str, list[tuple[float, float]]]:
    """Group -> (share of its channels that is left, KL in nats), each group cut alone."""
    weights = judge.importance(network.module, judge.samples, judge.targets)
    found: dict[str, list[tuple[float, float]]] = {}
    for group in network.groups:
        if group.heads:
            continue
        width, step = network.width(group), _unit(group, network, unit)
        smallest = max(min(step, width), group.least)
        widths = sorted({max(round(width * k / (points + 1) / step) * step, smallest) for k in range(1, points + 1)})
        curve = [(1.0, 0.0)]
        for left in reversed([w for w in widths if w < width]):
            cut = network.without(network.weakest(group, weights, width - left))
            curve.append((left / width, judge.kl(cut.module)))
        if len(curve) > 1:
            found[group.name] = curve
    return found

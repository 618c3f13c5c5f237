"""Where to cut: the step that loses least for the cost it saves, again and again.

The loss of a step is measured, not guessed: how far the KL divergence of the answers from the original's grows on
training samples, with batch norms re-estimated (without that a small cut looks like ruin), on a model that has recovered
from the cuts before. The most promising steps are compared once more after each was healed: a block that is left out ruins
more than a few channels do, and more of it comes back. The share of the capacity that goes, of MACs and weights alike,
counts as a loss, too: between cuts that cost the same and save the same, the network that is left with more can learn more.
In the end, cuts that later ones made needless are taken back. Steps remove channels down to the next multiple of ``unit``,
because a width beside it costs as much as the next multiple (blocked layouts on a CPU, tensor cores on a GPU), a whole
attention head, or a whole block that a residual goes around.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekit.errors import first_line
from edgekit.progress import say
from edgekit.training.devices import Devices

from .groups import Group, Network
from .importance import Importance
from .price import Price, macs_price, size_price
from .trial import CODE_ERRORS

__all__ = ["Judge", "Step", "cut_path", "narrowest", "sensitivity", "spared", "too_narrow"]

HEALING, HEALED, HEALING_RATE = 24, 32, 1e-3  # steps after each cut, of so many samples
LARGE = 4  # a step takes a part of this of a wide group, at least
CAPACITY = 1.0  # nats that all MACs and weights count for: what fine-tuning cannot bring back is missing capacity
SHORTLIST = 2  # cuts of channels that are compared after healing, beside one block
_POINTS = 4  # of a group's sensitivity, beside the uncut one


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
    """``samples`` (N, ...) with ``targets`` (N,) that judge a cut, and ``taught`` (M, ...) that heal it: other ones, or a model
    that learns them by heart would look well. With each go the original's log-probabilities. All lie on the device that
    trains, where a module goes for as long as it is judged."""

    samples: Tensor
    targets: Tensor
    reference: Tensor
    taught: Tensor
    wanted: Tensor
    importance: Importance

    @classmethod
    def of(
        cls, module: nn.Module, samples: Tensor, targets: Tensor, importance: Importance, taught: Tensor | None = None
    ) -> Judge:
        device = Devices().device
        module.to(device).eval()
        samples, targets = samples.to(device), targets.to(device)
        taught = samples if taught is None else taught.to(device)
        with torch.no_grad():
            reference = F.log_softmax(module(samples), -1)
            wanted = torch.cat([F.log_softmax(module(part), -1) for part in torch.split(taught, len(samples))])
        module.cpu()
        return cls(samples, targets, reference, taught, wanted, importance)

    def kl(self, module: nn.Module) -> float:
        """Nats by which the answers of ``module`` differ; its batch norms are re-estimated in place."""
        answers = F.log_softmax(_settled(module.to(self.samples.device), self.samples), -1)
        module.cpu()
        return float(F.kl_div(answers, self.reference, reduction="sum", log_target=True)) / math.prod(answers.shape[:-1])

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The importance of each weight of ``module``."""
        found = self.importance(module.to(self.samples.device), self.samples, self.targets)
        module.cpu()
        for name, value in found.items():
            found[name] = value.cpu()
        return found

    def heal(self, module: nn.Module) -> float:
        """A few steps towards the original's answers, in place, taken back where they led away; `kl` after them. A ruined
        model bears anything: what the next cut costs can only be seen on one that has recovered."""
        before, state = self.kl(module), copy.deepcopy(module.state_dict())
        module.to(self.samples.device)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # dropout, too: the same model is healed the same way
            self._heal(module)
        if (after := self.kl(module)) <= before:
            return after
        module.load_state_dict(state)
        return before

    def _heal(self, module: nn.Module) -> None:
        optimizer = torch.optim.AdamW(module.parameters(), HEALING_RATE)
        module.train()
        for _ in range(HEALING):
            chosen = torch.randint(len(self.taught), (min(HEALED, len(self.taught)),)).to(self.samples.device)
            answers = F.log_softmax(module(self.taught[chosen]), -1).flatten(0, -2)
            loss = F.kl_div(answers, self.wanted[chosen].flatten(0, -2), reduction="batchmean", log_target=True)
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
        weights = judge.weights(network.module)
        moves = {(m.kind, m.name): m for m in _moves(network, weights, unit)}
        masked = {key: move.masked(network) for key, move in moves.items()}
        saved = {key: min(cost - price(left), cost - limit) for key, left in masked.items()}
        whole = _capacity(network)
        shrunk = {key: CAPACITY * (1 - _capacity(left) / whole) for key, left in masked.items()}
        useful = [key for key in moves if saved[key] > 1e-9 * cost]
        if not useful:
            return
        healed: dict[tuple[str, str], tuple[Network, float]] = {}
        for key in _shortlist(useful, partial(_loss, network, kl, judge, moves), losses, saved, shrunk):
            cut = moves[key].make(network)
            healed[key] = cut, judge.heal(cut.module)
        if not healed:
            return
        best = min(healed, key=lambda key: _rank(healed[key][1] - kl + shrunk[key], saved[key]))
        move, (network, kl) = moves[best], healed[best]
        cost = price(network)
        if move.kind == "block":
            losses.clear()
        losses = {key: loss for key, loss in losses.items() if key[1] != move.name}
        yield Step(network, move.kind, move.name, move.before, move.after, kl, cost)


def _capacity(network: Network) -> float:
    """What a network can learn with, as one number: multiply-accumulates and weights alike. An embedding is nearly all
    weights, and little of its words is in the samples that judge a cut; a first convolution is nearly all arithmetic."""
    return math.sqrt(macs_price(network) * size_price(network))


def _loss(network: Network, kl: float, judge: Judge, moves: Mapping[tuple[str, str], _Move], key: tuple[str, str]) -> float:
    """How much further a cut takes the answers, before healing. Infinite where the module's code does not follow it: a block
    that a former cut has made narrower than what it stands in can have nothing in its place."""
    try:
        return max(judge.kl(moves[key].make(network).module) - kl, 0.0)
    except CODE_ERRORS as error:
        if key[0] != "block":
            say(f"{key[1]} stays at {moves[key].before}: its module cannot run narrower ({first_line(error)})")
        return math.inf


def _rank(loss: float, saved: float) -> float:
    """Smaller is better. A loss of nothing is worth more the more it saves."""
    return (max(loss, 0.0) + 1e-6) / saved


def _shortlist(
    useful: Sequence[tuple[str, str]],
    loss: Callable[[tuple[str, str]], float],
    losses: dict[tuple[str, str], float],
    saved: Mapping[tuple[str, str], float],
    shrunk: Mapping[tuple[str, str], float],
) -> list[tuple[str, str]]:
    """The best cuts of channels and the best block, before healing. ``losses`` are of earlier networks: what ranks well by
    one is measured anew, as a network that could bear more bears less by now."""
    found: list[tuple[str, str]] = []
    for keys, count in (
        ([key for key in useful if key[0] != "block"], SHORTLIST),
        ([key for key in useful if key[0] == "block"], 1),
    ):
        now: set[tuple[str, str]] = set()
        while True:
            for key in keys:
                if key not in losses:
                    losses[key] = loss(key)
                    now.add(key)
            best = sorted(keys, key=lambda key: _rank(losses[key] + shrunk[key], saved[key]))[:count]
            stale = [key for key in best if key not in now]
            if not stale:
                break
            for key in stale:
                del losses[key]
        found += [key for key in best if losses[key] < math.inf]
    return found


def spared(network: Network, steps: Sequence[Step], judge: Judge, price: Price, limit: float) -> tuple[list[Step], list[Step]]:
    """``steps`` from ``network`` on, made again without those that later ones made needless, and those; the price stays
    within ``limit``. What lost most is spared first."""
    growth = [step.kl - before for step, before in zip(steps, [0.0, *(step.kl for step in steps)], strict=False)]
    kept = list(range(len(steps)))
    weights = judge.weights(network.module)
    for index in sorted(kept, key=lambda index: -growth[index]):
        others = [one for one in kept if one != index]
        if others and price(_masked(network, [steps[one] for one in others], weights)) <= limit:
            kept = others
    if len(kept) == len(steps):
        return list(steps), []
    again = []
    for index in kept:
        if (move := _same(steps[index], network, judge.weights(network.module))) is None:
            continue
        network = move.make(network)
        kl = judge.heal(network.module)
        again.append(Step(network, move.kind, move.name, move.before, move.after, kl, price(network)))
    return again, [step for index, step in enumerate(steps) if index not in kept]


def _masked(network: Network, steps: Sequence[Step], weights: Mapping[str, Tensor]) -> Network:
    """What ``steps`` would leave, for its price."""
    for step in steps:
        if (move := _same(step, network, weights)) is not None:
            network = move.masked(network)
    return network


def _same(step: Step, network: Network, weights: Mapping[str, Tensor]) -> _Move | None:
    """The cut of ``step`` on another network, to a width as even as its own; None where what it cut went with a block, or
    where nothing is left to cut."""
    if step.kind == "block":
        return _block(step.name)
    heads = step.kind == "heads"
    group = next((g for g in network.groups if (g.name, g.heads) == (step.name, heads) and network.width(g)), None)
    if group is None:
        return None
    width = network.width(group)
    after = max(width - step.before + step.after, group.least)
    if not heads:  # without an earlier cut of 50 to 48, one of 48 to 32 leaves 48, not 34
        after = -(-after // (even := math.gcd(step.before, step.after))) * even
    return _narrower(network, group, after, weights) if after < width else None


def _moves(network: Network, weights: Mapping[str, Tensor], unit: int) -> Iterator[_Move]:
    for group in network.groups:
        width = network.width(group)
        after = width - 1 if group.heads else _next(width, _unit(group, network, unit))  # heads go one at a time
        if after >= group.least:
            yield _narrower(network, group, after, weights)
    yield from map(_block, network.blocks)


def _narrower(network: Network, group: Group, after: int, weights: Mapping[str, Tensor]) -> _Move:
    before = network.width(group)
    weakest = network.weakest(group, weights, before - after)
    attributes = group.attributes if group.heads else ()
    kind = "heads" if group.heads else "channels"
    return _Move(kind, group.name, before, after, lambda n: n.without(weakest, attributes), lambda n: n.masked(weakest))


def _block(name: str) -> _Move:
    return _Move("block", name, 1, 0, lambda n: n.skipping(name), lambda n: n.bypassed(name))


def _unit(group: Group, network: Network, unit: int) -> int:
    """Channels of a row that make up ``unit``s."""
    if group.heads:
        return 1
    if group.recurrent:
        return max(unit // 2, 1)  # the product that makes all gates is three or four times as wide
    return max(unit // math.gcd(unit, len(network.rows(group))), 1)


def _next(width: int, unit: int) -> int:
    """The next width below ``width`` that is worth having; 0 where there is none."""
    if width <= unit:
        unit = max(unit // 2, 1)
    step = max(unit, width // LARGE // unit * unit)
    return max((width - 1) // unit * unit - (step - unit), 0)


def too_narrow(network: Network, unit: int) -> dict[str, str]:
    """Groups that could be cut but for their width, and what to do about it."""
    found = {}
    for group in network.groups:
        width, own = network.width(group), _unit(group, network, unit)
        if not group.heads and width and _next(width, own) < group.least:
            found[group.name] = f"its width, {width}, has no smaller one that is worth having: lower --unit ({unit})"
    return found


def narrowest(network: Network, unit: int = 16) -> Network:
    """The network with all cut that can be; its module is as it was."""
    for name in network.blocks:
        network = network.bypassed(name)
    for group in network.groups:
        step = 1 if group.heads else _unit(group, network, unit)
        kept = min(network.width(group), max(step // 2 if not group.heads else 1, group.least))
        network = network.masked(channel for row in network.rows(group) for channel in row[kept:])
    return network


def sensitivity(network: Network, judge: Judge, unit: int = 16) -> dict[str, list[tuple[float, float]]]:
    """Group -> (share of its channels that is left, KL in nats), each group cut alone."""
    weights = judge.weights(network.module)
    found: dict[str, list[tuple[float, float]]] = {}
    for group in network.groups:
        if group.heads:
            continue
        width, step = network.width(group), _unit(group, network, unit)
        smallest = max(min(step, width), group.least)
        widths = sorted({max(round(width * k / (_POINTS + 1) / step) * step, smallest) for k in range(1, _POINTS + 1)})
        curve = [(1.0, 0.0)]
        for left in reversed([w for w in widths if w < width]):
            cut = network.without(network.weakest(group, weights, width - left))
            curve.append((left / width, judge.kl(cut.module)))
        if len(curve) > 1:
            found[group.name] = curve
    return found

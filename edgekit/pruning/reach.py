"""From a network to one that meets its target: cut by prediction, measure, correct the prediction, cut on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgekit.errors import UsageError
from edgekit.models.export import export_onnx
from edgekit.progress import say

from .groups import Network
from .latency import paired_latency
from .price import LatencyPrice, MacsPrice, Price, RooflinePrice, size_price
from .search import Judge, Step, cut_path, narrowest, spared
from .target import Target

__all__ = ["Meter", "Reached", "reach"]

CORRECTIONS = 8
HOPELESS = 2.0  # so many times the target's time, all that can be cut still takes: the table is never that wrong
ERROR = 1.005  # of a measurement: what meets the target within it is not cut further, as a cut may cost a point


Keep = Callable[[Sequence[Step]], None]


class Meter:
    """Measures a module against the original on ONNX Runtime, one thread, one sample, in turns."""

    def __init__(self, graph: bytes, sample: NDArray[Any]) -> None:
        self.graph, self.sample = graph, sample

    def __call__(self, module: nn.Module) -> tuple[float, float]:
        """Milliseconds of the original and of ``module``."""
        return self.compared(self.exported(module))

    def exported(self, module: nn.Module) -> bytes:
        return export_onnx(module, torch.from_numpy(np.repeat(self.sample, 2, 0)))

    def compared(self, graph: bytes) -> tuple[float, float]:
        """Milliseconds of the original and of ``graph``."""
        return paired_latency(self.graph, graph, self.sample)


class Reached(NamedTuple):
    """``predicted``: the share of the original's time that the table said before the network was measured; None where no
    latency was asked for."""

    network: Network
    steps: list[Step]
    predicted: float | None


def reach(
    network: Network,
    judge: Judge,
    target: Target,
    price: Price,
    meter: Meter,
    whole: float,
    unit: int,
    keep: Keep = lambda _: None,
) -> Reached:
    """Cut ``network`` until it meets ``target``; ``whole`` is what the original costs by ``price``, 1 by a `LatencyPrice`.
    ``keep`` hears of all cuts after each one. A network that an earlier search left may be cut on.

    Raises `UsageError` where what can be cut does not suffice, with how far it goes. A latency is only predicted by then: it is
    refused where layers are frozen or where it is out of all reach (`HOPELESS`), and else tried.
    """
    least = price(narrowest(network, unit))
    if not isinstance(price, LatencyPrice):
        limit = target.limit(whole)
        if least > limit * (1 + 1e-9):
            _refuse(target, least / whole, network)
        steps = _walk(network, judge, price, limit, unit, keep)
        found = steps[-1].network if steps else network
        if price(found) > limit * (1 + 1e-9):
            _refuse(target, price(found) / whole, network)
        return Reached(found, steps, None)
    if target.value < 1 and not network.groups and not network.blocks:
        _refuse(target, 1.0, network)
    if least / whole > target.value:
        if _forced(network) or least / whole > HOPELESS * target.value:
            _refuse(target, least / whole, network)
        say(f"{target} is out of reach: all that can be cut gives {whole / least:.1f}x; the best found will be written")
    return _reach_latency(network, judge, target, price, meter, unit, keep)


def _reach_latency(
    network: Network, judge: Judge, target: Target, price: LatencyPrice, meter: Meter, unit: int, keep: Keep
) -> Reached:
    """Everything in shares of the original's time, measured beside it: the machine's pace changes from minute to minute."""
    start, steps, limit = network, list[Step](), target.value * ERROR
    share, first = _measured(meter, network) if price(network) < 1 - 1e-9 else 1.0, price  # below: cut by an earlier search
    for _ in range(CORRECTIONS):
        if share <= limit:
            break
        walked = _walk(network, judge, price, limit, unit, _after(steps, keep))
        if not walked:  # the best found
            break
        steps += walked
        network = walked[-1].network
        share = _measured(meter, network)
        say(f"measured {1 / share:.2f}x; the table said {1 / price(network):.2f}x")
        price = price.anchored(network, share)
    if steps and share <= limit:  # the table may have promised too little
        fewer = _spared(start, steps, judge, price, limit)
        if fewer and len(fewer) < len(steps) and _measured(meter, fewer[-1].network) <= limit:
            steps, network = fewer, fewer[-1].network
    price.table.save()
    return Reached(network, steps, first(network))


def _after(steps: Sequence[Step], keep: Keep) -> Keep:
    before = list(steps)
    return lambda more: keep([*before, *more])


def _measured(meter: Meter, network: Network) -> float:
    """Share of the original's time."""
    old, new = meter(network.module)
    return new / old


def _walk(network: Network, judge: Judge, price: Price, limit: float, unit: int, keep: Keep) -> list[Step]:
    steps = list[Step]()
    for step in cut_path(network, judge, price, limit, unit):
        steps.append(step)
        keep(steps)
        say(f"cut {_named(step)}, KL {step.kl:.3f}, {_shown(step.price, price)}")
    return _spared(network, steps, judge, price, limit) if steps and steps[-1].price <= limit else steps


def _spared(network: Network, steps: list[Step], judge: Judge, price: Price, limit: float) -> list[Step]:
    kept, needless = spared(network, steps, judge, price, limit)
    if needless:
        say(f"not needed after all: {'; '.join(map(_named, needless))}")
        say(f"without: KL {kept[-1].kl:.3f}, {_shown(kept[-1].price, price)}")
    return kept


def _named(step: Step) -> str:
    return f"{step.name}: left out" if step.kind == "block" else f"{step.name}: {step.before} -> {step.after} {step.kind}"


def _shown(value: float, price: Callable[[Network], float]) -> str:
    if isinstance(price, MacsPrice):
        return f"{value / 1e6:.2f} million MACs"
    if price is size_price:
        return f"{value / 1e3:,.0f} kB"
    return f"{value:.4f} ms predicted" if isinstance(price, RooflinePrice) else f"{1 / value:.2f}x predicted"


def _forced(network: Network) -> list[str]:
    return [name for name, why in network.kept.items() if "frozen" in why]


def _refuse(target: Target, left: float, network: Network) -> None:
    held = sorted(network.kept.items(), key=lambda item: "output" in item[1])[:2]
    reasons = "; ".join(f"{name} stays: {why}" for name, why in held)
    raise UsageError(
        f"{target} cannot be reached: all that can be cut leaves {left:.0%} ({reasons})",
        "freeze less (--freeze)" if _forced(network) else "ask for less, or train a smaller model",
    )

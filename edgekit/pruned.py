"""What a bundle's history says of its pruning, for whoever draws it: tolerant of entries that say less, inventing nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .manifest import History

__all__ = ["PrunedLayer", "Pruning", "PruningStep", "kl_ticks", "pruning_of"]

Curve = tuple[tuple[float, float], ...]
_LARGEST = 1e300  # an integer in JSON can be larger than any float


class PrunedLayer(NamedTuple):
    """A layer before and after. ``before`` and ``after`` are its channels, in and out where it has both; ``after`` is empty
    where the block that held it is skipped. Microseconds are of one sample, by the table of measured layers."""

    name: str
    kind: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    macs_before: float | None
    macs: float | None
    us_before: float | None
    us: float | None

    @property
    def skipped(self) -> bool:
        return bool(self.before) and not self.after

    @property
    def widths(self) -> tuple[int, int] | None:
        """Channels that it makes, before and after; None for an operator that has none of its own."""
        return (self.before[-1], self.after[-1] if self.after else 0) if self.before else None

    def channels(self) -> str:
        """In words: ``48 -> 32 in, 96 -> 64 out``, ``96 -> 64`` where all are alike, ``skipped``."""
        if self.skipped:
            return "skipped"
        pairs = list(zip(self.before, self.after, strict=True))
        told = [f"{a} \N{RIGHTWARDS ARROW} {b}" if a != b else f"{a}" for a, b in pairs]
        names = ("key", "value") if self.kind == "attention" else ("in", "out")
        if len(told) == 2 and told[0] != told[1]:
            return f"{told[0]} {names[0]}, {told[1]} {names[1]}"
        return told[0] if told else ""


class PruningStep(NamedTuple):
    """One cut, in the order of cutting: ``kind`` is channels, heads or block; ``kl`` of the whole model's answers, nats."""

    layer: str
    kind: str
    before: int
    after: int
    kl: float | None


class Pruning(NamedTuple):
    """One entry of stage ``prune``; None and empty: it does not say. ``sensitivity``: group -> (share of its channels left, KL
    in nats) by falling share, the most sensitive first. Shares are 0..1, ``drop`` is in points of ``metric``, ``predicted`` a
    sentence about the named target, where one was asked for."""

    layers: tuple[PrunedLayer, ...]
    steps: tuple[PruningStep, ...]
    kept: tuple[tuple[str, str], ...]
    sensitivity: tuple[tuple[str, Curve], ...]
    speedup: float | None
    latency_before_ms: float | None
    latency_ms: float | None
    latency_predicted_ms: float | None
    macs_share: float | None
    parameters: float | None
    parameters_before: float | None
    drop: float | None
    metric: str
    sparse_share: float
    sparse_layers: int
    device: str
    predicted: str | None = None

    @property
    def gain(self) -> str | None:
        """``2.15x fewer MACs, measured 1.40x faster on DEVICE, one thread``; None where no latency was measured, without which
        a count of MACs misleads."""
        if not self.speedup or self.speedup <= 0:
            return None
        pace = f"{self.speedup:.2f}x faster" if self.speedup >= 1 else f"{1 / self.speedup:.2f}x slower"
        where = f"measured {pace} on {self.device}, one thread"
        if not self.macs_share or self.macs_share <= 0:
            return where
        return f"as many MACs, {where}" if self.macs_share >= 0.9995 else f"{1 / self.macs_share:.2f}x fewer MACs, {where}"


def pruning_of(entry: History) -> Pruning | None:
    """What an entry of stage ``prune`` holds; None for another stage, or where it has neither layers, cuts nor a speed-up."""
    figures = entry.figures
    if entry.stage != "prune":
        return None
    kept = figures.get("kept")
    device = figures.get("device")
    found = Pruning(
        layers=tuple(filter(None, map(_layer, _rows(figures.get("layers"))))),
        steps=tuple(filter(None, map(_step, _rows(figures.get("cuts"))))),
        kept=tuple((str(k), v) for k, v in kept.items() if isinstance(v, str)) if isinstance(kept, Mapping) else (),
        sensitivity=_curves(figures.get("sensitivity")),
        speedup=_number(figures.get("speedup")),
        latency_before_ms=_number(figures.get("latency_before_ms")),
        latency_ms=_number(figures.get("latency_ms")),
        latency_predicted_ms=_number(figures.get("latency_predicted_ms")),
        macs_share=_number(figures.get("macs_share")),
        parameters=_number(figures.get("parameters")),
        parameters_before=_number(figures.get("parameters_before")),
        drop=_number(figures.get("drop")),
        metric="character error rate" if "cer" in figures else "top-1",
        sparse_share=_number(figures.get("sparse_share")) or 0.0,
        sparse_layers=int(_number(figures.get("sparse_layers")) or 0),
        device=device.removesuffix(", 1 thread") if isinstance(device, str) and device else "ONNX Runtime",
        predicted=_predicted(figures.get("on")),
    )
    return found if found.layers or found.steps or found.speedup is not None else None


def _predicted(value: object) -> str | None:
    named = value if isinstance(value, Mapping) else {}
    target, before, after = named.get("target"), _number(named.get("before_ms")), _number(named.get("ms"))
    if not isinstance(target, str) or before is None or after is None:
        return None
    where = ", ".join([target, *([str(named["precision"])] if "precision" in named else [])])
    return f"{before:.3g} \N{RIGHTWARDS ARROW} {after:.3g} ms predicted on {where}: a roofline, not a measurement"


def kl_ticks(most: float) -> list[float]:
    """Round KL divergences from 0 to ``most`` or above, for an axis of their square roots: KL grows with the square of a small
    change, so that on a straight axis one sensitive group would press all others into a line."""
    most = max(most, 1e-6)
    power = math.ceil(math.log10(most)) + 1
    candidates = [part * 10.0**k for k in range(power, power - 9, -1) for part in (5, 2, 1)]
    top = min(value for value in candidates if value >= most)
    ticks = [top]
    for value in candidates:
        if value < top and min(ticks[-1] ** 0.5 - value**0.5, value**0.5) >= 0.11 * top**0.5:
            ticks.append(value)
    return [0.0, *reversed(ticks)]


def _rows(value: object) -> Iterable[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def _layer(row: Mapping[str, Any]) -> PrunedLayer | None:
    before, after = _sizes(row.get("before")), _sizes(row.get("after"))
    if before is None or after is None or (after and len(after) != len(before)):
        return None
    costs = [_number(row.get(key)) for key in ("macs_before", "macs", "us_before", "us")]
    return PrunedLayer(str(row.get("layer") or "the model"), str(row.get("kind", "")), before, after, *costs)


def _step(row: Mapping[str, Any]) -> PruningStep | None:
    before, after = _number(row.get("before")), _number(row.get("after"))
    if before is None or after is None:
        return None
    # Entries of before there were heads and blocks hold channels alone.
    kind = str(row.get("kind", "channels"))
    return PruningStep(str(row.get("layer") or "the model"), kind, int(before), int(after), _number(row.get("kl")))


def _curves(value: object) -> tuple[tuple[str, Curve], ...]:
    found: list[tuple[str, Curve]] = []
    for name, points in value.items() if isinstance(value, Mapping) else ():
        pairs = [(_number(p[0]), _number(p[1])) for p in points if _pair(p)] if isinstance(points, list | tuple) else []
        curve = tuple(sorted(((x, y) for x, y in pairs if x is not None and y is not None), reverse=True))
        if len(curve) > 1:
            found.append((str(name), curve))
    return tuple(sorted(found, key=lambda item: -_at_half(item[1])))


def _pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _at_half(curve: Curve) -> float:
    """KL with half of the channels, by straight lines: curves end at different shares, so their ends do not compare."""
    (right, high), (left, low) = next(((a, b) for a, b in itertools.pairwise(curve) if b[0] <= 0.5), (curve[0], curve[-1]))
    return high + (low - high) * (right - 0.5) / (right - left) if right > left else low


def _sizes(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    sizes = [_number(v) for v in value]
    return tuple(int(v) for v in sizes if v is not None) if all(v is not None and v >= 0 for v in sizes) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else None

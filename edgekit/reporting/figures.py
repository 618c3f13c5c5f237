"""Reading figures that other stages wrote: tolerant of absent and malformed values, never inventing one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from edgekit.manifest import History

__all__ = [
    "MAKERS",
    "Curve",
    "comparable",
    "confusion",
    "curve",
    "decoded",
    "latest",
    "mapping",
    "number",
    "numbers",
    "own_entries",
    "pareto",
    "rounded",
    "words",
]

#: Stages that make a new bundle. What was measured before the last of them was measured on other weights.
MAKERS = ("train", "prune", "quantize", "import")

#: No latency, count or size of this field is larger; what is larger is damage, and sums and products of it overflow.
LARGEST = 1e30


class Curve(NamedTuple):
    """``lines``: name -> one value an epoch; losses and shares apart, because they need an axis each."""

    stage: str
    time: str
    epochs: tuple[float, ...]
    losses: dict[str, list[float | None]]
    shares: dict[str, list[float | None]]


def decoded(data: bytes) -> Any:
    """Of a JSON file. Raises `ValueError` for what is none, and for what is nested too deep to be read."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def number(source: object, *names: str) -> float | None:
    """The first of ``names`` in a mapping that is a number within `LARGEST`; dots reach into nested mappings."""
    return next((float(value) for name in names if _is_figure(value := _reach(source, name))), None)


def _is_figure(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def words(source: object, *names: str) -> str | None:
    """The first of ``names`` in a mapping that is a non-empty text or a number, as text."""
    for name in names:
        value = _reach(source, name)
        if isinstance(value, str) and value.strip():
            return value
        if _is_figure(value):
            return f"{value:g}"
    return None


def _reach(source: object, name: str) -> object:
    """``source[name]``, or ``source[a][b]`` for ``a.b``; None where a step is absent."""
    value: object = source
    for part in (name,) if isinstance(source, Mapping) and name in source else name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def rounded(value: float, digits: int = 3) -> str:
    """At so many digits, or all of those before the point: 2430 is neither 2.43e+03 nor 2000."""
    if 10**digits - 0.5 <= abs(value) < 1e15:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.{digits}g}"


def mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def numbers(value: object) -> list[float] | None:
    """A list of numbers within `LARGEST`, or None."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return None
    return [float(v) for v in value] if value and all(map(_is_figure, value)) else None


def own_entries(history: Sequence[History]) -> Sequence[History]:
    """The entries whose figures are about the bundle as it is: from the last stage that made it onwards."""
    start = max((i for i, entry in enumerate(history) if entry.stage in MAKERS), default=0)
    return history[start:]


def comparable(history: Sequence[History]) -> Sequence[History]:
    """`own_entries`, without evaluations on other data than the bundle was trained on: their figures do not compare with those
    of other bundles. All of them where nothing is left to compare."""
    own = own_entries(history)
    home = {entry.config["data"] for entry in history if entry.stage in MAKERS and isinstance(entry.config.get("data"), str)}
    kept = [entry for entry in own if entry.stage != "eval" or not home or entry.config.get("data") in home]
    return kept if any(number(entry.figures, "top1") is not None for entry in kept) else own


def latest(history: Sequence[History], *names: str) -> float | None:
    """The newest figure of these names among the entries."""
    return next((v for entry in reversed(history) if (v := number(entry.figures, *names)) is not None), None)


def confusion(history: Sequence[History], classes: int) -> list[list[int]] | None:
    """The newest confusion matrix (classes, classes), rows truth; None where it is absent or has another size."""
    for entry in reversed(history):
        raw = entry.figures.get("confusion")
        rows = [numbers(row) or [] for row in raw] if isinstance(raw, Sequence) else []
        if rows and classes in (0, len(rows)) and all(len(row) == len(rows) and min(row) >= 0 for row in rows):
            return [[int(v) for v in row] for row in rows]
    return None


def curve(entry: History) -> Curve | None:
    """Figures per epoch of a training or fine-tuning stage: ``[{"epoch", "loss", "val_top1", ...}, ...]``."""
    raw = entry.figures.get("curve")
    points = [p for p in raw if isinstance(p, Mapping)] if isinstance(raw, Sequence) else []
    if len(points) < 2:
        return None
    names = [n for n in dict.fromkeys(k for p in points for k in p) if any(number(p, n) is not None for p in points)]
    losses = [n for n in names if "loss" in n]
    shares = [n for n in names if any(word in n for word in ("top1", "acc", "f1", "characters"))]
    if not losses and not shares:
        return None
    stated = [number(p, "epoch", "step") for p in points]
    epochs = tuple(float(i) if epoch is None else epoch for i, epoch in enumerate(stated))
    if any(b <= a for a, b in itertools.pairwise(epochs)):  # rounds of pruning, each counted from 1
        epochs = tuple(float(i) for i in range(1, len(points) + 1))
    return Curve(
        entry.stage,
        entry.time,
        epochs,
        {n: [number(p, n) for p in points] for n in losses},
        {n: [number(p, n) for p in points] for n in shares},
    )


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, gain) points that no other beats in both, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front

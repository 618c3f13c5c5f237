"""How much stays float: a share of the multiply-accumulates, or the fewest layers that meet a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from edgekit.errors import UsageError

__all__ = ["Budget", "by_share", "fewest_float", "returned_to_int8", "tightened"]

T = TypeVar("T")
UNITS = 4096  # of the multiply-accumulates that a share leaves float
RETRIED = 16  # float layers that are tried in int8 again


class Budget(NamedTuple):
    """At most one is set. ``max_drop`` in points of top-1, ``min_snr`` in dB, ``share`` of multiply-accumulates in 0..1."""

    max_drop: float | None = None
    min_snr: float | None = None
    share: float | None = None

    def checked(self) -> Budget:
        """Raises `UsageError` for two budgets, or one out of range."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        if len(given) > 1:
            names = " and ".join("--" + name.replace("_", "-") for name in given)
            raise UsageError(f"{names} exclude each other", "state one budget")
        limits = {"max_drop": (0.0, 100.0), "min_snr": (-200.0, 200.0), "share": (0.0, 1.0)}
        for name, value in given.items():
            low, high = limits[name]
            if not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} {value} is out of range", f"give a number in {low:g}..{high:g}")
        return self


def by_share(noise: Mapping[str, float], macs: Mapping[str, int], room: float) -> list[str]:
    """The layers to quantize where at most ``room`` of the multiply-accumulates stay float, with the least ``noise`` in sum.

    A knapsack, by dynamic programming in units of the room, rounded up; then what still fits, the most harmful first.
    """
    names = sorted(noise, key=noise.__getitem__, reverse=True)
    best, taken = np.zeros(UNITS + 1), np.zeros((len(names), UNITS + 1), bool)
    sizes = [min(int(np.ceil(macs[name] * UNITS / room)), UNITS + 1) if room > 0 else UNITS + 1 for name in names]
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        if size > UNITS:
            continue
        gained = np.full(UNITS + 1, -1.0)
        gained[size:] = best[: UNITS + 1 - size] + noise[name]
        taken[i] = gained > best
        best = np.maximum(best, gained)
    left, at = set[str](), UNITS
    for i in reversed(range(len(names))):
        if taken[i, at]:
            left.add(names[i])
            at -= sizes[i]
    for name in names if room > 0 else ():
        if name not in left and sum(macs[other] for other in left) + macs[name] <= room:
            left.add(name)
    return [name for name in noise if name not in left]


def fewest_float(
    order: Sequence[str], attempt: Callable[[list[str]], T], met: Callable[[T], bool], better: Callable[[T], float]
) -> tuple[T, bool]:
    """Leave the first ``k`` of ``order`` float, with the least ``k`` that meets the budget: all int8 first, then bisection.

    Returns (result, whether it meets the budget); the best found where none does. At least one layer is quantized.
    """
    tried: dict[int, T] = {}

    def at(k: int) -> T:
        if k not in tried:
            tried[k] = attempt(list(order[k:]))
        return tried[k]

    low, high = 0, len(order) - 1
    if met(at(0)):
        return at(0), True
    if not met(at(high)):
        return max(tried.values(), key=better), False
    while high - low > 1:  # at(low) misses, at(high) meets
        middle = (low + high) // 2
        low, high = (low, middle) if met(at(middle)) else (middle, high)
    return at(high), True


class _Named(Protocol):
    """A candidate that knows which layers it quantizes."""

    @property
    def names(self) -> list[str]: ...


N = TypeVar("N", bound=_Named)


def tightened(order: Sequence[str], found: N, attempt: Callable[[list[str]], N], met: Callable[[N], bool]) -> N:
    """From a candidate that meets the budget towards fewer float layers, by bisection with a dearer ``attempt``.

    All int8 is known to miss it.
    """
    low, high = 0, len(order) - len(found.names)
    while high - low > 1:
        middle = (low + high) // 2
        trial = attempt(list(order[middle:]))
        if met(trial):
            found, high = trial, middle
        else:
            low = middle
    return found


def returned_to_int8(
    order: Sequence[str], found: N, macs: Mapping[str, int], attempt: Callable[[list[str]], N], met: Callable[[N], bool]
) -> N:
    """A candidate that meets the budget with each float layer int8 again that it does not need, the largest first.

    The first ones of an order are left float together, also those that are small and cost little.
    """
    for name in sorted(set(order) - {*found.names}, key=lambda name: (-macs[name], name))[:RETRIED]:
        trial = attempt([other for other in order if other == name or other in found.names])
        if met(trial):
            found = trial
    return found

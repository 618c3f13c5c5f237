"""What a network costs: multiply-accumulates, bytes of weights, or milliseconds, from the sizes of its operators alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from edgekit.targets import Target

from .coupling import Operation
from .groups import SAMPLES, Network
from .table import LatencyTable

__all__ = ["LatencyPrice", "MacsPrice", "Price", "RooflinePrice", "layer_rows", "macs_of", "macs_price", "size_price"]

#: Of the table's units: between two layers, and a call; fitted to pruned digits nets, whose kernels are of a few.
BETWEEN_US, CALL_US = 1.3, 1.5
#: What a network costs, in the unit of the target.
Price = Callable[[Network], float]


def macs_of(operation: Operation, sizes: tuple[int, ...], whole: tuple[int, ...]) -> int:
    """Multiply-accumulates of one sample with ``sizes`` channels left of the ``whole``."""
    kind, static = operation.kind, operation.shape
    if kind in ("convolution", "deconvolution"):
        grouping, space = static[:2]
        before, after, kernel = (static[2 + k * space : 2 + (k + 1) * space] for k in range(3))
        columns = 1.0 if grouping < 0 else sizes[0] / grouping
        places = math.prod(after if kind == "convolution" else before) * static[-1] / SAMPLES
        return round(sizes[1] * columns * math.prod(kernel) * places)
    if kind == "linear":
        return static[0] * sizes[0] * sizes[1] // SAMPLES
    if kind == "recurrence":
        gates, steps, series = static
        return gates * steps * series * sizes[1] * (sizes[0] + sizes[1]) // SAMPLES
    if kind == "attention":
        return sum(sizes) * static[-2] * static[-1] * static[0] // SAMPLES
    if kind == "product":
        share = math.prod(size / full for size, full in zip(sizes, whole, strict=True))
        return round(math.prod(static) * share) // SAMPLES
    return 0


def macs_price(network: Network) -> float:
    """Multiply-accumulates of one sample, in the operators that pruning follows."""
    return float(sum(macs_of(o, network.sizes(o), tuple(map(len, o.dims))) for o in network.operations))


@dataclass(frozen=True)
class MacsPrice:
    """Multiply-accumulates of one sample; ``rest`` are those of operators that pruning cannot follow, which stay."""

    rest: float = 0.0

    @classmethod
    def of(cls, network: Network, macs: int) -> MacsPrice:
        """``macs``: of the whole network, counted."""
        return cls(max(macs - macs_price(network), 0.0))

    def __call__(self, network: Network) -> float:
        return macs_price(network) + self.rest


def size_price(network: Network) -> float:
    """Bytes of float32 weights and buffers, of a network that may be masked."""
    return 4.0 * sum(network.elements().values())


@dataclass(frozen=True)
class LatencyPrice:
    """Share of the original's time by a table of measured layers, scaled so that a measured network has its measured share."""

    table: LatencyTable
    scale: float = 1.0

    def __call__(self, network: Network) -> float:
        return self.scale * self.kernels(network)

    def kernels(self, network: Network) -> float:
        """The sum of the table's entries and of what a runtime takes between them."""
        times = [self.table.microseconds(o, network.sizes(o), SAMPLES) for o in network.operations]
        return (sum(times) + BETWEEN_US * sum(1 for time in times if time) + CALL_US) / 1e3

    def anchored(self, network: Network, measured: float) -> LatencyPrice:
        """The same table, fitted to a network that was measured."""
        return replace(self, scale=measured / max(self.kernels(network), 1e-9))


@dataclass(frozen=True)
class RooflinePrice:
    """Milliseconds of one sample on a named target by the roofline model: each operator takes the longer of its arithmetic
    and its memory traffic, plus a launch (`Target.kernel_us`). A prediction, never a measurement.

    Raises `UsageError` where the target has no figures.
    """

    target: Target
    precision: str

    def __post_init__(self) -> None:
        self.target.kernel_us(0, 0, self.precision)

    def __call__(self, network: Network) -> float:
        width, total = {"fp32": 4, "fp16": 2, "int8": 1}[self.precision], 0.0
        for operation in network.operations:
            sizes, whole = network.sizes(operation), tuple(map(len, operation.dims))
            if 0 in sizes:
                continue
            macs, moved = macs_of(operation, sizes, whole), _moved(operation, sizes, whole)
            total += self.target.kernel_us(macs, width * moved, self.precision)
        return total / 1e3


def _moved(operation: Operation, sizes: tuple[int, ...], whole: tuple[int, ...]) -> float:
    """Numbers that an operator reads and writes for one sample, weights included."""
    kind, static = operation.kind, operation.shape
    if kind in ("convolution", "deconvolution"):
        grouping, space = static[:2]
        before, after, kernel = (math.prod(static[2 + k * space : 2 + (k + 1) * space]) for k in range(3))
        columns = 1.0 if grouping < 0 else sizes[0] / grouping
        return (sizes[0] * before + sizes[1] * after) * static[-1] / SAMPLES + sizes[1] * columns * kernel
    if kind == "linear":
        return static[0] / SAMPLES * sum(sizes) + sizes[0] * sizes[1]
    if kind == "recurrence":  # the weights come anew with every step
        gates, steps, series = static
        return steps * (series / SAMPLES * sum(sizes) + gates * sizes[1] * sum(sizes))
    if kind == "attention":
        return sum(sizes) * (static[-2] + static[-1]) + 2 * math.prod(static[1:])
    share = sizes[0] / whole[0] if sizes else 1.0
    return 2 * math.prod(static) / SAMPLES * share


def layer_rows(before: Network, after: Network, table: LatencyTable) -> list[dict[str, Any]]:
    """Each layer of ``before`` and what became of it in ``after``: channels, multiply-accumulates, the table's microseconds.

    What a skipped block held has no channels ``after``.
    """
    left: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for operation in after.operations:
        left[operation.kind, operation.module].append(operation)
    rows = []
    for operation in before.operations:
        same = left[operation.kind, operation.module]
        now = same.pop(0) if same else None
        if operation.kind in ("pointwise", "transcendental"):
            continue
        sizes = tuple(map(len, operation.dims))
        rows.append(
            {
                "layer": operation.module,
                "kind": operation.kind,
                "before": list(sizes),
                "after": list(map(len, now.dims)) if now else [],
                "macs_before": macs_of(operation, sizes, sizes),
                "macs": macs_of(now, tuple(map(len, now.dims)), tuple(map(len, now.dims))) if now else 0,
                "us_before": round(table.microseconds(operation, sizes, SAMPLES), 2),
                "us": round(table.microseconds(now, tuple(map(len, now.dims)), SAMPLES), 2) if now else 0.0,
            }
        )
    table.save()
    return rows

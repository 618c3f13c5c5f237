"""What a network costs: multiply-accumulates, bytes of weights, or milliseconds, from the sizes of its operators alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .coupling import Operation
from .groups import SAMPLES, Network
from .table import LatencyTable

__all__ = ["Price", "latency_price", "macs_of", "macs_price", "size_price"]

#: What a network costs, in the unit of the target.
Price = Callable[[Network], float]


def macs_of(operation: Operation, sizes: tuple[int, ...], whole: tuple[int, ...]) -> int:
    """Multiply-accumulates of one sample with ``sizes`` channels left of the ``whole``."""
    kind, static = operation.kind, operation.shape
    if kind in ("convolution", "deconvolution"):
        grouping, space = static[:2]
        before, after, kernel = (static[2 + k * space : 2 + (k + 1) * space] for k in range(3))
        columns = 1.0 if grouping < 0 else sizes[0] / grouping
        return int(sizes[1] * columns * math.prod(kernel) * math.prod(after if kind == "convolution" else before))
    if kind == "linear":
        return static[0] * sizes[0] * sizes[1] // SAMPLES
    if kind == "recurrence":
        gates, steps = static
        return gates * steps * sizes[1] * (sizes[0] + sizes[1])
    if kind == "attention":
        return sum(sizes) * static[-2] * static[-1]
    if kind == "product":
        share = sizes[0] / whole[0] if sizes else 1.0
        return int(math.prod(static) * share) // SAMPLES
    return 0


def macs_price(network: Network) -> float:
    """Multiply-accumulates of one sample."""
    return float(sum(macs_of(o, network.sizes(o), tuple(map(len, o.dims))) for o in network.operations))


def size_price(network: Network) -> float:
    """Bytes of float32 weights."""
    state = network.module.state_dict()
    total = 0
    for name, value in state.items():
        total += 4 * value.numel() if value.is_floating_point() else 0
    return float(total)


class latency_price(NamedTuple):  # noqa: N801  it is called like the others
    """Milliseconds of one sample by a table of measured layers, scaled so that a measured network costs what it measured."""

    table: LatencyTable
    scale: float = 1.0

    def __call__(self, network: Network) -> float:
        return self.scale * self.kernels(network)

    def kernels(self, network: Network) -> float:
        """The sum of the table's entries, milliseconds."""
        return sum(self.table.microseconds(o, network.sizes(o), SAMPLES) for o in network.operations) / 1e3

    def anchored(self, network: Network, measured_ms: float) -> latency_price:
        """The same table, fitted to a network that was measured."""
        return self._replace(scale=measured_ms / max(self.kernels(network), 1e-9))

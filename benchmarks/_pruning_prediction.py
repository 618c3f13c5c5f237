"""Predicted against measured latency of nets that were narrowed at random. `pruning.py` calls it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.models.export import export_onnx
from edgekit.models.module import load as load_module
from edgekit.pruning.groups import Network, analyse
from edgekit.pruning.latency import paired_latency
from edgekit.pruning.price import LatencyPrice
from edgekit.pruning.table import LatencyTable
from edgekit.runtime.golden import load_golden

#: Every other net has widths in multiples of the first, which `prune` takes by itself; the rest in multiples of the second.
UNITS = (16, 8)
WANTED = 0.15  # relative error that 90% of the nets should stay within


def predicted_ms(table: LatencyTable, base: Network, net: Network, base_ms: float) -> float:
    """What edgekit predicts for ``net``: the table's sum, scaled so that ``base`` costs what it measured in the same run."""
    return LatencyPrice(table).anchored(base, base_ms)(net)


def narrowed(network: Network, seed: int, unit: int) -> Network:
    """The net without a random share, at most three quarters, of each group's channels; widths in multiples of ``unit``."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for group in network.groups:
        width, step = network.width(group), 1 if group.heads else unit
        left = max(step, round(width * draw.uniform(0.25, 1) / step) * step)
        noise = {name: torch.rand(value.shape) for name, value in network.module.state_dict().items()}
        if group.heads:
            for _ in range(width - left):
                network = network.without(network.weakest(group, noise, 1), group.attributes)
                noise = {name: torch.rand(value.shape) for name, value in network.module.state_dict().items()}
        elif left < width:
            network = network.without(network.weakest(group, noise, width - left))
    return network


def prediction(path: Path, nets: int) -> dict[str, Any]:
    """``nets`` pairs of measured and predicted milliseconds, and the relative error's median and 90th percentile."""
    bundle = Bundle.open(path)
    before, sample = bundle.file(FLOAT_GRAPH).read_bytes(), load_golden(bundle)[0]["x"][:1]
    example = torch.from_numpy(np.repeat(sample, 2, 0))
    base, table = analyse(load_module(bundle), example), LatencyTable()
    found: list[dict[str, Any]] = []
    for seed in range(nets):
        unit = UNITS[seed % 2]
        net = narrowed(base, seed, unit)
        graph = export_onnx(net.module, example)
        base_ms, measured = paired_latency(before, graph, sample)
        guess = predicted_ms(table, base, net, base_ms)
        found.append({"unit": unit, "measured_ms": measured, "base_ms": base_ms, "predicted_ms": guess})
        print(f"  {path.stem} {seed}: {measured:.4f} ms, predicted {guess:.4f}", flush=True)
    table.save()
    return {"nets": found, **{f"unit_{unit}": _errors(found, unit) for unit in UNITS}}


def _errors(found: list[dict[str, Any]], unit: int) -> dict[str, float]:
    errors = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in found if row["unit"] == unit]
    if not errors:
        return {}
    share = sum(error <= WANTED for error in errors) / len(errors)
    return {"median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9)), "within_15_percent": share}

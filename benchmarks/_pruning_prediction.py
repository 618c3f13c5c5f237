"""Predicted against measured latency of nets that were narrowed at random. `pruning.py` calls it."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.models.module import export_onnx
from edgekit.models.module import load as load_module
from edgekit.pruning.latency import paired_latency
from edgekit.runtime.golden import load_golden

#: Every other net has widths in multiples of this; the rest have any.
UNIT = 16


def predicted_ms(base: Bundle, module: nn.Module, graph: bytes) -> float | None:
    """TO FILL: what edgekit.pruning.latency's table predicts for ``module`` (``graph`` is its export), milliseconds.

    None while there is no such table: then only the measured latencies are kept.
    """
    return None


def narrowed(module: nn.Module, example: torch.Tensor, seed: int, unit: int) -> nn.Module:
    """A copy in which every group of channels lost a random share, at most three quarters; widths in multiples of ``unit``."""
    module, draw = copy.deepcopy(module).eval(), random.Random(seed)
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(module, example_inputs=example)
        for group in graph.get_all_groups(ignored_layers=[last], root_module_types=[nn.Conv2d, nn.Linear]):
            dependency, channels = group[0].dep, list(group[0].idxs)
            left = max(unit, round(len(channels) * draw.uniform(0.25, 1) / unit) * unit)
            if left < len(channels):
                gone = sorted(draw.sample(channels, len(channels) - left))
                graph.get_pruning_group(dependency.target.module, dependency.handler, gone).prune()
    return module


def prediction(path: Path, nets: int) -> dict[str, Any]:
    """``nets`` pairs of measured and predicted milliseconds, and the relative error's median and 90th percentile."""
    base = Bundle.open(path)
    module, before = load_module(base), base.file(FLOAT_GRAPH).read_bytes()
    sample = load_golden(base)[0]["x"][:1]
    example = torch.from_numpy(np.repeat(sample, 2, 0))
    found: list[dict[str, Any]] = []
    for seed in range(nets):
        unit = UNIT if seed % 2 else 1
        net = narrowed(module, example, seed, unit)
        graph = export_onnx(net, example)
        pairs = [paired_latency(before, graph, sample) for _ in range(3)]
        measured, guess = median(new for _, new in pairs), predicted_ms(base, net, graph)
        row = {"unit": unit, "measured_ms": measured, "base_ms": median(old for old, _ in pairs), "predicted_ms": guess}
        found.append(row)
        print(f"  {path.stem} {seed}: {measured:.4f} ms, predicted {guess}", flush=True)
    return {"nets": found, **{f"unit_{unit}": _errors(found, unit) for unit in (1, UNIT)}}


def _errors(found: list[dict[str, Any]], unit: int) -> dict[str, float] | None:
    errors = [abs(r["predicted_ms"] / r["measured_ms"] - 1) for r in found if r["unit"] == unit and r["predicted_ms"]]
    return {"median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9))} if errors else None

"""`estimate`: what a device would need, by the roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009).

A kernel takes the longer of its arithmetic at the dense peak and its memory traffic at the full bandwidth, plus the cost
of a launch. Both limits are never reached together, so this is a lower bound for all but the launches; published
measurements lie above it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import onnx

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BundleError, UsageError
from edgekit.targets import PRECISIONS, Figure, Target, load_targets, target_named

from .cost import GraphCost, LayerCost, Tensor, graph_cost
from .shapes import profiles_for

__all__ = ["Kernel", "estimate", "fuse", "predictable"]

TOP = 8  # layers shown
#: Joined to the kernel that makes their input, where nothing else reads it: TensorRT's point-wise and Q fusions.
_POINTWISE = frozenset(
    """Add BatchNormalization Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Mish Mul Neg PRelu Pow QuantizeLinear
    Relu Selu Sigmoid Softplus Sqrt Sub Tanh Where""".split()  # noqa: SIM905
)
_CAVEATS = (
    "a roofline prediction, not a measurement: no kernel reaches both peaks, so expect more",
    "GPU alone at its highest clocks, dense; no DLA, no transfers, no pre- or postprocessing",
)


@dataclass
class Kernel:
    """Layers that run as one kernel. ``reads`` and ``writes`` are the activations that reach memory."""

    layers: list[LayerCost]
    reads: dict[str, Tensor] = field(default_factory=dict)
    writes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)


def fuse(cost: GraphCost, outputs: set[str]) -> list[Kernel]:
    """Group layers as TensorRT would at least: point-wise ones join the kernel whose output only they read."""
    readers: dict[str, int] = dict.fromkeys(outputs, 1)
    for layer in cost.layers:
        for tensor in layer.reads:
            readers[tensor.name] = readers.get(tensor.name, 0) + 1
    kernels: list[Kernel] = []
    maker: dict[str, int] = {}
    for layer in cost.layers:
        joins = [maker[t.name] for t in layer.reads if t.name in maker and readers[t.name] == 1]
        if layer.op in _POINTWISE and joins:
            index = max(joins)
            kernels[index].layers.append(layer)
        else:
            index = len(kernels)
            kernels.append(Kernel([layer]))
        kernel = kernels[index]
        for tensor in layer.reads:
            if maker.get(tensor.name) == index:
                if readers[tensor.name] == 1:
                    kernel.writes.pop(tensor.name, None)  # stays in registers
            else:
                kernel.reads[tensor.name] = tensor
        for tensor in layer.writes:
            maker[tensor.name] = index
            kernel.writes[tensor.name] = tensor
    return kernels


def estimate(
    bundle: Bundle | str | os.PathLike[str], *, target: str, precision: str = "best", batch: int = 1
) -> dict[str, Any]:
    """Predict the latency of one inference on a target, in ms. ``"prediction": true`` marks it.

    ``precision`` best: int8 where the bundle is quantized, else fp16. Layers outside Q/DQ of an int8 graph count as
    float32, as `build` leaves them. Raises `UsageError` for a target without figures (those are per card), a precision it
    lacks, or dynamic axes without a range.
    """
    chosen = target_named(target)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    precision = _precision(opened, chosen, precision)
    bandwidth, launch = _figures(chosen, precision)
    model = onnx.load_model(str(opened.file(INT8_GRAPH if precision == "int8" else FLOAT_GRAPH)), load_external_data=False)
    cost = graph_cost(model, _sizes(opened, batch))
    kernels = fuse(cost, {output.name for output in model.graph.output})
    rows = [_timed(kernel, chosen, precision, bandwidth.value, launch.value) for kernel in kernels]
    total = sum(row["us"] for row in rows)
    shares = {
        bound: sum(row["us"] for row in rows if row["bound"] == bound) / max(total, 1e-9)
        for bound in ("math", "memory", "launch")
    }
    used = [f for f in (chosen.peak(p) for p in {precision, *(row["precision"] for row in rows)}) if f]
    caveats = [*_CAVEATS, *(f"{f.value:g} {f.source}" for f in (*used, bandwidth, launch) if not f.confirmed)]
    if cost.unknown:
        caveats.append(f"not counted, for their shapes are unknown: {', '.join(cost.unknown[:4])}")
    form = opened.form if precision == "int8" else precision
    if form == "fp8":
        caveats.append("fp8 counts at the rate of int8")
    return {
        "bundle": str(opened.path),
        "prediction": True,
        "target": chosen.name,
        "precision": form,
        "batch": batch,
        "latency_ms": round(total / 1e3, 4),
        "per_second": round(1e6 * batch / max(total, 1e-9), 1),
        "macs": cost.macs,
        "parameters": cost.parameters,
        "bytes": sum(row["bytes"] for row in rows),
        "kernels": len(rows),
        "share_by_bound": {key: round(value, 3) for key, value in shares.items()},
        "top_layers": sorted(rows, key=lambda row: -row["us"])[:TOP],
        "caveats": caveats,
    }


def predictable(target: str) -> Target:
    """The target called ``target``, where `estimate` has figures of it for float graphs. Raises `UsageError`."""
    chosen = target_named(target)
    _figures(chosen, "fp16")
    return chosen


def _precision(bundle: Bundle, target: Target, precision: str) -> str:
    if precision == "best":
        return "int8" if bundle.has(INT8_GRAPH) else "fp16"
    if precision not in PRECISIONS or precision not in target.precisions:
        both = [p for p in PRECISIONS if p in target.precisions]
        raise UsageError(f"{precision!r} is not estimated for {target.name}", f"choose --precision {', '.join(both)} or best")
    if precision == "int8" and not bundle.has(INT8_GRAPH):
        raise BundleError(
            f"{bundle.path} has no int8 graph", f"quantize it first: edgekit quantize {bundle.path} --out B2 --calib SPEC"
        )
    return precision


def _figures(target: Target, precision: str) -> tuple[Figure, Figure]:
    """(bandwidth, launch)"""
    if target.bandwidth_gbs is None or target.launch_us is None or target.peak(precision) is None or target.fp32_tflops is None:
        able = [name for name, t in load_targets().items() if t.bandwidth_gbs and t.launch_us and t.peak(precision)]
        raise UsageError(
            f"{target.name} has no {precision} peak and bandwidth to predict from ({target.title})",
            f"estimate for one of: {', '.join(able)}",
        )
    return target.bandwidth_gbs, target.launch_us


def _sizes(bundle: Bundle, batch: int) -> dict[str, int]:
    """Symbol -> size: the batch, and the largest of each stated range."""
    dynamic = any(spec.shape and isinstance(spec.shape[0], str) for spec in bundle.manifest.inputs)
    profiles = profiles_for(bundle, batch if dynamic or batch != 1 else None)
    return {
        symbol: profiles[spec.name][2][index]
        for spec in bundle.manifest.inputs
        for index, symbol in enumerate(spec.shape)
        if isinstance(symbol, str)
    }


def _timed(kernel: Kernel, target: Target, precision: str, bandwidth: float, launch: float) -> dict[str, Any]:
    """One kernel's row: microseconds = max(math, memory) + launch."""
    main = max(kernel.layers, key=lambda layer: layer.macs)
    used = "int8" if main.int8 else ("fp16" if precision == "fp16" else "fp32")
    peak = target.peak(used)
    assert peak is not None
    traffic = [*kernel.reads.values(), *kernel.writes.values(), *(w for layer in kernel.layers for w in layer.weights)]
    moved = sum(t.size_bytes // 2 if used == "fp16" and t.is_float32 else t.size_bytes for t in traffic)
    math_us, memory_us = 2 * kernel.macs / peak.value / 1e6, moved / bandwidth / 1e3
    longest = max((math_us, "math"), (memory_us, "memory"), (launch, "launch"))
    return {
        "layer": main.name if len(kernel.layers) == 1 else f"{main.name} + {len(kernel.layers) - 1}",
        "op": main.op,
        "precision": used,
        "us": round(max(math_us, memory_us) + launch, 3),
        "bound": longest[1],
        "macs": kernel.macs,
        "bytes": moved,
    }

"""`estimate`: what a device would need, by the roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009).

A kernel takes the longer of its arithmetic and its memory traffic, each at the share of the peak that kernels reach, plus
the cost of a launch. The share and the launch are two numbers, fitted to published latencies by `benchmarks/estimate.py`
and judged there on others. ``bound_ms`` is the same at both peaks with launches free: a lower bound wherever tensors pass
through memory, not a cache.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import onnx

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import UsageError
from edgekit.manifest import batch_symbol
from edgekit.targets import PRECISIONS, Target, load_targets, target_named

from .cost import GraphCost, LayerCost, Tensor, graph_cost
from .shapes import profiles_for

__all__ = ["Kernel", "Work", "estimate", "fuse", "is_quantized", "predictable", "work_of"]

TOP = 8  # layers shown
#: Joined to the kernel that makes their input, where nothing else reads it: TensorRT's point-wise and Q fusions. SiLU is two
#: readers of one tensor, and stays a kernel of its own: TensorRT fuses it with the convolution on some GPUs and precisions
#: only (github.com/NVIDIA/TensorRT/issues/3542, 2572), and the published YOLO figures fit better so.
_POINTWISE = frozenset(
    """Add BatchNormalization Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Mish Mul Neg PRelu Pow QuantizeLinear
    Relu Selu Sigmoid Softplus Sqrt Sub Tanh Where""".split()  # noqa: SIM905
)
#: Layers that int8 tensor cores compute, and operators that only move what they read, so that int8 passes through them.
_QUANTIZED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_MOVING = frozenset(("Add", "Concat", "MaxPool", "Relu", "Transpose"))
_FITTED_SM = "8.7"
_CAVEATS = (
    "a roofline prediction, not a measurement: within 1.5x on published figures of ResNet-50 and YOLO11 it was not fitted to",
    "GPU alone at its highest clocks, dense; no DLA, no transfers, no pre- or postprocessing",
)


class Work(NamedTuple):
    """A kernel as the roofline sees it; ``channels`` as in `LayerCost`."""

    layer: str
    op: str
    precision: str
    macs: int
    size_bytes: int
    channels: tuple[int, int] | None


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


def work_of(
    model: onnx.ModelProto, precision: str, sizes: Mapping[str, int] | None = None, *, rest: str = "fp16"
) -> tuple[list[Work], GraphCost]:
    """What each kernel of a graph computes and moves at ``precision`` fp32, fp16 or int8, and the cost of the graph.

    int8: where the graph has Q/DQ, and else as if every layer with weights were quantized. What is not int8 then is ``rest``,
    as `build` casts it. Raises `GraphError` where shapes cannot be inferred.
    """
    cost = graph_cost(model, sizes)
    outputs = {output.name for output in model.graph.output}
    imagined = precision == "int8" and not is_quantized(model)
    eight = _eight_bits(cost, outputs) if imagined else frozenset()
    plain = rest if precision == "int8" else precision

    def size(tensor: Tensor, int8: bool) -> int:
        if not tensor.is_float32:
            return tensor.size_bytes
        return tensor.elements * (1 if int8 else 4 if plain == "fp32" else 2)

    found = []
    for kernel in fuse(cost, outputs):
        main = max(kernel.layers, key=lambda layer: layer.macs)
        int8 = main.int8 or (imagined and _weighted(main))
        moved = sum(size(tensor, tensor.name in eight) for tensor in (*kernel.reads.values(), *kernel.writes.values()))
        moved += sum(size(tensor, imagined and _weighted(layer)) for layer in kernel.layers for tensor in layer.weights)
        name = main.name if len(kernel.layers) == 1 else f"{main.name} + {len(kernel.layers) - 1}"
        found.append(Work(name, main.op, "int8" if int8 else plain, kernel.macs, moved, main.channels))
    return found, cost


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether the graph states its own int8, by Q/DQ."""
    return any(node.op_type == "DequantizeLinear" for node in model.graph.node)


def _weighted(layer: LayerCost) -> bool:
    return layer.op in _QUANTIZED and bool(layer.macs and layer.weights)


def _eight_bits(cost: GraphCost, outputs: set[str]) -> frozenset[str]:
    """Activations that only quantized layers read, directly or through what moves bytes: their maker writes int8."""
    readers: dict[str, list[LayerCost]] = {}
    for layer in cost.layers:
        for tensor in layer.reads:
            readers.setdefault(tensor.name, []).append(layer)
    found: set[str] = set()
    for layer in reversed(cost.layers):
        for tensor in (*layer.writes, *layer.reads):
            all_eight = all(
                _weighted(reader) or (reader.op in _MOVING and all(t.name in found for t in reader.writes))
                for reader in readers.get(tensor.name, ())
            )
            if all_eight and readers.get(tensor.name) and tensor.name not in outputs:
                found.add(tensor.name)
    return frozenset(found)


def estimate(
    bundle: Bundle | str | os.PathLike[str], *, target: str, precision: str = "best", batch: int | None = None
) -> dict[str, Any]:
    """Predict the latency of one inference on a target, in ms. A prediction, not a measurement.

    ``precision`` best: int8 where the bundle is quantized, else fp16 (fp32 where the target has none). int8 of a bundle that
    is not quantized counts as if every layer with weights were, and says so. ``batch``: 1 if not given, or the fewest samples
    that the graph is stated to take.

    Returns ``prediction`` (True), ``bundle``, ``target``, ``precision``, ``as_if_quantized``, ``batch``, ``latency_ms``,
    ``bound_ms`` (no kernel below its peaks, launches free), ``per_second`` (samples), ``macs``, ``parameters``, ``bytes``
    (moved), ``kernels`` (how many), ``share_by_bound`` (of the time: math, memory, launch), ``top_layers`` (those that take
    longest) and ``caveats`` (texts).
    Raises `UsageError` for a target without figures (those are per card), a precision it lacks, or dynamic
    axes without a range.
    """
    if batch is not None and type(batch) is not int:
        raise UsageError(f"a batch of {batch!r}", "give a whole number of samples")
    chosen = target_named(target)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    precision = _precision(opened, chosen, precision)
    _check_figures(chosen, precision)
    quantized = precision == "int8" and opened.has(INT8_GRAPH)
    model = onnx.load_model(str(opened.file(INT8_GRAPH if quantized else FLOAT_GRAPH)), load_external_data=False)
    rest = "fp16" if "fp16" in chosen.precisions else "fp32"
    batch, sizes = sizes_of(opened, batch)
    works, cost = work_of(model, precision, sizes, rest=rest)
    rows = [_row(work, chosen) for work in works]
    total = sum(row["us"] for row in rows)
    bounds = ("math", "memory", "launch")
    shares = {bound: sum(row["us"] for row in rows if row["bound"] == bound) / max(total, 1e-9) for bound in bounds}
    form = opened.form if quantized else precision
    return {
        "bundle": str(opened.path),
        "prediction": True,
        "target": chosen.name,
        "precision": form,
        "as_if_quantized": precision == "int8" and not quantized,
        "batch": batch,
        "latency_ms": round(total / 1e3, 4),
        "bound_ms": round(sum(chosen.bound_us(work.macs, work.size_bytes, work.precision) for work in works) / 1e3, 4),
        "per_second": round(1e6 * batch / max(total, 1e-9), 1),
        "macs": cost.macs,
        "parameters": cost.parameters,
        "bytes": sum(row["bytes"] for row in rows),
        "kernels": len(rows),
        "share_by_bound": {key: round(value, 3) for key, value in shares.items()},
        "top_layers": sorted(rows, key=lambda row: -row["us"])[:TOP],
        "caveats": _caveats(chosen, works, cost, form, imagined=precision == "int8" and not quantized),
    }


def _caveats(target: Target, works: list[Work], cost: GraphCost, form: str, *, imagined: bool) -> list[str]:
    found = list(_CAVEATS[:1] if target.kind == "cpu" else _CAVEATS)
    if imagined:
        found.append(
            "as if quantized by plain Q/DQ around every layer with weights; "
            "what quantize adds (shifts, pads) or leaves float costs more"
        )
    if form == "fp8":
        found.append("fp8 counts at the rate of int8")
    if target.sm != _FITTED_SM and target.launch_us is None and target.peak_share is None:
        found.append(
            f"what kernels reach was fitted on Orin, and is assumed for {target.title}; Thor was twice as fast as by it"
        )
    if target.figures_of:
        found.append(
            f"figures of {target.figures_of} stand for {target.title}, others are slower: "
            f'state yours in a table with like = "{target.name}", by --targets FILE'
        )
    if target.peak_share is not None and target.peak_share.value > 1:
        found.append("bound_ms counts traffic that the cache of this GPU serves: the latency may lie below it")
    used = [target.peak(name) for name in sorted({work.precision for work in works})]
    figures = [f for f in (*used, target.bandwidth_gbs, target.launch_us, target.peak_share) if f and not f.confirmed]
    found += [f"{figure.value:g} {figure.source}" for figure in figures]
    for name, step in sorted(target.alignment.items()):
        odd = [work for work in works if work.precision == name and not _aligned(work.channels, int(step.value))]
        if odd:
            found.append(f"{len(odd)} {name} layers with channels that are no multiple of {step.value:g}: expect these slower")
    if cost.unknown:
        found.append(f"not counted, for their shapes are unknown: {', '.join(cost.unknown[:4])}")
    if target.file:
        found.append(f"{target.name} is {'the shipped one replaced by ' if target.replaces else ''}a table of {target.file}")
    return found


def _aligned(channels: tuple[int, int] | None, step: int) -> bool:
    """Depthwise layers join one channel with one, by kernels that know no alignment."""
    return channels is None or channels == (1, 1) or all(count % step == 0 for count in channels)


def predictable(target: str) -> Target:
    """The target called ``target``, where `estimate` has figures of it for float graphs. Raises `UsageError`."""
    chosen = target_named(target)
    _check_figures(chosen, "fp16")
    return chosen


def _precision(bundle: Bundle, target: Target, precision: str) -> str:
    if precision == "best":
        return "int8" if bundle.has(INT8_GRAPH) else "fp16" if "fp16" in target.precisions else "fp32"
    if precision not in PRECISIONS or precision not in target.precisions:
        both = [p for p in PRECISIONS if p in target.precisions]
        raise UsageError(f"{precision!r} is not estimated for {target.name}", f"choose --precision {', '.join(both)} or best")
    return precision


def _check_figures(target: Target, precision: str) -> None:
    """Raise `UsageError` where a peak that `work_of` may ask for, or the bandwidth, is not stated."""
    needed = [precision, "fp16" if "fp16" in target.precisions else "fp32"] if precision == "int8" else [precision]
    if target.bandwidth_gbs is None or None in map(target.peak, needed):
        able = [name for name, t in load_targets().items() if t.bandwidth_gbs and all(map(t.peak, needed))]
        raise UsageError(
            f"{target.name} has no {' and '.join(needed)} peak and bandwidth to predict from ({target.title})",
            f'state {target.lacking(*needed)} in a table with like = "{target.name}" and give it by --targets FILE '
            f"(docs/targets.md has one to copy); or estimate for one of: {', '.join(able)}",
        )


def sizes_of(bundle: Bundle, batch: int | None = None) -> tuple[int, dict[str, int]]:
    """(the batch, symbol -> size: that batch, and the largest of each other stated range). ``batch`` None: the fewest samples
    that the graph takes. Raises `UsageError` for an axis of which nothing is known."""
    inputs = bundle.manifest.inputs
    first = batch_symbol(inputs)
    profiles = profiles_for(bundle, batch)
    if batch is None:
        fewest = [profiles[spec.name][0][0] for spec in inputs if spec.shape and spec.shape[0] == first]
        fewest += [spec.shape[0] for spec in inputs if first is None and spec.shape and isinstance(spec.shape[0], int)]
        batch = fewest[0] if fewest else 1
        profiles = profiles_for(bundle, batch if first is not None else None)
    return batch, {
        symbol: profiles[spec.name][2][index]
        for spec in bundle.manifest.inputs
        for index, symbol in enumerate(spec.shape)
        if isinstance(symbol, str)
    }


def _row(work: Work, target: Target) -> dict[str, Any]:
    """One kernel in JSON, with its microseconds and what decides them."""
    total = target.kernel_us(work.macs, work.size_bytes, work.precision)
    launch = target.kernel_us(0, 0, work.precision)
    by_math = target.bound_us(work.macs, 0, work.precision) >= target.bound_us(0, work.size_bytes, work.precision)
    return {
        "layer": work.layer,
        "op": work.op,
        "precision": work.precision,
        "us": round(total, 3),
        "bound": "launch" if launch > total - launch else "math" if by_math else "memory",
        "macs": work.macs,
        "bytes": work.size_bytes,
    }

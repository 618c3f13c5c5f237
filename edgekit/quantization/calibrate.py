"""From samples to an int8 graph: observe, choose a method by measured error, find what stays float, correct, measure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import GraphError, UsageError
from edgekit.progress import say, track
from edgekit.runtime.golden import load_golden
from edgekit.version import __version__

from . import record
from .budget import Budget, by_share, fewest_float
from .graph import Parameters, insert
from .placement import Placement, multiply_accumulates, place, shape_tensors, weights_of
from .prepare import prepare
from .record import Calibration, Drawn, LayerRecord
from .recovery import WEIGHT_METHODS, correct_biases, weight_scales
from .samples import Pool, Samples, digests
from .sensitivity import Sensitivity, Study, most_harmful_first
from .simulate import Array, Feeds, Simulator, exposed, observe, signal_to_noise, with_reference
from .statistics import METHODS, Statistics, scale_of

__all__ = ["Result", "calibrate", "culprit"]

STUDIED = (8, 64)  # samples behind the choice of a method and the sensitivities: fewest and most
CORRECTED = (16, 256)  # samples behind the bias correction
WORK = 10**12  # multiply-accumulates that each of the two may cost: a minute or two on one core
EXPLAINED = 3  # layers whose loss is put into words


class Result(NamedTuple):
    """Bytes of ``model.int8.onnx`` and ``calibration.json``; figures; how the budget was missed, or ""."""

    graph: bytes
    calibration: bytes
    figures: dict[str, Any]
    missed: str


class Candidate(NamedTuple):
    """An int8 graph that was tried. ``drop`` in points of top-1, where labels are at hand."""

    layers: list[str]
    parameters: Parameters
    model: onnx.ModelProto
    snr_db: float
    drop: float | None


class Bench(NamedTuple):
    """What every candidate of one bundle is made from and measured with."""

    original: onnx.ModelProto
    prepared: onnx.ModelProto
    placement: Placement
    macs: dict[str, int]
    pool: Pool
    statistics: dict[str, Statistics]  # by tensor
    grouped: dict[str, Statistics]  # by group
    study: Study
    golden: Feeds

    def parameters(self, method: str, weight_method: str) -> Parameters:
        scales = {name: scale_of(METHODS[method](seen)) for name, seen in self.grouped.items()}
        weights = weights_of(self.prepared, self.placement)
        axes = {layer.name: layer.axis for layer in self.placement.layers}
        return Parameters(scales, {name: weight_scales(w, axes[name], weight_method) for name, w in weights.items()})

    def candidate(self, layers: list[str], parameters: Parameters, labelled: bool) -> Candidate:
        """Quantize these layers, correct biases where that helps, measure on samples that gave no range."""
        some = self.pool.calibration.spread(_affordable(CORRECTED, len(layers) * sum(self.macs.values()) // 2))
        corrected = correct_biases(self.prepared, self.placement, parameters, layers, some.batches)
        if self.study.snr_db(corrected, layers) > self.study.snr_db(parameters, layers):
            parameters = corrected
        model = insert(self.prepared, self.placement, parameters, layers)
        snr = signal_to_noise(model, with_reference(self.original, self.judging()))
        drop = _drop(self.original, model, self.pool.labelled) if labelled else None
        return Candidate(layers, parameters, model, snr, drop)

    def judging(self) -> Iterable[Feeds]:
        return self.pool.held_out.batches() if len(self.pool.held_out) else [self.golden]


def calibrate(bundle: Bundle, pool: Pool, budget: Budget, method: str, seed: int) -> Result:
    """Raises `GraphError` where nothing can be quantized, `UsageError` where ``max_drop`` has no labels to go by."""
    if budget.max_drop is not None and (pool.labelled.targets is None or not len(pool.labelled)):
        raise UsageError("--max-drop needs labelled samples, and these have none", "add --data SPEC, or state --min-snr")
    graph = bundle.file(FLOAT_GRAPH).read_bytes()
    bench = _bench(bundle, graph, pool)
    method, weight_method, parameters = _choose(bench, method)
    rows = bench.study.sensitivities(parameters)
    found, missed = _within(bench, budget, parameters, rows)
    data: bytes = found.model.SerializeToString(deterministic=True)
    calibration = Calibration(
        format=1,
        graph=hashlib.sha256(graph).hexdigest(),
        int8_graph=hashlib.sha256(data).hexdigest(),
        method=method,
        weight_method=weight_method,
        samples=Drawn(pool.source, pool.data_digest, pool.split, seed, pool.calibration.ids, digests(pool.calibration)),
        preprocessing=bundle.manifest.preprocessing,
        versions={
            "edgekit": __version__,
            "numpy": np.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        tensors={name: record.tensor_record(seen, parameters.scales[name]) for name, seen in bench.grouped.items()},
        groups=bench.placement.groups,
        layers=_layer_records(bench, found, parameters, rows),
    )
    figures = _figures(bench, found, method, weight_method, len(data), culprit(calibration))
    return Result(data, record.encode(calibration), figures, missed)


def culprit(calibration: Calibration) -> dict[str, Any] | None:
    """The int8 layer that adds the most noise alone."""
    measured = [layer for layer in calibration.layers if layer.int8 and layer.alone_db is not None]
    if not measured:
        return None
    worst = min(measured, key=lambda layer: layer.alone_db or 0.0)
    return {"layer": worst.name, "op": worst.op, "alone_db": worst.alone_db, "gain_db": worst.gain_db, "why": worst.why}


def _bench(bundle: Bundle, graph: bytes, pool: Pool) -> Bench:
    prepared = prepare(graph)
    placement = place(prepared)
    if not placement.layers:
        reasons = "; ".join(sorted({f"{node.op}: {node.reason}" for node in placement.unquantized})[:3])
        raise GraphError(
            f"the graph has no layer to quantize ({reasons or 'no Conv, Gemm or MatMul'})", "build it as it is: edgekit build B"
        )
    original = onnx.load_model_from_string(graph)
    golden = _single(bundle)
    shapes = Simulator(exposed(prepared, wanted := shape_tensors(prepared, placement)))(golden)
    macs = multiply_accumulates(prepared, placement, dict(zip(wanted, (a.shape for a in shapes.values()), strict=True)))
    batches = track(pool.calibration.batches(), f"calibrating with {len(pool.calibration)} samples")
    statistics = observe(prepared, placement.groups, batches)
    grouped: dict[str, Statistics] = {}
    for name, group in placement.groups.items():
        grouped[group] = grouped[group].merged(statistics[name]) if group in grouped else statistics[name]
    studied = pool.calibration.spread(_affordable(STUDIED, 2 * len(placement.layers) * sum(macs.values())))
    study = Study(prepared, placement, list(with_reference(original, studied.batches())))
    return Bench(original, prepared, placement, macs, pool, statistics, grouped, study, golden)


def _affordable(limits: tuple[int, int], cost: int) -> int:
    """How many samples at ``cost`` multiply-accumulates each fit `WORK`, within the limits. No clock: the same everywhere."""
    return int(np.clip(WORK // max(cost, 1), *limits))


def _single(bundle: Bundle) -> dict[str, Array]:
    """One golden sample, or all where the batch is fixed."""
    inputs, _ = load_golden(bundle)
    specs = {spec.name: spec.shape for spec in bundle.manifest.inputs}
    return {k: v[:1] if specs.get(k) and isinstance(specs[k][0], str) else v for k, v in inputs.items()}


def _choose(bench: Bench, method: str) -> tuple[str, str, Parameters]:
    """The calibration method with the best output SNR on a few of the samples; a stated one is taken as it is."""
    if method != "auto":
        weight_method = "minmax" if method == "minmax" else "mse"
        return method, weight_method, bench.parameters(method, weight_method)
    names = [layer.name for layer in bench.placement.layers]
    trials = [(activation, weight) for activation in METHODS for weight in WEIGHT_METHODS]
    measured = []
    for activation, weight in track(trials, "choosing a method"):
        parameters = bench.parameters(activation, weight)
        measured.append((bench.study.snr_db(parameters, names), activation, weight, parameters))
    _, activation, weight, parameters = max(measured, key=lambda trial: trial[0])
    return activation, weight, parameters


def _within(bench: Bench, budget: Budget, parameters: Parameters, rows: list[Sensitivity]) -> tuple[Candidate, str]:
    """The candidate that the budget asks for, and how it is missed, or ""."""
    order = most_harmful_first(rows, bench.macs)
    total = sum(bench.macs.values())
    if budget.share is not None:
        names = by_share(order, bench.macs, total, budget.share) or order[-1:]
        found = bench.candidate(names, parameters, False)
        reached = sum(bench.macs[name] for name in names) / max(total, 1)
        if reached < budget.share - 1e-9:
            reasons = "; ".join(f"{node.name}: {node.reason}" for node in bench.placement.unquantized[:3])
            return found, f"a share of {reached:.3f} can be quantized, {budget.share:g} was asked ({reasons})"
        return found, ""
    if budget.max_drop is None and budget.min_snr is None:
        return bench.candidate(order, parameters, False), ""

    def attempt(names: list[str]) -> Candidate:
        found = bench.candidate(names, parameters, budget.max_drop is not None)
        drop = "" if found.drop is None else f", drop {found.drop:.2f} points"
        say(f"{len(order) - len(names)} of {len(order)} layers float: {found.snr_db:.1f} dB{drop}")
        return found

    if budget.min_snr is not None:
        limit = budget.min_snr
        found, met = fewest_float(order, attempt, lambda c: c.snr_db >= limit, lambda c: c.snr_db)
        return found, "" if met else f"the best SNR is {found.snr_db:.1f} dB, {limit:g} was asked"
    points = budget.max_drop or 0.0
    found, met = fewest_float(order, attempt, lambda c: (c.drop or 0.0) <= points, lambda c: -(c.drop or 0.0))
    return found, "" if met else f"the least drop is {found.drop:.2f} points, {points:g} were allowed"


def _drop(original: onnx.ModelProto, model: onnx.ModelProto, labelled: Samples) -> float:
    """Points of top-1 that the int8 graph loses on labelled samples."""
    assert labelled.targets is not None
    name = original.graph.output[0].name
    right: list[float] = []
    for graph in (original, model):
        run = Simulator(graph)
        answers: NDArray[Any] = np.concatenate([run(feeds)[name].argmax(-1).ravel() for feeds in labelled.batches()])
        right.append(float((answers == labelled.targets).mean()))
    return 100 * (right[0] - right[1])


def _layer_records(
    bench: Bench, found: Candidate, parameters: Parameters, rows: Sequence[Sensitivity]
) -> tuple[LayerRecord, ...]:
    layers = {layer.name: layer for layer in bench.placement.layers}
    worst = sorted((row for row in rows), key=lambda row: row.alone_db)[:EXPLAINED]
    why = {row.layer: bench.study.why(layers[row.layer], parameters, bench.statistics) for row in worst}
    measured = {row.layer: row for row in rows}
    result = []
    for name, layer in layers.items():
        int8, bias = name in found.layers, found.parameters.biases.get(name)
        result.append(
            LayerRecord(
                name,
                layer.op,
                int8,
                bench.macs[name],
                round(measured[name].alone_db, 2),
                round(measured[name].gain_db, 2),
                record.exact_all(found.parameters.weights[name]) if int8 else (),
                record.exact_all(bias) if int8 and bias is not None else None,
                "; ".join(text for text in (why.get(name, ""), "" if int8 else "left float by the budget") if text),
            )
        )
    result += [
        LayerRecord(node.name, node.op, False, bench.macs[node.name], why=node.reason) for node in bench.placement.unquantized
    ]
    return tuple(result)


def _figures(
    bench: Bench, found: Candidate, method: str, weight_method: str, size: int, worst: dict[str, Any] | None
) -> dict[str, Any]:
    total = sum(bench.macs.values())
    every = len(bench.placement.layers) + len(bench.placement.unquantized)
    figures = {
        "snr_db": round(found.snr_db, 2),
        "measured_on": f"{len(bench.pool.held_out)} held-out samples" if len(bench.pool.held_out) else "golden inputs",
        "share": round(sum(bench.macs[name] for name in found.layers) / max(total, 1), 6),
        "size_bytes": size,
        "method": method,
        "weight_method": weight_method,
        "layers": {"int8": len(found.layers), "float": every - len(found.layers)},
        "culprit": worst,
    }
    if found.drop is not None:
        figures["drop"] = round(found.drop, 3)  # points of top-1, on labelled train samples
    return figures

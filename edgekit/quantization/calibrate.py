"""From samples to an int8 graph: observe, fit, find what stays float, fit again, measure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import GraphError, UsageError
from edgekit.graphs.dequantize import quantized_nodes
from edgekit.progress import say
from edgekit.version import __version__

from . import record
from .budget import Budget, by_share, fewest_float
from .graph import Parameters, insert
from .memory import give_back, returned
from .placement import Placement, multiply_accumulates, place, shape_tensors, weights_of
from .prepare import prepare
from .reconstruct import reconstruct
from .record import Calibration, Drawn, LayerRecord, QuantizerRecord
from .rounding import weight_scales
from .samples import Pool, Samples, digests
from .sensitivity import Sensitivity, Study, most_harmful_first
from .simulate import Feeds, Simulator, measured_shapes, observe, signal_to_noise, with_reference
from .statistics import METHODS, Statistics, scale_of

__all__ = ["Result", "calibrate", "culprit"]

STUDIED = (2, 64)  # samples behind the sensitivities: fewest and most
JUDGED = (8, 64)  # held-out samples behind the choice of a recovery
STUDIED_BYTES = 16 << 20  # of inputs and float outputs that are held meanwhile
FITTED = (16, 128)  # samples behind the fitted weights
SPOOLED_BYTES = 2 << 30  # on disk meanwhile
WORK = 4 * 10**11  # multiply-accumulates that each of these may cost: a minute on one core
BATCH_BYTES = 16 << 20  # of tensors that one run shows
EXPLAINED = 3  # layers whose loss is put into words
WORTH_DB = 0.5  # operators in front of Q must gain this much at the output, fitting at all must gain something


class Result(NamedTuple):
    """Bytes of ``model.int8.onnx`` and ``calibration.json``; figures; how the budget was missed, or ""."""

    graph: bytes
    calibration: bytes
    figures: dict[str, Any]
    missed: str


class Recovered(NamedTuple):
    """Numbers, by which recovery, and the output SNR of each recovery that was tried, all int8."""

    parameters: Parameters
    recovery: str
    tried: dict[str, float]


class Candidate(NamedTuple):
    """An int8 graph that was tried. ``drop`` in points of top-1, where labels are at hand."""

    names: list[str]
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
    batch: int
    statistics: dict[str, Statistics]  # by tensor
    grouped: dict[str, Statistics]  # by group
    study: Study
    first: Feeds

    def rounded(self, method: str) -> Parameters:
        """Ranges by one method, weights rounded to nearest."""
        scales = {name: scale_of(METHODS[method](seen)) for name, seen in self.grouped.items()}
        layers = {self.placement.groups[layer.data] for layer in self.placement.layers}
        for product in self.placement.products if method == "mse" else ():
            # Attention hangs on its largest scores, and a squared error over all of them would clip those.
            for group in {self.placement.groups[name] for name in product.inputs} - layers:
                scales[group] = scale_of(METHODS["minmax"](self.grouped[group]))
        weights, axes = weights_of(self.prepared, self.placement), {layer.name: layer.axis for layer in self.placement.layers}
        how = "minmax" if method == "minmax" else "mse"
        return Parameters(scales, {name: weight_scales(w, axes[name], how) for name, w in weights.items()})

    def fitted(self, parameters: Parameters, names: Sequence[str], recovery: str) -> Parameters:
        """Weights fitted layer by layer, for these layers int8."""
        cost = 6 * sum(self.macs.values())
        live = sum(seen.count for seen in self.statistics.values()) // max(len(self.pool.calibration), 1)
        count = min(_affordable(FITTED, cost), max(FITTED[0], SPOOLED_BYTES // max(4 * live, 1)))
        some = self.pool.calibration.spread(count)
        # Samples often come in turns, class after class: every other one must not be of one kind.
        some = some.take([int(i) for i in np.random.default_rng(0).permutation(len(some))])
        size = max(1, min(self.batch, len(some) // 8))

        def batches() -> Iterator[Feeds]:
            return some.batches(size)

        return reconstruct(self.prepared, self.placement, parameters, names, batches, extra=recovery == "shifted")

    def candidate(self, names: list[str], parameters: Parameters, labelled: bool) -> Candidate:
        """Quantize these layers, measure on samples that gave no range and no weight; they chose the recovery at most."""
        model = insert(self.prepared, self.placement, parameters, names)
        snr = signal_to_noise(model, with_reference(self.original, self.judging()))
        drop = _drop(self.original, model, self.pool.labelled) if labelled else None
        return Candidate(names, parameters, model, snr, drop)

    def judging(self) -> Iterator[Feeds]:
        return self.pool.held_out.batches(self.batch) if len(self.pool.held_out) else iter([self.first])


def calibrate(bundle: Bundle, pool: Pool, budget: Budget, method: str, seed: int, *, extra: bool = True) -> Result:
    """Raises `GraphError` where nothing can be quantized, `UsageError` where ``max_drop`` has no labels to go by."""
    if budget.max_drop is not None and (pool.labelled.targets is None or not len(pool.labelled)):
        raise UsageError("--max-drop needs labelled samples, and these have none", "add --data SPEC, or state --min-snr")
    with returned():
        return _calibrate(bundle, pool, budget, method, seed, extra)


def _calibrate(bundle: Bundle, pool: Pool, budget: Budget, method: str, seed: int, extra: bool) -> Result:
    graph = bundle.file(FLOAT_GRAPH).read_bytes()
    bench = _bench(bundle, graph, pool)
    recovered = _recover(bench, method, extra)
    stated = budget.max_drop is not None or budget.min_snr is not None or budget.share is not None
    rows = bench.study.sensitivities(recovered.parameters, alone=not stated)
    found, missed = _within(bench, budget, recovered, rows)
    data: bytes = found.model.SerializeToString(deterministic=True)
    parameters = found.parameters
    calibration = Calibration(
        format=2,
        graph=hashlib.sha256(graph).hexdigest(),
        int8_graph=hashlib.sha256(data).hexdigest(),
        method=method,
        recovery=recovered.recovery,
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
        quantizers={
            site: QuantizerRecord(
                record.exact(quantizer.scale), *(None if v is None else record.exact_all(v) for v in quantizer[1:])
            )
            for site, quantizer in parameters.quantizers.items()
        },
        layers=_layer_records(bench, found, bench.rounded("mse" if method == "auto" else method), rows),
    )
    figures = _figures(bench, found, method, recovered, len(data), culprit(calibration))
    return Result(data, record.encode(calibration), figures, missed)


def culprit(calibration: Calibration) -> dict[str, Any] | None:
    """The int8 layer that costs the output most."""
    measured = [layer for layer in calibration.layers if layer.int8 and layer.gain_db is not None]
    if not measured:
        return None
    worst = max(measured, key=lambda layer: layer.gain_db or 0.0)
    return {"layer": worst.name, "op": worst.op, "alone_db": worst.alone_db, "gain_db": worst.gain_db, "why": worst.why}


def _bench(bundle: Bundle, graph: bytes, pool: Pool) -> Bench:
    prepared = prepare(graph)
    placement = place(prepared)
    if not placement.names:
        reasons = "; ".join(sorted({f"{node.op}: {node.reason}" for node in placement.unquantized})[:3])
        raise GraphError(
            f"the graph has no layer to quantize ({reasons or 'no Conv, Gemm or MatMul'})", "build it as it is: edgekit build B"
        )
    original = onnx.load_model_from_string(graph)
    if quantized_nodes(original):  # what is rounded already is no reference: the same graph made float is
        original = prepared
    first = pool.calibration.read(0)
    wanted = list(dict.fromkeys([*shape_tensors(prepared, placement), *placement.groups]))
    shapes = measured_shapes(prepared, wanted, first)
    macs = multiply_accumulates(prepared, placement, shapes)
    shown = {name: 4 * int(np.prod(shapes[name], dtype=np.int64)) for name in placement.groups}
    batch = int(np.clip(BATCH_BYTES // max(sum(shown.values()), 1), 1, 64))
    statistics = observe(prepared, shown, lambda: pool.calibration.batches(batch), BATCH_BYTES)
    give_back()
    grouped: dict[str, Statistics] = {}
    for name, group in placement.groups.items():
        grouped[group] = grouped[group].merged(statistics[name]) if group in grouped else statistics[name]
    ends = measured_shapes(original, [value.name for value in original.graph.output], first)
    size = 4 * sum(int(np.prod(shape, dtype=np.int64)) for shape in ends.values()) + sum(a.nbytes for a in first.values())
    count = min(_affordable(STUDIED, 2 * len(placement.names) * sum(macs.values())), max(2, STUDIED_BYTES // max(size, 1)))
    studied = pool.calibration.spread(count)
    study = Study(prepared, placement, list(with_reference(original, studied.batches(batch))))
    return Bench(original, prepared, placement, macs, pool, batch, statistics, grouped, study, first)


def _affordable(limits: tuple[int, int], cost: int) -> int:
    """How many samples at ``cost`` multiply-accumulates each fit `WORK`, within the limits. No clock: the same everywhere."""
    return int(np.clip(WORK // max(cost, 1), *limits))


def _recover(bench: Bench, method: str, extra: bool) -> Recovered:
    """A stated method as the books have it; ``auto``: the recovery with the best output, each step only where it helps."""
    rounded = bench.rounded("mse" if method == "auto" else method)
    if method != "auto":
        return Recovered(rounded, "none", {})
    names = bench.placement.names
    held = bench.pool.held_out.spread(_affordable(JUDGED, 6 * sum(bench.macs.values())))

    def measured(parameters: Parameters) -> float:
        judges = held.batches(bench.batch) if len(held) else iter([bench.first])
        model = insert(bench.prepared, bench.placement, parameters, names)
        return signal_to_noise(model, with_reference(bench.original, judges))

    best, tried = Recovered(rounded, "none", {}), {"none": measured(rounded)}
    for recovery in ("fitted", "shifted") if extra else ("fitted",):
        parameters = bench.fitted(rounded, names, recovery)
        tried[recovery] = measured(parameters)
        say(f"{recovery}: {tried[recovery]:.1f} dB ({', '.join(f'{k} {v:.1f}' for k, v in tried.items() if k != recovery)})")
        if tried[recovery] > tried[best.recovery] + (WORTH_DB if recovery == "shifted" else 0.0):
            best = Recovered(parameters, recovery, {})
    return best._replace(tried={name: round(value, 2) for name, value in tried.items()})


def _within(bench: Bench, budget: Budget, recovered: Recovered, rows: list[Sensitivity]) -> tuple[Candidate, str]:
    """The candidate that the budget asks for, and how it is missed, or ""."""
    order, parameters = most_harmful_first(rows, bench.macs), recovered.parameters
    total = sum(bench.macs.values())
    labelled = budget.max_drop is not None

    def settled(names: list[str]) -> Candidate:
        """Fitted anew for just these layers, where that is better."""
        found = bench.candidate(names, parameters, labelled)
        if recovered.recovery == "none" or len(names) == len(order):
            return found
        again = bench.candidate(names, bench.fitted(bench.rounded("mse"), names, recovered.recovery), labelled)
        return again if again.snr_db > found.snr_db else found

    if budget.share is not None:
        names = by_share(order, bench.macs, total, budget.share) or order[-1:]
        reached = sum(bench.macs[name] for name in names) / max(total, 1)
        found = settled(names)
        if reached < budget.share - 1e-9:
            reasons = "; ".join(f"{node.name}: {node.reason}" for node in bench.placement.unquantized[:3])
            return found, f"a share of {reached:.3f} can be quantized, {budget.share:g} was asked ({reasons})"
        return found, ""
    if budget.max_drop is None and budget.min_snr is None:
        return bench.candidate(order, parameters, False), ""

    def attempt(names: list[str]) -> Candidate:
        found = bench.candidate(names, parameters, labelled)
        drop = "" if found.drop is None else f", drop {found.drop:.2f} points"
        say(f"{len(order) - len(names)} of {len(order)} layers float: {found.snr_db:.1f} dB{drop}")
        return found

    def met(found: Candidate) -> bool:
        return found.snr_db >= budget.min_snr if budget.min_snr is not None else (found.drop or 0.0) <= (budget.max_drop or 0.0)

    found, kept = fewest_float(order, attempt, met, lambda c: -(c.drop or 0.0) if labelled else c.snr_db)
    better = settled(found.names)
    if met(better) or not kept:
        found, kept = better, met(better)
    if kept:
        return found, ""
    if budget.min_snr is not None:
        return found, f"the best SNR is {found.snr_db:.1f} dB, {budget.min_snr:g} was asked"
    return found, f"the least drop is {found.drop:.2f} points, {budget.max_drop:g} were allowed"


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


def _layer_records(bench: Bench, found: Candidate, rounded: Parameters, rows: Sequence[Sensitivity]) -> tuple[LayerRecord, ...]:
    layers = {layer.name: layer for layer in bench.placement.layers}
    ops = {product.name: product.op for product in bench.placement.products} | {k: v.op for k, v in layers.items()}
    worst = sorted((row for row in rows if row.layer in layers), key=lambda row: -row.gain_db)[:EXPLAINED]
    why = {
        row.layer: bench.study.why(layers[row.layer], rounded, bench.statistics)
        + (
            ""
            if found.parameters.quantizer(bench.placement, layers[row.layer].data).plain
            else "; shifted or scaled by channel"
        )
        for row in worst
    }
    measured, parameters = {row.layer: row for row in rows}, found.parameters
    nearest = dict(record.nearest_integers(bench.prepared, bench.placement, parameters, parameters.integers))
    result = []
    for name in bench.placement.names:
        int8, bias = name in found.names, parameters.biases.get(name)
        row = measured[name]
        result.append(
            LayerRecord(
                name,
                ops[name],
                int8,
                bench.macs[name],
                None if row.alone_db is None else round(row.alone_db, 2),
                round(row.gain_db, 2),
                record.exact_all(parameters.weights[name]) if int8 and name in layers else (),
                record.exact_all(bias) if int8 and bias is not None else None,
                record.packed(parameters.integers[name], nearest[name]) if int8 and name in nearest else None,
                "; ".join(text for text in (why.get(name, ""), "" if int8 else "left float by the budget") if text),
            )
        )
    result += [
        LayerRecord(node.name, node.op, False, bench.macs[node.name], why=node.reason) for node in bench.placement.unquantized
    ]
    return tuple(result)


def _figures(
    bench: Bench, found: Candidate, method: str, recovered: Recovered, size: int, worst: dict[str, Any] | None
) -> dict[str, Any]:
    total = sum(bench.macs.values())
    every = len(bench.placement.names) + len(bench.placement.unquantized)
    extras = sum(not quantizer.plain for quantizer in found.parameters.quantizers.values())
    figures = {
        "snr_db": round(found.snr_db, 2),
        "measured_on": f"{len(bench.pool.held_out)} held-out samples"
        if len(bench.pool.held_out)
        else "the first calibration sample",
        "share": round(sum(bench.macs[name] for name in found.names) / max(total, 1), 6),
        "size_bytes": size,
        "method": method,
        "recovery": recovered.recovery,
        "recoveries_db": recovered.tried,
        "shifted_inputs": extras,
        "layers": {"int8": len(found.names), "float": every - len(found.names)},
        "culprit": worst,
    }
    if found.drop is not None:
        figures["drop"] = round(found.drop, 3)  # points of top-1, on labelled train samples
    return figures

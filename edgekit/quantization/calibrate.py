"""From samples to an int8 graph: observe, fit, find what stays float, fit again, measure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import UsageError
from edgekit.progress import say
from edgekit.version import __version__

from . import record
from .bench import Bench, Candidate, make_bench
from .budget import Budget, by_share, fewest_float, returned_to_int8, tightened
from .graph import Parameters
from .journal import Journal
from .memory import returned
from .placement import RECURRENT
from .record import Calibration, Drawn, LayerRecord, QuantizerRecord
from .recovery import Recovered, recover
from .samples import Pool, digests
from .sensitivity import Sensitivity, most_harmful_first, noise_power
from .store import left_float, store

__all__ = ["Options", "Result", "calibrate", "culprit", "open_journal"]

_VERSIONS = {
    "edgekit": __version__,
    "numpy": np.__version__,
    "onnx": onnx.__version__,
    "onnxruntime": onnxruntime.__version__,
}
UNHEARD_DB = 150.0  # no measured output hears the layer
EXPLAINED = 3  # layers whose loss is put into words


class Options(NamedTuple):
    """``shift`` allows Sub, Mul and Pad in front of Q; ``keep_float``: names, patterns or operators of layers."""

    method: str = "auto"
    shift: bool = True
    keep_float: tuple[str, ...] = ()


class Result(NamedTuple):
    """Bytes of ``model.int8.onnx`` and ``calibration.json``; figures; how the budget was missed, or "", and a cure."""

    graph: bytes
    calibration: bytes
    figures: dict[str, Any]
    missed: str
    hint: str = "relax the budget, or give more and better calibration samples"


def calibrate(
    bundle: Bundle,
    pool: Pool,
    budget: Budget,
    options: Options,
    seed: int,
    journal: Journal | None = None,
) -> Result:
    """``journal``: knows what was done before, of `open_journal`.

    Raises `GraphError` where nothing can be quantized, `UsageError` where ``max_drop`` has no labels to go by."""
    if budget.max_drop is not None and (pool.labelled.targets is None or not len(pool.labelled)):
        raise UsageError("--max-drop needs labelled samples, and these have none", "add --data SPEC, or state --min-snr")
    with returned():
        return _calibrate(bundle, pool, budget, options, seed, journal or Journal(None, ""))


def open_journal(path: Path, bundle: Bundle, pool: Pool, options: Options) -> Journal:
    """What was done of this calibration before, and will be: in a file which the caller discards when the work is done."""
    graph = hashlib.sha256(bundle.file(FLOAT_GRAPH).read_bytes()).hexdigest()
    about = [graph, *map(str, options), *_VERSIONS.values(), *digests(pool.calibration), "", *digests(pool.held_out)]
    return Journal(path, hashlib.sha256("\0".join(about).encode()).hexdigest())


def _calibrate(bundle: Bundle, pool: Pool, budget: Budget, options: Options, seed: int, journal: Journal) -> Result:
    method = options.method
    graph = bundle.file(FLOAT_GRAPH).read_bytes()
    drawn = digests(pool.calibration)
    bench = make_bench(graph, pool, journal, options.keep_float)
    recovered = recover(bench, method, options.shift)
    stated = budget.max_drop is not None or budget.min_snr is not None or budget.share is not None
    rows = bench.study.sensitivities(recovered.parameters, alone=stated or method == "auto", recall=bench.journal.recall)
    found, missed = _within(bench, budget, recovered, rows)
    found, stored = store(bench, found, lambda smaller: bool(missed) or _met(budget, smaller))
    data: bytes = found.model.SerializeToString(deterministic=True)
    parameters = found.parameters
    calibration = Calibration(
        format=2,
        graph=hashlib.sha256(graph).hexdigest(),
        int8_graph=hashlib.sha256(data).hexdigest(),
        method=method,
        recovery=recovered.recovery,
        samples=Drawn(pool.source, pool.data_digest, pool.split, seed, pool.calibration.ids, drawn),
        preprocessing=bundle.manifest.preprocessing,
        versions=_VERSIONS,
        tensors={name: record.tensor_record(seen, parameters.scales[name]) for name, seen in bench.grouped.items()},
        groups=bench.placement.groups,
        quantizers={
            site: QuantizerRecord(
                record.exact(quantizer.scale), *(None if v is None else record.exact_all(v) for v in quantizer[1:])
            )
            for site, quantizer in parameters.quantizers.items()
        },
        layers=_layer_records(bench, found, recovered.rounded, rows),
        stored=stored,
    )
    figures = _figures(bench, found, method, recovered, len(data), culprit(calibration))
    figures |= {"stored_weights": len(stored), "float_weights_bytes": left_float(found.model.graph)}
    return Result(data, record.encode(calibration), figures, missed)


def culprit(calibration: Calibration) -> dict[str, Any] | None:
    """The int8 layer that costs the output most, where each was measured alone."""
    measured = [layer for layer in calibration.layers if layer.int8 and layer.alone_db is not None]
    if not measured:
        return None
    worst = min(measured, key=lambda layer: layer.alone_db or 0.0)
    return {
        "layer": worst.name,
        "op": worst.op,
        "alone_db": worst.alone_db,
        "layer_db": worst.layer_db,
        "drop": worst.drop,
        "why": worst.why,
    }


def _within(bench: Bench, budget: Budget, recovered: Recovered, rows: list[Sensitivity]) -> tuple[Candidate, str]:
    """The candidate that the budget asks for, and how it is missed, or ""."""
    order, parameters = most_harmful_first(rows, bench.macs), recovered.parameters
    labelled = budget.max_drop is not None

    def better(found: Candidate) -> float:
        return found.snr_db if found.drop is None else -found.drop

    def settled(names: list[str]) -> Candidate:
        """Fitted anew for just these layers, where that is better."""
        found = bench.candidate(names, parameters, labelled)
        if recovered.recovery == "none" or len(names) == len(order):
            return found
        again = bench.candidate(names, bench.fitted(recovered.rounded, names, recovered.recovery), labelled)
        return max(found, again, key=better)

    if budget.share is not None:
        names, missed = _of_share(bench, budget.share, noise_power(rows))
        return settled(names or order[-1:]), missed
    if budget.max_drop is None and budget.min_snr is None:
        return bench.candidate(order, parameters, False), ""

    def said(found: Candidate) -> Candidate:
        drop = "" if found.drop is None else f", drop {found.drop:.2f} points"
        say(f"{len(order) - len(found.names)} of {len(order)} layers float: {found.snr_db:.1f} dB{drop}")
        return found

    def met(found: Candidate) -> bool:
        return _met(budget, found)

    def int8_macs(found: Candidate) -> int:
        return sum(bench.macs[name] for name in found.names)

    def attempt(names: list[str]) -> Candidate:
        return said(bench.candidate(names, parameters, labelled))

    found, kept = fewest_float(order, attempt, met, better)
    if not kept:  # what makes least noise for its size may be large, and too much alone
        quietest = sorted(order, key=noise_power(rows).__getitem__, reverse=True)
        other, kept = fewest_float(quietest, attempt, met, better)
        if kept or better(other) > better(found):
            order, found = quietest, other
    if kept:
        found = returned_to_int8(order, found, bench.macs, attempt, met)
    again = settled(found.names)
    if met(again) or not kept:
        found, kept = again, met(again)
    if kept and recovered.recovery != "none":  # fitted anew, fewer may do
        least = int8_macs(found)
        found = tightened(order, found, lambda names: said(settled(names)), lambda it: met(it) and int8_macs(it) >= least)
    if kept:
        return found, ""
    if budget.min_snr is not None:
        return found, f"the best SNR is {found.snr_db:.1f} dB, {budget.min_snr:g} was asked"
    return found, f"the least drop is {found.drop:.2f} points, {budget.max_drop:g} were allowed"


def _of_share(bench: Bench, share: float, noise: dict[str, float]) -> tuple[list[str], str]:
    """The layers to quantize, and why they are fewer than asked, or ""."""
    total, stays = sum(bench.macs.values()), bench.placement.unquantized
    room = (1.0 - share + 1e-9) * total - sum(bench.macs[node.name] for node in stays)  # 0.9 of 10 leaves room for 1
    names = by_share(noise, bench.macs, room)
    reached = sum(bench.macs[name] for name in names) / max(total, 1)
    if names and reached < share - 1e-9:
        reasons = "; ".join(f"{node.name}: {node.reason}" for node in stays[:3])
        return names, f"a share of {reached:.3f} can be quantized, {share:g} was asked ({reasons})"
    return names, ""


def _met(budget: Budget, found: Candidate) -> bool:
    if budget.min_snr is not None:
        return found.snr_db >= budget.min_snr
    return budget.max_drop is None or (found.drop or 0.0) <= budget.max_drop


def _layer_records(bench: Bench, found: Candidate, rounded: Parameters, rows: Sequence[Sensitivity]) -> tuple[LayerRecord, ...]:
    layers = {layer.name: layer for layer in bench.placement.layers}
    ops = bench.placement.ops
    measured_alone = [row for row in rows if row.layer in layers and row.alone_db is not None and row.alone_db < UNHEARD_DB]
    worst = sorted(measured_alone, key=lambda row: row.alone_db or 0.0)[:EXPLAINED]
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
                round(row.layer_db, 2),
                None if row.drop is None else round(row.drop, 3),
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
        "ranges": {**recovered.ranges._asdict()},
        "recovery": recovered.recovery,
        "recoveries_db": recovered.tried,
        "shifted_inputs": extras,
        "layers": {"int8": len(found.names), "float": every - len(found.names)},
        "recurrent": sum(node.op in RECURRENT for node in bench.placement.unquantized),
        "culprit": worst,
    }
    if found.drop is not None:
        figures["drop"] = round(found.drop, 3)  # points of top-1, on labelled train samples
    return figures

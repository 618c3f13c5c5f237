"""The verb: bundle -> bundle with an int8 graph and the calibration that made it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import onnx

from edgekit.bundle import CALIBRATION, FLOAT_GRAPH, GOLDEN, INT8_GRAPH, TOKENIZER, WEIGHTS, Bundle, new_path
from edgekit.errors import BudgetNotMet, GraphError, UsageError
from edgekit.evaluation import evaluate
from edgekit.manifest import Tolerance
from edgekit.progress import say
from edgekit.runtime import check_golden, compare_arrays
from edgekit.runtime.golden import load_golden
from edgekit.runtime.onnxruntime import session

from . import record
from .budget import Budget
from .calibrate import Result, calibrate
from .frozen import rebuild_result
from .graph import check
from .samples import from_dataset, gather
from .statistics import METHODS

__all__ = ["layer_table", "quantize"]

#: Another backend rounds ties and adds in another order. Its distance from this int8 graph is at most of the size of the
#: int8 error itself, which doubles the noise power: 3 dB. A wrong scale or layout costs far more.
GOLDEN_MARGIN_DB = 3.0
GOLDEN_LIMIT_DB = 60.0
#: The error has a third of the outputs' amplitude: no int8 graph worth having, unless the caller states what is enough.
POOR_DB = 10.0


def quantize(
    bundle: Bundle | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    calib: str | os.PathLike[str] | None = None,
    max_drop: float | None = None,
    min_snr: float | None = None,
    share: float | None = None,
    method: str = "auto",
    samples: int = 256,
    data: str | None = None,
    seed: int = 0,
) -> Bundle:
    """Post-training static int8: explicit Q/DQ, signed, symmetric, a scale per tensor and per weight channel.

    ``calib``: a data spec (its train split is sampled, balanced by class, with ``seed``), a folder of ``.npz`` with one
    array an input name, a ``calibration.json`` with frozen ranges (no data is needed, and the same float graph gives the
    same bytes), or None for the data that the bundle was trained on. ``samples`` give the ranges; others the figures.
    ``max_drop`` (points of top-1, on labelled train samples; ``data`` names them where ``calib`` does not), ``min_snr``
    (dB at the output) or ``share`` (of the multiply-accumulates, 0..1) say how much may stay float; none: nothing does.
    ``method``: auto, mse, entropy, percentile or minmax.

    Returns the new bundle; its last history entry has the figures. Raises `BudgetNotMet` with the best found written: also
    where ``max_drop`` is exceeded on the test split, and, with neither ``max_drop`` nor ``min_snr`` stated, below 10 dB.
    `GraphError` where the graph cannot be quantized, `DataError` for samples that do not fit, `UsageError`, `OutputExists`.
    """
    budget = Budget(max_drop, min_snr, share).checked()
    if method not in ("auto", *METHODS):
        raise UsageError(f"there is no method {method!r}", f"choose one of: auto, {', '.join(METHODS)}")
    if samples < 1:
        raise UsageError(f"--samples {samples} is no number of samples", "give 1 or more; 256 is usual")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    new_path(out)
    config = {"calib": None if calib is None else os.fspath(calib), "method": method, "samples": samples, "seed": seed}
    config |= {name: value for name, value in budget._asdict().items() if value is not None}
    if calib is not None and Path(calib).suffix == ".json":
        if method != "auto" or any(value is not None for value in budget):
            raise UsageError(
                "a calibration.json already says which layers are int8, and how", "leave out --method and the budget"
            )
        result = rebuild_result(opened, Path(calib))
        labelled, judged = data, None
    else:
        wanted = max_drop is not None
        pool = gather(opened, calib, samples, seed, labelled=wanted)
        if data is not None:
            other = from_dataset(opened, data, samples if wanted else 1, seed, labelled=wanted)
            pool = pool._replace(labelled=other.labelled)
            config["labelled_digest"] = other.data_digest
        config["data_digest"] = pool.data_digest  # evaluation then stays off both train splits
        result = calibrate(opened, pool, budget, method, seed)
        judged = budget
        known = pool.labelled.targets is not None and len(pool.labelled) > 0
        labelled = (data or pool.source) if known else None
    return _finish(opened, out, config, result, labelled, judged)


def layer_table(bundle: Bundle) -> list[dict[str, Any]]:
    """The layers of a quantized bundle, the most sensitive first: layer, op, type, share of MACs, dB, why."""
    calibration = record.decode(bundle.file(CALIBRATION))
    total = max(sum(layer.macs for layer in calibration.layers), 1)
    rows = [
        {
            "layer": layer.name,
            "op": layer.op,
            "type": "int8" if layer.int8 else "float",
            "macs": round(layer.macs / total, 4),
            "alone_db": layer.alone_db,
            "gain_db": layer.gain_db,
            "why": layer.why,
        }
        for layer in calibration.layers
    ]
    return sorted(rows, key=lambda row: (row["alone_db"] is None, row["alone_db"] or 0.0))


def _finish(
    parent: Bundle,
    out: str | os.PathLike[str],
    config: dict[str, Any],
    result: Result,
    labelled: str | None,
    budget: Budget | None,
) -> Bundle:
    """Check the graph, measure it as the device would, write the bundle; raise where ``budget`` is not met (None: no gate)."""
    check(onnx.load_model_from_string(result.graph))
    golden_db = _golden_db(parent, result.graph)
    limit = round(min(golden_db - GOLDEN_MARGIN_DB, GOLDEN_LIMIT_DB), 1)
    tolerance = Tolerance("snr_db", limit)
    figures = {**result.figures, "golden_snr_db": round(golden_db, 2), "golden_limit_db": limit}
    if labelled and parent.manifest.labels:
        with tempfile.TemporaryDirectory() as folder:
            trial = _write(parent, Path(folder) / "trial.edge", config, result, figures, tolerance)
            # Both graphs of the one bundle, so that its history chooses the same samples for both.
            figures["top1"] = evaluate(trial, labelled)["top1"]
            figures["top1_float"] = evaluate(trial, labelled, precision="float")["top1"]
    written = _write(parent, out, config, result, figures, tolerance)
    check_golden(written, INT8_GRAPH)
    missed, hint = _missed(result, figures, budget)
    if missed:
        raise BudgetNotMet(
            missed,
            hint,
            {"bundle": str(written.path), **figures},
        )
    return written


def _missed(result: Result, figures: dict[str, Any], budget: Budget | None) -> tuple[str, str]:
    """(what is missed, hint), or two empty texts. The test split only judges: it chose nothing.

    Frozen ranges (``budget`` None) give a graph that was judged when they were made, perhaps by a budget that they do not
    record: a poor one is said, not refused.
    """
    if result.missed:
        return result.missed, "the best found is written; relax the budget, or give more and better calibration samples"
    if budget is not None and budget.max_drop is not None:
        lost = 100 * (figures["top1_float"] - figures["top1"])
        if lost > budget.max_drop + 1e-9:
            return (
                f"top-1 drops by {lost:.2f} points on the test split, {budget.max_drop:g} were allowed",
                "the best found is written; state a smaller --max-drop to leave more layers float, or retrain",
            )
        return "", ""
    worst = min(figures["snr_db"], figures["golden_snr_db"])
    if worst >= POOR_DB or (budget is not None and budget.min_snr is not None):
        return "", ""
    poor = f"the int8 outputs are only {worst:.1f} dB from the float ones, {POOR_DB:g} is the least that is usable"
    if budget is None:
        say(poor)
        return "", ""
    return poor, "the best found is written; leave layers float: --min-snr DB (a smaller DB accepts it as it is)"


def _golden_db(bundle: Bundle, graph: bytes) -> float:
    """Lowest output SNR of the int8 graph on the golden inputs, through the runtime's backend."""
    inputs, outputs = load_golden(bundle)
    run = session(graph)
    found = dict(zip([value.name for value in run.get_outputs()], run.run(None, inputs), strict=True))
    worst = min((compare_arrays(golden, found[name]).snr_db for name, golden in outputs.items()), default=200.0)
    if worst == float("-inf"):
        raise GraphError("the int8 graph gives NaN, Inf or other shapes on the golden inputs", "check the model's outputs")
    return worst


def _write(
    parent: Bundle,
    out: str | os.PathLike[str],
    config: dict[str, Any],
    result: Result,
    figures: dict[str, Any],
    tolerance: Tolerance,
) -> Bundle:
    with Bundle.create(out) as draft:
        for name in (FLOAT_GRAPH, WEIGHTS, GOLDEN, TOKENIZER):
            if parent.has(name):
                draft.write(name, parent.read(name))
        draft.write(INT8_GRAPH, result.graph)
        draft.write(CALIBRATION, result.calibration)
        entry = parent.entry("quantize", config, figures)
        draft.manifest = msgspec.structs.replace(
            parent.manifest,
            name=Path(out).name.removesuffix(".edge"),
            golden={**parent.manifest.golden, INT8_GRAPH: tolerance},
            history=(*parent.manifest.history, entry),
        )
    return Bundle.open(out)

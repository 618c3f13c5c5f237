"""The verb: bundle -> bundle with a quantized graph and the calibration that made it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import onnx

from edgekit.bundle import CALIBRATION, FLOAT_GRAPH, GOLDEN, INT8_GRAPH, TOKENIZER, WEIGHTS, Bundle, new_path
from edgekit.errors import BudgetNotMet, GraphError, UsageError
from edgekit.evaluation import evaluate
from edgekit.manifest import Tolerance
from edgekit.progress import say
from edgekit.runtime import check_golden
from edgekit.runtime.golden import compare_outputs, is_choice, load_golden, parse_golden, save_golden
from edgekit.runtime.graph_file import read_graph
from edgekit.runtime.onnxruntime import session

from . import record
from .budget import Budget
from .calibrate import Options, Result, calibrate, open_journal
from .formats import FORMATS, other_format
from .frozen import RANDOM, rebuild_result
from .graph import check
from .journal import discard
from .placement import kept_float, place
from .prepare import prepare
from .samples import Pool, Samples, from_dataset, gather
from .simulate import signal_to_noise, with_reference
from .speed import BACKENDS, MARGIN, faster, latencies
from .statistics import METHODS

__all__ = ["layer_table", "quantize"]

#: Another backend rounds ties and adds in another order. Its distance from this int8 graph is at most of the size of the
#: int8 error itself, which doubles the noise power: 3 dB. A wrong scale or layout costs far more.
GOLDEN_MARGIN_DB = 3.0
GOLDEN_LIMIT_DB = 60.0
GOLDEN_SAMPLES, GOLDEN_BYTES = 4, 16 << 20
#: The error has a third of the outputs' amplitude: no int8 graph worth having, unless the caller states what is enough.
POOR_DB = 10.0
QAT_SAMPLES = 1500
#: Shares of the multiply-accumulates that are tried, one after the other, until int8 is faster than float.
LADDER = (1.0, 0.75, 0.5, 0.25)


#: What is not recorded, for it changes nothing.
_USUAL = {"shift": True, "format": "int8", "qat": False, "faster_on": None, "keep_float": list[str]()}


class _Made(NamedTuple):
    """A result, the labelled data that it is judged on, the budget (None: judged when it was frozen), new golden arrays."""

    result: Result
    labelled: str | None
    budget: Budget | None
    golden: bytes | None


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
    shift: bool = True,
    format: str = "int8",  # noqa: A002  the name that the command line has
    qat: bool = False,
    qat_epochs: int = 5,
    faster_on: str | None = None,
    keep_float: str | Sequence[str] = (),
) -> Bundle:
    """Static int8: explicit Q/DQ, signed, symmetric, a scale per tensor and per weight channel.

    ``calib``: a data spec (its train split is sampled, balanced by class, with ``seed``), a folder of ``.npz`` with one
    array an input name, a ``calibration.json`` with frozen ranges (no data is needed, and the same float graph gives the
    same bytes), or None for the data that the bundle was trained on. ``samples`` give the ranges; others the figures.
    ``max_drop`` (points of top-1, on labelled train samples; ``data`` names them where ``calib`` does not), ``min_snr``
    (dB at the output) or ``share`` (of the multiply-accumulates, 0..1) say how much may stay float; none: nothing does.

    ``method``: ``auto`` fits ranges and weights layer by layer and keeps what helps on held-out samples; mse, entropy,
    percentile and minmax are those methods as the books have them, and fit nothing. ``shift`` allows ``auto`` Sub, Mul and
    Pad in front of Q where they help. ``qat`` then trains the int8 graph for ``qat_epochs``. ``format``: int8, fp8,
    weights8 or weights4. ``faster_on`` (a backend) leaves layers float until the graph is 3% faster there than the float
    one. ``keep_float``: layers that stay float, by name, pattern (``*``, ``?``) or operator.

    What was done is kept in ``OUT.checkpoint`` until the bundle is written: an interrupted run goes on from there.

    Returns the new bundle; its last history entry has the figures. Raises `BudgetNotMet` with the best found written: also
    where ``max_drop`` is exceeded on the test split, and, with neither ``max_drop`` nor ``min_snr`` stated, below 10 dB.
    `GraphError` where the graph cannot be quantized, `DataError` for samples that do not fit, `UsageError`, `OutputExists`.
    """
    budget = Budget(max_drop, min_snr, share).checked()
    _check(method, samples, format, qat, qat_epochs, faster_on, budget, keep_float)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    new_path(out)
    config: dict[str, Any] = {"calib": _spelled(calib), "method": method, "samples": samples, "seed": seed}
    kept = [keep_float] if isinstance(keep_float, str) else [*keep_float]
    options = {"shift": shift, "format": format, "qat": qat, "faster_on": faster_on, "keep_float": kept}
    stated = {name: value for name, value in budget._asdict().items() if value is not None}
    stated |= {name: value for name, value in options.items() if value != _USUAL[name]}
    config |= stated
    if calib is not None and Path(calib).suffix == ".json":
        if method != "auto" or stated:
            raise UsageError(
                "a calibration.json already says which layers are int8, and how", "leave out --method, the budget and the rest"
            )
        result, golden = rebuild_result(opened, Path(calib))
        return _finish(opened, out, config, _Made(result, data, None, golden))
    return _calibrated(opened, out, config, budget, data, qat_epochs)


def _calibrated(
    bundle: Bundle, out: str | os.PathLike[str], config: dict[str, Any], budget: Budget, data: str | None, qat_epochs: int
) -> Bundle:
    """From samples: calibrate, train where asked, judge, write. The checkpoint goes once the bundle is there."""
    if "qat" in config:
        from .qat import check_trainable  # torch

        check_trainable(bundle.file(FLOAT_GRAPH).read_bytes())
    if "keep_float" in config:
        kept_float(place(prepare(bundle.file(FLOAT_GRAPH).read_bytes(), quiet=True)), config["keep_float"])
    pool, training = _drawn(bundle, config["calib"], data, config, labelled=budget.max_drop is not None or "qat" in config)
    checkpoint = Path(out).with_name(f"{Path(out).name}.checkpoint")
    result = _result(bundle, pool, budget, config, checkpoint)
    if "qat" in config:
        result = _trained(bundle, result, training, pool, qat_epochs, config["seed"])
    known = pool.labelled.targets is not None and len(pool.labelled) > 0
    golden = _golden(bundle, pool) if bundle.manifest.task == "tensor" else None
    made = _Made(result, (data or pool.source) if known else None, budget, golden)
    try:
        return _finish(bundle, out, config, made)
    finally:
        if os.path.lexists(out):  # with the best found, too, where a budget is missed
            discard(checkpoint)


def _spelled(calib: object) -> str | None:
    """``calib`` as text. Raises `UsageError` for what is neither text nor a path."""
    if calib is None or isinstance(calib, str):
        return calib
    if not isinstance(calib, os.PathLike):
        raise UsageError(
            f"calib is of type {type(calib).__name__}",
            "give a data spec, a folder of .npz or a calibration.json: text or a path",
        )
    return str(os.fspath(calib))


def _drawn(
    bundle: Bundle, calib: str | os.PathLike[str] | None, data: str | None, config: dict[str, Any], *, labelled: bool
) -> tuple[Pool, Samples]:
    """The samples, and those that ``qat`` trains on; what they are is added to ``config``."""
    samples, seed = config["samples"], config["seed"]
    pool = gather(bundle, calib, max(samples, QAT_SAMPLES) if "qat" in config else samples, seed, labelled=labelled)
    training = pool.calibration
    pool = pool._replace(calibration=training.take(range(min(samples, len(training)))))
    if data is not None:
        other = from_dataset(bundle, data, samples if labelled else 1, seed, labelled=labelled)
        pool = pool._replace(labelled=other.labelled)
        config["labelled_digest"] = other.data_digest
    config["data_digest"] = pool.data_digest  # evaluation then stays off both train splits
    return pool, training


def _check(
    method: str,
    samples: int,
    form: str,
    qat: bool,
    epochs: int,
    faster_on: str | None,
    budget: Budget,
    keep: str | Sequence[str],
) -> None:
    if method not in ("auto", *METHODS):
        raise UsageError(f"there is no method {method!r}", f"choose one of: auto, {', '.join(METHODS)}")
    if samples < 1:
        raise UsageError(f"--samples {samples} is no number of samples", "give 1 or more; 256 is usual")
    if form not in FORMATS:
        raise UsageError(f"there is no format {form!r}", f"choose one of: {', '.join(FORMATS)}")
    if form != "int8" and (qat or faster_on or keep or method != "auto" or any(value is not None for value in budget)):
        raise UsageError(f"--format {form} takes no method, budget, --qat and such", "leave all that out, or use int8")
    if epochs < 1:
        raise UsageError(f"--qat-epochs {epochs} is no number of epochs", "give 1 or more")
    if faster_on is not None and faster_on not in BACKENDS:
        raise UsageError(f"there is no backend {faster_on!r} to measure on here", f"choose one of: {', '.join(BACKENDS)}")
    if faster_on is not None and (qat or any(value is not None for value in budget)):
        raise UsageError("--faster-on is a budget of its own", "leave out --qat, --max-drop, --min-snr and --share")


def layer_table(bundle: Bundle) -> list[dict[str, Any]]:
    """The layers of a quantized bundle, the most costly first: layer, op, type, share of MACs, dB, points, why.

    Empty for a form that has no calibration.
    """
    if not bundle.has(CALIBRATION):
        return []
    calibration = record.decode(bundle.file(CALIBRATION))
    total = max(sum(layer.macs for layer in calibration.layers), 1)
    rows = [
        {
            "layer": layer.name,
            "op": layer.op,
            "type": "int8" if layer.int8 else "float",
            "macs": round(layer.macs / total, 4),
            "alone_db": layer.alone_db,
            "layer_db": layer.layer_db,
            "drop": layer.drop,
            "why": layer.why,
        }
        for layer in calibration.layers
    ]
    key = "alone_db" if any(row["alone_db"] is not None for row in rows) else "layer_db"
    return sorted(rows, key=lambda row: (row[key] is None, row[key] or 0.0))


def _result(bundle: Bundle, pool: Pool, budget: Budget, config: dict[str, Any], checkpoint: Path) -> Result:
    """int8 by the budget, or by the ladder that ``faster_on`` walks; or another form."""
    if (form := config.get("format", "int8")) != "int8":
        return other_format(bundle, pool, form)

    options = Options(config["method"], config.get("shift", True), tuple(config.get("keep_float", ())))
    journal = open_journal(checkpoint, bundle, pool, options)

    def made(budget: Budget) -> Result:
        return calibrate(bundle, pool, budget, options, config["seed"], journal)

    if "faster_on" not in config:
        return _timed(bundle, made(budget), pool)
    best: Result | None = None
    last = b""
    for step in LADDER:
        found = made(Budget(share=step))
        if found.graph == last:  # of few layers: no other share is nearer
            continue
        found, last = _timed(bundle, found, pool), found.graph
        times = found.figures["latency_ms"]
        say(f"{found.figures['share']:.0%} int8: {times['int8']:.3f} ms, float {times['float']:.3f} ms")
        if best is None or times["int8"] < best.figures["latency_ms"]["int8"]:
            best = found
        if faster(times["int8"], times["float"]):
            return found
    assert best is not None
    times = best.figures["latency_ms"]
    return best._replace(
        missed=f"int8 takes {times['int8']:.3f} ms on {config['faster_on']}, float {times['float']:.3f} ms: less than "
        f"{MARGIN:.0%} faster, and so are graphs of which parts stay float",
        hint="run the float graph on this machine, or measure on the device itself: edgekit bench",
    )


def _timed(bundle: Bundle, result: Result, pool: Pool) -> Result:
    """With the latency of both graphs on ONNX Runtime; slower int8 is said."""
    feeds = pool.calibration.read(0)
    times = latencies([read_graph(bundle, FLOAT_GRAPH), result.graph], feeds)
    latency = {"backend": "onnxruntime", "float": times[0], "int8": times[1]}
    if times[1] > times[0]:
        say(
            f"on this CPU int8 takes {times[1]:.3f} ms and float {times[0]:.3f} ms: int8 here shows accuracy, not speed; "
            "--faster-on onnxruntime leaves layers float until it is faster"
        )
    return result._replace(figures={**result.figures, "latency_ms": latency})


def _trained(bundle: Bundle, result: Result, training: Samples, pool: Pool, epochs: int, seed: int) -> Result:
    """The int8 graph after quantization-aware training, with its own figures; its calibration no longer rebuilds it."""
    from .qat import fine_tune  # torch

    graph = bundle.file(FLOAT_GRAPH).read_bytes()
    judges = pool.labelled if len(pool.labelled) else pool.held_out if len(pool.held_out) else pool.calibration
    made = fine_tune(result.graph, graph, training, judges, epochs=epochs, seed=seed)
    held = pool.held_out if len(pool.held_out) else pool.calibration
    snr = signal_to_noise(
        onnx.load_model_from_string(made.graph), with_reference(onnx.load_model_from_string(graph), held.batches(8))
    )
    figures = {**result.figures, "snr_db": round(snr, 2), "size_bytes": len(made.graph), "qat": made.figures}
    if made.graph == result.graph:
        return result._replace(figures=figures)
    calibration = record.trained(result.calibration, made.graph)
    return result._replace(graph=made.graph, calibration=calibration, figures=figures)


def _golden(bundle: Bundle, pool: Pool) -> bytes:
    """Golden arrays from real samples: an imported bundle's own are random, and far outside of what is calibrated."""
    source = pool.held_out if len(pool.held_out) else pool.calibration
    first = source.read(0)
    size = max(sum(array.nbytes for array in first.values()), 1)
    count = min(GOLDEN_SAMPLES, max(1, GOLDEN_BYTES // size))
    feeds = next(iter(source.take(range(min(count, len(source)))).batches(count)))
    run = session(read_graph(bundle, FLOAT_GRAPH))
    names = [value.name for value in run.get_outputs()]
    return save_golden(dict(feeds), dict(zip(names, run.run(names, dict(feeds)), strict=True)))


def _finish(parent: Bundle, out: str | os.PathLike[str], config: dict[str, Any], made: _Made) -> Bundle:
    """Check the graph, measure it as the device would, write the bundle; raise where the budget is not met."""
    result, labelled = made.result, made.labelled
    check(onnx.load_model_from_string(result.graph), onnx.load(parent.file(FLOAT_GRAPH)))
    golden_db, limit = _golden_db(parent, made)
    tolerance = Tolerance("snr_db", limit)
    figures = {**result.figures, "golden_snr_db": round(golden_db, 2), "golden_limit_db": limit}
    if labelled and parent.manifest.labels:
        with tempfile.TemporaryDirectory() as folder:
            trial = _write(parent, Path(folder) / "trial.edge", config, made, figures, tolerance)
            # Both graphs of the one bundle, so that its history chooses the same samples for both.
            figures["top1"] = evaluate(trial, labelled)["top1"]
            figures["top1_float"] = evaluate(trial, labelled, precision="float")["top1"]
    written = _write(parent, out, config, made, figures, tolerance)
    check_golden(written, INT8_GRAPH)
    missed, hint = _missed(result, figures, made.budget)
    if missed:
        raise BudgetNotMet(missed, hint, {"bundle": str(written.path), **figures})
    return written


def _missed(result: Result, figures: dict[str, Any], budget: Budget | None) -> tuple[str, str]:
    """(what is missed, hint), or two empty texts. The test split only judges: it chose nothing.

    Frozen ranges (``budget`` None) give a graph that was judged when they were made, perhaps by a budget that they do not
    record: a poor one is said, not refused.
    """
    if result.missed:
        return result.missed, f"the best found is written; {result.hint}"
    if budget is not None and budget.max_drop is not None:
        lost = 100 * (figures["top1_float"] - figures["top1"])
        if lost > budget.max_drop + 1e-9:
            return (
                f"top-1 drops by {lost:.2f} points on the test split, {budget.max_drop:g} were allowed",
                f"the best found is written; {_cure(budget.max_drop, 'qat' in figures)}",
            )
    worst = min(figures["snr_db"], figures["golden_snr_db"])
    if figures["measured_on"] == RANDOM:
        say(
            f"{worst:.1f} dB on the random golden inputs of edgekit import judge nothing, and hold an engine to little: "
            "name the calibration.json in its own bundle, whose golden inputs are samples"
        )
        return "", ""
    if worst >= POOR_DB or (budget is not None and budget.min_snr is not None):
        return "", ""
    poor = f"the quantized outputs are only {worst:.1f} dB from the float ones, {POOR_DB:g} is the least that is usable"
    if budget is None or budget.max_drop is not None:
        say(poor)
        return "", ""
    return poor, "the best found is written; leave layers float: --min-snr DB (a smaller DB accepts it as it is)"


def _cure(max_drop: float, trained: bool) -> str:
    """What may keep the accuracy on the test split, where the train samples said that it is kept."""
    cure = "state a smaller --max-drop to leave more layers float" if max_drop else "leave layers float by --share or --min-snr"
    return cure if trained else f"{cure}, or add --qat"


def _golden_db(bundle: Bundle, made: _Made) -> tuple[float, float]:
    """Lowest output SNR of the quantized graph on the golden inputs, through the runtime's backend; and what it then owes."""
    inputs, outputs = load_golden(bundle) if made.golden is None else parse_golden(made.golden)
    run = session(made.result.graph)
    found = dict(zip([value.name for value in run.get_outputs()], run.run(None, inputs), strict=True))
    worst = compare_outputs(outputs, found, quantized=True).snr_db
    if worst == float("-inf"):
        raise GraphError("the int8 graph gives NaN, Inf or other shapes on the golden inputs", "check the model's outputs")
    # Few choices that all agree would owe that forever: one of them at a tie differs on the next machine.
    most = POOR_DB if all(map(is_choice, outputs.values())) else GOLDEN_LIMIT_DB
    return worst, round(min(worst - GOLDEN_MARGIN_DB, most), 1)


def _write(
    parent: Bundle,
    out: str | os.PathLike[str],
    config: dict[str, Any],
    made: _Made,
    figures: dict[str, Any],
    tolerance: Tolerance,
) -> Bundle:
    with Bundle.create(out) as draft:
        for name in (FLOAT_GRAPH, WEIGHTS, GOLDEN, TOKENIZER):
            if parent.has(name):
                draft.write(name, made.golden if name == GOLDEN and made.golden is not None else parent.read(name))
        draft.write(INT8_GRAPH, made.result.graph)
        if made.result.calibration:
            draft.write(CALIBRATION, made.result.calibration)
        entry = parent.entry("quantize", config, figures)
        draft.manifest = msgspec.structs.replace(
            parent.manifest,
            name=Path(out).name.removesuffix(".edge"),
            golden={**parent.manifest.golden, INT8_GRAPH: tolerance},
            history=(*parent.manifest.history, entry),
        )
    return Bundle.open(out)

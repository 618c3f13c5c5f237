"""``edgekit quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.errors import BudgetNotMet

from .common import SEED, Answer, answers, bundle_argument, out_option, table

__all__ = ["quantize"]

_SHOWN = 12


@click.command("quantize")
@bundle_argument()
@out_option("The int8 bundle to write.", "B2")
@click.option(
    "--calib", metavar="SPEC|DIR|FILE", help="Data spec, folder of .npz, or calibration.json. Default: training data."
)
@click.option("--max-drop", type=float, metavar="POINTS", help="Lose at most this many points of top-1.")
@click.option("--min-snr", type=float, metavar="DB", help="Keep at least this SNR at the output.")
@click.option("--share", type=float, metavar="S", help="Quantize at least this share of the multiply-accumulates, 0..1.")
@click.option("--method", default="auto", metavar="NAME", help="auto, mse, entropy, percentile or minmax.  [default: auto]")
@click.option("--samples", default=256, show_default=True, help="Calibration samples.")
@click.option("--data", metavar="SPEC", help="Labelled data for --max-drop and top-1, where --calib has no labels.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Which samples are drawn.")
@click.option("--shift/--no-shift", default=True, help="Allow Sub, Mul and Pad in front of Q where they help.")
@click.option(
    "--format", default="int8", show_default=True, metavar="NAME", help="int8, fp8 (SM 8.9 on), weights8 or weights4."
)
@click.option("--qat", is_flag=True, help="Train the int8 graph after that, taught by the float one.")
@click.option("--qat-epochs", default=5, show_default=True, help="Epochs of --qat.")
@click.option("--faster-on", metavar="BACKEND", help="Leave layers float until int8 is faster there than float: onnxruntime.")
@click.option(
    "--keep-float",
    multiple=True,
    metavar="NAME",
    help="Leave this float, as often as need be: a layer, '/head/*' or an operator.",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw each layer's cost, as SVG.")
@answers
def quantize(bundle: Path, out: Path, plot: Path | None, **options: Any) -> Answer:
    """Quantize a bundle to int8, as an explicit Q/DQ graph for TensorRT.

    Without a budget, everything that TensorRT likes in int8 becomes int8. --min-snr and --max-drop keep as few layers
    float as they can, --share makes no more int8 than it takes. The best found is written even where a budget is missed,
    with exit code 3, and so is a graph below 10 dB where no --max-drop or --min-snr is stated. --max-drop is searched on
    train samples and judged on the test split too. Ranges come from training samples, the SNR from others; a
    calibration.json gives the same graph again without data.

    Method auto fits ranges and weights layer by layer and keeps what helps on held-out samples. The others are those
    methods as the books have them: fast, and nothing is fitted. A stopped calibration goes on with the same command.

    \b
    Examples:
      edgekit quantize digits.edge --out digits8.edge
      edgekit quantize digits.edge --out digits8.edge --calib digits --max-drop 0.5
      edgekit quantize ocr.edge --out ocr8.edge --calib samples/ --min-snr 20
      edgekit quantize ocr.edge --out ocr8.edge --calib samples/ --keep-float '/head/*'
      edgekit quantize digits.edge --out digits8.edge --qat
      edgekit quantize text.edge --out text4.edge --format weights4
      edgekit quantize digits.edge --out digits8.edge --calib calibration/digits-depthwise/calibration.json
    \f
    Returns ``bundle``, ``snr_db`` at the output and what it was ``measured_on``, ``share`` of the multiply-accumulates in
    int8, ``size_bytes`` of the graph, ``method``, ``ranges``, ``recovery`` and ``recoveries_db`` (how weights were fitted,
    and what was tried), ``shifted_inputs``, ``layers`` (how many of each form), ``recurrent`` (layers that stay float),
    ``culprit`` (the layer that costs most), ``stored_weights`` and ``float_weights_bytes``, ``golden_snr_db`` and
    ``golden_limit_db``, ``layer_table`` (a row a layer), ``latency_ms`` (of both graphs on this CPU), where labels are known
    ``top1`` and ``top1_float``, with ``--max-drop`` ``drop``, with ``--qat`` ``qat``, of other formats ``format`` and
    ``stored`` in the place of what they lack.
    """
    from edgekit.bundle import Bundle
    from edgekit.quantization import check_picture, draw_layers, layer_table
    from edgekit.quantization import quantize as run

    if plot is not None:
        check_picture(plot)
    missed: BudgetNotMet | None = None
    try:
        written = run(bundle, out=out, **options)
    except BudgetNotMet as error:
        if "bundle" not in error.result:
            raise
        written, missed = Bundle.open(error.result["bundle"]), error
    rows = layer_table(written)
    if plot is not None:
        draw_layers(written, rows, plot)
    figures = written.manifest.history[-1].figures
    return Answer(
        {"bundle": str(written.path), **figures, "layer_table": rows}, _text(written.path, figures, rows), missed=missed
    )


def _text(path: Path, figures: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    recovery = f", {figures['recovery']}" if figures.get("recovery", "none") != "none" else ""
    lines = [
        f"{path}: {figures['snr_db']:.1f} dB on {figures['measured_on']}, {_extent(figures)}, "
        f"{figures['size_bytes'] / 1024:.0f} KiB, method {figures['method']}{recovery}",
    ]
    if tried := figures.get("recoveries_db"):
        lines.append("recoveries tried, all int8: " + ", ".join(f"{name} {db:.1f} dB" for name, db in tried.items()))
    if figures.get("shifted_inputs"):
        lines.append(f"{figures['shifted_inputs']} inputs are shifted or scaled in front of Q; --no-shift leaves that out")
    if kept := figures.get("float_weights_bytes"):
        lines.append(
            f"{kept / 1024:.0f} KiB of tables and recurrent weights stay float32; --format weights8 stores weights alone"
        )
    if figures.get("stored_weights"):
        lines.append(f"{figures['stored_weights']} tables and recurrent weights are stored in int8, and computed in float")
    if "qat" in figures:
        lines.append(_trained(figures["qat"]))
    if "top1" in figures:
        before = f" (float {figures['top1_float']:.2%})" if "top1_float" in figures else ""
        lines.append(f"top-1 {figures['top1']:.2%}{before}")
    if shown := rows[:_SHOWN]:
        numbers = [{name: value for name, value in row.items() if name != "why"} for row in shown]
        lines += ["", table(numbers), "", *[f"{row['layer']}: {row['why']}" for row in shown if row["why"]]]
    return "\n".join(lines)


def _trained(qat: dict[str, Any]) -> str:
    """What training won, on the samples that chose the epoch."""
    epochs = f"{qat['epochs']} epoch{'s' if qat['epochs'] != 1 else ''}"
    if not qat["best_epoch"]:
        return f"QAT: none of {epochs} was better than the untrained graph, which is kept"
    won = f"{qat['snr_db']['before']:.1f} -> {qat['snr_db']['after']:.1f} dB"
    if "top1" in qat:
        won += f", top-1 {qat['top1']['before']:.2%} -> {qat['top1']['after']:.2%}"
    return f"QAT: {won} on the samples that chose epoch {qat['best_epoch']} of {epochs}"


def _extent(figures: dict[str, Any]) -> str:
    """How much was quantized: of the products, or where only weights are stored small, of those."""
    if not (stored := figures.get("stored")):
        outside = " outside of LSTM, GRU and RNN" if figures.get("recurrent") else ""
        return f"{figures['share']:.1%} of the MACs{outside} in {figures.get('format', 'int8')}"
    return "; ".join(
        f"{sums['weights']} weights in {width} ({sums['bytes_before'] / 1024:.0f} KiB became {sums['bytes_after'] / 1024:.0f})"
        for width, sums in sorted(stored.items())
    )

"""``edgekit quantize``."""

from __future__ import annotations

from pathlib import Path

import click

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
@answers
def quantize(
    bundle: Path,
    out: Path,
    calib: str | None,
    max_drop: float | None,
    min_snr: float | None,
    share: float | None,
    method: str,
    samples: int,
    data: str | None,
    seed: int,
) -> Answer:
    """Quantize a bundle to int8, as an explicit Q/DQ graph for TensorRT.

    Without a budget, everything that TensorRT likes in int8 becomes int8. A budget keeps the fewest layers float that
    meet it; the best found is written even where it does not, with exit code 3, and so is a graph below 10 dB where no
    --max-drop or --min-snr is stated. --max-drop holds on the test split too. Ranges come from training samples,
    the SNR from others; a calibration.json gives the same graph again without data.

    \b
    Examples:
      edgekit quantize digits.edge --out digits8.edge
      edgekit quantize digits.edge --out digits8.edge --calib digits --max-drop 0.5
      edgekit quantize ocr.edge --out ocr8.edge --calib samples/ --min-snr 20
      edgekit quantize digits.edge --out digits8.edge --calib calibration/digits-depthwise/calibration.json
    """
    from edgekit.quantization import layer_table
    from edgekit.quantization import quantize as run

    written = run(
        bundle, out=out, calib=calib, max_drop=max_drop, min_snr=min_snr, share=share,
        method=method, samples=samples, data=data, seed=seed,
    )  # fmt: skip
    entry = written.last("quantize")
    assert entry is not None
    figures = entry.figures
    rows = layer_table(written)
    whys = [f"{row['layer']}: {row.pop('why')}" if row["why"] else str(row.pop("why")) for row in rows]
    lines = [
        f"{written.path}: {figures['snr_db']:.1f} dB on {figures['measured_on']}, {figures['share']:.1%} of the MACs in int8, "
        f"{figures['size_bytes'] / 1024:.0f} KiB, method {figures['method']}",
    ]
    if "top1" in figures:
        before = f" (float {figures['top1_float']:.2%})" if "top1_float" in figures else ""
        lines.append(f"top-1 {figures['top1']:.2%}{before}")
    lines += ["", table(rows[:_SHOWN]), "", *[why for why in whys[:_SHOWN] if why]]
    return Answer({"bundle": str(written.path), **figures}, "\n".join(lines))

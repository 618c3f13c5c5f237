"""``edgekit prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import SEED, Answer, answers, bundle_argument, out_option, targets_option


class _Bytes(click.ParamType[float]):
    """A number of bytes, with k or M for thousands and millions."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip().lower().removesuffix("b")
        factor = {"k": 1e3, "m": 1e6}.get(text[-1:])
        try:
            return float(text[:-1]) * factor if factor else float(text)
        except ValueError:
            self.fail(f"{value!r} is no size: wanted bytes, for example 100k or 1.5M", param, ctx)


@click.command()
@bundle_argument()
@out_option("The pruned bundle to write.", "B2")
@click.option("--keep", type=float, metavar="SHARE", help="Share of the MACs to keep.  [default: 0.5]")
@click.option("--macs", type=float, metavar="SHARE", help="The same as --keep.")
@click.option("--speedup", type=float, metavar="X", help="Cut until it measures X times faster.")
@click.option("--latency-ms", type=float, metavar="MS", help="Cut until it measures MS milliseconds a sample.")
@click.option("--size", type=_Bytes(), metavar="BYTES", help="Cut to float32 weights and buffers of so many bytes; 100k, 1.5M.")
@click.option(
    "--on",
    default="onnxruntime",
    show_default=True,
    metavar="BACKEND|TARGET",
    help="Where latency counts: onnxruntime measures here, one thread; a name of `edgekit targets` predicts.",
)
@click.option("--max-drop", type=float, metavar="POINTS", help="Points of top-1 (or CER) that may be lost; more: exit 3.")
@click.option("--sparsity", type=click.Choice(["2:4"]), help="Zero two of every four weights (Ampere and later).")
@click.option("--data", metavar="SPEC", help="Fine-tune on this.  [default: what B was trained on]")
@click.option("--epochs", type=click.IntRange(1), help="Epochs of fine-tuning.  [default: as many as B was trained for]")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="In all: fine-tuning has fewer epochs if the search leaves too few.",
)
@click.option(
    "--importance",
    default="magnitude",
    show_default=True,
    metavar="NAME",
    help="What ranks a layer's channels: magnitude, taylor, norm-scale or activation.",
)
@click.option("--freeze", multiple=True, metavar="LAYER", help="A layer, or pattern, that keeps its width; repeatable.")
@click.option(
    "--unit",
    default=16,
    show_default=True,
    type=click.IntRange(1, 128),
    help="What widths are multiples of: 16 for CPUs and fp16, 32 for int8 tensor cores.",
)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Same seed, same machine: same weights.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.svg", help="Draw what each layer bears.")
@targets_option
@answers
def prune(bundle: Path, out: Path, plot: Path | None, keep: float | None, macs: float | None, **options: Any) -> Answer:
    """Remove channels, recurrent units, attention heads and blocks from a trained bundle, fine-tune, and measure the gain.

    What loses least for the time it saves goes first, by a table of layers timed on this machine. The speed-up is measured
    against B, in turn, in the same run. A stopped run goes on: give the same command again.

    \b
    Examples:
      edgekit prune digits.edge --out digits-half.edge --keep 0.5
      edgekit prune digits.edge --out digits-fast.edge --speedup 2 --max-drop 0.5
      edgekit prune parcels.edge --out small.edge --latency-ms 5 --freeze 'stem.*' --plot layers.svg
      edgekit prune parcels.edge --out sparse.edge --sparsity 2:4
    \f
    Returns ``bundle``, ``top1`` and, of text readers, ``cer``, ``drop`` (points lost), ``speedup``, ``latency_ms``,
    ``latency_before_ms`` and ``latency_predicted_ms`` (by the table of layers; None where nothing was searched), ``device``
    (where these were taken), ``macs``, ``macs_share``, ``parameters``, ``sparse_layers``, ``seconds``, ``cuts`` (in their
    order: ``layer``, ``kind``, width ``before`` and ``after``, ``kl``), ``layers`` (a row each), ``kept`` (layer to the
    reason why it was left), ``sensitivity`` (what each layer bears) and, with a target, ``on`` (what is predicted there).
    """
    import edgekit
    from edgekit.errors import BudgetNotMet, UsageError
    from edgekit.pruning.picture import check_picture, draw_pruning

    if keep is not None and macs is not None:
        raise UsageError("--keep and --macs arrived together", "give one of them: they are the same")
    if plot is not None:
        check_picture(plot)
    missed = None
    try:
        pruned = edgekit.prune(bundle, out=out, keep=macs if keep is None else keep, **options)
    except BudgetNotMet as error:
        if not out.exists():
            raise
        pruned, missed = edgekit.Bundle.open(out), error
    if plot is not None:
        draw_pruning(pruned, plot)
    figures = pruned.manifest.history[-1].figures
    shown = ("top1", "cer", "drop", "speedup", "latency_ms", "latency_before_ms", "latency_predicted_ms", "device", "macs",
             "macs_share", "parameters", "sparse_layers", "seconds", "cuts", "layers", "kept", "sensitivity", "on")  # fmt: skip
    return Answer(
        {"bundle": str(pruned.path), **{k: figures[k] for k in shown if k in figures}}, _text(out, figures), missed=missed
    )


def _text(out: Path, figures: dict[str, Any]) -> str:
    score = f"CER {figures['cer']:.2%} ({figures['drop']:+.2f}" if "cer" in figures else (
        f"top-1 {figures['top1']:.2%} ({-figures['drop']:+.2f}"
    )  # fmt: skip
    lines = [
        f"{out}: {score} points), {figures['speedup']:.2f}x faster "
        f"({figures['latency_before_ms']:.3f} -> {figures['latency_ms']:.3f} ms, {figures['device']}), "
        f"{figures['macs_share']:.0%} of the MACs, {figures['parameters']:,} of {figures['parameters_before']:,} parameters"
    ]
    if figures["sparse_layers"]:
        lines.append(f"2:4 in {figures['sparse_layers']} layers; ONNX Runtime gains nothing from it, TensorRT may")
    if figures.get("on"):
        target = figures["on"]
        lines.append(
            f"predicted on {target['target']}, {target['precision']}: {target['before_ms']:.4f} -> {target['ms']:.4f} ms"
            " (a roofline, not a measurement)"
        )
    return "\n".join(lines)

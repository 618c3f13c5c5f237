"""prune."""

from __future__ import annotations

from pathlib import Path

import click

from .common import SEED, Answer, answers, bundle_argument, out_option


@click.command()
@bundle_argument()
@out_option("The pruned bundle to write.", "B2")
@click.option("--keep", type=float, metavar="SHARE", help="Share of the multiply-accumulates to keep.  [default: 0.5]")
@click.option("--speedup", type=float, metavar="X", help="Cut until it measures X times faster (ONNX Runtime, one thread).")
@click.option("--max-drop", type=float, metavar="POINTS", help="Points of top-1 that may be lost; more: exit 3.")
@click.option("--sparsity", type=click.Choice(["2:4"]), help="Zero two of every four weights (Ampere and later).")
@click.option("--data", metavar="SPEC", help="Fine-tune on this.  [default: what B was trained on]")
@click.option("--epochs", default=30, show_default=True, type=click.IntRange(1), help="Epochs of fine-tuning.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Same seed, same machine: same weights.")
@answers
def prune(
    bundle: Path,
    out: Path,
    keep: float | None,
    speedup: float | None,
    max_drop: float | None,
    sparsity: str | None,
    data: str | None,
    epochs: int,
    seed: int,
) -> Answer:
    """Remove whole channels from a trained bundle, fine-tune, and measure the gain.

    Widths end on multiples of 16: others cost as much as the next multiple. The speed-up is measured against B,
    in turn, in the same run.

    \b
    Examples:
      edgekit prune digits.edge --out digits-half.edge --keep 0.5
      edgekit prune digits.edge --out digits-fast.edge --speedup 2 --max-drop 0.5
    """
    import edgekit

    pruned = edgekit.prune(
        bundle, out=out, keep=keep, speedup=speedup, max_drop=max_drop, sparsity=sparsity, data=data, epochs=epochs, seed=seed
    )
    figures = pruned.manifest.history[-1].figures
    shown = {k: figures[k] for k in ("top1", "drop", "speedup", "macs", "macs_share", "parameters", "seconds")}
    text = (
        f"{out}: top-1 {figures['top1']:.2%} ({-figures['drop']:+.2f} points), {figures['speedup']:.2f}x faster "
        f"({figures['latency_before_ms']:.3f} -> {figures['latency_ms']:.3f} ms, ONNX Runtime, one thread), "
        f"{figures['macs_share']:.0%} of the MACs, {figures['parameters']:,} parameters"
    )
    return Answer({"bundle": str(pruned.path), **shown, "cuts": figures["cuts"]}, text)

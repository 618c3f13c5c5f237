"""train, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import SEED, Answer, answers, bundle_argument, out_option


@click.command()
@click.option("--data", required=True, metavar="SPEC", help="digits | folder:PATH | npz:PATH")
@click.option("--model", default="depthwise", show_default=True, metavar="NAME", help="textbook | depthwise")
@out_option("The bundle to write, for example digits.edge.")
@click.option("--epochs", default=40, show_default=True, type=click.IntRange(1), help="Passes over the training split.")
@click.option("--batch", default=128, show_default=True, type=click.IntRange(2), help="Samples a step.")
@click.option("--lr", type=click.FloatRange(0, 10, min_open=True), help="Peak learning rate.  [default: the model's]")
@click.option("--size", type=click.IntRange(8, 1024), help="Input height and width, pixels.  [default: the data set's]")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Same seed, same machine: same weights.")
@answers
def train(data: str, model: str, out: Path, epochs: int, batch: int, lr: float | None, size: int | None, seed: int) -> Answer:
    """Train a compact model and write it as a bundle.

    A stopped run resumes: give the same command again. Damaged images are named, skipped and counted.

    \b
    Examples:
      edgekit train --data digits --out digits.edge
      edgekit train --data folder:parcels --model depthwise --size 112 --out parcels.edge
    """
    import edgekit

    bundle = edgekit.train(data=data, out=out, model=model, epochs=epochs, batch=batch, lr=lr, size=size, seed=seed)
    figures = bundle.manifest.history[-1].figures
    shown = {key: figures[key] for key in ("top1", "macro_f1", "parameters", "macs", "seconds")}
    text = _text(str(bundle.path), shown, figures["damaged"])
    return Answer({"bundle": str(bundle.path), **shown, "damaged": figures["damaged"]}, text)


@click.command(name="eval")
@bundle_argument()
@click.option("--data", required=True, metavar="SPEC", help="digits | folder:PATH | npz:PATH")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help="auto | onnxruntime")
@click.option("--save/--no-save", default=True, show_default=True, help="Record the figures in B's history, for the report.")
@answers
def eval_(bundle: Path, data: str, backend: str, save: bool) -> Answer:
    """Top-1, macro F1 and the confusion matrix, through the runtime that ships.

    On the data the model was trained on, only the held-out split counts; on other data, every sample.

    \b
    Example:
      edgekit eval digits.edge --data digits
    """
    import edgekit

    figures = edgekit.evaluate(bundle, data, backend=backend, save=save)
    shown = {key: figures[key] for key in ("top1", "macro_f1", "samples", "backend")}
    text = _text(str(bundle), shown, figures["damaged"])
    return Answer({"bundle": str(bundle), **figures}, text)


def _text(bundle: str, figures: dict[str, Any], damaged: list[str]) -> str:
    names = {"top1": "top-1", "macro_f1": "macro F1", "macs": "MACs"}

    def words(key: str, value: object) -> str:
        if key in ("top1", "macro_f1"):
            return f"{value:.2%}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    text = f"{bundle}: " + ", ".join(f"{names.get(key, key)} {words(key, value)}" for key, value in figures.items())
    return text + (f"\ndamaged images left out: {len(damaged)}" if damaged else "")

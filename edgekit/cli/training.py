"""``edgekit train`` and ``eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import SEED, Answer, answers, bundle_argument, out_option

#: What people see of a training or an evaluation, in this order, where it is there.
FIGURES = ("top1", "macro_f1", "cer", "parameters", "macs", "seconds")
BACKENDS = "auto | tensorrt | tensorrt-rtx | onnxruntime"
DATA = "digits | spam | labels | watch | folder:PATH | csv:PATH | npz:PATH | validation:SHARE:SPEC"


@click.command()
@click.option("--data", required=True, metavar="SPEC", help=DATA)
@click.option(
    "--model",
    metavar="NAME",
    help="textbook | depthwise | depthwise-n | depthwise-s | depthwise-m | residual | gru-rows | lstm-rows | vit | lstm-text | "
    "transformer-text | gru-series | lstm-series | crnn | hf:FOLDER | package.module:factory  [default: what suits the data]",
)
@out_option("The bundle to write, for example digits.edge.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training split.  [default: the model's and data's]")
@click.option("--batch", type=click.IntRange(2), help="Samples a step.  [default: the model's]")
@click.option("--lr", type=click.FloatRange(0, 10, min_open=True), help="Peak learning rate.  [default: the model's]")
@click.option(
    "--weight-decay",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0, 10, max_open=True),
    help="Decay of matrices and kernels, not of biases and norms.",
)
@click.option(
    "--smoothing",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Label smoothing of classifiers.",
)
@click.option("--size", type=click.IntRange(8, 1024), help="Height and width of pictures, pixels.  [default: the data set's]")
@click.option(
    "--width",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.1, 4),
    help="Factor on a preset's channels, which end on multiples of 8.",
)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Same seed, same machine: same weights.")
@click.option(
    "--augment",
    metavar="POLICY",
    help="none | digits | signs | photos | medical | logistics | lines | text | series  [default: the data set's]",
)
@click.option(
    "--optimizer",
    default="adamw",
    show_default=True,
    type=click.Choice(["adamw", "sgd"]),
    help="SGD has Nesterov momentum.",
)
@click.option(
    "--validation",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the training split by which the best epoch is chosen; 0 keeps the last.",
)
@click.option(
    "--patience", default=0, show_default=True, type=click.IntRange(0), help="Stop after so many epochs without a better."
)
@click.option("--balance", is_flag=True, help="Weigh the classes of an unbalanced set alike.")
@click.option("--teacher", metavar="B", type=click.Path(path_type=Path), help="A trained bundle to distil from.")
@click.option("--logs", metavar="DIR", type=click.Path(path_type=Path), help="Write the curves for TensorBoard.")
@answers
def train(**options: Any) -> Answer:
    """Train a compact model and write it as a bundle.

    A stopped run resumes: give the same command again. Damaged samples are named, skipped and counted. Under torchrun the
    same command trains on several GPUs or machines.

    \b
    Examples:
      edgekit train --data digits --out digits.edge
      edgekit train --data folder:parcels --size 112 --out parcels.edge
      edgekit train --data csv:mails.csv --model hf:MiniLM --out mails.edge
      edgekit train --data folder:parcels --teacher big.edge --model depthwise-n --out small.edge
      torchrun --nproc-per-node 2 -m -- edgekit train --data folder:parcels --out parcels.edge
    \f
    Returns ``bundle``, ``top1``, ``macro_f1`` and, of text readers, ``cer`` (shares of 1), ``parameters``, ``macs``,
    ``seconds`` and ``damaged`` (samples that could not be read).
    """
    import edgekit

    bundle = edgekit.train(**options)
    figures = bundle.manifest.history[-1].figures
    shown = {key: figures[key] for key in FIGURES if key in figures}
    text = _text(str(bundle.path), shown, figures["damaged"])
    return Answer({"bundle": str(bundle.path), **shown, "damaged": figures["damaged"]}, text)


@click.command(name="eval")
@bundle_argument()
@click.option("--data", required=True, metavar="SPEC", help=DATA)
@click.option("--beam", default=1, show_default=True, type=click.IntRange(1, 1000), help="Beam width of a text reader.")
@click.option("--backend", default="auto", show_default=True, metavar="NAME", help=BACKENDS)
@click.option("--save/--no-save", default=True, show_default=True, help="Record the figures in B's history, for the report.")
@answers
def eval_(bundle: Path, data: str, beam: int, backend: str, save: bool) -> Answer:
    """Top-1, macro F1 and the confusion matrix (of a text reader: lines right, character error rate), through the runtime
    that ships.

    On the data the model was trained on, only the held-out split counts; on other data, every sample.

    \b
    Examples:
      edgekit eval digits.edge --data digits
    \f
    Returns ``bundle`` and the figures:
    """
    import edgekit

    figures = edgekit.evaluate(bundle, data, beam=beam, backend=backend, save=save)
    shown = {key: figures[key] for key in (*FIGURES[:3], "samples", "backend") if key in figures}
    text = _text(str(bundle), shown, figures["damaged"])
    return Answer({"bundle": str(bundle), **figures}, text)


def _text(bundle: str, figures: dict[str, Any], damaged: list[str]) -> str:
    names = {"top1": "top-1", "macro_f1": "macro F1", "cer": "character errors", "macs": "MACs"}

    def words(key: str, value: object) -> str:
        if key in ("top1", "macro_f1", "cer"):
            return f"{value:.2%}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    text = f"{bundle}: " + ", ".join(f"{names.get(key, key)} {words(key, value)}" for key, value in figures.items())
    return text + (f"\ndamaged samples left out: {len(damaged)}" if damaged else "")

"""``edgekit data`` and ``augment``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import SEED, Answer, answers, out_option, table
from .training import DATA

__all__ = ["augment", "data"]


@click.command()
@click.option("--data", "spec", required=True, metavar="SPEC", help=DATA)
@out_option("The picture to write, for example data.png.", metavar="FILE")
@answers
def data(spec: str, out: Path) -> Answer:
    """Draw what a data set holds: classes, samples, sizes, duplicates, contradicting labels, damage.

    Every sample is read once. Duplicates are looked for within and across the splits; of pictures also those that only
    look alike. --json lists all of them, the picture the first few.

    \b
    Examples:
      edgekit data --data folder:parcels --out parcels.png
      edgekit data --data csv:mails.csv --out mails.png --json
    """
    from edgekit.data.sheets.report import data_report

    figures = data_report(spec, out)
    return Answer(figures, _text(figures))


def _text(figures: dict[str, Any]) -> str:
    """The same in a few lines."""
    groups, wrong, near = figures["duplicates"], figures["conflicting"], figures["near"]
    things = "characters" if figures["task"] == "text-recognition" else "classes"
    words = [
        f"{figures['data']}: {figures['task']}, {len(figures['classes'])} {things}, "
        f"{figures['train']:,} train, {figures['held_out']:,} held out"
    ]
    if figures["left_out"]:
        words.append(f"left out of training, because what they show is held out too: {figures['left_out']:,}")
    if figures["imbalance"] is not None:
        words.append(f"largest : smallest in training: {figures['imbalance']:.1f}")
    across = sum(group["across"] for group in groups)
    words.append(f"groups of equal samples: {len(groups):,}, {across:,} of them in train and held out")
    if near is not None:
        words.append(
            f"pictures that look like another: {len(near):,}, {sum(pair['across'] for pair in near):,} across the split"
        )
    words.append(f"damaged samples: {len(figures['damaged']):,}")
    if wrong:
        rows = [
            {key: " | ".join(sample[key] for sample in group["samples"][:3]) for key in ("label", "id", "split")}
            for group in wrong[:10]
        ]
        words.append(f"equal samples with different labels: {len(wrong):,}\n{table(rows)}")
    return "\n".join([*words, f"picture: {figures['out']}"])


@click.command()
@click.option("--data", "spec", required=True, metavar="SPEC", help=DATA)
@click.option(
    "--show",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The picture to write, for example sheet.png.",
)
@click.option(
    "--policy",
    metavar="POLICY",
    help="none | digits | signs | photos | medical | logistics | lines | text | series  [default: the data set's]",
)
@click.option("--size", type=click.IntRange(8, 1024), help="Height and width of pictures, pixels.  [default: the data set's]")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Same seed: same samples, same changes.")
@answers
def augment(spec: str, show: Path, policy: str | None, size: int | None, seed: int) -> Answer:
    """Show what training does to samples: each as it is at the left, eight changed versions beside it.

    \b
    Examples:
      edgekit augment --data digits --show sheet.png
      edgekit augment --data folder:parcels --policy logistics --size 160 --show sheet.png
    """
    from edgekit.data.sheets.contact import augmentation_sheet
    from edgekit.training.tokenizer import fit_tokenizer

    answer = augmentation_sheet(spec, show, policy=policy, size=size, seed=seed, tokenizer_of=fit_tokenizer)
    words = (
        f"{answer['data']}: {len(answer['samples'])} samples, {answer['versions']} versions of each, policy {answer['policy']}"
    )
    return Answer(answer, f"{words}\npicture: {answer['out']}")

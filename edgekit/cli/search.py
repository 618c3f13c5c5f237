"""search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import SEED, Answer, answers, table


@click.command()
@click.option("--data", required=True, metavar="SPEC", help="What to train on, as in train.")
@click.option(
    "--study",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where the trials are kept, for example parcels.study; an earlier search goes on there.",
)
@click.option("--model", metavar="NAME", help="As in train.  [default: what suits the data]")
@click.option(
    "--trials", default=20, show_default=True, type=click.IntRange(1), help="Finished trials that the study shall have."
)
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training split in a trial.  [default: as in train]")
@click.option(
    "--validation",
    default=0.15,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the training split that trials are judged by.",
)
@click.option("--size", type=click.IntRange(8, 1024), help="Height and width of pictures, pixels.  [default: the data set's]")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Same seed, same machine, one process: same trials.")
@click.option("--augment", metavar="POLICY", help="As in train.  [default: the data set's]")
@click.option("--optimizer", default="adamw", show_default=True, type=click.Choice(["adamw", "sgd"]), help="As in train.")
@click.option("--balance", is_flag=True, help="Weigh the classes of an unbalanced set alike.")
@answers
def search(**options: Any) -> Answer:
    """Find the learning rate, batch, weight decay and smoothing that suit a data set, by many short trainings.

    The first trial is of the defaults; hopeless ones are given up early. Judged by a share of the training split: the
    held-out split is never read. A stopped search goes on: give the same command again. Given twice, or on several machines
    with FILE on a shared disk, the commands share the trials, and may do one more each. Ends with the train command for what
    was found.

    \b
    Examples:
      edgekit search --data folder:parcels --study parcels.study
      edgekit search --data csv:mails.csv --model transformer-text --epochs 6 --trials 40 --study mails.study
    """
    from edgekit.training.search import search as run

    found = run(**options)
    rows = [{**row, "score": f"{row['score']:.2%}"} for row in found["top"]]
    counts = f"{found['study']}: {found['trials']} trials, {found['pruned']} given up early, {found['failed']} failed"
    text = f"{counts}\n\n{table(rows)}\n\n{found['command']}"
    return Answer(found, text)

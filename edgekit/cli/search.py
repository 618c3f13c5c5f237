"""``edgekit search``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.errors import UsageError
from edgekit.progress import short

from .common import SEED, Answer, answers, table, targets_option


@click.command()
@click.option("--data", required=True, metavar="SPEC", help="What to train on, as in train.")
@click.option(
    "--study",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where the trials are kept, for example parcels.study; an earlier search goes on there.",
)
@click.option(
    "--objective",
    default="accuracy",
    show_default=True,
    metavar="NAMES",
    help="accuracy: tune how to train. accuracy,latency: the front over width, resolution, pruning and precision.",
)
@click.option(
    "--on", metavar="TARGET", help="Predict latency for a name of edgekit targets, where it counts.  [default: measure here]"
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
@click.option(
    "--size",
    type=click.IntRange(8, 1024),
    help="Height and width of pictures, pixels; of a front the middle one.  [default: the data set's]",
)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Same seed, same machine, one process: same trials.")
@click.option("--augment", metavar="POLICY", help="As in train.  [default: the data set's]")
@click.option("--optimizer", default="adamw", show_default=True, type=click.Choice(["adamw", "sgd"]), help="As in train.")
@click.option("--balance", is_flag=True, help="Weigh the classes of an unbalanced set alike.")
@targets_option
@answers
def search(objective: str, on: str | None, **options: Any) -> Answer:
    """Find the settings that suit a data set, by many short trainings: those of training, or the front of accuracy and latency.

    --objective accuracy tunes the learning rate, batch, weight decay and smoothing; hopeless trials are given up early.
    Ends with the train command for what was found.

    --objective accuracy,latency varies width, resolution, share of MACs that pruning keeps, and float or int8. A trial
    trains, prunes and quantizes; its graph is timed in ONNX Runtime, one thread, in turns with a fixed one. Ends with the
    trials that no other beats in both; their bundles lie in FILE.trials, FILE.svg shows them, edgekit report FILE draws
    them. On a CPU int8 is often slower: --on TARGET takes the roofline prediction for a device instead.

    The first trial is of the defaults. Judged by a share of the training split: the held-out split is never read. A stopped
    search goes on: give the same command again. Given twice, or on several machines with FILE on a shared disk, the commands
    share the trials, and may do one more each.

    \b
    Examples:
      edgekit search --data folder:parcels --study parcels.study
      edgekit search --data csv:mails.csv --model transformer-text --epochs 6 --trials 40 --study mails.study
      edgekit search --data folder:parcels --objective accuracy,latency --trials 40 --study front.study
      edgekit search --data folder:parcels --objective accuracy,latency --on jetson-orin-nano --study orin.study
    """
    wanted = sorted(part.strip() for part in objective.split(","))
    if wanted == ["accuracy", "latency"]:
        return _front(options, on)
    if wanted != ["accuracy"]:
        raise UsageError(f"there is no objective {objective!r}", "choose accuracy, or accuracy,latency")
    if on is not None:
        raise UsageError(f"--on {on} is where latency is predicted for", "add --objective accuracy,latency")
    return _best(options)


def _best(options: dict[str, Any]) -> Answer:
    from edgekit.training.search import search as run

    found = run(**options)
    rows = [{**row, "score": f"{row['score']:.2%}"} for row in found["top"]]
    counts = f"{found['study']}: {found['trials']} trials, {found['pruned']} given up early, {found['failed']} failed"
    text = f"{counts}\n\n{table(rows)}\n\n{found['command']}"
    return Answer(found, text)


def _front(options: dict[str, Any], on: str | None) -> Answer:
    import edgekit

    found = edgekit.pareto(**options, on=on)
    rows = [_row(row) for row in found["front"]]
    counts = f"{found['study']}: {found['trials']} trials, {found['failed']} failed; {len(rows)} that no other beats in both"
    notes = "".join(f"\nMind: {note}" for note in found["notes"])
    best = next((row["bundle"] for row in reversed(found["front"]) if row["bundle"]), "B")
    hint = f"edgekit eval {best} --data {options['data']}  # on the held-out split, which no trial has seen"
    where = f"latency: {found['latency']}{notes}\npicture: {found['picture']}; page: edgekit report {found['study']}"
    return Answer(found, f"{counts}\n\n{table(rows)}\n\n{where}\n\n{hint}")


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A trial on the front, for people."""
    return {
        "trial": row["trial"],
        "accuracy": f"{row['accuracy']:.2%}",
        "ms": short(row["latency_ms"], 3),
        "MACs": row["macs"],
        "parameters": row["parameters"],
        "kB": round(row["size_bytes"] / 1e3),
        "width": row["width"],
        "px": row["size"],
        "keep": row["keep"],
        "precision": row["precision"],
        "bundle": row["bundle"],
    }

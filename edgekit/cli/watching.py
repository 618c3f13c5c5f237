"""``edgekit replay`` and ``edgekit harvest``: what a scan kept, looked at later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import Answer, answers, out_option

if TYPE_CHECKING:
    from edgekit.scanner.replay import Difference

__all__ = ["harvest", "replay"]

SHOWN = 10
SHOWN_FIELDS = 4


@click.command("replay")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--bundle", metavar="B", type=click.Path(path_type=Path), help="The model, where it lies now; or another one.")
@click.option("--backend", help="What runs the model. Default: what ran it in the scan.")
@answers
def replay(file: Path, bundle: Path | None, backend: str | None) -> Answer:
    """Run a recorded incident again and hold every event against the one that was sent.

    With the bundle that ran then the events come out byte for byte; with another one the differences are what it would have
    said. Exit code 3 where an event differs; the first ten such are shown.

    \b
    Examples:
      edgekit replay 20260131T120000Z-no_read.edgekit-incident
      edgekit replay FILE.edgekit-incident --bundle new.edge --json
    \f
    Returns ``same``, ``frames``, ``events``, ``given`` and ``given_codes`` (events, and frames' codes, taken as recorded),
    ``differing`` (events), ``difference`` (the first, or None), ``differences`` (the first 50), ``fresh`` and ``absent``
    (steps without the state they had, or that could not be made), ``model`` (digest of what ran now), ``changed`` (models
    that are others) and ``why`` (what the incident is).
    """
    from edgekit.scanner.replay import replay as run

    found = run(file, bundle=bundle, backend=backend)
    text = f"{found.frames} frames, {found.events} events"
    taken = {"events": found.given, "frames' codes": found.given_codes}
    if given := [f"{count} {what}" for what, count in taken.items() if count]:
        text += f" ({' and '.join(given)} taken as recorded)"
    lines = [f"{text}: " + (f"{found.differing} differ" if found.differing else "all as recorded"), *found.changed]
    lines += [_shown(each) for each in found.differences[:SHOWN]]
    if found.differing > SHOWN:
        lines.append(f"  and {found.differing - SHOWN} more (--json lists 50)")
    if found.differing and (found.fresh or found.absent):
        lines.append(f"steps without the state they had: {', '.join([*found.fresh, *found.absent])}")
    return Answer(found.figures(), "\n".join(lines), exit_code=3 if found.differing else 0)


def _shown(difference: Difference) -> str:
    event = difference.recorded or difference.replayed
    name = f"{event.get('source', '')} {event.get('seq', '')}".strip() if isinstance(event, dict) else ""
    changes = difference.changed()
    more = f"; {', '.join([*changes][SHOWN_FIELDS:])} too" if len(changes) > SHOWN_FIELDS else ""
    fields = (f"{field} {json.dumps(a)} -> {json.dumps(b)}" for field, (a, b) in [*changes.items()][:SHOWN_FIELDS])
    return f"  event {difference.number}, {name}: {', '.join(fields)}{more}"


@click.command("harvest")
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@out_option("The data set to make, one folder a label.", "DATASET")
@answers
def harvest(folder: Path, out: Path) -> Answer:
    """Make a data set of the frames that a scan kept for retraining.

    Labels are the model's, so look through review.csv, which lists the most telling frames first, before training on
    folder:DATASET. Frames without a label go to DATASET.unlabelled beside it, for you to sort.

    \b
    Examples:
      edgekit harvest /var/lib/edgekit/harvest --out parcels2
      edgekit train --data folder:parcels2 --out parcels2.edge
    """
    from edgekit.scanner.gathered import SHEET, gather, unlabelled_of

    made = gather(folder, out)
    text = f"{made['frames']} frames in {len(made['labels'])} folders; look through {out / SHEET}"
    if count := made["unlabelled"]:
        text += f", and sort {count} in {unlabelled_of(out)}"
    return Answer(made, text + (f"; {made['damaged']} damaged ones left out" if made["damaged"] else ""))

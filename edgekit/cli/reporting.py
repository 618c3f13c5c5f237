"""``edgekit report`` and ``explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edgekit.errors import UsageError

from .common import Answer, answers, bundle_argument, table

__all__ = ["explain", "report"]

SHOWN_WORDS = 8


class _Serving(click.Command):
    """``--serve`` with and without a port: what follows is the port where it is a number, else the first bundle."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = list(args)
        if "--serve" in rest:
            at = rest.index("--serve")
            port = rest.pop(at + 1) if rest[at + 1 :] and rest[at + 1].isdecimal() else "0"
            rest[at] = f"--serve={port}"
        return super().parse_args(ctx, rest)


@click.command(cls=_Serving)
@click.argument("bundles", metavar="B...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The page. An earlier report of that name is replaced, any other file is not.",
)
@click.option(
    "--explanations",
    multiple=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Show the pictures that `edgekit explain --out DIR` wrote; repeatable.",
)
@click.option(
    "--serve",
    "port",
    metavar="[PORT]",
    type=click.IntRange(0, 65535),
    help="Write nothing; show bundles, or all in a folder, live on 127.0.0.1 until Ctrl-C.  [default: a free port]",
)
@answers
def report(bundles: tuple[Path, ...], out: Path, explanations: tuple[Path, ...], port: int | None) -> Answer:
    """One self-contained HTML page about one or several bundles.

    Accuracy against latency and size, training curves, confusion, latency histograms, quantization, engines and
    provenance. Nothing is measured here: what is missing is said in its place, with the command that measures it.
    The page needs no network. A study of edgekit search --objective accuracy,latency stands for the bundles on its front,
    and is drawn with all its trials. With --serve the page follows its bundles: the browser loads it again when a
    stage has made or measured one, and keeps its place.

    \b
    Examples:
      edgekit report digits.edge digits8.edge --out report.html
      edgekit report front.study --out report.html
      edgekit report --serve 8000 runs/digits
    """
    if port is not None:
        from edgekit.reporting import serve

        _refuse_with_serve(explanations)
        return Answer(serve(bundles, port=port), "ended")
    from edgekit.reporting import report as write

    data = write(bundles, out=out, explanations=explanations)
    count = len(data["bundles"])
    return Answer(data, f"{data['report']}: {count} {'bundle' if count == 1 else 'bundles'}, {data['size_bytes'] / 1e3:.0f} kB")


def _refuse_with_serve(explanations: tuple[Path, ...]) -> None:
    """What only a written page has; explanations that lie in a bundle are served with it."""
    if explanations or click.get_current_context().get_parameter_source("out") != ParameterSource.DEFAULT:
        raise UsageError("--serve writes no file and shows bundles only", "leave --out and --explanations away")


@click.command()
@bundle_argument()
@click.argument("images", metavar="SAMPLE...", nargs=-1, required=True)  # no Path: it would change a text
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the pictures and explanation.json; made where it is missing, other files in it stay.",
)
@click.option(
    "--method",
    type=click.Choice(["activations", "gradcam", "lime", "occlusion", "rollout"]),
    default="occlusion",
    show_default=True,
    help="occlusion, lime: any graph, through the runtime. gradcam, rollout (attention of "
    "the presets vit and transformer-text): PyTorch weights. activations: an image model's layers, against their calibration.",
)
@click.option("--label", metavar="NAME", help="Explain this class instead of the predicted one.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float", "int8"]),
    default="auto",
    show_default=True,
    help="Which graph of the bundle; auto takes int8 where there is one. Not for gradcam and rollout, which are float.",
)
@click.option(
    "--samples",
    type=click.IntRange(50, 20_000),
    default=1000,
    show_default=True,
    help="lime: how often the model is asked, each time with other parts hidden.",
)
@click.option(
    "--compare",
    is_flag=True,
    help="occlusion, lime: the float graph's map beside the int8 graph's, with the rank correlation of the two.",
)
@answers
def explain(bundle: Path, images: tuple[str, ...], **options: Any) -> Answer:
    """Show what the model looks at, one picture a sample.

    A sample is an image; a text (itself, or a .txt file); a sensor series, .csv with a row a time step and a column a
    channel, or .npy or .npz of (time, channels). A folder stands for what the model takes of it.
    Orange speaks for the class, blue against it. Each map is checked twice: what it calls important is hidden first, and
    the score must fall faster (deletion_auc, a smaller area under the curve) than with the same map misplaced
    (misplaced_auc); then it is shown first, and the score must rise faster (insertion_auc above misplaced_insertion_auc).

    \b
    Examples:
      edgekit explain digits8.edge photo.png --out why
      edgekit explain digits.edge photos/ --out why --method gradcam
      edgekit explain mails8.edge "You have won a prize" --out why --method lime
      edgekit explain digits8.edge photo.png --out why --compare
    """
    from edgekit.explanation import explain as run

    data = run(bundle, images, **options)
    columns = ["source", "label", "score", "overlay", "deletion_auc", "misplaced_auc"]
    columns += ["insertion_auc", "misplaced_insertion_auc"]
    if any(image.get("explained", image.get("label")) != image.get("label") for image in data["images"]):
        columns.insert(2, "explained")  # another class than the answer was asked about
    rows = [{k: image[k] for k in columns if k in image} for image in data["images"]]
    text = table(rows)
    if options["compare"]:
        text += f"\n\n{table([_compared(image) for image in data['images']])}"
    if "layers" in data:
        columns = ["name", "op", "shape", "low", "high", "zeros", "dead", "channels", "saturated", "beyond"]
        text += "\n\n" + table(data["layers"], columns)
        text += "".join(f"\n{layer['name']}: {layer['note']}" for layer in data["layers"] if layer["note"])
    text += "".join(f"\n\n{_words(image, options['method'] != 'rollout')}" for image in data["images"] if "words" in image)
    for image in data["images"]:
        if image.get("unread"):
            read = len(image["time_steps"])
            text += f"\n{image['overlay']}: the model reads the first {read} of {read + image['unread']} time steps"
    if data["skipped"]:
        text += f"\n{len(data['skipped'])} samples were skipped: {', '.join(data['skipped'])}"
    return Answer(data, f"{text}\n\npictures and explanation.json: {data['out']}")


def _compared(image: dict[str, Any]) -> dict[str, Any]:
    """What the two graphs say of one sample."""
    row = {"overlay": image["overlay"], "spearman": image["compared"]["spearman"]}
    for graph in ("float", "int8"):
        row |= {f"{graph}_{key}": image["compared"][graph][key] for key in ("label", "deletion_auc", "insertion_auc")}
    return row


def _word(word: str) -> str:
    return word if word.isalnum() else repr(word)  # a comma is a word, too


def _words(image: dict[str, Any], signed: bool) -> str:
    """The words of one text that say most, for and against."""
    ranked = sorted(image["words"], key=lambda word: -abs(word["weight"]))[:SHOWN_WORDS]
    sides = [[f"{_word(w['word'])} {w['weight']:+.2f}" for w in ranked if (w["weight"] > 0) is side] for side in (True, False)]
    if not signed:  # attention has no class
        return f"attended to: {', '.join(sides[0])}  ({image['source']})"
    told = [f"{name} {', '.join(side)}" for name, side in zip(("for:", "against:"), sides, strict=True) if side]
    return f"{image['explained']}  {'  '.join(told)}  ({image['source']})"

"""``edgekit pipeline``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import Answer, answers, table, targets_option


@click.command()
@click.argument("recipe", metavar="[RECIPE.toml]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Output folder.  [default: the recipe's, or runs/NAME]"
)
@click.option("--data", metavar="SPEC", help="Data in place of the recipe's own, for example folder:signs.")
@click.option("--show", is_flag=True, help="Print the recipe instead of running it: a start for your own.")
@targets_option
@answers
def pipeline(recipe: Path | None, out: Path | None, data: str | None, show: bool) -> Answer:
    """The whole way by a recipe: train, prune, quantize, build, bench, report, scan.

    RECIPE.toml is a file of yours, or the name of a built-in recipe: digits (the default, 5,000 real handwritten digits),
    signs, medical, parcels (folders of pictures: name yours by --data), reading, spam, series. Run it again and only what
    changed is done again; interrupted training goes on where it stopped. Paths in a recipe start at the current folder,
    bundles and pictures that its stages make lie in the output folder.

    \b
    Examples:
      edgekit pipeline
      edgekit pipeline signs --data folder:my-signs
      edgekit pipeline --show > my.toml
      edgekit pipeline my.toml --out runs/mine
    \f
    Returns ``recipe`` with ``--show``, else:
    """
    from edgekit.pipeline import pipeline as run
    from edgekit.pipeline import read_recipe, recipe_file

    if show:
        text = recipe_file(recipe).read_text(encoding="utf-8") if recipe_file(recipe).is_file() else ""
        if not text or recipe_file(recipe) == recipe:
            read_recipe(recipe, data)
        return Answer({"recipe": text}, text.rstrip())
    as_json = bool(click.get_current_context().params["as_json"])
    answer = run(recipe, out=out, data=data, on_event=None if as_json else click.echo)
    return Answer(answer, _text(answer))


def _text(answer: dict[str, Any]) -> str:
    reads = any(row["cer"] is not None for row in answer["table"])
    rows = [
        {
            "stage": row["stage"],
            "top-1": None if row["top1"] is None else f"{row['top1']:.2%}",
            **({"CER": None if row["cer"] is None else f"{row['cer']:.2%}"} if reads else {}),
            "p50 ms": _ms(row["p50_ms"], row["trustworthy"]),
            "p99 ms": _ms(row["p99_ms"], row["trustworthy"]),
            "parameters": None if row["parameters"] is None else f"{row['parameters']:,}",
            "graph kB": f"{row['size_bytes'] / 1000:.1f}",
            "engine": row["engine"],
            "kit": row["kit"],
        }
        for row in answer["table"]
    ]
    lines = ["", table(rows), "", "latency: ONNX Runtime on this machine's CPU, one thread, batch 1"]
    if any(row["trustworthy"] is False for row in answer["table"]):
        lines.append("*: disturbed, do not rely on it; the report says by what, `edgekit bench` measures again")
    lines += [f"engine: {path}" for path in answer["engines"]]
    lines += [f"build kit: {path}" for path in answer["kits"]]
    lines += [f"report: {answer['report']}"] if answer["report"] else []
    return "\n".join(lines)


def _ms(value: float | None, trustworthy: bool | None) -> str | None:
    if value is None:
        return None
    return f"{value:.3f}{'*' if trustworthy is False else ''}"

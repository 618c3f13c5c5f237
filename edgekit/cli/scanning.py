"""``edgekit scan``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import Answer, answers

if TYPE_CHECKING:
    from edgekit.scanner import Summary

__all__ = ["scan"]


@click.command("scan")
@click.argument("bundle", metavar="[B]", required=False, type=click.Path(path_type=Path))
@click.option("--codes", is_flag=True, help="Read 1-D and 2-D codes, and GS1 data in them; with or without a bundle.")
@click.option("--source", required=True, metavar="SRC", help="An image file, or a folder of images.")
@click.option("--watch", is_flag=True, help="Keep watching the folder for new files, until SIGTERM or Ctrl-C.")
@click.option(
    "--sink",
    "sinks",
    multiple=True,
    metavar="SINK",
    help="jsonl:PATH, jsonl:- (stdout, the default), sqlite:PATH, mqtt://HOST:PORT/TOPIC, http(s)://...; may be repeated.",
)
@click.option(
    "--outbox",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Where events wait for mqtt and http sinks that are down. Default: in $STATE_DIRECTORY or the user's state folder.",
)
@click.option("--backend", default="auto", show_default=True, help="What runs the model.")
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(0, 1024), help="CPU cores for the model, 0 for all."
)
@click.option(
    "--code-budget-ms",
    default=100.0,
    show_default=True,
    type=click.FloatRange(0),
    help="After this long on one frame no further attempt at a code is started; 0: plain reading only.",
)
@answers
def scan(
    bundle: Path | None,
    codes: bool,
    source: str,
    watch: bool,
    sinks: tuple[str, ...],
    outbox: Path | None,
    backend: str,
    threads: int,
    code_budget_ms: float,
) -> Answer:
    """Read images with a model, codes, or both: one JSON event an image.

    A damaged image is reported as an event and does not stop the scan. Events for mqtt and http sinks wait on disk,
    in order, while the sink is down. Without --sink the events go to stdout; with --json stdout is the summary.

    \b
    Examples:
      edgekit scan digits.edge --source images/
      edgekit scan digits.edge --codes --source images/ --sink jsonl:events.jsonl --sink sqlite:events.db
      edgekit scan --codes --source inbox/ --watch --sink mqtt://broker:1883/line1/codes
    """
    from edgekit.errors import UsageError
    from edgekit.progress import say
    from edgekit.scanner import scan as scan_source
    from edgekit.scanner import stop_on_signals

    as_json = bool(click.get_current_context().params["as_json"])
    sinks = tuple("jsonl:-" if sink.lower() == "jsonl:-" else sink for sink in sinks)
    if as_json and "jsonl:-" in sinks:
        raise UsageError("--json and --sink jsonl:- both want stdout", "leave one of them out, or write jsonl:PATH")
    targets = sinks or (() if as_json else ("jsonl:-",))
    with stop_on_signals() as stop:
        summary = scan_source(
            bundle,
            source=source,
            sinks=targets,
            codes=codes,
            watch=watch,
            outbox=outbox,
            backend=backend,
            threads=threads,
            code_budget_ms=code_budget_ms,
            stop=stop,
        )
    answer = _answer(summary, source, interrupted=stop.signal)
    if stop.signal == signal.SIGINT and not watch:
        raise KeyboardInterrupt
    if answer.exit_code:
        say(f"error: {answer.data['error']}\nhint: {answer.data['hint']}")
    if "jsonl:-" in targets:  # stdout belongs to the events
        say(answer.text)
        click.get_current_context().exit(answer.exit_code)
    return answer


def _answer(summary: Summary, source: str, interrupted: int) -> Answer:
    """The summary in figures and in one line; exit code 1 where frames came and not one could be read."""
    figures = summary.figures()
    dropped = ", ".join(f"{count} {reason}" for reason, count in summary.dropped.items())
    text = f"{summary.captured} captured, {summary.inferred} read, {summary.codes} codes" + (f"; {dropped}" if dropped else "")
    if summary.latency_ms["p50"] is not None:
        text += f"; latency p50 {summary.latency_ms['p50']:.3g} ms, p99 {summary.latency_ms['p99']:.3g} ms"
    if summary.captured and not summary.inferred and not interrupted:
        error = {"error": f"not one of the {summary.captured} images of {source} could be read", "hint": "the events say why"}
        return Answer({**figures, **error}, text, exit_code=1)
    return Answer(figures, text)

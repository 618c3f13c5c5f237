"""``edgekit scan``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import Answer, answers

if TYPE_CHECKING:
    from edgekit.scanner import Summary
    from edgekit.scanner.config import ScanConfig, SourceOptions

__all__ = ["scan"]


@click.command("scan")
@click.argument("bundle", metavar="[B]", required=False, type=click.Path(path_type=Path))
@click.option("--codes", is_flag=True, help="Read 1-D and 2-D codes, and GS1 data in them; with or without a bundle.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="SRC",
    help="An image, a folder, a video file or a camera (camera:N, v4l2:, rtsp://, gst:); cameras may be repeated.",
)
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
    type=click.FloatRange(0),
    help="So long after a frame's plain reading no further attempt at a code is started; 0: plain reading only. "
    "Default: 300 for files, 100 for cameras and streams.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Only name every mistake in the config file B.toml, and what this machine lacks.",
)
@click.option("--example", is_flag=True, help="Only print a config file with every setting, its default and what it does.")
@click.option("--tui", is_flag=True, help="Show the running scan in this terminal; without --sink its events are only shown.")
@answers
def scan(
    bundle: Path | None,
    codes: bool,
    sources: tuple[str, ...],
    watch: bool,
    sinks: tuple[str, ...],
    outbox: Path | None,
    backend: str,
    threads: int,
    code_budget_ms: float | None,
    check: bool,
    example: bool,
    tui: bool,
) -> Answer:
    """Read images with a model, codes, or both: one JSON event an image. B is a bundle, or a TOML file that says all.

    A damaged image is reported as an event and does not stop the scan. Events for mqtt and http sinks wait on disk,
    in order, while the sink is down. Without --sink the events go to stdout; with --json stdout is the summary.

    \b
    Examples:
      edgekit scan digits.edge --source images/
      edgekit scan digits.edge --codes --source images/ --sink jsonl:events.jsonl --sink sqlite:events.db
      edgekit scan --codes --source inbox/ --watch --sink mqtt://broker:1883/line1/codes
      edgekit scan --example > scan.toml
      edgekit scan --check scan.toml && edgekit scan scan.toml
      edgekit scan scan.toml --tui
    \f
    Returns ``captured``, ``inferred``, ``dropped`` (reason to count) and ``in_flight`` (captured is the sum of these three;
    the last is 0 at the end), ``codes``, ``events``, ``sinks``, ``steps`` and ``sources`` (a row each), ``latency_ms`` (p50
    and p99), ``model``, ``kpis`` (read rate, codes a frame, misreads) and ``complete`` (the source was read to its own end).
    With ``--check`` ``config``, ``ok``, ``problems`` and ``warnings`` instead.
    """
    from edgekit.errors import UsageError
    from edgekit.scanner.service import named_config

    written = bundle is not None and bundle.suffix.lower() == ".toml"
    if example:
        return _example()
    if check:
        return _checked(bundle, written)
    if written and bundle is not None:
        config = _read(bundle)
    elif not sources:
        raise UsageError("there is no --source", "name an image, a folder, a video file or a camera: --source images/")
    else:
        sinks = tuple("jsonl:-" if sink.lower() == "jsonl:-" else sink for sink in sinks)
        names = {"codes": codes, "watch": watch, "outbox": outbox, "backend": backend, "threads": threads}
        config = named_config(bundle, source=sources, sinks=sinks, code_budget_ms=code_budget_ms, **names)  # type: ignore[arg-type]
    view = tui and _can_show()
    config = _with_stdout(config, view)
    summary, interrupted = _scanned(config, view)
    return _told(_answer(summary, ", ".join(sources) or "the sources", interrupted, config), config)


def _told(answer: Answer, config: ScanConfig) -> Answer:
    """The end in words, where the log goes; not on a stdout that belongs to the events."""
    from edgekit.progress import say
    from edgekit.scanner.logs import logging

    with logging(config.log):
        if answer.exit_code:
            say(f"error: {answer.data['error']}", "error")
            say(f"hint: {answer.data['hint']}", "error")
        if any(sink.address == "jsonl:-" for sink in config.sink):
            if config.log.format == "text":  # the log has ended with it else
                say(answer.text)
            click.get_current_context().exit(answer.exit_code)
    return answer


def _example() -> Answer:
    from edgekit.scanner.example import example_config

    return Answer({"config": (text := example_config())}, text.rstrip())


def _scanned(config: ScanConfig, view: bool) -> tuple[Summary, int]:
    """The figures, and the signal that ended the scan, 0 for none."""
    import contextlib

    from edgekit.errors import EdgekitError
    from edgekit.scanner import Scanner, stop_on_signals

    from .scan_view import viewed

    context = click.get_current_context()
    # Until the answer is out: stdout and stderr may be pipes that nobody empties.
    stop = context.with_resource(stop_on_signals())
    scanner = Scanner(config, stop=stop)
    try:
        with viewed(scanner, stop) if view else contextlib.nullcontext():
            return scanner.run(), stop.signal
    except EdgekitError as error:
        if config.log.format == "json" and not context.params["as_json"]:  # the log has ended with it, and stays JSON
            context.exit(error.exit_code)
        raise


def _can_show() -> bool:
    """Whether ``--tui`` has a terminal to draw on; says so where not."""
    from edgekit.errors import UsageError
    from edgekit.progress import say

    from .scan_view import can_draw

    if click.get_current_context().params["as_json"]:
        raise UsageError("--json and --tui both want stdout", "leave one of them out")
    if can_draw():
        return True
    say("stdout is no terminal that can be drawn on: the scan runs without --tui")
    return False


def _read(path: Path) -> ScanConfig:
    """The config in a file, which says all of the scan."""
    from click.core import ParameterSource

    from edgekit.errors import UsageError
    from edgekit.scanner.config import read_config

    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("bundle", "as_json", "tui")
        and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(f"{path} says all of the scan, {given[0]} too", "leave the option out, or write it into the file")
    return read_config(path)


def _with_stdout(config: ScanConfig, view: bool) -> ScanConfig:
    """Without a sink events go to stdout, unless the answer or the view does."""
    import sys

    from msgspec.structs import replace

    from edgekit.errors import UsageError
    from edgekit.scanner.config import SinkOptions
    from edgekit.scanner.logs import LogOptions

    taken = "--json" if click.get_current_context().params["as_json"] else "--tui" if view else ""
    if taken and any(sink.address == "jsonl:-" for sink in config.sink):
        raise UsageError(f"{taken} and the sink jsonl:- both want stdout", "leave one of them out, or write jsonl:PATH")
    if view and sys.stderr.isatty():  # the view has the lines; a log beside it would be written across it
        config = replace(config, log=LogOptions())
    return config if config.sink or taken else replace(config, sink=(SinkOptions("jsonl:-"),))


def _checked(path: Path | None, written: bool) -> Answer:
    """Every mistake in a config file and on this machine; exit code 2 where there is one."""
    from edgekit.errors import UsageError
    from edgekit.progress import say
    from edgekit.scanner.checking import check_config

    if path is None or not written:
        raise UsageError("--check wants a config file", "edgekit scan --check scan.toml")
    problems, warnings = check_config(path)
    for kind, found in (("error", problems), ("warning", warnings)):
        for problem in found:
            say(f"{kind}: {problem}")
    rows, doubts = ([{"where": p.where, "error": p.message, "hint": p.hint} for p in found] for found in (problems, warnings))
    data = {"config": str(path), "ok": not problems, "problems": rows, "warnings": doubts}
    text = f"{path}: {_counted(len(problems), 'mistake')}" if problems else f"{path} is in order"
    text += f", with {_counted(len(warnings), 'warning')}" if warnings else ""
    return Answer(data, text, 2 if problems else 0)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _answer(summary: Summary, source: str, interrupted: int, config: ScanConfig) -> Answer:
    """The summary in figures and in one line; exit code 1 where frames came and not one could be read, and where Ctrl-C left
    some unread."""
    figures = summary.figures()
    text = summary.line()
    if interrupted == signal.SIGINT and not summary.complete and not any(map(_goes_on, config.source)):
        error = {"error": "interrupted, some of the pictures are not read", "hint": "the same command reads all of them again"}
        return Answer({**figures, **error}, text, exit_code=1)
    came = summary.captured - summary.dropped.get("no trigger", 0)  # a trigger that did not come is no fault of the images
    error = {}
    if came and not summary.inferred and not interrupted:
        error = {"error": f"not one of the {came} images of {source} could be read", "hint": "the events say why"}
    for row, of in zip(summary.sources, config.source, strict=False):
        if row.get("state") == "down" and not interrupted and not _goes_on(of):
            what = f"{row['source']} ended before its end ({row['reason']}); {row['captured']} frames came"
            error = {"error": what, "hint": "the same command reads it again"}
    if error:
        return Answer({**figures, **error}, text, exit_code=1)
    return Answer(figures, text)


def _goes_on(source: SourceOptions) -> bool:
    """Whether only a signal ends it."""
    from edgekit.scanner.sources.address import LIVE, kind_of

    kind = kind_of(source.address)
    return source.watch or source.loop or kind in LIVE or (kind == "pattern" and "," not in source.address)

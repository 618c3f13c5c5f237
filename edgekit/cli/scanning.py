"""``edgekit scan``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import Answer, answers

if TYPE_CHECKING:
    from edgekit.scanner import Summary
    from edgekit.scanner.config import ScanConfig

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
    default=100.0,
    show_default=True,
    type=click.FloatRange(0),
    help="After this long on one frame no further attempt at a code is started; 0: plain reading only.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Only name every mistake in the config file B.toml, and what this machine lacks.",
)
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
    code_budget_ms: float,
    check: bool,
) -> Answer:
    """Read images with a model, codes, or both: one JSON event an image. B is a bundle, or a TOML file that says all.

    A damaged image is reported as an event and does not stop the scan. Events for mqtt and http sinks wait on disk,
    in order, while the sink is down. Without --sink the events go to stdout; with --json stdout is the summary.

    \b
    Examples:
      edgekit scan digits.edge --source images/
      edgekit scan digits.edge --codes --source images/ --sink jsonl:events.jsonl --sink sqlite:events.db
      edgekit scan --codes --source inbox/ --watch --sink mqtt://broker:1883/line1/codes
      edgekit scan --check scan.toml && edgekit scan scan.toml
    """
    from edgekit.errors import UsageError
    from edgekit.progress import say
    from edgekit.scanner import Scanner, stop_on_signals
    from edgekit.scanner.service import named_config

    written = bundle is not None and bundle.suffix.lower() == ".toml"
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
    config = _with_stdout(config)
    targets = [sink.address for sink in config.sink]
    with stop_on_signals() as stop:
        summary = Scanner(config, stop=stop).run()
    answer = _answer(summary, ", ".join(sources) or "the sources", interrupted=stop.signal)
    if stop.signal == signal.SIGINT and not any(source.watch for source in config.source):
        raise KeyboardInterrupt
    if answer.exit_code:
        say(f"error: {answer.data['error']}\nhint: {answer.data['hint']}")
    if "jsonl:-" in targets:  # stdout belongs to the events
        say(answer.text)
        click.get_current_context().exit(answer.exit_code)
    return answer


def _read(path: Path) -> ScanConfig:
    """The config in a file, which says all of the scan."""
    from click.core import ParameterSource

    from edgekit.errors import UsageError
    from edgekit.scanner.config import read_config

    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("bundle", "as_json")
        and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(f"{path} says all of the scan, {given[0]} too", "leave the option out, or write it into the file")
    return read_config(path)


def _with_stdout(config: ScanConfig) -> ScanConfig:
    """Without a sink events go to stdout, unless the answer does."""
    from msgspec.structs import replace

    from edgekit.errors import UsageError
    from edgekit.scanner.config import SinkOptions

    as_json = bool(click.get_current_context().params["as_json"])
    if as_json and any(sink.address == "jsonl:-" for sink in config.sink):
        raise UsageError("--json and the sink jsonl:- both want stdout", "leave one of them out, or write jsonl:PATH")
    return config if config.sink or as_json else replace(config, sink=(SinkOptions("jsonl:-"),))


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


def _answer(summary: Summary, source: str, interrupted: int) -> Answer:
    """The summary in figures and in one line; exit code 1 where frames came and not one could be read."""
    figures = summary.figures()
    text = summary.line()
    if summary.captured and not summary.inferred and not interrupted:
        error = {"error": f"not one of the {summary.captured} images of {source} could be read", "hint": "the events say why"}
        return Answer({**figures, **error}, text, exit_code=1)
    return Answer(figures, text)

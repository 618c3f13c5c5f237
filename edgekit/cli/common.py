"""What every command shares: ``--json``, the printing of answers, and the words for errors."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click

from edgekit.errors import BudgetNotMet, EdgekitError, MissingExtra
from edgekit.progress import first, harmless, short

__all__ = [
    "SEED",
    "Answer",
    "Terminated",
    "answers",
    "bundle_argument",
    "ending_in_order",
    "fail",
    "lines",
    "out_option",
    "table",
    "targets_option",
]


_AGAIN = "run the same command again; finished work is kept"
#: What torch and numpy both take.
SEED = click.IntRange(0, 2**32 - 1)


class Terminated(SystemExit):
    """A signal that ends a program came; its exit code is what a shell reports of one (143 for SIGTERM)."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """In the block SIGTERM and SIGHUP raise `Terminated`: temporary folders go, half bundles too, and child processes end.

    By default either kills Python on the spot. Left alone are a signal that somebody handles or ignores (``nohup``), and the
    processes of ``torchrun``, which stops them while they wait for each other in native code, where no exception gets through.
    """
    if threading.current_thread() is not threading.main_thread() or "RANK" in os.environ:
        yield
        return
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # ``timeout`` sends it twice: what cleans up is not to be interrupted
    raise Terminated(number)


@dataclass(frozen=True)
class Answer:
    """What a command says: ``data`` for --json, ``text`` for people (made from ``data`` where empty).

    ``missed``: the budget that this, the best found, does not meet. It is raised when the text is out; --json has all in one.
    """

    data: Mapping[str, Any]
    text: str = ""
    exit_code: int = field(default=0)
    missed: BudgetNotMet | None = None


def answers(function: Callable[..., Answer]) -> Callable[..., int]:
    """Add ``--json`` to a command whose body returns an `Answer`; print it; return the exit code."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, all else on stderr.")
    @functools.wraps(function)
    def wrapper(*args: Any, as_json: bool, **kwargs: Any) -> int:
        answer = function(*args, **kwargs)
        if answer.missed is not None and as_json:
            raise answer.missed
        if first():  # of the processes of one torchrun, one answers
            click.echo(_json(answer.data) if as_json else harmless(answer.text or lines(answer.data)))
        if answer.missed is not None:
            raise answer.missed
        return answer.exit_code

    return wrapper


def bundle_argument() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A positional bundle, shown as B."""
    return click.argument("bundle", metavar="B", type=click.Path(path_type=Path))


def out_option(what: str, metavar: str = "B") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--out``: always required, never overwritten."""
    return click.option("--out", required=True, metavar=metavar, type=click.Path(path_type=Path), help=what)


def _use_targets(ctx: click.Context, _param: click.Parameter, files: tuple[Path, ...]) -> None:
    """Add the files to the variable that `load_targets` reads, for as long as the command runs; its children have it too."""
    if not files:
        return
    from edgekit.targets import USER_TARGETS

    before = os.environ.get(USER_TARGETS)
    os.environ[USER_TARGETS] = os.pathsep.join([*([before] if before else []), *map(str, files)])

    def restore() -> None:
        os.environ.pop(USER_TARGETS, None)
        if before is not None:
            os.environ[USER_TARGETS] = before

    ctx.call_on_close(restore)


#: ``--targets FILE``: targets of the user's own, for one command.
targets_option = click.option(
    "--targets",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    expose_value=False,
    callback=_use_targets,
    help="Your own targets.toml as well; EDGEKIT_TARGETS=FILE does it for every command.",
)


def table(rows: list[dict[str, Any]], columns: list[str] | None = None) -> str:
    """Rows as aligned text; numbers to the right, absent values as a dash."""
    if not rows:
        return ""
    columns = columns or list(rows[0])
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    right = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]

    def line(values: list[str]) -> str:
        return "  ".join(v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)).rstrip()

    return "\n".join([line(columns), line(["-" * w for w in widths]), *map(line, cells)])


def fail(error: BaseException, as_json: bool) -> int:
    """Print cause and cure on stderr (and as JSON on stdout if asked); return the exit code."""
    result: Mapping[str, Any] = {}
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        message, hint, code = "interrupted", _AGAIN, 1
    elif isinstance(error, Terminated):
        message, hint, code = f"ended by {error.signal.name}", _AGAIN, 128 + error.signal
    elif isinstance(error, click.ClickException):
        if not as_json:
            error.show(sys.stderr)
            return error.exit_code
        message, hint, code = error.format_message(), "see --help", error.exit_code
    elif isinstance(error, EdgekitError):
        message, hint, code = error.message, error.hint, error.exit_code
        result = error.result if isinstance(error, BudgetNotMet) else {}
    elif isinstance(error, BrokenPipeError):
        return 1
    elif isinstance(error, OSError):
        message, hint, code = _os_error(error)
    elif isinstance(error, ModuleNotFoundError) and error.name:
        missing = MissingExtra.of(error)
        message, hint, code = missing.message, missing.hint, missing.exit_code
    else:
        message, hint, code = f"{type(error).__name__}: {error}", "this is a defect of edgekit; EDGEKIT_DEBUG=1 shows where", 1
    if os.environ.get("EDGEKIT_DEBUG"):
        traceback.print_exception(error)
    if as_json and first():
        with contextlib.suppress(OSError):  # it may be stdout that failed
            click.echo(_json({**result, "error": message, "hint": hint}))
    # The others speak too here: what failed may have failed in one of them only.
    which = "" if first() else f" in process {os.environ['RANK']}"
    click.echo(harmless(f"error{which}: {' '.join(message.split())}"), err=True)
    if hint:
        click.echo(harmless(f"hint: {' '.join(hint.split())}"), err=True)
    return code


def _os_error(error: OSError) -> tuple[str, str, int]:
    named = error.filename2 or error.filename  # of a rename the second: the first is a temporary name that nobody gave
    where = f" ({named})" if named else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full{where}; nothing was left half written", "free some space and run the command again", 1
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}: {error.strerror}", "choose another path, or change its permissions", 1
    if error.errno == errno.EISDIR:
        return f"a folder is in the way{where}", "name a file", 2
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"a file is in the way{where}: {error.strerror}", "name a path below folders only", 2
    return f"{error.strerror or error}{where}", "check the path", 1


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(_plain(data), allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON for mappings, paths, numpy scalars and arrays. NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return short(value) if isinstance(value, float) else str(value)


def lines(data: Mapping[str, Any]) -> str:
    """``key  value`` lines, nested mappings indented under their key."""
    width = max((len(k) for k in data), default=0)
    rows = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            rows.append(key)
            rows += [f"  {line}" for line in lines(value).splitlines()]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            rows.append(key)
            rows += [f"  {line}" for line in table([dict(row) for row in value]).splitlines()]
        else:
            rows.append(f"{key.ljust(width)}  {_cell(value) if not isinstance(value, list) else ', '.join(map(str, value))}")
    return "\n".join(rows)

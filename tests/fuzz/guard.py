"""One input at a time, with a limit on time and memory, and an eye on every file that is opened for writing."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from edgekit.errors import EdgekitError

from . import targets

_CHANGING = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "os.chown"}
#: Those whose last argument is the folder that a path is relative to, as a descriptor.
_RELATIVE = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: What is looked at while an input is read: the folder that may be written in, and what was written elsewhere.
_watched: dict[str, Any] = {"inside": (), "outside": []}


class Hang(BaseException):
    """Not an `Exception`: readers turn those into words."""


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watched["inside"] or not (event == "open" or event in _CHANGING):
        return
    if event == "open":
        path, _, flags = args
        if not isinstance(flags, int) or not flags & _WRITING:
            return
        paths: tuple[Any, ...] = (path,)
    else:
        paths = args[:2] if event in ("os.rename", "os.link") else args[1:2] if event == "os.symlink" else args[:1]
    folder = args[-1] if event != "open" and isinstance(args[-1], int) and args[-1] >= 0 else None
    base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None and event in _RELATIVE else os.getcwd()
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            parent, name = os.path.split(os.path.join(base, os.fsdecode(path)))
            whole = os.path.join(os.path.realpath(parent), name)  # by way of a link, too
            if not whole.startswith(_watched["inside"]) and not whole.startswith(("/dev/", "/proc/")):
                _watched["outside"].append(f"{event} {whole}")


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Hang(f"still at work after {targets.SECONDS} s")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """For a process: the memory that it has and `targets.MEMORY` more; the alarm's handler; the eye on files."""
    if not _watched.get("hooked"):
        sys.addaudithook(_audit)
        _watched["hooked"] = True
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + targets.MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def tried(read: Callable[[bytes, Path], object], data: bytes) -> str:
    """What is wrong with how ``read`` takes ``data``; empty where nothing is."""
    folder = Path(tempfile.mkdtemp(prefix="edgekit-fuzz.")).resolve()
    work = folder / "in"
    work.mkdir()
    temporary = tempfile.tempdir
    tempfile.tempdir = str(work)  # what a reader keeps for a moment
    _watched.update(inside=(str(work),), outside=[])
    signal.alarm(targets.SECONDS)
    wrong = ""
    try:
        read(data, work)
    except EdgekitError as error:
        if not error.message.strip() or not error.hint.strip():
            wrong = f"an error without words: {error!r}"
    except Hang as error:
        wrong = str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  that is what is looked for
        wrong = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        _watched["inside"] = ()
        tempfile.tempdir = temporary
    strays = [path.name for path in folder.iterdir() if path != work] + _watched["outside"]
    shutil.rmtree(folder, ignore_errors=True)
    return wrong or (f"files outside of its folder: {strays[:3]}" if strays else "")

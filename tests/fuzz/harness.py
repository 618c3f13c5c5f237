"""What a fuzz target may do, and how one input is run: errors of edgekit only, no file outside its folder, in time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError

__all__ = ["CORPUS", "SECONDS", "TARGETS", "Finding", "Stepped", "Target", "corpus_of", "folder", "run_one", "target"]

CORPUS = Path(__file__).with_name("corpus")
SECONDS = 10.0  # an input may take so long, on a busy machine too
MEMORY = 1 << 30  # bytes of address space that a process of the runner may map beyond what it has when it starts
#: Linux gives no file for these; they are devices that tests and libraries open.
_HARMLESS = ("/dev/null", "/dev/urandom", "/proc/")


class Stepped(AssertionError):
    """A target did what none may: wrote outside its folder, started a program, loaded a pickle."""


@dataclass(frozen=True)
class Target:
    """``run`` takes the bytes; ``seeds`` makes small real inputs; ``kind`` says how they are mutated; ``also``: errors beside
    edgekit's own that the functions under test state."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    kind: str
    also: tuple[type[BaseException], ...] = ()
    programs: bool = False
    words: tuple[bytes, ...] = ()
    seconds: float = SECONDS


@dataclass
class Finding:
    """An input that broke a rule, and how."""

    target: str
    data: bytes
    what: str
    trace: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:12]


TARGETS: dict[str, Target] = {}


def target(
    seeds: Callable[[], list[bytes]], kind: str, *, also: tuple[type[BaseException], ...] = (), **more: Any
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Enter a function into `TARGETS` under its name."""

    def enter(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        name = run.__name__
        TARGETS[name] = Target(name, run, seeds, kind, also, **more)
        return run

    return enter


def corpus_of(name: str) -> list[bytes]:
    """The seeds, which are made here, and the kept inputs."""
    kept = sorted((CORPUS / name).iterdir()) if (CORPUS / name).is_dir() else []
    return [*TARGETS[name].seeds(), *(path.read_bytes() for path in kept)]


class _Watch:
    """Python's audit events while a target runs (PEP 578): what it opens for writing, makes, removes or starts."""

    def __init__(self) -> None:
        self.inside: str | None = None
        self.programs = False
        self.wrong = ""
        self._hooked = False

    def begin(self, inside: Path, programs: bool) -> None:
        if not self._hooked:  # a hook cannot be taken away again; without a folder it does nothing
            sys.addaudithook(self._heard)
            self._hooked = True
        self.wrong, self.programs, self.inside = "", programs, os.path.realpath(inside)

    def end(self) -> str:
        self.inside = None
        return self.wrong

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (
                isinstance(mode, str) and set(mode) & set("wax+")
            )
            if writes and isinstance(path, str | bytes):
                self._check(event, path)
        elif event == "os.mkdir" and os.path.isdir(os.fsdecode(arguments[0])):
            return  # it is there, and stays as it is
        elif event in ("os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.chmod", "os.utime"):
            self._check(event, arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._check(event, arguments[1])
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn"):
            if not self.programs:
                self.wrong = f"{event} {str(arguments)[:200]}"
        elif event == "pickle.find_class":
            self.wrong = f"{event} {arguments}"

    def _check(self, event: str, path: Any) -> None:
        inside = self.inside
        if not isinstance(path, str | bytes | os.PathLike) or inside is None:
            return  # a file that is open already
        name = os.path.abspath(os.fsdecode(path))
        folder_ = os.path.realpath(os.path.dirname(name))
        if not (folder_ + os.sep).startswith(inside + os.sep) and not name.startswith(_HARMLESS):
            self.wrong = f"{event} {name}"


_watch = _Watch()
_here: list[Path] = []


def folder() -> Path:
    """The one folder that the running target may write in; empty when it begins."""
    return _here[-1]


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="edgekit-fuzz-", dir=base))
    before, temporary = os.getcwd(), tempfile.tempdir
    _here.append(path)
    try:
        os.chdir(path)
        tempfile.tempdir = str(path)
        yield path
    finally:
        tempfile.tempdir = temporary
        os.chdir(before)
        _here.pop()
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_one(one: Target, data: bytes) -> Finding | None:
    """Run a target on ``data``; what it broke, if anything."""
    try:
        with _own_folder() as inside, _in_time(one.seconds):
            _watch.begin(inside, one.programs)
            try:
                one.run(data)
            except EdgekitError as error:
                if not error.message or not error.hint or "\n" in error.message + error.hint:
                    return Finding(
                        one.name, data, f"an error without cause or cure in a line: {error.message!r}, {error.hint!r}"
                    )
            except one.also:
                pass
            finally:
                wrong = _watch.end()
            if wrong:
                raise Stepped(wrong)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  whatever it is, it is a finding
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
        return Finding(one.name, data, what, traceback.format_exc()[-6000:])
    return None

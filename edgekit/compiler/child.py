"""Native parsers run in a child process: a crash, a hang or a memory bomb in one costs an error line, not the caller.

`call` starts ``python -m edgekit.compiler.child MODULE:FUNCTION FOLDER BYTES``; the function gets the request (JSON) and the
folder that both sides share, and returns the answer (JSON). Errors of edgekit cross over as they are.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import edgekit.errors
from edgekit.children import end_with_parent
from edgekit.errors import EdgekitError, GraphError, MissingExtra, UsageError

from .build_options import MEMINFO, memory_in

__all__ = ["NativeCrash", "call"]

MAX_TIMEOUT_S = 1e6  # `Popen.wait` takes no more than the clock holds
ADDRESS_SPACE = 32 << 30  # bytes; a hostile graph asks for terabytes
LEAST_SPACE = 4 << 30  # bytes; libraries and their threads map a good part of it without using it
_ERRNO = 100  # exit codes above it: the answer could not be written, for this reason
#: glibc gives large blocks back to the system at once: weights that are freed before the next copy are not counted twice.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
_FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_LONGEST = 300  # characters of an unforeseen error's message


class NativeCrash(GraphError):
    """The child died of the graph. ``code``: its exit code, below zero the signal."""

    code = 0

    @property
    def fault(self) -> bool:
        """Whether the library itself failed, as it may not on another graph; SIGKILL is the system's, short of memory."""
        return -self.code in _FAULTS


def call(
    function: str, request: Mapping[str, Any], folder: Path, timeout_s: float, address_space: int = ADDRESS_SPACE
) -> dict[str, Any]:
    """Run ``MODULE:FUNCTION`` of this room in a child; returns its answer.

    ``address_space``: bytes it may map, fewer where the machine has less to give, 0 for no limit: a CUDA context reserves
    addresses for all memory of the machine, so TensorRT beside a GPU fails under any limit that would help.

    Raises the child's `EdgekitError` or `OSError`; `NativeCrash` where the child died, `GraphError` where it
    took longer than ``timeout_s``.
    """
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s < MAX_TIMEOUT_S:
        raise UsageError(f"a timeout of {timeout_s!r} s", f"give seconds above 0 and below {MAX_TIMEOUT_S:g}")
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    environment = {**_MALLOC, **os.environ, "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)}
    command = [sys.executable, "-m", "edgekit.compiler.child", function, str(folder), str(address_space)]
    # cwd is our own folder, so that no module of the caller's folder shadows a library
    process: subprocess.Popen[bytes] | None = None
    try:
        with _uninterrupted():
            process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent, which kills the child: no traceback of its own
            )
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise GraphError(
            f"the graph took longer than {timeout_s:g} s and was stopped", "raise --timeout, or simplify the graph"
        ) from None
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
    answer = folder / "answer.json"
    if code > _ERRNO:
        raise OSError(code - _ERRNO, os.strerror(code - _ERRNO), str(folder))
    if code != 0 or not answer.is_file():
        crash = NativeCrash(
            f"the native parser {_fate(code)} on this graph", "fix its shapes (--shape NAME:AxB at import), or export it again"
        )
        crash.code = code
        raise crash
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise _rebuilt(found["error"])
    return found


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and `kill` wait for the end of the block: inside `Popen` they would leave a child that nobody knows."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *_ENDING})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _fate(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
        return "was killed (SIGKILL), as systems do where memory is short," if name == "SIGKILL" else f"crashed ({name})"
    except ValueError:
        return f"crashed (signal {-code})"


def _rebuilt(error: Mapping[str, Any]) -> EdgekitError | OSError:
    if error["kind"] == "OSError":
        return OSError(error["errno"], error["strerror"], error["filename"] or None)
    if error["kind"] == "MissingExtra":
        return MissingExtra(error["extra"], error["module"])
    kind = getattr(edgekit.errors, error["kind"], GraphError)
    raised: EdgekitError = kind.__new__(kind)
    EdgekitError.__init__(raised, error["message"], error["hint"])
    return raised


def _described(error: BaseException) -> dict[str, Any]:
    if isinstance(error, MissingExtra):
        return {"kind": "MissingExtra", "extra": error.extra, "module": error.module}
    if isinstance(error, ModuleNotFoundError):
        return _described(MissingExtra.of(error))
    if isinstance(error, EdgekitError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    if isinstance(error, OSError) and error.errno:
        return {
            "kind": "OSError",
            "errno": error.errno,
            "strerror": error.strerror or "",
            "filename": str(error.filename or ""),
        }
    if isinstance(error, MemoryError):
        return {"kind": "GraphError", "message": "the graph needs more memory than allowed", "hint": "check its tensor sizes"}
    first = (str(error).splitlines() or [""])[0]
    message = f"{type(error).__name__}: {first}"[:_LONGEST]
    return {"kind": "GraphError", "message": message, "hint": "this is a defect of edgekit; EDGEKIT_DEBUG=1 shows where"}


def _limit_memory(address_space: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    there = memory_in(MEMINFO, "MemAvailable")
    if address_space and there:  # past it the system kills, this process or another, and nobody learns which node it was
        address_space = min(address_space, max(there, LEAST_SPACE))
    if address_space and (hard == resource.RLIM_INFINITY or hard > address_space):
        resource.setrlimit(resource.RLIMIT_AS, (address_space, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _quiet_natives(folder: Path) -> None:
    """Native libraries write to file descriptors 1 and 2: into the log with it. Python's own stderr stays the person's."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def main() -> None:
    module, name = sys.argv[1].split(":")
    folder = Path(sys.argv[2])
    end_with_parent()
    _limit_memory(int(sys.argv[3]))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)  # they were blocked when the parent started this process
    if not os.environ.get("EDGEKIT_DEBUG"):
        _quiet_natives(folder)
    try:
        request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        answer = getattr(importlib.import_module(f"edgekit.compiler.{module}"), name)(request, folder)
    except Exception as error:  # noqa: BLE001  the parent turns it into words
        if os.environ.get("EDGEKIT_DEBUG"):
            sys.excepthook(type(error), error, error.__traceback__)
        answer = {"error": _described(error)}
    temporary = folder / "answer.tmp"
    try:
        temporary.write_text(json.dumps(answer), encoding="utf-8")
        temporary.replace(folder / "answer.json")
    except OSError as error:
        os._exit(_ERRNO + (error.errno or errno.EIO))
    sys.stderr.flush()
    # Skips the destructors of native libraries: some crash at exit after good work.
    os._exit(0)


if __name__ == "__main__":
    main()

"""A bundle that was offered is opened in a process of its own first: one that crashes or hangs there takes no scan with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import msgspec

from edgekit.children import end_with_parent
from edgekit.errors import BackendError, EdgekitError, UsageError, first_line

__all__ = ["main", "probe"]

_POLL_S = 0.05
_NICE = 10  # the scan goes first
_CHILD = "import sys; sys.path[:] = sys.argv[6:]; from edgekit.scanner.probe import main; main(*sys.argv[1:6])"
_MOST_BYTES = 1 << 16


def probe(path: str, backend: str, precision: str, threads: int, patience_s: float, stopping: threading.Event) -> None:
    """Open the bundle at ``path`` and hold it against its golden outputs, elsewhere.

    Raises `BackendError` with the words why it does not pass, where it ends without any, and after ``patience_s``; returns
    early once ``stopping`` is set.
    """
    argv = [path, backend, precision, str(threads), str(os.getpid()), *sys.path]
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", _CHILD, *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        end = time.monotonic() + patience_s
        try:
            while process.poll() is None:
                if stopping.wait(_POLL_S):
                    return
                if time.monotonic() > end:
                    raise BackendError(f"it was not open within {patience_s:g} s", "raise open_s, or make the bundle again")
            assert process.stdout is not None
            said = process.stdout.read(_MOST_BYTES)
        finally:
            if process.poll() is None:
                process.kill()
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise BackendError(f"what opened it crashed ({name})", "run it alone: edgekit bench B")
    try:
        why = msgspec.json.decode(said, type=str)
    except msgspec.DecodeError:
        raise BackendError(f"what opened it ended with {process.returncode}", "run it alone: edgekit bench B") from None
    if why:
        raise BackendError(why, "make the bundle again")


def main(path: str, backend: str, precision: str, threads: str, parent: str) -> None:
    """The process: one JSON string on stdout, empty where all is well."""
    from edgekit.runtime import Model
    from edgekit.runtime.golden import Golden

    end_with_parent()
    if os.getppid() != int(parent):
        return
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    out = os.dup(1)
    os.dup2(2, 1)  # libraries that print
    why = ""
    try:
        with Model.open(path, backend, precision=precision, threads=int(threads)) as model:  # type: ignore[arg-type]
            golden = Golden.of(model.runner)
            if not any(array.size for array in golden.outputs.values()):
                raise UsageError(f"{path} holds no golden outputs", "make the bundle again")
            golden.check(model.runner)
    except EdgekitError as error:
        why = error.message
    except Exception as error:  # noqa: BLE001  whatever a bundle does, it is told
        why = f"{type(error).__name__}: {first_line(error)}"
    os.write(out, msgspec.json.encode(why))

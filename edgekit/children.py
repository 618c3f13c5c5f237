"""Processes of our own interpreter beside this one, for code that may crash, hang or take all memory."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

__all__ = ["calling", "end_with_parent", "go_first", "start"]

_PR_SET_PDEATHSIG = 1


def calling(module: str) -> str:
    """Code for `start`: ``module.main(descriptor, number)``, found where this process finds its modules."""
    return f"import sys; sys.path[:] = sys.argv[3:]; from {module} import main; main(int(sys.argv[1]), int(sys.argv[2]))"


def start(code: str, theirs: socket.socket, number: int, *, quiet: bool = True) -> subprocess.Popen[bytes]:
    """Run ``code``, which gets the descriptor of its end of a pair of sockets, a number and our ``sys.path`` in ``sys.argv``.

    Nothing else is open there, but our stderr where it is not to be ``quiet``; and it has a session of its own: Ctrl-C is for
    this process, which ends it. Raises `OSError` where no process can be had.
    """
    import subprocess  # the children need none

    return subprocess.Popen(  # noqa: S603  our own interpreter
        [sys.executable, "-c", code, str(theirs.fileno()), str(number), *sys.path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if quiet else None,
        pass_fds=(theirs.fileno(),),
        start_new_session=True,
    )


def end_with_parent() -> None:
    """Have the kernel kill this process with the thread that started it, however that ends. Linux alone knows that (prctl(2),
    PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def go_first() -> None:
    """Be what the system ends first where memory is short, and leave no image of this process on the disk."""
    import resource  # not on Windows, where nobody scans

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")

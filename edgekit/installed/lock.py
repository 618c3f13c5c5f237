"""One writer at a time under a root, across processes and containers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.files import taken
from edgekit.progress import say

__all__ = ["LOCK", "PATIENCE_S", "START_S", "hold"]

LOCK = ".lock"
#: What an install waits for another: that one may fetch nothing by then, but test a large engine.
PATIENCE_S = 900.0
#: What a start, a confirmation or a withdrawal waits for a few renames; the scan's watchdog allows 10 s.
START_S = 2.0


@contextlib.contextmanager
def hold(folder: Path, patience_s: float) -> Iterator[None]:
    """Hold ``folder``'s lock in the block: flock(2) on a file that its owner alone can open, since whoever can open one can
    also hold it for ever.

    After a second it is said who holds it. Raises `EdgekitError` after ``patience_s`` seconds, `OSError` where the file cannot
    be opened.
    """
    handle = -1
    try:
        while handle < 0 or _gone(handle, folder / LOCK):  # a first install that was refused takes its lock with it
            if handle >= 0:
                os.close(handle)
                handle = -1  # what comes may raise
            handle = _taken(folder, patience_s)
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def _taken(folder: Path, patience_s: float) -> int:
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:  # with a first install that was refused
        raise EdgekitError(f"there is no folder {folder} any more", "the same command makes it anew") from None
    try:
        owner, file = os.stat(folder), os.fstat(handle)
        # Root was here first, in another user's root. What that user has linked there instead of a lock is not given away.
        if os.geteuid() == 0 and file.st_uid != owner.st_uid and (file.st_nlink, file.st_size) == (1, 0):
            os.fchown(handle, owner.st_uid, owner.st_gid)
        _take(handle, folder, patience_s)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _gone(handle: int, path: Path) -> bool:
    try:
        return os.stat(path, follow_symlinks=False).st_ino != os.fstat(handle).st_ino
    except FileNotFoundError:
        return True


def _take(handle: int, folder: Path, patience_s: float) -> None:
    if not taken(handle, patience_s, lambda: say(f"waiting for {_holder(handle)}, which is at work in {folder}")):
        raise EdgekitError(
            f"{_holder(handle)} has been at work in {folder} for more than {patience_s:g} s", "wait for it, or end it"
        )


def _holder(handle: int) -> str:
    """Who holds the lock, by /proc/locks (proc(5)): nobody knows where that process is in another container."""
    inode = os.fstat(handle).st_ino
    try:
        rows = [row.split() for row in Path("/proc/locks").read_text("ascii").splitlines()]
        pid = next(row[4] for row in rows if row[1] == "FLOCK" and row[5].endswith(f":{inode}"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").split()
    except (OSError, StopIteration, IndexError):
        return "another command"
    return f"process {pid} ({' '.join(words)[:80]})"

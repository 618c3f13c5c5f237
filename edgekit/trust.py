"""Which TensorRT engines this machine may load. An engine is executable: loading one runs what its maker put in.

A manifest's hashes say that a file is whole, not who made it. So an engine is loaded only where its sha256 was noted here:
by `build` on this machine, by `install` of a pack whose signature was checked (or that the user vouched for), or where it
was compiled on this machine from a build kit. The notes are empty files, named by the digest, in a folder that only its
owner writes.

    $XDG_STATE_HOME/edgekit/trusted/   ~/.local/state by default; what a user built
    /var/lib/edgekit/trusted/          what root built or installed, for every user's services
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from .errors import BackendError

__all__ = ["ENGINES", "TRUST_ALL", "check_private", "is_trusted", "local_builds", "state_folders", "trust_engine", "trust_here"]

#: Set to 1, every engine of a whole bundle is loaded: the user vouches for all bundles that the process opens.
TRUST_ALL = "EDGEKIT_TRUST_ENGINES"
#: Where a device keeps what it compiled from build kits, below each state folder.
ENGINES = "engines"
SYSTEM = Path("/var/lib/edgekit")
_NOTES = "trusted"
_HERE: set[str] = set()
_DIGEST = re.compile(r"[0-9a-f]{64}")


def state_folders() -> tuple[Path, ...]:
    """The user's, then the system's; the first is the one that this user writes. A user without a home has the latter alone."""
    base = os.environ.get("XDG_STATE_HOME")
    try:
        user = Path(base or Path.home() / ".local" / "state") / "edgekit"
    except RuntimeError:  # a container's number that no passwd names
        return (SYSTEM,)
    return (SYSTEM, user) if not base and os.geteuid() == 0 else (user, SYSTEM)


def trust_engine(sha256: str) -> None:
    """Note that the engine with this digest may be loaded. A machine that cannot keep the note builds all the same."""
    if not _DIGEST.fullmatch(sha256):
        raise ValueError(f"not a sha256: {sha256!r}")
    folder = state_folders()[0] / _NOTES
    with contextlib.suppress(OSError):
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)  # another process may be at it
            folder.chmod(0o755)  # whatever the umask: root's notes are for every user's services
        (folder / sha256).touch(mode=0o644)


def trust_here(sha256: str) -> None:
    """Let this process load the engine with this digest, and no other: it is to be tried before it is believed."""
    _HERE.add(sha256)


def is_trusted(sha256: str) -> bool:
    """Whether the engine with this digest was built or installed on this machine."""
    if os.environ.get(TRUST_ALL) == "1" or sha256 in _HERE:
        return True
    if not _DIGEST.fullmatch(sha256):
        return False
    for folder in state_folders():
        note = folder / _NOTES / sha256
        with contextlib.suppress(BackendError, OSError):
            check_private(note)
            return True
    return False


def local_builds(key: str) -> list[Path]:
    """Folders in which this machine may keep the engine that it compiled from the build kit with this key."""
    return [folder / ENGINES / key[:16] for folder in state_folders()]


def check_private(path: Path) -> None:
    """Raise `BackendError` where another user could have written a file or its folder, `OSError` where it is not there."""
    for part in (path, path.parent):
        about = part.lstat()
        if part.is_symlink():
            raise BackendError(f"{part} is a symbolic link", "remove it, and make the file again")
        if about.st_uid not in (0, os.geteuid()) or about.st_mode & 0o022:
            raise BackendError(
                f"{part} can be written by another user than you and root", f"chmod go-w {part}, after a look at who wrote it"
            )

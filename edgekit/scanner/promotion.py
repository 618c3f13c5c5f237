"""What a shadow promoted, kept over a restart: the scan starts with the bundle that it ended with."""

from __future__ import annotations

import time
from hashlib import blake2b
from pathlib import Path

import msgspec

from edgekit.bundle import Bundle
from edgekit.errors import EdgekitError
from edgekit.files import atomic_write

from .events import rfc3339
from .outbox import default_outbox

__all__ = ["Promoted", "keep_promoted", "promoted_file", "read_promoted"]

_MOST_BYTES = 1 << 16


class Promoted(msgspec.Struct, frozen=True):
    """``bundle`` with this ``digest`` took the place of the configured one, whose digest is ``instead_of``."""

    bundle: str
    digest: str
    instead_of: str
    time: str = ""


def promoted_file(kept: str, candidate: str, configured: str) -> Path:
    """``kept``, else a file in the state folder, one for each candidate and configured bundle (their paths)."""
    name = blake2b(f"{candidate}\0{configured}".encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return Path(kept) if kept else default_outbox().parent / f"promoted-{name}.json"


def keep_promoted(path: Path, bundle: Bundle, instead_of: str) -> str:
    """Why it is not kept, "" where it is. A link (an install's ROOT/current) is followed: it may soon lead elsewhere."""
    promoted = Promoted(str(bundle.path.resolve()), bundle.digest, instead_of, rfc3339(time.time()))
    try:
        if bundle.digest == instead_of:  # back where the config is
            path.unlink(missing_ok=True)
            return ""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, msgspec.json.encode(promoted) + b"\n")
    except (OSError, EdgekitError) as error:
        return f"{path}: {getattr(error, 'strerror', None) or error}"
    return ""


def read_promoted(path: Path, configured: Bundle) -> tuple[Bundle | None, str]:
    """The bundle that was promoted in the place of ``configured``, or None and why there is none; "" where none ever was.

    Its files are hashed where it is opened.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return None, ""
        promoted = msgspec.json.decode(path.read_bytes(), type=Promoted)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        return None, f"{path} cannot be read: {error}"
    if promoted.instead_of != configured.digest:  # the config names another one since: that is newer
        return None, ""
    try:
        bundle = Bundle.open(promoted.bundle, verify=False)
    except (EdgekitError, OSError) as error:
        return None, getattr(error, "message", str(error))
    if bundle.digest != promoted.digest:
        return None, f"{promoted.bundle} is {bundle.digest[:12]} now, {promoted.digest[:12]} was promoted"
    return bundle, ""

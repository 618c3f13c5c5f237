"""From a bundle to a device: pack, sign, verify, install, roll back.

    signing.py   Ed25519 over a whole file, in a trailer that needs no parser
    archive.py   the packed bundle: a plain zip, written the same way every time, read with suspicion
    packing.py   pack and verify
    fetching.py  where a pack comes from: a file, a stick, an HTTP server
    checks.py    what is tried before a switch: room, golden outputs, latency
    slots.py     two slots under a root, switched by one rename; `edgekit.installed` is what the scanner knows of them

Nothing here trusts a byte before its signature is checked; a pack that was refused has changed nothing.
"""

from edgekit.installed import Start, mark, starting

from .packing import contents, pack, verify
from .signing import keygen
from .slots import install, rollback, status

__all__ = ["Start", "contents", "install", "keygen", "mark", "pack", "rollback", "starting", "status", "verify"]

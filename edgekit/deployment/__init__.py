"""From a bundle to a device: pack, sign, verify, install, roll back.

    signing.py   keys; Ed25519 over a whole file and what is stated of it, in a trailer that needs no parser
    revoking.py  signed lists of keys and packs that are no longer to be believed
    trusted.py   what a device believes: keys, revocations, the releases it has accepted, the time
    archive.py   the packed bundle: a plain zip, written the same way every time, read with suspicion
    packing.py   pack, sign and verify
    inventory.py what is inside, and the same as a bill of materials (CycloneDX)
    fetching.py  where a pack comes from: a file, a stick, an HTTP server
    checks.py    what is tried before a switch: room, golden outputs, latency
    slots.py     two slots under a root, switched by one rename; `edgekit.installed` is what the scanner knows of them

Nothing here trusts a byte before its signature is checked; a pack that was refused has changed nothing.
"""

from edgekit.installed import Start, mark, starting

from .packing import contents, pack, sign, verify
from .revoking import revoke
from .signing import keygen
from .slots import install, rollback, status

__all__ = [
    "Start",
    "contents",
    "install",
    "keygen",
    "mark",
    "pack",
    "revoke",
    "rollback",
    "sign",
    "starting",
    "status",
    "verify",
]

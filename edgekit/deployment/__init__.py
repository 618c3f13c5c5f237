"""From a bundle to a device: pack, sign, verify, install, roll back.

    signing.py   Ed25519 over a whole file, in a trailer that needs no parser
    archive.py   the packed bundle: a plain zip, written the same way every time, read with suspicion
    packing.py   pack and verify
    slots.py     two slots under a root, switched by one rename

Nothing here trusts a byte before its signature is checked; a pack that was refused has changed nothing.
"""

from .packing import contents, pack, verify
from .signing import keygen
from .slots import install, rollback, status

__all__ = ["contents", "install", "keygen", "pack", "rollback", "status", "verify"]

"""From a bundle to a device: pack, sign, verify, install, roll back.

    signing.py   keys; Ed25519 over a whole file and what is stated of it, in a trailer that needs no parser
    revoking.py  signed lists of keys and packs that are no longer to be believed
    trusted.py   what a device believes: keys, revocations, the releases it has accepted, the time
    archive.py   the packed bundle: a plain zip, written the same way every time, read with suspicion
    packing.py   pack, sign and verify
    inventory.py what is inside, and the same as a bill of materials (CycloneDX)
    fetching.py  where a pack comes from: a file, a stick, an HTTP server
    checks.py    what is tried before a switch: room, golden outputs, latency
    apart.py     the last two of them in a process of its own, which a model may take with it
    installing.py  an install, step by step: what is asked before anything of a pack runs
    slots.py     two slots under a root, switched by one rename: the switch, the way back, the status
                 (`edgekit.installed` is what the scanner knows of them)

Nothing here trusts a byte before its signature is checked; a pack that was refused has changed nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.lazy import on_first_use

if TYPE_CHECKING:
    from edgekit.installed import Start, mark, starting

    from .installing import install
    from .packing import contents, pack, sign, verify
    from .revoking import revoke
    from .signing import keygen
    from .slots import rollback, status

#: Loaded on first use: the process that tries a bundle needs none of them.
_HOMES = {
    "Start": "edgekit.installed",
    "contents": ".packing",
    "install": ".installing",
    "keygen": ".signing",
    "mark": "edgekit.installed",
    "pack": ".packing",
    "revoke": ".revoking",
    "rollback": ".slots",
    "sign": ".packing",
    "starting": "edgekit.installed",
    "status": ".slots",
    "verify": ".packing",
}

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

__getattr__, __dir__ = on_first_use(__name__, _HOMES)

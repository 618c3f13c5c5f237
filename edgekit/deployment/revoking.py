"""A signed list of what is no longer to be believed: keys, packs, bundles. Text in one spelling, signed by its last line:

    edgekit-revocations-1 number=0020261128120000\\n
    key 0123456789abcdef\\n             sorted; key ids first, then digests of packs or of bundles
    pack 64 hex digits\\n
    edgekit-signature KEY_ID BASE64\\n

Lists add up: what was revoked once stays revoked. So an old list takes nothing back, and whoever has stolen a key can revoke
more with it, but cannot bring that key back by a list with a higher number.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import SignatureError, UsageError
from edgekit.files import atomic_write, check_new

from .signing import LINE_BYTES, MAX_RELEASE, check_line, key_id_of, private_key, signature_line

__all__ = ["MAX_BYTES", "REVOKED", "Revoked", "read_list", "revoke"]

REVOKED = "revoked.txt"
_CONTEXT = b"edgekit-revocations-1\0"
_LIST = re.compile(rb"edgekit-revocations-1 number=([0-9]{16})\n((?:key [0-9a-f]{16}\n)*)((?:pack [0-9a-f]{64}\n)*)")
_ID = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}", re.ASCII)
MAX_BYTES = 1 << 20


class Revoked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Key ids (16 hex digits) and digests (64) that nothing is believed of. ``number``: of the newest list in it."""

    number: int = 0
    keys: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()

    def __or__(self, other: Revoked) -> Revoked:
        return Revoked(max(self.number, other.number), self.keys | other.keys, self.digests | other.digests)

    def text(self) -> bytes:
        rows = [f"key {key}\n" for key in sorted(self.keys)] + [f"pack {digest}\n" for digest in sorted(self.digests)]
        return f"edgekit-revocations-1 number={self.number:016}\n{''.join(rows)}".encode()


def read_list(path: Path, keys: Mapping[str, Any]) -> tuple[Revoked, str] | None:
    """The list in a file and the id of the key that signed it; None where no key of ``keys`` has.

    Its form is looked at once its signature holds. Raises `SignatureError` where it is absent, where a known key signed
    something else, or what was signed is no list.
    """
    if not path.is_file():
        raise SignatureError(f"there is no list of revocations at {path}", "make one: edgekit revoke ID --out F --key K")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise SignatureError(f"{path} is larger than {MAX_BYTES >> 20} MiB: no list of revocations", "fetch it again")
    body, line = data[:-LINE_BYTES], data[-LINE_BYTES:]
    signer = check_line(line, _CONTEXT + body, keys)
    if signer is None:
        return None
    match = _LIST.fullmatch(body)
    if match:
        ids, digests = ([row.split()[1].decode() for row in part.splitlines()] for part in match.groups()[1:])
        found = Revoked(int(match[1]), frozenset(ids), frozenset(digests))
        if found.text() == body:
            return found, signer
    raise SignatureError(f"{path} is signed, but no list of revocations", "make it anew: edgekit revoke ID --out F --key K")


def revoke(ids: Iterable[str], *, out: str | os.PathLike[str], key: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a list that revokes ``ids`` (key ids of 16 hex digits; digests of packs or bundles of 64), signed with ``key``.

    A list that is at ``out``, signed by the same key, is added to. Its number grows: the time as YYYYMMDDhhmmss, or one more
    than before. Returns ``revoked`` (the path), ``number``, ``keys``, ``digests``, ``key_id``.
    Raises `UsageError` for what is no id, `SignatureError` where another key signed the list at ``out``.
    """
    given = list(ids)
    if bad := [one for one in given if not _ID.fullmatch(one)]:
        raise UsageError(
            f"{bad[0]!r} is no id", "give key ids (16 hex digits) or digests (64), as edgekit verify F.zip --json says them"
        )
    path, secret = Path(out), private_key(Path(key))
    refuse_inside_bundle(path)
    check_new(path)
    before = Revoked()
    if path.exists():
        found = read_list(path, {key_id_of(secret.public_key()): secret.public_key()})
        if found is None:
            raise SignatureError(
                f"{path} is signed by another key than {key}", "move it away, and name all that it revokes again"
            )
        before = found[0]
    now = int(time.strftime("%Y%m%d%H%M%S", time.gmtime()))
    number = min(max(before.number + 1, now), MAX_RELEASE)
    new = Revoked(
        number,
        before.keys | {one for one in given if len(one) == 16},
        before.digests | {one for one in given if len(one) == 64},
    )
    body = new.text()
    if len(body) + LINE_BYTES > MAX_BYTES:
        raise UsageError(f"{path} would be larger than {MAX_BYTES >> 20} MiB", "revoke the key that signed all these packs")
    atomic_write(path, body + signature_line(secret, _CONTEXT + body))
    return {
        "revoked": str(path),
        "number": number,
        "keys": sorted(new.keys),
        "digests": sorted(new.digests),
        "key_id": key_id_of(secret.public_key()),
    }

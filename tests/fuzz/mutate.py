"""From sound inputs to damaged ones: bytes, and what a format is made of, so that checksums and structure still hold."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from edgekit.manifest import Manifest, encode_manifest

Mutator = Callable[[bytes, Sequence[bytes], random.Random], bytes]

_SIZES = (0, 1, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_WORDS = (
    b"../", b"/etc/passwd", b"..\\", b"\0", b"\r\n", b"%00", b"%2e%2e%2f", b"-1", b"1e999", b"NaN", b"9" * 400, b"[" * 3000,
    b'{"a":' * 2000, b"\xed\xa0\x80", b"\xff\xfe", "ﬁ\u202e".encode(), b"'''", b'"""', b"{{", b"\x1b[2J", b"\n\n", b"=" * 99,
)  # fmt: skip
#: File names that a reader must not follow.
NAMES = (
    "../up", "/etc/cron.d/x", "a/../../up", "C:\\x", "con", "a\0b", "MANIFEST.JSON", "manifest.json", "ﬁle", "a" * 300,
    "a/b/c", "./x", "x/", "", " ", "x.", "é", "e\u0301", "\u202egpj.exe", "model.onnx/x",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 2**70, 1.5, 1e308, "", "x" * 5000, "../up", "\ud800", [], {}, [[]] * 50, {"a": {}}, "NaN",
    [0] * 2000,
)  # fmt: skip


def of_bytes(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """One to eight changes anywhere: bits, lengths, pieces taken out, doubled, exchanged or put in."""
    buffer = bytearray(data)
    for _ in range(1 << rng.randrange(4)):
        at = rng.randrange(len(buffer) + 1)
        size = min(len(buffer) - at, 1 << rng.randrange(12))
        choice = rng.randrange(9)
        if choice == 0 and at < len(buffer):
            buffer[at] ^= 1 << rng.randrange(8)
        elif choice == 1 and at < len(buffer):
            buffer[at] = rng.randrange(256)
        elif choice == 2:
            del buffer[at : at + size]
        elif choice == 3:
            buffer[at:at] = buffer[at : at + size] * rng.choice((1, 1, 2, 30))
        elif choice == 4:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(_SIZES) & (256**width - 1)
            buffer[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
        elif choice == 5:
            buffer[at:at] = rng.choice(_WORDS)
        elif choice == 6 and others:
            other = rng.choice(others)
            begin = rng.randrange(len(other) + 1)
            buffer[at : at + size] = other[begin : begin + size]
        elif choice == 7:
            buffer[at:] = b""
        else:
            buffer[at:at] = rng.randbytes(rng.randrange(1, 40))
    return bytes(buffer[: 4 << 20])


def of_text(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Lines and values exchanged, doubled, left out; now and then bytes."""
    if rng.random() < 0.3:
        return of_bytes(data, others, rng)
    lines = data.split(b"\n")
    for _ in range(1 << rng.randrange(3)):
        at = rng.randrange(len(lines))
        choice = rng.randrange(5)
        if choice == 0:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif choice == 1 and len(lines) > 1:
            del lines[at]
        elif choice == 2:
            name, sign, _ = lines[at].partition(b"=")
            value = json.dumps(rng.choice(_VALUES)).encode()
            lines[at] = name + b"= " + value if sign else value
        elif choice == 3 and others:
            lines.insert(at, rng.choice(rng.choice(others).split(b"\n")))
        else:
            lines[at] = of_bytes(lines[at], others, rng)
    return b"\n".join(lines)


def of_json(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A value anywhere in it exchanged, left out, or its key renamed; now and then bytes."""
    try:
        tree = json.loads(data)
    except ValueError:
        return of_bytes(data, others, rng)
    if rng.random() < 0.2 or not isinstance(tree, dict | list) or not tree:
        return of_bytes(data, others, rng)
    for _ in range(1 << rng.randrange(3)):
        _exchange(tree, rng)
    text = json.dumps(tree)
    return text.encode("utf-8", "surrogatepass")


def _exchange(tree: Any, rng: random.Random) -> None:
    place, key = tree, None
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    if key is None or not place:
        return
    choice = rng.randrange(4)
    if choice == 0 and isinstance(place, dict):
        place[rng.choice(NAMES)] = place.pop(key)
    elif choice == 1:
        del place[key]
    else:
        place[key] = copy.deepcopy(rng.choice(_VALUES))


def of_manifest(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Changed JSON whose seal holds again where it still is a manifest, as whoever writes one can renew it."""
    import msgspec

    changed = of_json(data, others, rng)
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, UnicodeEncodeError, RecursionError):
        return encode_manifest(msgspec.json.decode(changed, type=Manifest))
    return changed


@cache
def _bomb() -> bytes:
    """Two gigabytes of zeros, deflated to two megabytes: an array of 16-bit numbers, by its header."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w", force_zip64=True) as member:
        head = {"descr": "<u2", "fortran_order": False, "shape": (1 << 30,)}
        np.lib.format.write_array_header_1_0(member, head)
        for _ in range(2048):
            member.write(bytes(1 << 20))
    return buffer.getvalue()


def of_zip(inner: Mutator) -> Mutator:
    """Members changed by ``inner``, renamed, doubled or left out, the zip written anew around them; now and then bytes."""

    def changed(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = [(info, archive.read(info)) for info in archive.infolist()]
        except Exception:  # noqa: BLE001  not a zip any more
            return of_bytes(data, others, rng)
        if rng.random() < 0.3 or not members:
            return of_bytes(data, others, rng)
        if rng.random() < 0.002:
            return _bomb()
        at = rng.randrange(len(members))
        info, content = members[at]
        choice = rng.randrange(6)
        if choice < 3:
            members[at] = (info, inner(content, [held for _, held in members], rng))
        elif choice == 3:
            info.filename = rng.choice(NAMES)
        elif choice == 4:
            members.insert(at, members[rng.randrange(len(members))])
        else:
            del members[at]
        return _zipped(members, archive.comment, rng)

    return changed


def _zipped(members: list[tuple[zipfile.ZipInfo, bytes]], comment: bytes, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        archive.comment = comment
        for info, content in members:
            fresh = zipfile.ZipInfo(info.filename or "x", info.date_time)
            fresh.compress_type = info.compress_type if rng.random() < 0.9 else zipfile.ZIP_DEFLATED
            fresh.external_attr = info.external_attr if rng.random() < 0.9 else rng.choice((0o120777, 0o40755, 0o10644)) << 16
            with contextlib.suppress(ValueError, UnicodeEncodeError):
                archive.writestr(fresh, content)
    return buffer.getvalue()

"""Seeded mutations that know a little of what they change: zip, npz, JSON, TOML, lines of text, and bytes of any kind."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

__all__ = ["MOST_BYTES", "mutated"]

MOST_BYTES = 64 << 10
_NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    127,
    128,
    255,
    256,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
_WORDS = (
    b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"\x93NUMPY\x01\x00", b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff", b"GIF89a",
    b"II*\0", b"MM\0*", b"RIFF", b"WEBP", b"BM", b"P6 9 9 255\n", b"SQLite format 3\0", b"../", b"/etc/passwd", b"..\\",
    b"\0", b"\r\n",
    b"\r\n\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"e\xcc\x81",
    b"\xef\xbc\x8f", b"nan", b"inf", b"-1",
    b"1e999", b"9" * 400, b"[" * 300, b"{" * 300, b'{"a":' * 200, b"\\u0000", b"null", b"true", b"\xff" * 20,
    b"\x80" * 20, b"A" * 1000,
)  # fmt: skip
_NAMES = (
    "../x",
    "/tmp/x",
    "a/../../x",
    "MANIFEST.JSON",
    "manifest.json",
    "x\0y",
    "é",
    "e\u0301",
    "．．/x",
    "x.",
    "x ",
    "con",
    "a\\b",
    "",
    "a/b/c",
    "C:x",
    ".x",
    "x" * 300,
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    2**64,
    1e308,
    -0.0,
    0.5,
    "",
    "x",
    "../x",
    "\0",
    "\u2028",
    "é",
    [],
    {},
    [[]],
    [None],
    {"": 0},
    "x" * 5000,
)
Way = Callable[[random.Random, bytes, list[bytes]], bytes]


def mutated(kind: str, rng: random.Random, data: bytes, corpus: list[bytes], words: tuple[bytes, ...] = ()) -> bytes:
    """``data`` with one to five changes, of bytes or inside the structure that ``kind`` names."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        way = _KINDS.get(kind)
        if way is not None and rng.random() < 0.6:
            with contextlib.suppress(Exception):  # it is no longer of that kind: then its bytes are changed
                data = way(rng, data, corpus)
                continue
        data = _bytes(rng, data, corpus, words)
    return data[:MOST_BYTES]


def _bytes(rng: random.Random, data: bytes, corpus: list[bytes], words: tuple[bytes, ...] = ()) -> bytes:
    at = rng.randrange(len(data) + 1)
    choice = rng.randrange(9)
    if choice == 0 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if choice == 1:
        return data[:at] + rng.randbytes(rng.choice((1, 1, 2, 4, 16))) + data[at + rng.choice((0, 1, 2, 4)) :]
    if choice == 2:
        size = rng.choice((1, 2, 4, 8))
        number = (rng.choice(_NUMBERS) + rng.choice((-1, 0, 0, 1))) % (1 << 8 * size)
        return data[:at] + number.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]
    if choice == 3:
        word = rng.choice((*_WORDS, *words, *words))
        return data[:at] + word + data[at + rng.choice((0, len(word))) :]
    if choice == 4:
        return data[:at] + data[at + rng.randrange(1, 64) :]
    if choice == 5:
        return data[:at]
    if choice == 6:
        end = min(len(data), at + rng.randrange(1, 256))
        return data[:end] + data[at:end] * rng.choice((1, 2, 50)) + data[end:]
    other = rng.choice(corpus) if corpus else data
    there = rng.randrange(len(other) + 1)
    if choice == 7:
        return data[:at] + other[there:]
    return data[:at] + other[there : there + rng.randrange(1, 200)] + data[at:]


def _zip(rng: random.Random, data: bytes, corpus: list[bytes], inner: Callable[[str], str] = lambda name: "json") -> bytes:
    """Members changed, doubled, renamed, left out, deflated; or a field of the table set, with nothing else put right."""
    if rng.random() < 0.4:
        return _zip_field(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [[info, archive.read(info)] for info in archive.infolist()]
        comment = archive.comment
    choice, one = rng.randrange(8), rng.choice(members)
    if choice <= 2:
        kind = "json" if one[1][:1] in (b"{", b"[") else "npy" if one[1][:6] == b"\x93NUMPY" else "bytes"
        one[1] = mutated(kind, rng, one[1], [each[1] for each in members])
    elif choice == 3:
        members.append([zipfile.ZipInfo(rng.choice((*_NAMES, one[0].filename, one[0].filename.swapcase()))), one[1]])
    elif choice == 4:
        one[0] = zipfile.ZipInfo(rng.choice(_NAMES))
    elif choice == 5:
        members.remove(one)
    elif choice == 6:
        one[0].external_attr = rng.choice((0o120777, 0o040755, 0o010644, 0o060644)) << 16
    else:
        one[1], one[0].compress_type = bytes(rng.choice((0, 10, 1 << 20))), zipfile.ZIP_DEFLATED
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.comment = comment
        for info, content in members:
            archive.writestr(info, content, info.compress_type)
    return out.getvalue()


def _zip_field(rng: random.Random, data: bytes) -> bytes:
    """Set one field of a local header, of an entry of the directory, or of its end (APPNOTE.TXT 4.3)."""
    magic, fields = rng.choice((
        (b"PK\x03\x04", ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))),
        (b"PK\x01\x02", ((4, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (38, 4),
        (42, 4))),
        (b"PK\x05\x06", ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
    ))  # fmt: skip
    places = [found.start() for found in re.finditer(re.escape(magic), data)]
    offset, size = rng.choice(fields)
    at = rng.choice(places) + offset
    number = int.from_bytes(data[at : at + size], "little")
    changed = rng.choice((rng.choice(_NUMBERS), number + 1, number - 1, number * 1000)) % (1 << 8 * size)
    return data[:at] + changed.to_bytes(size, "little") + data[at + size :]


def _npy(rng: random.Random, data: bytes, corpus: list[bytes]) -> bytes:
    """Another header before the same numbers."""
    length = struct.unpack("<H", data[8:10])[0]
    shape = rng.choice(
        (
            "()",
            "(0,)",
            "(1,)",
            "(-1,)",
            "(3, 2)",
            "(1000000000000,)",
            "(2**40,)",
            "(1, " * 40 + ")" * 40,
            "(True,)",
            "(10, 10**9)",
        )
    )
    kind = rng.choice(
        ("'<f4'", "'|O'", "'<U99999999'", "'|V8'", "[('a', '<f4')]", "'|S0'", "'<M8[ns]'", "'>i8'", "'|u1'", "'<c16'", "'f', 1")
    )
    order = rng.choice(("False", "True", "1", "None"))
    header = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}".encode().ljust(rng.choice((1, 118)))
    return (
        data[:6]
        + rng.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00"))
        + struct.pack("<H", len(header))
        + header
        + data[10 + length :]
    )


def _json(rng: random.Random, data: bytes, corpus: list[bytes]) -> bytes:
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    at = rng.randrange(len(lines))
    tree = json.loads(lines[at])
    lines[at] = json.dumps(_tree(rng, tree), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _tree(rng: random.Random, tree: Any) -> Any:
    """A JSON tree with one value, key or list changed."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if not isinstance(tree, dict | list):
        return rng.choice(_VALUES)
    walk(tree)
    if not places:
        return rng.choice(_VALUES)
    node, key = rng.choice(places)
    choice = rng.randrange(6)
    if choice == 0:
        node[key] = rng.choice(_VALUES)
    elif choice == 1:
        del node[key]
    elif choice == 2 and isinstance(node, dict):
        node[rng.choice((*_NAMES, key.swapcase()))] = node[key]
    elif choice == 3:
        other, there = rng.choice(places)
        with contextlib.suppress(KeyError, IndexError):
            node[key] = json.loads(json.dumps(other[there]))
    elif choice == 4 and isinstance(node[key], int | float):
        node[key] = rng.choice((node[key] + 1, -node[key], node[key] * 10**9, node[key] / 3, rng.choice(_NUMBERS)))
    elif isinstance(node[key], list):
        node[key] = node[key] * rng.choice((2, 40))
    else:
        node[key] = rng.choice((*_NAMES, rng.choice(_VALUES)))
    return tree


_TOML = (
    "0", "-1", "1e400", "nan", "inf", "''", "'x'", "[]", "[[]]", "{}", "true", "1979-05-27T07:32:00Z", "07:32:00",
    "0x7fffffffffffffff",
    "9223372036854775808", "1_0", '"\\u0000"', '"\\u2028"', "'../x'", "['a', 1]", "{a=1}", "[" * 400,
    "'" + "x" * 5000 + "'", '"""a\nb"""',
)  # fmt: skip


def _toml(rng: random.Random, data: bytes, corpus: list[bytes]) -> bytes:
    """A line changed: its value, its key, its place; one doubled, or one of another file."""
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    at, choice = rng.randrange(len(lines)), rng.randrange(6)
    key, equals, _ = lines[at].partition("=")
    if choice <= 2 and equals:
        lines[at] = f"{key}= {rng.choice(_TOML)}"
    elif choice == 3:
        lines.insert(at, rng.choice(lines))
    elif choice == 4:
        del lines[at]
    else:
        other = rng.choice(corpus).decode("utf-8", "surrogateescape").split("\n")
        lines.insert(at, rng.choice(other))
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def _lines(rng: random.Random, data: bytes, corpus: list[bytes]) -> bytes:
    lines = data.split(b"\n")
    at, choice = rng.randrange(len(lines)), rng.randrange(4)
    if choice == 0:
        lines.insert(at, rng.choice(lines))
    elif choice == 1:
        del lines[at]
    else:
        cells = lines[at].split(b",")
        cells[rng.randrange(len(cells))] = rng.choice(
            (b"", b"nan", b"inf", b"1e39", b"-0", b'"', b'"a\nb"', b"x" * 3000, b"\xff", b" 7 ", b"0x1")
        )
        lines[at] = b",".join(cells)
    return b"\n".join(lines)


_KINDS: dict[str, Way] = {"zip": _zip, "npz": _zip, "npy": _npy, "json": _json, "toml": _toml, "lines": _lines}

"""Ed25519 (RFC 8032) over a whole file and a statement about it. Both stand in the last `TRAILER_BYTES` bytes:

    ... any bytes ...
    edgekit-pack-1 release=0020261128120000 expires=2027-12-31T23:59:59Z\\n
    edgekit-signature KEY_ID BASE64\\n        four lines; one without a signature is all dashes

``KEY_ID`` is the first 16 hex digits of the sha256 of the raw public key. Signed is ``CONTEXT + the statement's line +
sha256(all before the trailer)``: the file streams through a hash, so memory stays flat, and the context keeps a signature of
ours from being one of anything else. The trailer has one length and one spelling, so it is found and checked without a parser,
and a signature is added without moving a byte. In a packed bundle it is the zip's comment, so ``unzip`` still works.

sha256, not sha512: the processors of Jetsons and of today's servers have instructions for it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import MissingExtra, OutputExists, SignatureError, first_line

__all__ = [
    "LINE_BYTES",
    "MAX_RELEASE",
    "MAX_SIGNATURES",
    "NEVER",
    "TRAILER_BYTES",
    "Checked",
    "PathOrPaths",
    "Statement",
    "Trailer",
    "as_paths",
    "blank_trailer",
    "check_end",
    "check_line",
    "check_signature",
    "key_id_of",
    "keygen",
    "private_key",
    "public_keys",
    "read_trailer",
    "sign_file",
    "signature_line",
]

PathOrPaths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

CONTEXT = b"edgekit-pack-1\0"
MAX_SIGNATURES = 4
MAX_RELEASE = 10**16 - 1
NEVER = "9999-12-31T23:59:59Z"
_EMPTY = b"edgekit-signature " + b"-" * 16 + b" " + b"-" * 88 + b"\n"
_STATEMENT = re.compile(
    rb"edgekit-pack-1 release=([0-9]{16}) expires=([0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])T"
    rb"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]Z)\n"
)
_LINE = re.compile(rb"edgekit-signature ([0-9a-f]{16}) ([A-Za-z0-9+/]{86}==)\n")
_STATEMENT_BYTES = 69
LINE_BYTES = len(_EMPTY)
TRAILER_BYTES = _STATEMENT_BYTES + MAX_SIGNATURES * LINE_BYTES
_BLOCK = 1 << 20
_ZIP_END_BYTES = 22 + 65535  # its last record, with the longest comment
_MAX_KEY_BYTES = 1 << 16
_MAX_KEYS = 256
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----[\r\n]+[A-Za-z0-9+/=\r\n]+-----END PUBLIC KEY-----")


class Statement(NamedTuple):
    """What a signer says of a pack. ``release`` grows; ``expires`` is in UTC, `NEVER` where the pack has no end."""

    release: int
    expires: str = NEVER

    def line(self) -> bytes:
        return f"edgekit-pack-1 release={self.release:016} expires={self.expires}\n".encode()


class Trailer(NamedTuple):
    """What a trailer says; true only once `check_signature` has checked it. ``signatures``: key id -> 64 bytes."""

    statement: Statement
    signatures: dict[str, bytes]


class Checked(NamedTuple):
    """A signed file whose signature holds. ``digest``: sha256 of all before the trailer, the same whoever signs."""

    statement: Statement
    key_ids: tuple[str, ...]
    digest: str


def keygen(out: str | os.PathLike[str]) -> dict[str, Any]:
    """Make a key pair in the folder ``out``: ``edgekit.key`` (PKCS 8 PEM, mode 0600) and ``edgekit.pub`` (PEM).

    Returns ``key`` and ``pub`` (paths) and ``key_id`` (16 hex digits).
    Raises `OutputExists` where either is there already: a lost key cannot be had back.
    """
    ed25519, serialization = _cryptography()
    folder = Path(out)
    refuse_inside_bundle(folder / "edgekit.key")
    secret, public = folder / "edgekit.key", folder / "edgekit.pub"
    for path in (secret, public):
        if path.exists() or path.is_symlink():
            raise OutputExists(path)
    folder.mkdir(parents=True, exist_ok=True)
    key = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    _write_new(
        secret,
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        0o600,
    )
    _write_new(public, key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo), 0o644)
    return {"key": str(secret), "pub": str(public), "key_id": key_id_of(key.public_key())}


def key_id_of(public: Any) -> str:
    """16 hex digits that name a public key."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]


# The trailer


def blank_trailer(statement: Statement) -> bytes:
    """A trailer that nobody has signed yet."""
    return statement.line() + _EMPTY * MAX_SIGNATURES


def read_trailer(file: IO[bytes]) -> Trailer | None:
    """The trailer that a file carries, unchecked; None where it has none of the exact form."""
    size = file.seek(0, os.SEEK_END)
    if size <= TRAILER_BYTES:
        return None
    file.seek(size - TRAILER_BYTES)
    data = file.read(TRAILER_BYTES)
    said = _STATEMENT.fullmatch(data[:_STATEMENT_BYTES])
    if not said:
        return None
    signatures: dict[str, bytes] = {}
    lines = [data[at : at + LINE_BYTES] for at in range(_STATEMENT_BYTES, TRAILER_BYTES, LINE_BYTES)]
    while lines and lines[-1] == _EMPTY:  # the free lines are the last ones
        lines.pop()
    for line in lines:
        found = _signature(line)
        if found is None or found[0] in signatures:
            return None
        signatures[found[0]] = found[1]
    return Trailer(Statement(int(said[1]), said[2].decode()), signatures)


def _signature(line: bytes) -> tuple[str, bytes] | None:
    """(key id, 64 bytes) of a signature's line in its one spelling."""
    match = _LINE.fullmatch(line)
    if not match:
        return None
    value = base64.b64decode(match[2])
    # Base64 of 64 bytes has four idle bits: only the one canonical spelling counts, so that no bit is free to flip.
    return (match[1].decode(), value) if base64.b64encode(value) == match[2] else None


def signature_line(secret: Any, message: bytes) -> bytes:
    """The line that says that the private key ``secret`` signed ``message``."""
    return f"edgekit-signature {key_id_of(secret.public_key())} ".encode() + base64.b64encode(secret.sign(message)) + b"\n"


def check_line(line: bytes, message: bytes, keys: Mapping[str, Any]) -> str | None:
    """The id of the key of ``keys`` that signed ``message``, by a line of `signature_line`; None where no known key did.

    Raises `SignatureError` where a known key signed something else.
    """
    found = _signature(line)
    if found is None or found[0] not in keys:
        return None
    _hold(keys, *found, message)
    return found[0]


def sign_file(file: IO[bytes], key: str | os.PathLike[str]) -> str:
    """Add a signature to the trailer of an open file (one of `blank_trailer` at least); returns the key id.

    Raises `SignatureError` where ``key`` is no Ed25519 private key, where that key has signed already, or where four have.
    """
    secret = private_key(Path(key))
    key_id = key_id_of(secret.public_key())
    trailer = read_trailer(file)
    if trailer is None:
        raise SignatureError("the pack has no place for a signature", "make it anew: edgekit pack B --out F.zip --key K")
    if key_id in trailer.signatures:
        raise SignatureError(f"the pack is signed by key {key_id} already", "give another --key")
    if len(trailer.signatures) == MAX_SIGNATURES:
        raise SignatureError(f"the pack has {MAX_SIGNATURES} signatures, which is all there is place for", "pack it anew")
    end = file.seek(0, os.SEEK_END) - TRAILER_BYTES
    line = signature_line(secret, CONTEXT + trailer.statement.line() + _hash(file, end))
    file.seek(end + _STATEMENT_BYTES + len(trailer.signatures) * LINE_BYTES)
    file.write(line)
    return key_id


def check_signature(file: IO[bytes], keys: Mapping[str, Any], revoked: Collection[str] = ()) -> Checked:
    """Check an open file against trusted keys (`public_keys`). Nothing of the file is parsed.

    One good signature by a key that is trusted and not revoked is enough; signatures by unknown keys are passed over. Raises
    `SignatureError` where there is none, or where a trusted key's does not fit the file.
    """
    trailer = read_trailer(file)
    if trailer is None or not trailer.signatures:
        if _cut_off(file):
            raise SignatureError("the pack is cut off or damaged: its end is missing", "fetch or copy it again")
        raise SignatureError("the pack is not signed, or its signature is damaged", "sign it: edgekit sign F.zip --key K")
    known = _known(trailer, keys, revoked)
    digest = _hash(file, file.seek(0, os.SEEK_END) - TRAILER_BYTES)
    for key_id in known:
        _hold(keys, key_id, trailer.signatures[key_id], CONTEXT + trailer.statement.line() + digest)
    return Checked(trailer.statement, tuple(known), digest.hex())


def check_end(end: bytes, digest: str, keys: Mapping[str, Any], revoked: Collection[str] = ()) -> Checked | None:
    """Whether a file of which the last `TRAILER_BYTES` bytes are ``end`` is the one whose other bytes have this ``digest``: a
    signature that holds for both says so, without a byte of the file. None where it does not, or cannot be told.

    Raises `SignatureError` where no key in force has signed it.
    """
    trailer = read_trailer(io.BytesIO(b"\0" + end))
    if trailer is None or not trailer.signatures:
        return None
    known = _known(trailer, keys, revoked)
    try:
        for key_id in known:
            _hold(keys, key_id, trailer.signatures[key_id], CONTEXT + trailer.statement.line() + bytes.fromhex(digest))
    except SignatureError:
        return None
    return Checked(trailer.statement, tuple(known), digest)


def _known(trailer: Trailer, keys: Mapping[str, Any], revoked: Collection[str]) -> list[str]:
    """The signers that are trusted and not revoked. Raises `SignatureError` where there is none."""
    signers = trailer.signatures.keys()
    if not signers & keys.keys():
        raise SignatureError(
            f"the pack is signed by key {', '.join(signers)}; trusted is {', '.join(sorted(keys))}",
            "give the public key of its signer",
        )
    known = [key_id for key_id in signers if key_id in keys and key_id not in revoked]
    if not known:
        raise SignatureError(
            f"the pack is signed by key {', '.join(sorted(signers & keys.keys()))}, which is revoked",
            "do not use it; get one that is signed by a key in force",
        )
    return known


def _cut_off(file: IO[bytes]) -> bool:
    """Whether a zip begins here (a report is none) and its last record (APPNOTE 4.3.16) does not end where the file does: 22
    bytes, which name the length of the comment behind them."""
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        return False
    file.seek(max(0, file.seek(0, os.SEEK_END) - _ZIP_END_BYTES))
    end = file.read(_ZIP_END_BYTES)
    at = end.rfind(b"PK\5\6")
    return at < 0 or at + 22 + int.from_bytes(end[at + 20 : at + 22], "little") != len(end)


def _hold(keys: Mapping[str, Any], key_id: str, value: bytes, message: bytes) -> None:
    from cryptography.exceptions import InvalidSignature

    try:
        keys[key_id].verify(value, message)
    except InvalidSignature:
        raise SignatureError(
            f"the signature by key {key_id} does not match: the file was changed or damaged", "do not use it; fetch it again"
        ) from None


def _hash(file: IO[bytes], end: int) -> bytes:
    """sha256 of the first ``end`` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    block = memoryview(bytearray(_BLOCK))
    while end > 0 and (count := file.readinto(block[: min(_BLOCK, end)])):  # type: ignore[attr-defined]
        digest.update(block[:count])
        end -= count
    return digest.digest()


# Keys


def _cryptography() -> tuple[Any, Any]:
    """The two modules that are needed, loaded only where something is signed or checked."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingExtra("sign", "cryptography") from None
    return ed25519, serialization


def as_paths(value: PathOrPaths | None) -> list[Path]:
    """One path, several or none, as a list."""
    if value is None:
        return []
    return [Path(value)] if isinstance(value, str | os.PathLike) else [Path(path) for path in value]


def private_key(path: Path) -> Any:
    """The Ed25519 private key in a PEM file. Raises `SignatureError` for anything else."""
    ed25519, serialization = _cryptography()
    data = _read_key(path)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except Exception as error:  # noqa: BLE001  bad PEM, a password, an algorithm OpenSSL lacks: all mean "not our key"
        raise SignatureError(
            f"{path} is not a private key: {first_line(error)}", "make one: edgekit keygen --out DIR"
        ) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise SignatureError(f"{path} is not an Ed25519 private key", "make one: edgekit keygen --out DIR")
    return key


def public_keys(pub: PathOrPaths) -> dict[str, Any]:
    """Key id -> public key, of PEM files (each may hold several) and of folders (their ``.pub`` files).

    Raises `SignatureError` where one of them is no Ed25519 public key, or where there is none: a list of keys that is only
    half understood is not believed at all.
    """
    keys: dict[str, Any] = {}
    for path in as_paths(pub):
        files = sorted(path.glob("*.pub")) if path.is_dir() else [path]
        if not files:
            raise SignatureError(f"the folder {path} holds no .pub file", "put the edgekit.pub of keygen there")
        if len(files) > _MAX_KEYS:
            raise SignatureError(f"{path} holds {len(files)} key files, at most {_MAX_KEYS} are read", "leave those in force")
        for file in files:
            keys |= {key_id_of(key): key for key in _public_keys_of(file)}
    if not 0 < len(keys) <= _MAX_KEYS:
        raise SignatureError(f"{len(keys)} public keys were given, 1 to {_MAX_KEYS} can be", "give the edgekit.pub of keygen")
    return keys


def _public_keys_of(path: Path) -> list[Any]:
    ed25519, serialization = _cryptography()
    data = _read_key(path)
    if b"PRIVATE KEY-----" in data:
        raise SignatureError(
            f"{path} is not a public key: it holds a private one", "keep that secret; devices get the edgekit.pub of keygen"
        )
    blocks = _PEM.findall(data)
    if not blocks or data.count(b"-----BEGIN") != len(blocks):
        raise SignatureError(f"{path} is not a public key: no whole PEM block", "give the edgekit.pub of keygen")
    keys = []
    for block in blocks:
        try:
            key = serialization.load_pem_public_key(block)
        except Exception as error:  # noqa: BLE001  as above
            raise SignatureError(f"{path} is not a public key: {first_line(error)}", "give the edgekit.pub of keygen") from None
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise SignatureError(f"{path} is not an Ed25519 public key", "give the edgekit.pub of keygen")
        keys.append(key)
    return keys


def _read_key(path: Path) -> bytes:
    if not path.is_file():
        raise SignatureError(f"there is no key file {path}", "make one: edgekit keygen --out DIR")
    with path.open("rb") as file:
        data = file.read(_MAX_KEY_BYTES + 1)
    if len(data) > _MAX_KEY_BYTES:
        raise SignatureError(f"{path} is larger than {_MAX_KEY_BYTES >> 10} KiB: no key", "give a file that keygen made")
    return data


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist yet, never readable to more than ``mode`` allows."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise

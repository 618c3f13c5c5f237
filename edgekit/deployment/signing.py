"""Ed25519 (RFC 8032) over a whole file. The signature is the file's last line, so checking it needs no parser.

    ... any bytes ...edgekit-signature-v1 KEY_ID BASE64\\n

``KEY_ID`` is the first 16 hex digits of the sha256 of the raw public key. Signed is ``CONTEXT + sha512(all before the
trailer)``: the file streams through a hash, so memory stays flat, and the context keeps a signature of ours from being
one of anything else. In a packed bundle the trailer is the zip's comment, so ``unzip`` still works.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path
from typing import IO, Any, NamedTuple

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import MissingExtra, OutputExists, SignatureError, first_line

__all__ = ["TRAILER_BYTES", "Signature", "check_signature", "key_id_of", "keygen", "read_trailer", "sign_file"]

PREFIX = b"edgekit-signature-v1 "
CONTEXT = b"edgekit-signature-v1\0"
_TRAILER = re.compile(rb"edgekit-signature-v1 ([0-9a-f]{16}) ([A-Za-z0-9+/]{86}==)\n")
TRAILER_BYTES = len(PREFIX) + 16 + 1 + 88 + 1
_BLOCK = 1 << 20
_MAX_KEY_BYTES = 1 << 16


class Signature(NamedTuple):
    """What the trailer says; true only once `check_signature` has checked it. ``value`` is 64 bytes."""

    key_id: str
    value: bytes


def keygen(out: str | os.PathLike[str]) -> dict[str, Any]:
    """Make a key pair in the folder ``out``: ``edgekit.key`` (PKCS 8 PEM, mode 0600) and ``edgekit.pub`` (PEM).

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


def read_trailer(file: IO[bytes]) -> Signature | None:
    """The signature that a file carries, unchecked; None where it carries none of the exact form."""
    size = file.seek(0, os.SEEK_END)
    if size <= TRAILER_BYTES:
        return None
    file.seek(size - TRAILER_BYTES)
    match = _TRAILER.fullmatch(file.read(TRAILER_BYTES))
    if not match:
        return None
    value = base64.b64decode(match[2])
    # Base64 of 64 bytes has four idle bits: only the one canonical spelling counts, so that no bit is free to flip.
    return Signature(match[1].decode(), value) if base64.b64encode(value) == match[2] else None


def sign_file(file: IO[bytes], key: str | os.PathLike[str]) -> str:
    """Overwrite the last `TRAILER_BYTES` bytes of an open file with its signature; returns the key id.

    Raises `SignatureError` where ``key`` is no Ed25519 private key.
    """
    secret = _private_key(Path(key))
    end = file.seek(0, os.SEEK_END) - TRAILER_BYTES
    value = secret.sign(CONTEXT + _hash(file, end))
    key_id = key_id_of(secret.public_key())
    file.seek(end)
    file.write(PREFIX + key_id.encode() + b" " + base64.b64encode(value) + b"\n")
    return key_id


def check_signature(file: IO[bytes], pub: str | os.PathLike[str]) -> str:
    """Check an open file against a public key (PEM); returns the key id. Nothing of the file is parsed.

    Raises `SignatureError` where the file is not signed, was signed by another key, or differs by one bit.
    """
    public = _public_key(Path(pub))
    from cryptography.exceptions import InvalidSignature

    signature = read_trailer(file)
    if signature is None:
        raise SignatureError(
            "the pack is not signed, or its signature is damaged", "sign it: edgekit pack B --out F.zip --key K"
        )
    expected = key_id_of(public)
    if signature.key_id != expected:
        raise SignatureError(
            f"the pack is signed by key {signature.key_id}, {pub} is key {expected}", "give the public key of its signer"
        )
    end = file.seek(0, os.SEEK_END) - TRAILER_BYTES
    try:
        public.verify(signature.value, CONTEXT + _hash(file, end))
    except InvalidSignature:
        raise SignatureError(
            f"the signature by key {expected} does not match: the pack was changed or damaged", "do not use it; fetch it again"
        ) from None
    return expected


def _hash(file: IO[bytes], end: int) -> bytes:
    """sha512 of the first ``end`` bytes."""
    digest = hashlib.sha512()
    file.seek(0)
    while end > 0 and (block := file.read(min(_BLOCK, end))):
        digest.update(block)
        end -= len(block)
    return digest.digest()


def _cryptography() -> tuple[Any, Any]:
    """The two modules that are needed, loaded only where something is signed or checked."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingExtra("sign", "cryptography") from None
    return ed25519, serialization


def _private_key(path: Path) -> Any:
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


def _public_key(path: Path) -> Any:
    ed25519, serialization = _cryptography()
    data = _read_key(path)
    try:
        key = serialization.load_pem_public_key(data)
    except Exception as error:  # noqa: BLE001  as above
        raise SignatureError(f"{path} is not a public key: {first_line(error)}", "give the edgekit.pub of keygen") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise SignatureError(f"{path} is not an Ed25519 public key", "give the edgekit.pub of keygen")
    return key


def _read_key(path: Path) -> bytes:
    if not path.is_file():
        raise SignatureError(f"there is no key file {path}", "make one: edgekit keygen --out DIR")
    with path.open("rb") as file:
        return file.read(_MAX_KEY_BYTES)


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

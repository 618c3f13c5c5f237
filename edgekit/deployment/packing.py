"""A bundle as one file, signed: ``pack``, ``sign`` and ``verify``.

Left out is what no device needs: the training weights, the report and the bench files. ``calibration.json`` stays: on
the device it is the baseline for drift. The packed manifest names its source in a last history entry.
"""

from __future__ import annotations

import calendar
import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from edgekit.bundle import EXAMPLES, MANIFEST, REPORT, WEIGHTS, Bundle
from edgekit.errors import BundleError, OutputExists, SignatureError, UsageError
from edgekit.files import sync_path
from edgekit.manifest import History, Manifest
from edgekit.progress import say
from edgekit.version import __version__

from .archive import MAX_FILES, MAX_PACK_BYTES, Archive, open_archive, write_archive
from .signing import MAX_RELEASE, NEVER, Checked, PathOrPaths, Statement, as_paths, blank_trailer, read_trailer, sign_file
from .trusted import Trust, believe

__all__ = ["checked", "contents", "open_pack", "pack", "sign", "verify"]

_DURATION = re.compile(r"([1-9][0-9]{0,4})d", re.ASCII)
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)


def pack(
    bundle: Bundle | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    key: PathOrPaths | None = None,
    release: int | None = None,
    expires: str | None = None,
) -> Path:
    """Write ``bundle`` to the single file ``out``, signed with the Ed25519 private key in the file ``key``, if given, or with
    several.

    ``release``: a device takes none that is lower than one it has taken of this bundle's name; without, the time of the
    bundle's last change as YYYYMMDDhhmmss. ``expires``: a day (2027-12-31, to its end in UTC), or ``90d`` after
    that last change. The same bundle, keys and words give the same bytes, on any machine and at any time.

    Raises `OutputExists` where ``out`` is there, `BundleError` for a damaged bundle, `SignatureError` for a bad key,
    `UsageError` for a release or a day that is none; on any error nothing is left at ``out``.
    """
    opened = Bundle.open(bundle.path if isinstance(bundle, Bundle) else bundle)
    target = Path(out)
    if target.exists() or target.is_symlink():
        raise OutputExists(target)
    manifest = packed_manifest(opened)
    statement = _statement(manifest.history[-1].time, release, expires)
    size = sum((opened.path / name).stat().st_size for name in manifest.files)
    if len(manifest.files) >= MAX_FILES or size > MAX_PACK_BYTES - (64 << 20):
        raise BundleError(
            f"{opened.path} is too large to pack: {len(manifest.files)} files, {size} bytes",
            f"at most {MAX_FILES} files and {MAX_PACK_BYTES >> 30} GiB",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target) as file:
        write_archive(file, opened, manifest, blank_trailer(statement))  # the zip's comment is its end
        for path in as_paths(key):
            sign_file(file, path)
        if target.exists():
            raise OutputExists(target)
    return target


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes its place at ``target``, flushed, when the block is done; nothing is left where it fails."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(name, target)
        sync_path(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def sign(pack: str | os.PathLike[str], *, key: PathOrPaths) -> dict[str, Any]:
    """Add a signature (or several) to a packed bundle; what was signed before stays, and what it states.

    The pack is read whole before: a signer does not vouch for a damaged file. Returns what `contents` says. Raises as
    `pack` does, and `SignatureError` where that key has signed already; the pack then is as it was.
    """
    path = Path(pack)
    with open_pack(path) as source:
        with open_archive(source, os.fspath(path)) as archive:
            archive.check()
        source.seek(0)
        with _beside(Path(os.path.realpath(path))) as file:
            shutil.copyfileobj(source, file, 1 << 20)
            for one in as_paths(key):
                sign_file(file, one)
    return contents(path)


def _statement(last: str, release: int | None, expires: str | None) -> Statement:
    """What a pack is to state; ``last``: RFC 3339 time of its bundle's last change."""
    stamp = int(re.sub(r"[^0-9]", "", last)[:14] or 0)
    if release is not None and not 0 <= release <= MAX_RELEASE:
        raise UsageError(f"release {release} is out of range", f"give 0 to {MAX_RELEASE}")
    number = stamp if release is None else release
    if expires is None:
        return Statement(number)
    day = expires
    with contextlib.suppress(ValueError, OverflowError):
        if duration := _DURATION.fullmatch(expires):
            start = calendar.timegm(time.strptime(last[:10], "%Y-%m-%d"))
            day = time.strftime("%Y-%m-%d", time.gmtime(start + 86400 * int(duration[1])))
        if _DAY.fullmatch(day):
            time.strptime(day, "%Y-%m-%d")
            if f"{day}T23:59:59Z" < NEVER:
                if f"{day}T23:59:59Z" < time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()):
                    say(f"the pack has expired already, on {day}: no device takes it", level="warning")
                return Statement(number, f"{day}T23:59:59Z")
    raise UsageError(f"--expires {expires} is no day", "give one as 2027-12-31, or days from the bundle's last change: 90d")


def packed_manifest(bundle: Bundle) -> Manifest:
    """The manifest of the pack: fewer files, and a history entry that names the source bundle.

    The entry carries the time of the bundle's last change, not the hour of packing: the same bundle, the same bytes.
    """
    manifest = bundle.manifest
    left_out = [n for n in manifest.files if n in (WEIGHTS, REPORT, EXAMPLES) or n.startswith("bench/")]
    files = {name: digest for name, digest in manifest.files.items() if name not in left_out}
    last = manifest.history[-1].time if manifest.history else "1980-01-01T00:00:00Z"
    entry = History("pack", last, __version__, {"left_out": left_out}, bundle.digest)
    return msgspec.structs.replace(manifest, files=files, history=(*manifest.history, entry))


@contextlib.contextmanager
def open_pack(pack: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """The open file of a pack. Raises `BundleError` where there is none, and where it is too large for one."""
    path = Path(pack)
    if path.is_dir():
        unpacked = (path / MANIFEST).is_file()
        what = "a bundle that is not packed" if unpacked else "a folder"
        hint = f"pack it: edgekit pack {path} --out F.zip" if unpacked else "name a file: F.zip"
        raise BundleError(f"there is no packed bundle at {path}: it is {what}", hint)
    if not path.is_file():
        odd = ": it is a pipe, a socket or a device" if path.exists() else ""
        raise BundleError(f"there is no packed bundle at {path}{odd}", "make one: edgekit pack B --out F.zip")
    if path.stat().st_size > MAX_PACK_BYTES:
        raise BundleError(f"{path} is larger than {MAX_PACK_BYTES >> 30} GiB", "do not trust this pack")
    with path.open("rb") as file:
        yield file


@contextlib.contextmanager
def checked(file: IO[bytes], where: str, trust: Trust) -> Iterator[tuple[Archive, Checked]]:
    """The archive in an open file and who signed it: signature, revocation and expiry are checked before any parsing.

    Raises `SignatureError` for an untrusted pack, `BundleError` for one that breaks the format.
    """
    signed = trust.check(file)
    with open_archive(file, where) as archive:
        trust.check_digest(_digest(archive))
        yield archive, signed


def verify(
    pack: str | os.PathLike[str],
    *,
    pub: PathOrPaths,
    revoked: PathOrPaths | None = None,
    sbom: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Check the signature over the whole file, then every name, size and hash inside.

    ``pub``: PEM files (each may hold several public keys) or folders of ``.pub`` files; one good signature by one of these
    keys is enough. ``revoked``: signed lists of `revoke`; ``revoked.txt`` beside the pack is looked at too. ``sbom``: write the
    list of what is inside there, as CycloneDX 1.6 JSON.

    Nothing is parsed before the signature holds; memory stays flat. The file is read twice, and a stick may answer otherwise
    the second time: `install` checks a copy of its own.

    Returns ``verified`` (True), ``key_id``, ``key_ids`` (of the good signatures), ``pack_digest`` and what `contents` says.
    Raises `SignatureError` for an unsigned, changed, foreign, revoked or expired pack, `BundleError` for a signed pack that
    breaks the format.
    """
    from .inventory import write_sbom

    with open_pack(pack) as file:
        _not_foreign(file, pack)
        trust = believe(pub, revoked=revoked, pack=pack)
        with checked(file, os.fspath(pack), trust) as (archive, signed):
            archive.check()
            said = _said(signed.statement, signed.key_ids)
            found = {"verified": True, **said, **_listing(archive), "pack_digest": signed.digest}
            if sbom is not None:
                write_sbom(Path(sbom), archive.manifest, found)
            return found


def _not_foreign(file: IO[bytes], path: str | os.PathLike[str]) -> None:
    """Raises `SignatureError` for a file that neither begins nor ends as a pack: "not signed" would say too little."""
    head = file.read(4)
    if head == b"PK\3\4" or read_trailer(file) is not None:
        return
    hint = "give the F.zip of edgekit pack, or the .json of edgekit doctor --chaos --key K"
    if head.startswith(b"<"):
        hint = "a page carries no signature: verify what it shows, F.zip, or the .json beside it of edgekit doctor --chaos"
    what = "is no packed bundle, and no report of doctor --chaos" if head else "is empty"
    raise SignatureError(f"{path} {what}", hint)


def contents(pack: str | os.PathLike[str]) -> dict[str, Any]:
    """What a pack says it holds, its signatures unchecked.

    Returns ``name``, ``digest``, ``task``, ``size_bytes``, ``key_id`` (of the first signature, None where unsigned),
    ``key_ids``, ``release``, ``expires`` (None where it does not) and ``files`` (name, size_bytes, sha256, kind and producer
    each).
    """
    with open_pack(pack) as file:
        trailer = read_trailer(file)
        with open_archive(file, os.fspath(pack)) as archive:
            statement = trailer.statement if trailer else None
            return {**_said(statement, tuple(trailer.signatures) if trailer else ()), **_listing(archive)}


def _said(statement: Statement | None, key_ids: tuple[str, ...]) -> dict[str, Any]:
    expires = statement.expires if statement and statement.expires != NEVER else None
    release = statement.release if statement else None
    return {"key_id": key_ids[0] if key_ids else None, "key_ids": list(key_ids), "release": release, "expires": expires}


def _digest(archive: Archive) -> str:
    return Bundle(Path(archive.where), archive.manifest).digest


def _listing(archive: Archive) -> dict[str, Any]:
    from .inventory import describe

    return {
        "name": archive.manifest.name,
        "task": archive.manifest.task,
        "digest": _digest(archive),
        "size_bytes": archive.total_bytes,
        "files": [describe(entry, archive.manifest) for entry in archive.entries],
    }

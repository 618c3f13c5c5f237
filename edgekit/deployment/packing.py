"""A bundle as one file, signed: ``pack`` and ``verify``.

Left out is what no device needs: the training weights, the report and the bench files. ``calibration.json`` stays: on
the device it is the baseline for drift. The packed manifest names its source in a last history entry.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from edgekit.bundle import EXAMPLES, REPORT, WEIGHTS, Bundle
from edgekit.errors import BundleError, OutputExists
from edgekit.files import sync_path
from edgekit.manifest import History, Manifest
from edgekit.version import __version__

from .archive import MAX_FILES, MAX_PACK_BYTES, Archive, open_archive, write_archive

__all__ = ["contents", "open_pack", "pack", "verify"]


def pack(
    bundle: Bundle | str | os.PathLike[str], *, out: str | os.PathLike[str], key: str | os.PathLike[str] | None = None
) -> Path:
    """Write ``bundle`` to the single file ``out``, signed with the Ed25519 private key in the file ``key``, if given.

    The same bundle and key give the same bytes, on any machine and at any time. Raises `OutputExists` where ``out`` is
    there, `BundleError` for a damaged bundle, `SignatureError` for a bad key; on any error nothing is left at ``out``.
    """
    opened = Bundle.open(bundle.path if isinstance(bundle, Bundle) else bundle)
    target = Path(out)
    if target.exists() or target.is_symlink():
        raise OutputExists(target)
    manifest = packed_manifest(opened)
    size = sum((opened.path / name).stat().st_size for name in manifest.files)
    if len(manifest.files) >= MAX_FILES or size > MAX_PACK_BYTES - (64 << 20):
        raise BundleError(
            f"{opened.path} is too large to pack: {len(manifest.files)} files, {size} bytes",
            f"at most {MAX_FILES} files and {MAX_PACK_BYTES >> 30} GiB",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w+b") as file:
            _write(file, opened, manifest, key)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        if target.exists():
            raise OutputExists(target)
        os.replace(name, target)
        sync_path(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return target


def _write(file: IO[bytes], bundle: Bundle, manifest: Manifest, key: str | os.PathLike[str] | None) -> None:
    if key is None:
        write_archive(file, bundle, manifest, b"")
        return
    from .signing import TRAILER_BYTES, sign_file

    write_archive(file, bundle, manifest, b" " * TRAILER_BYTES)  # the zip's comment is its end: the trailer's place
    sign_file(file, key)


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
    """The open file of a pack. Raises `BundleError` where there is none."""
    path = Path(pack)
    if not path.is_file():
        raise BundleError(f"there is no packed bundle at {path}", "make one: edgekit pack B --out F.zip")
    with path.open("rb") as file:
        yield file


def verify(pack: str | os.PathLike[str], *, pub: str | os.PathLike[str]) -> dict[str, Any]:
    """Check the signature over the whole file, then every name, size and hash inside.

    Nothing is parsed before the signature holds; memory stays flat. Returns ``verified`` (True), ``key_id`` and what
    `contents` says. Raises `SignatureError` for an unsigned, changed or foreign pack, `BundleError` for a signed pack
    that breaks the format.
    """
    from .signing import check_signature

    with open_pack(pack) as file:
        key_id = check_signature(file, pub)
        with open_archive(file, os.fspath(pack)) as archive:
            archive.check()
            return {"verified": True, "key_id": key_id, **_listing(archive)}


def contents(pack: str | os.PathLike[str]) -> dict[str, Any]:
    """What a pack says it holds, its signature unchecked: ``name``, ``digest``, ``task``, ``size_bytes``, ``key_id`` (None
    where unsigned) and ``files`` with name, size_bytes and sha256 each.
    """
    from .signing import read_trailer

    with open_pack(pack) as file:
        signature = read_trailer(file)
        with open_archive(file, os.fspath(pack)) as archive:
            return {"key_id": signature.key_id if signature else None, **_listing(archive)}


def _listing(archive: Archive) -> dict[str, Any]:
    return {
        "name": archive.manifest.name,
        "task": archive.manifest.task,
        "digest": Bundle(Path(archive.where), archive.manifest).digest,
        "size_bytes": archive.total_bytes,
        "files": [{"name": entry.name, "size_bytes": entry.size_bytes, "sha256": entry.sha256} for entry in archive.entries],
    }

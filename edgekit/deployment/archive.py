"""The packed bundle as a file format: a zip of stored files, the same bytes from the same bundle on every machine.

Stored, not deflated: network weights hardly compress, the bytes do not depend on a zlib version, and an entry can
never be larger than its archive, so there is no zip bomb. Reading refuses everything that `write_archive` never writes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgekit.bundle import MANIFEST, Bundle
from edgekit.errors import BundleError, first_line
from edgekit.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest, encode_manifest, is_safe_name

__all__ = ["MAX_FILES", "MAX_PACK_BYTES", "Archive", "Entry", "open_archive", "write_archive"]

MAX_FILES = 1024
MAX_PACK_BYTES = 4 << 30
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_MODE = stat.S_IFREG | 0o644
_BLOCK = 1 << 20
_HINT = "do not trust this pack; fetch it again from who made it"
#: What `zipfile` raises on hostile bytes.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OverflowError, struct.error)


@dataclass(frozen=True)
class Entry:
    """One file of a pack, as its manifest lists it."""

    name: str
    size_bytes: int
    sha256: str


def write_archive(file: IO[bytes], bundle: Bundle, manifest: Manifest, comment: bytes) -> None:
    """Write ``manifest`` and the files it names, in sorted order with fixed dates and modes, streaming."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, strict_timestamps=True) as archive:
        archive.comment = comment
        data = encode_manifest(manifest)
        archive.writestr(_info(MANIFEST, len(data)), data)
        for name in sorted(manifest.files):
            path = bundle.file(name)
            with path.open("rb") as source, archive.open(_info(name, path.stat().st_size), "w") as target:
                while block := source.read(_BLOCK):
                    target.write(block)


def _info(name: str, size: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _DATE)
    info.create_system = 3  # Unix, whatever this machine is
    info.external_attr = _MODE << 16
    info.file_size = size
    return info


class Archive:
    """An open pack whose table and manifest have been checked; file contents are checked as they are read."""

    def __init__(self, archive: zipfile.ZipFile, size: int, where: str) -> None:
        self._archive = archive
        self.where = where
        infos = {info.filename: info for info in archive.infolist()}
        self._check_table(size)
        self.manifest_bytes = b"".join(self._read(MANIFEST)) if MANIFEST in infos else b""
        if MANIFEST not in infos:
            raise BundleError(f"{where} holds no {MANIFEST}: it is no packed bundle", "make one: edgekit pack B --out F.zip")
        self.manifest = decode_manifest(self.manifest_bytes, where)
        if odd := sorted(infos.keys() - {MANIFEST} ^ self.manifest.files.keys()):
            raise BundleError(f"{where}: {odd[0]} is in the zip or in the manifest, but not in both", _HINT)
        self.entries = tuple(Entry(name, infos[name].file_size, digest) for name, digest in sorted(self.manifest.files.items()))
        self.total_bytes = sum(entry.size_bytes for entry in self.entries) + len(self.manifest_bytes)

    def _check_table(self, size: int) -> None:
        """Refuse a table that `write_archive` never writes: names, kinds, sizes, compression."""
        infos = self._archive.infolist()
        if len(infos) > MAX_FILES:
            raise BundleError(f"{self.where} holds {len(infos)} files, at most {MAX_FILES} are allowed", _HINT)
        for info in infos:
            name = info.orig_filename
            if not is_safe_name(name) or name != info.filename:
                raise BundleError(f"{self.where} holds an unsafe name {name[:80]!r}", _HINT)
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):  # 0: written with bare permission bits
                raise BundleError(f"{self.where}: {name} is not a regular file", _HINT)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise BundleError(f"{self.where}: {name} is compressed or encrypted; packs store files as they are", _HINT)
            if name == MANIFEST and info.file_size > MAX_MANIFEST_BYTES:
                raise BundleError(f"{self.where}: its manifest is larger than {MAX_MANIFEST_BYTES >> 20} MiB", _HINT)
        if sum(info.file_size for info in infos) > size:  # entries that overlap
            raise BundleError(f"{self.where}: its files claim more bytes than the pack has", _HINT)
        names = [info.filename for info in infos]
        folders = {name.partition("/")[0] for name in names if "/" in name}
        # Lower case, because a file system may not tell A from a; folders too, because "a" and "a/b" cannot both be files.
        path, times = Counter(path.lower() for path in (*names, *folders)).most_common(1)[0] if infos else ("", 0)
        if times > 1:
            raise BundleError(f"{self.where} holds {path!r} more than once", _HINT)

    def _read(self, name: str) -> Iterator[bytes]:
        with _refusing(self.where), self._archive.open(name) as source:
            while block := source.read(_BLOCK):
                yield block

    def check(self) -> None:
        """Read every file once and compare its sha256 with the manifest's. Raises `BundleError` for the first that differs."""
        for entry in self.entries:
            self.stream(entry, lambda block: None)

    def extract(self, folder: Path) -> None:
        """Write all files into an empty folder, each checked on the way."""
        with _opened(folder / MANIFEST) as target:
            target.write(self.manifest_bytes)
        for entry in self.entries:
            path = folder / entry.name
            make_readable(path.parent)
            with _opened(path) as target:
                self.stream(entry, target.write)

    def stream(self, entry: Entry, sink: Callable[[bytes], object]) -> None:
        """Feed one file to ``sink`` in blocks of at most 1 MiB, then check its sha256."""
        digest = hashlib.sha256()
        for block in self._read(entry.name):
            digest.update(block)
            sink(block)
        if digest.hexdigest() != entry.sha256:
            raise BundleError(f"{self.where}: {entry.name} is damaged: its sha256 is not the manifest's", _HINT)


def make_readable(folder: Path) -> None:
    """A folder that others may read, whatever the umask: the scanner's user may be another one than who installs."""
    folder.mkdir(exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) & 0o055 != 0o055:
        folder.chmod(0o755)


def _opened(path: Path) -> IO[bytes]:
    file = path.open("xb")
    os.fchmod(file.fileno(), 0o644)
    return file


@contextlib.contextmanager
def open_archive(file: IO[bytes], where: str) -> Iterator[Archive]:
    """Open a packed bundle, its table and manifest checked. Raises `BundleError` for anything else."""
    size = file.seek(0, 2)
    if size > MAX_PACK_BYTES:
        raise BundleError(f"{where} is larger than {MAX_PACK_BYTES >> 30} GiB", _HINT)
    file.seek(0)
    with contextlib.ExitStack() as stack:
        with _refusing(where):
            archive = stack.enter_context(zipfile.ZipFile(file))
        yield Archive(archive, size, where)


@contextlib.contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turn what `zipfile` raises on damaged or hostile bytes into a `BundleError`."""
    try:
        yield
    except (*_ZIP_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek to where no file reaches
            raise
        reason = first_line(error)
        raise BundleError(
            f"{where} is no sound zip: {reason}", "fetch it again, or make it: edgekit pack B --out F.zip"
        ) from None

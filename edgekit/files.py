"""Files that are whole or absent: what every writer of edgekit goes through."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EdgekitError, OutputExists, UsageError

if TYPE_CHECKING:
    from numpy.lib.npyio import NpzFile
    from numpy.typing import NDArray

__all__ = [
    "atomic_write",
    "check_new",
    "given_path",
    "locked",
    "naming",
    "npz_arrays",
    "npz_problem",
    "printable",
    "read_file",
    "replace_note",
    "sha256_file",
    "staged",
    "sync_path",
    "taken",
]

#: So much a small .npz may unpack to; a larger one to a hundred times its size. Zeros pack a thousand times smaller.
UNPACKED_BYTES = 1 << 30
_UNPACKED_TIMES = 100
#: What `locked` waits for another command: one may measure an engine meanwhile.
LOCKED_S = 3600.0
#: Of Unicode; and the upper bits of the halves of a pair in UTF-16, which are no characters.
_LAST_CODE, _SURROGATES = 0x10FFFF, 0xD800 >> 11


def given_path(value: object, name: str) -> Path:
    """The argument ``name`` as a path. Raises `UsageError` for what is none."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise UsageError(f"{name}: {value!r} is no path", f"give a str or a pathlib.Path as {name}")
    return Path(path)


def check_new(path: Path) -> None:
    """Whether `atomic_write` can put a file at ``path``: better said before the work than after.

    Raises `OutputExists` for a device or a pipe, which a file would take the place of (as root even that of /dev/null), and
    `UsageError` where no file can be made there.
    """
    import tempfile

    if path.exists() and not path.is_file():
        raise OutputExists(path)
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:  # permissions do not tell all
        os.rmdir(tempfile.mkdtemp(dir=folder, prefix=f".{path.name}."))
    except NotADirectoryError:
        raise UsageError(f"a file is in the way ({folder})", "name a path below folders only") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written in {folder}: {error.strerror}", "name another path") from None


def read_file(path: str | os.PathLike[str]) -> bytes:
    """All of a file. A pipe, a socket or a device, which may never begin or never end, is `OSError` at once."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe opens without a writer
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no file but a folder, a pipe, a socket or a device", os.fspath(path))
        return file.read()


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that every encoding takes: bytes that are no UTF-8 appear as ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def npz_arrays(file: NpzFile, most_bytes: int | None = None) -> dict[str, NDArray[Any]]:
    """Every array of an open .npz, by name. ``most_bytes``: what they may unpack to; by default it hangs on the file's size.

    Raises `ValueError` where they would be larger and for a member that is no array, which numpy gives as bytes; what
    `numpy.load` raises for damaged ones.
    """
    import numpy as np

    members = file.zip.infolist()  # type: ignore[union-attr]  # open as long as the file is
    packed, unpacked = (sum(getattr(each, size) for each in members) for size in ("compress_size", "file_size"))
    most = max(UNPACKED_BYTES, _UNPACKED_TIMES * packed) if most_bytes is None else most_bytes
    if unpacked > most:
        raise ValueError(f"its {packed} bytes unpack to {unpacked}, at most {most} are taken")
    arrays = {name: file[name] for name in file.files}
    if odd := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise ValueError(f"its member {odd[0][:80]!r} is no array")
    for name, array in arrays.items():
        if array.dtype.kind == "U" and array.size and array.dtype.itemsize:
            codes = np.ascontiguousarray(array).ravel().view(array.dtype.str[0].replace("=", "<") + "u4")
            if ((codes > _LAST_CODE) | (codes >> 11 == _SURROGATES)).any():
                raise ValueError(f"its member {name[:80]!r} holds texts that are none")
    return arrays


def npz_problem(path: Path, error: Exception) -> str:
    """Why `numpy.load` refused a .npz, in words: it takes whatever is no zip for a pickle, and advises to load it unsafely."""
    import zipfile  # not needed where files are sound

    if isinstance(error, OSError) or zipfile.is_zipfile(path):
        return str(error) or type(error).__name__
    return "it is no .npz"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` of the block names ``path``: which disk is full is the first thing that one wants to know."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomic_write(path: Path, data: bytes) -> None:
    """Write beside ``path``, flush to disk, then replace: a reader sees the old file or the new one, never half."""
    with staged({path: data}) as names:
        os.replace(names[path], path)
    sync_path(path.parent)


def replace_note(path: Path, data: bytes) -> None:
    """`atomic_write` by one name beside, so that a crash leaves one file, for the next write to take; the caller holds a lock.

    All may read it, whatever the umask. Loads nothing: the device starts with it.
    """
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    with beside.open("xb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_path(path.parent)


@contextlib.contextmanager
def staged(files: Mapping[Path, bytes]) -> Iterator[dict[Path, str]]:
    """Contents on disk beside their final paths: all that can fail for lack of space, before anything changes.

    Yields final path -> temporary name; what the block has not renamed is removed.
    """
    import tempfile  # costs milliseconds, and the device only reads

    names: dict[Path, str] = {}
    try:
        for path, data in files.items():
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UsageError(f"{path} is a device, a pipe or a socket: a file would take its place", "name a file")
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path):
                handle, names[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            os.chmod(names[path], 0o644)
        yield names
    finally:
        for name in names.values():
            with contextlib.suppress(OSError):
                os.unlink(name)


def taken(handle: int, patience_s: float, waits: Callable[[], object]) -> bool:
    """Lock an open file or folder, flock(2), within so many seconds; whether it is ours. ``waits`` is called once, after a
    second."""
    begun, told = time.monotonic(), False
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        waited = time.monotonic() - begun
        if waited > patience_s or not patience_s:
            return False
        if waited > 1.0 and not told:
            waits()
            told = True
        time.sleep(0.02)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True, told: Callable[[str], object] = lambda words: None) -> Iterator[None]:
    """One writer at a time in a folder, across processes; ``told`` hears that this one waits, after a second.

    Raises `EdgekitError` where it is taken and ``wait`` is off, or for longer than `LOCKED_S`: whoever can open a folder can
    lock it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not taken(
            handle, LOCKED_S if wait else 0.0, lambda: told(f"waiting for another command, which is writing {folder}")
        ):
            raise EdgekitError(f"another command is writing {folder}", "wait for it, or choose another --out")
        yield
    finally:
        os.close(handle)


def sync_path(path: Path) -> None:
    """Flush a folder's entries (or a file's contents) to disk, so that a rename survives a power cut in the right order."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

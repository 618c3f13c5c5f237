"""Image files and folders of them, once or watched."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edgekit.errors import DataError, MissingExtra, UsageError
from edgekit.files import printable
from edgekit.preprocess import IMAGE_SUFFIXES, MAX_PIXELS
from edgekit.scanner.stop import Stop

from . import Captured, Notice
from .options import CameraOptions
from .stills import decoding, read_apart

__all__ = ["POLL_S", "open_files"]

#: A watched file is read once its size and time stood still for this long: a copy in progress is left alone.
POLL_S = 0.25
#: So much of a path is quoted where it is wrong.
_SHOWN = 200

_Stamp = tuple[int, int, int]  # inode, bytes, modification time in ns


def open_files(
    target: str, watch: bool, stop: Stop, options: CameraOptions | None = None
) -> Iterator[Captured | Notice | None]:
    """The image at ``target``, or every image below the folder ``target``, sorted by path; hidden files are left out.

    With ``watch``, files that appear or change later follow until ``stop`` is set. Of ``options`` only ``max_pixels`` counts.
    Raises `DataError` where there is nothing to read, `MissingExtra` without Pillow.
    """
    try:
        import PIL  # noqa: F401  what decodes needs it; say so before the first frame
    except ImportError:
        raise MissingExtra("scan", "PIL") from None
    path, name = Path(target), printable(target)
    name = name if len(name) <= _SHOWN else f"{name[: _SHOWN // 2]}...{name[-_SHOWN // 2 :]}"
    most = options.max_pixels if options else MAX_PIXELS
    try:
        mode = os.stat(target).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise DataError(f"there is no file or folder at {name}", "check --source") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}", _cure(error)) from None
    if stat.S_ISDIR(mode):
        return _decoding(_watched(path, stop, most) if watch else _captured(_listed(path), stop, most))
    if watch:
        raise UsageError(f"--watch wants a folder, {name} is a file", "name the folder, or leave --watch out")
    if not stat.S_ISREG(mode):
        raise DataError(f"{name} is no regular file", "give an image file or a folder of images")
    return _decoding(_captured([path], stop, most))


def _decoding(items: Iterator[Captured | Notice | None]) -> Iterator[Captured | Notice | None]:
    with decoding():
        yield from items


def _listed(folder: Path) -> list[Path]:
    try:
        paths = sorted(_stamps(folder, _raise))
    except OSError as error:
        raise DataError(f"{printable(error.filename or folder)} cannot be listed: {error.strerror}", _cure(error)) from None
    if not paths:
        raise DataError(
            f"{folder} holds no images", f"add some ({', '.join(sorted(IMAGE_SUFFIXES))}), or wait for them with --watch"
        )
    return paths


def _cure(error: OSError) -> str:
    return "give this user the right to read it" if isinstance(error, PermissionError) else "check --source"


def _stamps(folder: Path, unlisted: Callable[[OSError], None]) -> dict[Path, _Stamp]:
    """Every image below ``folder`` with what changes when it is written; ``unlisted`` hears of folders that cannot be read."""
    found: dict[Path, _Stamp] = {}
    for root, folders, names in os.walk(folder, onerror=unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                try:
                    status = path.stat()
                except OSError:  # gone since it was listed, or a dangling link
                    continue
                if path.is_file():
                    found[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _went(error: OSError, folder: Path) -> bool:
    """A folder below ``folder`` that was removed between its parent's listing and its own."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR) and os.fspath(error.filename or folder) != os.fspath(folder)


def _raise(error: OSError) -> None:
    raise error


def _captured(paths: list[Path], stop: Stop, most: int) -> Iterator[Captured]:
    for seq, path in enumerate(paths):
        if stop.is_set():
            return
        yield _capture(path, seq, most)


def _watched(folder: Path, stop: Stop, most: int) -> Iterator[Captured | Notice | None]:
    """Polling, not inotify: it also works on network shares, where cameras drop their pictures.

    A folder that cannot be listed is said in a ``camera`` event, and once it can again: a share that went away comes back. What
    lies in the others is read meanwhile, and what was read in it is not read again.
    """
    done: dict[Path, _Stamp] = {}
    before: dict[Path, _Stamp] = {}
    seq, down = 0, set[str]()
    while not stop.is_set():
        unlisted: list[OSError] = []
        now = _stamps(folder, unlisted.append)
        away = {os.fspath(each.filename or folder): each for each in unlisted if not _went(each, folder)}
        for name in sorted(away.keys() ^ down):
            if name in away:
                details = {"state": "down", "reason": f"it cannot be listed: {away[name].strerror or away[name]}"}
            else:
                details = {"state": "up" if os.path.isdir(name) else "removed"}
            yield Notice("camera", printable(name), time.time(), time.monotonic(), details)
        down = set(away)
        ready = [path for path, stamp in now.items() if before.get(path) == stamp and done.get(path) != stamp]
        for path in sorted(ready, key=lambda path: (now[path][2], path)):
            if stop.is_set():
                return
            yield _capture(path, seq, most)
            seq += 1
            done[path] = now[path]
        below = tuple(os.path.join(name, "") for name in down)
        # What was removed is forgotten: memory stays bounded.
        done = {path: stamp for path, stamp in done.items() if path in now or os.fspath(path).startswith(below)}
        before = now
        if not ready:
            yield None  # steps may have something due
        stop.wait(POLL_S)


def _capture(path: Path, seq: int, most: int) -> Captured:
    name = printable(path)
    now, monotonic = time.time(), time.monotonic()
    try:
        return Captured(read_apart(path, most), name, seq, now, "", monotonic)
    except DataError as error:
        return Captured(None, name, seq, now, f"{error.message}; {error.hint}", monotonic)
    except MemoryError:
        return Captured(None, name, seq, now, f"{printable(path.name)} does not fit into memory; scale it down", monotonic)

"""SQLite's writes and syncs, recorded by wrapping its VFS; and files as a power cut could leave them."""

from __future__ import annotations

import _sqlite3
import ctypes
import random
import shutil
from pathlib import Path
from typing import Any

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_OPEN = ctypes.CFUNCTYPE(_I, _P, _P, _P, _I, _P)
_WRITE = ctypes.CFUNCTYPE(_I, _P, _P, _I, _L)
_TRUNCATE = ctypes.CFUNCTYPE(_I, _P, _L)
_SYNC = ctypes.CFUNCTYPE(_I, _P, _I)
_METHODS = 20  # pointers in sqlite3_io_methods after its version (padded to a pointer)


class _Vfs(ctypes.Structure):
    """https://sqlite.org/c3ref/vfs.html, as far as xOpen."""

    _fields_ = [
        ("version", _I),
        ("size", _I),
        ("longest", _I),
        ("next", _P),
        ("name", ctypes.c_char_p),
        ("data", _P),
        ("open", _P),
    ]


class Log:
    """While entered, what is written to databases and their WALs, in order.

    ("write", name, offset, bytes), ("truncate", name, size), ("sync", name), and whatever `mark` adds.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
        library.sqlite3_vfs_find.argtypes = [ctypes.c_char_p]
        self._vfs = library.sqlite3_vfs_find(None).contents
        self.steps: list[Any] = []
        self._names: dict[int, str] = {}
        self._tables: dict[int, Any] = {}
        self._kept: list[Any] = []  # callbacks and tables that files still point to
        self._original = self._vfs.open

    def mark(self, step: Any) -> None:
        self.steps.append(step)

    def __enter__(self) -> Log:
        original = _OPEN(self._original)

        def opened(vfs: int, name: int | None, file: int, flags: int, out: int) -> int:
            # The pointer itself goes on: SQLite keeps it for as long as the file is open (it names the -shm by it).
            code = original(vfs, name, file, flags, out)
            methods = _P.from_address(file).value
            if code == 0 and name and methods:
                self._names[file] = ctypes.string_at(name).decode().rpartition("/")[2]
                if methods not in self._tables:
                    self._tables[methods] = self._table(methods)
                _P.from_address(file).value = ctypes.addressof(self._tables[methods])
            return int(code)

        callback = _OPEN(opened)
        self._kept += [callback, original]
        self._vfs.open = ctypes.cast(callback, _P).value
        return self

    def __exit__(self, *_: object) -> None:
        self._vfs.open = self._original

    def _table(self, methods: int) -> Any:
        """A copy of a file's methods in which xWrite (3), xTruncate (4) and xSync (5) say what they do."""
        table = (_P * _METHODS).from_buffer_copy((ctypes.c_char * (8 * _METHODS)).from_address(methods))
        do_write, do_truncate, do_sync = _WRITE(table[3] or 0), _TRUNCATE(table[4] or 0), _SYNC(table[5] or 0)

        def write(file: int, data: int, size: int, offset: int) -> int:
            self.steps.append(("write", self._names[file], offset, ctypes.string_at(data, size)))
            return int(do_write(file, data, size, offset))

        def truncate(file: int, size: int) -> int:
            self.steps.append(("truncate", self._names[file], size))
            return int(do_truncate(file, size))

        def sync(file: int, flags: int) -> int:
            code = int(do_sync(file, flags))
            self.steps.append(("sync", self._names[file]))
            return code

        callbacks = [_WRITE(write), _TRUNCATE(truncate), _SYNC(sync)]
        for place, callback in zip((3, 4, 5), callbacks, strict=True):
            table[place] = ctypes.cast(callback, _P).value
        self._kept += [callbacks, do_write, do_truncate, do_sync, table]
        return table


def recording() -> Log | None:
    """None where Python's sqlite3 does not use the shared library."""
    maps = Path("/proc/self/maps").read_text()
    path = next((line.split()[-1] for line in maps.splitlines() if "libsqlite3.so" in line), "")
    return Log(ctypes.CDLL(path)) if path and _sqlite3 else None


def image(steps: list[Any], folder: Path, part: float, rng: random.Random) -> None:
    """The files after ``steps`` and a power cut: of the writes since a file's last sync, the share ``part`` is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    last_sync = {step[1]: i for i, step in enumerate(steps) if step[0] == "sync"}
    files: dict[str, bytearray] = {}
    for i, step in enumerate(steps):
        if step[0] == "truncate":
            del files.setdefault(step[1], bytearray())[step[2] :]
        elif step[0] == "write":
            data = step[3]
            if i > last_sync.get(step[1], -1):
                if rng.random() >= part:
                    continue
                if part < 1:
                    data = data[: 512 * rng.randrange(1, len(data) // 512 + 2)]
            content = files.setdefault(step[1], bytearray())
            content.extend(b"\0" * max(0, step[2] - len(content)))
            content[step[2] : step[2] + len(data)] = data
    if any(name.endswith("-wal") for name in files):  # SQLite has removed the journal before it opens the WAL
        files = {name: content for name, content in files.items() if not name.endswith("-journal")}
    for name, content in files.items():
        if not name.endswith("-shm"):
            (folder / name).write_bytes(content)

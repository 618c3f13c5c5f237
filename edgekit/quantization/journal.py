"""Results of long work, appended to one file as they come: an interrupted calibration goes on where it stopped."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from edgekit.progress import say

from .simulate import Array

__all__ = ["Journal", "discard"]

_MAGIC = b"edgekit calibration journal 1\n"
_FRAME = struct.Struct("<II")  # length and crc32 of a record
_MOST = 1 << 30  # bytes of a record

Arrays = dict[str, Array]


class _Stored(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class _Record(msgspec.Struct, frozen=True):
    name: str
    arrays: dict[str, _Stored]


class Journal:
    """Named results. A torn end, which a killed process leaves, is cut off; results of another ``key`` are thrown away.

    Without a path, where the file there is something else, or cannot be written, nothing is kept.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._head = path, _MAGIC + key.encode() + b"\n"
        self._places: dict[str, tuple[int, int]] = {}  # name -> offset and length
        self._fresh = False  # the file is begun with the first result: what is refused leaves none
        try:
            self._open()
        except OSError as error:
            self._stop(error)

    def _open(self) -> None:
        path = self._path
        if path is None:
            return
        if path.exists() and not _is_ours(path):
            say(f"{path} is no calibration of edgekit and stays as it is: this run cannot be resumed")
            self._path = None
        elif path.exists() and (end := self._read(path)):
            with path.open("r+b") as file:
                file.truncate(end)
            if self._places:
                say(f"{path} has {len(self._places)} results of this calibration: going on from there")
        else:
            self._fresh = True

    def recall(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """What ``make`` gave under this name before; else what it gives now, which is kept."""
        if name in self._places:
            return self._load(name)
        arrays = make()
        if self._path is not None:
            try:
                self._append(name, arrays)
            except OSError as error:
                self._stop(error)
        return arrays

    def _stop(self, error: OSError) -> None:
        """Work goes on where its journal cannot be written: on a full disk, or under too long a name."""
        say(f"{self._path} cannot be written ({error.strerror}): this run cannot be resumed")
        self._path, self._places = None, {}

    def _read(self, path: Path) -> int:
        """Where the last whole record ends; 0 for results of another calibration."""
        with path.open("rb") as file:
            if file.read(len(self._head)) != self._head:
                return 0
            end = file.tell()
            while len(frame := file.read(_FRAME.size)) == _FRAME.size:
                length, checksum = _FRAME.unpack(frame)
                data = file.read(length) if length <= _MOST else b""
                if not data or len(data) != length or zlib.crc32(data) != checksum:
                    break
                try:
                    record = msgspec.msgpack.decode(data, type=_Record)
                except msgspec.DecodeError:
                    break
                self._places[record.name] = (end + _FRAME.size, length)
                end = file.tell()
        return end

    def _load(self, name: str) -> Arrays:
        assert self._path is not None
        offset, length = self._places[name]
        with self._path.open("rb") as file:
            file.seek(offset)
            record = msgspec.msgpack.decode(file.read(length), type=_Record)
        return {
            part: np.frombuffer(stored.data, np.dtype(stored.dtype)).reshape(stored.shape).copy()
            for part, stored in record.arrays.items()
        }

    def _append(self, name: str, arrays: Arrays) -> None:
        assert self._path is not None
        stored = {part: _Stored(a.dtype.str, a.shape, np.ascontiguousarray(a).tobytes()) for part, a in arrays.items()}
        data = msgspec.msgpack.encode(_Record(name, stored))
        if self._fresh:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(self._head)
            self._fresh = False
        with self._path.open("ab") as file:
            offset = file.tell()
            file.write(_FRAME.pack(len(data), zlib.crc32(data)) + data)
        self._places[name] = (offset + _FRAME.size, len(data))


def discard(path: Path) -> None:
    """The work is done: its journal goes, a file of anybody else's stays."""
    if path.exists() and _is_ours(path):
        path.unlink()


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        found = file.read(len(_MAGIC))
    return found == _MAGIC[: len(found)]  # also one that was killed before its first line

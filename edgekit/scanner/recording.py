"""The file of an incident, ``NAME.edgekit-incident``: a zip of JSON and PNG, in an order that never changes.

    incident.json     `Recording`: what ran, why the file was written, the state of the steps where it begins
    journal.jsonl     `Round` by round: what came from the source, what the reading answered, what the clocks said
    events.jsonl      the events that left, byte for byte
    frames/000000.png the frames, lossless

Nothing of it is unpacked to disk, and nothing of it is run.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError

from .events import encode
from .png import decode_png

__all__ = [
    "FRAME",
    "SUFFIX",
    "Came",
    "Model",
    "Recorded",
    "Recording",
    "Round",
    "StepState",
    "frame_name",
    "open_recording",
    "write_recording",
]

SUFFIX = ".edgekit-incident"
FRAME = "$frame"
MAX_TEXT = 16 << 20  # of a JSON member
MAX_PARTS = 1_000_000  # lists and objects in one: empty ones take 30 times their text in memory
MAX_FRAME = 256 << 20
MAX_ROUNDS = 1_000_000
_OLD = (1980, 1, 1, 0, 0, 0)


class Came(msgspec.Struct, frozen=True, omit_defaults=True):
    """A captured frame, or a notice (``kind`` and ``event``). ``answer``: the event as the reading made it."""

    source: str
    seq: int
    time: float
    monotonic: float
    frame: int | None = None
    error: str = ""
    answer: dict[str, Any] | None = None
    kind: str = ""
    event: dict[str, Any] | None = None


class Round(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the scan's loop did at one go. ``sent``: how many events left in it. ``fires``: triggers from outside, each as
    (how many frames had come when it was taken, or -1: after all that, camera or None, reference, from when it counts)."""

    came: tuple[Came, ...] = ()
    monotonic: float = 0.0
    wall: float = 0.0
    sent: int = 0
    fires: tuple[tuple[int, str | None, str, float], ...] = ()


class Model(msgspec.Struct, frozen=True):
    path: str
    digest: str
    backend: str
    graph: str
    beam: int = 1


class StepState(msgspec.Struct, frozen=True):
    """A step: its options, and its ``state`` at the first round, where it can tell (``known``).

    A frame in it is ``{FRAME: number}``.
    """

    name: str
    options: Any = None
    state: Any = None
    known: bool = False


class Recording(msgspec.Struct, frozen=True):
    """``first``: the number of the first event. ``codes``: the reader's budget in ms, -1 for a function of the user's own;
    ``formats``: what it reads, none for all."""

    format: Literal[1]
    edgekit: str
    run_id: str
    first: int
    why: dict[str, Any]
    model: Model | None = None
    text: Model | None = None
    codes: float | None = None
    formats: tuple[str, ...] = ()
    region: tuple[float, float, float, float] | None = None
    line: tuple[float, float, float, float] | None = None
    steps: tuple[StepState, ...] = ()
    config: Any = None
    seconds: float = 0.0
    frames: int = 0


class Recorded:
    """An open file. Raises `DataError` for one that is damaged or was not written by edgekit."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._zip = zipfile.ZipFile(self.path)
            self.about = msgspec.json.decode(self._read("incident.json", MAX_TEXT), type=Recording)
            rounds = self._read("journal.jsonl", MAX_TEXT).splitlines()
            if len(rounds) > MAX_ROUNDS:
                raise self._bad("it has too many rounds")
            decoder = msgspec.json.Decoder(Round)
            self.rounds = [decoder.decode(line) for line in rounds]
            self.events = self._read("events.jsonl", MAX_TEXT).splitlines()
        except (zipfile.BadZipFile, NotImplementedError, RecursionError, ValueError) as error:  # msgspec's are ValueErrors
            raise self._bad(str(error)) from None

    def frame(self, number: int) -> NDArray[np.uint8]:
        name = frame_name(number)
        return decode_png(self._read(name, MAX_FRAME), f"{self.path}: {name}")

    def close(self) -> None:
        self._zip.close()

    def _read(self, name: str, limit: int) -> bytes:
        try:
            with self._zip.open(name) as member:
                data = member.read(limit + 1)
        except (KeyError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, OSError, zlib.error) as error:
            raise self._bad(f"{name}: {error}") from None
        if len(data) > limit:
            raise self._bad(f"{name} is larger than {limit >> 20} MiB")
        if limit == MAX_TEXT and _parts(data) > MAX_PARTS:
            raise self._bad(f"{name} holds more than {MAX_PARTS} lists and objects")
        return data

    def _bad(self, why: str) -> DataError:
        return DataError(f"{self.path} is no recording of an incident: {why}", f"give a file *{SUFFIX} that edgekit scan wrote")


def _parts(data: bytes) -> int:
    """Lists and objects in a JSON text; looked at closely only where there may be too many, in one pass."""
    found = data.count(b"[") + data.count(b"{")
    if found > MAX_PARTS:
        outside = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]  # of strings
        found = sum(part.count(b"[") + part.count(b"{") for part in outside)
    return found


def open_recording(path: str | os.PathLike[str]) -> Recorded:
    """Raises `DataError`, `OSError`."""
    if not Path(path).is_file():
        raise DataError(f"there is no file {path}", f"give a file *{SUFFIX} that edgekit scan wrote")
    return Recorded(path)


def frame_name(number: int) -> str:
    return f"frames/{number:06d}.png"


def write_recording(
    path: Path, about: Recording, rounds: Iterable[Round], events: Iterable[bytes], frames: Iterable[bytes]
) -> int:
    """Write beside ``path``, then rename; the size in bytes. ``frames`` are PNG files. Raises `OSError`, and leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                _add(archive, "incident.json", msgspec.json.format(encode(about), indent=1) + b"\n")
                _add(archive, "journal.jsonl", b"".join(encode(each) + b"\n" for each in rounds))
                _add(archive, "events.jsonl", b"".join(each + b"\n" for each in events))
                for number, frame in enumerate(frames):
                    _add(archive, frame_name(number), frame, zipfile.ZIP_STORED)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.chmod(temporary, 0o644)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return size


def _add(archive: zipfile.ZipFile, name: str, data: bytes, how: int = zipfile.ZIP_DEFLATED) -> None:
    info = zipfile.ZipInfo(name, _OLD)
    info.compress_type = how
    info.external_attr = 0o644 << 16
    archive.writestr(info, data)

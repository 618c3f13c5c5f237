"""Where samples come from and where their pictures go."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgekit.errors import DataError, OutputExists, UsageError
from edgekit.files import atomic_write, given_path, printable

from .modality import Modality

__all__ = ["RECORD", "Pictures", "Source", "collect"]

RECORD = "explanation.json"
SHOWN = 60  # characters of a text that stand for it
STEM = 150  # bytes of a picture's name that come from its sample's; file systems take 255 in all


class Source(NamedTuple):
    """A file, or (where ``file`` is None) the ``text`` itself. ``shown`` names it to people, ``stem`` its picture."""

    shown: str
    stem: str
    file: Path | None
    text: str = ""


def collect(given: Sequence[str | os.PathLike[str]], out: Path, kind: type[Modality]) -> list[Source]:
    """Files as given, folders as what the modality reads, without what an earlier explanation put into ``out``.

    For texts, a str that is no path stands for itself. Raises `DataError` for what is not there.
    """
    found: list[Source] = []
    for one in given:
        if not isinstance(one, str):  # which may be a text, "" too, of which a text model says that it holds no word
            given_path(one, kind.noun)
        path = Path(one)
        if os.path.isdir(one):  # unlike Path's, it answers for names that are too long, and "" is not the current folder
            inside = _inside(path, out, kind.suffixes)
            if not inside:
                raise DataError(f"{path} holds no {kind.plural}", f"add files ({', '.join(sorted(kind.suffixes))})")
            found += map(_file, inside)
        elif os.path.isfile(one):
            found.append(_file(path))
        elif kind.noun == "text" and not (path.suffix.lower() in kind.suffixes and len(str(one).split()) == 1):
            text = os.fspath(one)
            short = " ".join(text[: 4 * SHOWN].split())
            short = short if len(short) <= SHOWN else f"{short[: SHOWN - 1]}…"
            found.append(Source(printable(short) or repr(text[:SHOWN]), "text", None, text))
        else:
            raise DataError(f"there is no {kind.noun} {path}", "check the path")
    if not found:
        raise UsageError(f"no {kind.noun} was named", f"edgekit explain B {kind.noun.upper()}... --out DIR")
    return found


def _file(path: Path) -> Source:
    return Source(printable(path), path.stem, path)


def _inside(folder: Path, out: Path, suffixes: frozenset[str]) -> list[Path]:
    made = earlier_pictures(folder / RECORD) if folder.resolve() == out.resolve() else set()
    shown = (p for p in folder.iterdir() if not p.name.startswith(".") and p.name not in made)
    return sorted(p for p in shown if p.suffix.lower() in suffixes and p.is_file())


class Pictures:
    """Names and writes one picture a sample; equal stems are numbered.

    Only what an earlier explanation wrote here is replaced, as its ``explanation.json`` lists it; sources never are.
    Raises `OutputExists` where that file is somebody else's.
    """

    def __init__(self, folder: Path, method: str, sources: Sequence[Path]) -> None:
        self._folder, self._method = folder, method
        self._taken = {source.resolve() for source in sources}
        self._names: set[str] = set()
        self._ours = earlier_pictures(folder / RECORD)

    def write(self, stem: str, png: bytes) -> str:
        short = printable(stem).replace("\\", "_").replace("/", "_").encode()[:STEM].decode(errors="ignore")
        name = next(n for n in self._candidates(short) if n not in self._names and self._free(n, png))
        self._names.add(name)
        atomic_write(self._folder / name, png)
        return name

    def _candidates(self, stem: str) -> Iterator[str]:
        yield f"{stem}.{self._method}.png"
        number = 2
        while True:
            yield f"{stem}-{number}.{self._method}.png"
            number += 1

    def _free(self, name: str, png: bytes) -> bool:
        path = self._folder / name
        if path.resolve() in self._taken:
            return False
        # The same picture: left by an explanation that was cut off before it wrote its record.
        return name in self._ours or not os.path.lexists(path) or (path.is_file() and path.read_bytes() == png)


def earlier_pictures(record: Path) -> set[str]:
    """The pictures that an earlier explanation lists. Raises `OutputExists` where ``record`` is none."""
    try:
        return {image.overlay for image in msgspec.json.decode(record.read_bytes(), type=_Record).images}
    except FileNotFoundError:
        return set()
    except msgspec.DecodeError:
        raise OutputExists(record) from None


class _Image(msgspec.Struct):
    overlay: str


class _Record(msgspec.Struct):
    """What marks an ``explanation.json`` as ours."""

    method: str
    digest: str
    images: list[_Image]

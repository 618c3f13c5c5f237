"""What `edgekit explain` wrote, for the page: each picture with the model that it is of and whether it is to be believed."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgekit.errors import DataError

from .figures import decoded, number, words

__all__ = ["MAX_PICTURE_BYTES", "Picture", "data_uri", "read_pictures"]

_STEM = 24  # characters of a sample's name that its picture's is sure to begin with

MAX_PICTURE_BYTES = 400_000
MAX_RECORD_BYTES = 64 << 20
PNG = b"\x89PNG\r\n\x1a\n"
#: A map's figure, that of its control, and whether the map must have the smaller one.
CHECKS = (("deletion", "deletion_auc", "misplaced_auc", True), ("insertion", "insertion_auc", "misplaced_insertion_auc", False))


class Picture(NamedTuple):
    """``uri``: a PNG. ``label``: the answer. ``of``: bundle, graph, method, and the class that was asked about where that is
    another. ``checks``: what the map reached, beside its control. ``cautions``: why not to take it at its face."""

    uri: str
    source: str
    label: str | None = None
    score: float | None = None
    of: str = ""
    checks: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


def read_pictures(folder: Path, known: Mapping[str, str]) -> list[Picture]:
    """Those of ``explanation.json`` by file name, never by a path out of the folder. ``known``: digest -> name of the bundles
    that the page is about.

    Raises `DataError` for a folder without explanations.
    """
    try:
        record = folder / "explanation.json"
        if record.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError(f"explanation.json is over {MAX_RECORD_BYTES >> 20} MiB")
        data = decoded(record.read_bytes())
        images = [image for image in data["images"] if isinstance(image, Mapping)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} holds no explanations: {error}", "write them: edgekit explain B IMAGE... --out DIR"
        ) from None
    return list(_found(folder, data, images, known))


def _source(said: str, picture: Path) -> str:
    """A file's name without its folders, which its picture is called after; a text as it is, slashes and all."""
    stem = Path(said).stem.replace("\\", "_")[:_STEM]
    return Path(said).name if stem and picture.name.startswith(stem) else said


def _found(
    folder: Path, data: Mapping[str, Any], images: list[Mapping[str, Any]], known: Mapping[str, str]
) -> Iterator[Picture]:
    digest = words(data, "digest") or ""
    bundle = known.get(digest) or Path(words(data, "bundle") or "").name.removesuffix(".edge")
    of = " · ".join(part for part in (bundle, words(data, "graph"), words(data, "method")) if part)
    strange = () if digest in known else (f"of {bundle or 'an unnamed bundle'}, which is none of this page",)
    for image in images:
        path = folder / Path(words(image, "overlay") or "").name
        if uri := _read(path):
            source = " ".join(filter(None, (_source(words(image, "source") or path.name, path), words(image, "series"))))
            checks, doubts = _checked(image)
            answer, asked = words(image, "label"), words(image, "explained")
            about = of if asked in (None, answer) else f"{of} · explains {asked}"
            yield Picture(uri, source, answer, number(image, "score"), about, checks, (*strange, *doubts))


def _checked(image: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(figures, doubts) in words; a sheet of activations has neither."""
    checks, doubts = [], []
    for name, figure, control, smaller in CHECKS:
        reached, misplaced = number(image, figure), number(image, control)
        if reached is None:
            continue
        beside = "" if misplaced is None else f" (misplaced {misplaced:.2f})"
        checks.append(f"{name} {reached:.2f}{beside}")
        if misplaced is not None and not (reached < misplaced if smaller else reached > misplaced):
            doubts.append(f"no better than the same map misplaced, by {name}")
    if unchecked := words(image, "unchecked"):
        doubts.append(f"not checked: {unchecked}")
    return tuple(checks), tuple(doubts)


def _read(path: Path) -> str | None:
    if not os.path.isfile(path) or path.stat().st_size > MAX_PICTURE_BYTES:  # os.path's answers for odd names, too
        return None
    return data_uri(path.read_bytes())


def data_uri(png: bytes) -> str | None:
    """A PNG as data: URI; None for anything else, or where it is too large to inline."""
    if not png.startswith(PNG) or len(png) > MAX_PICTURE_BYTES:
        return None
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

"""What a `Harvest` kept, as a ``folder:`` data set with a sheet of what to look at."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import DataError, OutputExists

from .steps.harvest import Facts

__all__ = ["SHEET", "UNLABELLED", "gather", "unlabelled_of"]

UNLABELLED = "unlabelled"  # in the name of the folder beside the data set: in it they would be a class
SHEET = "review.csv"
_MAX_FACTS = 1 << 16
_COLUMNS = ("file", "label", "text", "score", "why", "other", "source", "seq", "time")


def gather(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, Any]:
    """Copy the frames of ``folder`` to ``out``, one folder a predicted label; those without one to ``OUT.unlabelled`` beside.
    `SHEET` in ``out`` lists all, the most telling first.

    Returns ``frames``, ``labels`` (count by folder), ``unlabelled`` (how many), ``damaged``. Raises `DataError` where there is
    nothing to gather, `OutputExists`, `OSError`; then nothing is left behind.
    """
    source, target = Path(folder), Path(out)
    beside = unlabelled_of(target)
    for each in (target, beside):
        if os.path.lexists(each):
            raise OutputExists(each)
    refuse_inside_bundle(target)
    found, damaged = _found(source)
    if not found:
        raise DataError(f"{source} holds no harvested frames", "harvest some: edgekit scan with a harvest in its config")
    target.parent.mkdir(parents=True, exist_ok=True)
    work, others = (Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")) for _ in range(2))
    try:
        labels: dict[str, int] = {}
        unlabelled = 0
        with (work / SHEET).open("w", newline="", encoding="utf-8") as file:
            sheet = csv.writer(file)
            sheet.writerow(_COLUMNS)
            for path, facts in sorted(found, key=lambda each: (-each[1].value, each[0].name)):
                if place := _folder_name(facts.label):
                    (work / place).mkdir(exist_ok=True)
                    shutil.copyfile(path, work / place / path.name)
                    labels[place] = labels.get(place, 0) + 1
                else:
                    shutil.copyfile(path, others / path.name)
                    unlabelled += 1
                where = f"{place}/{path.name}" if place else f"../{beside.name}/{path.name}"
                row = (facts.label, facts.text, facts.score, facts.why, facts.other, facts.source, facts.seq, facts.time)
                sheet.writerow([where, *map(_cell, row)])
        for made, final in ((others, beside), (work, target)):
            os.chmod(made, 0o755)  # noqa: S103  as mkdir would have made it
            if made is work or unlabelled:
                os.rename(made, final)
    except BaseException:
        for made in (work, beside if not others.exists() else others):
            shutil.rmtree(made, ignore_errors=True)
        raise
    if not unlabelled:
        others.rmdir()
    figures = {"out": str(target), "frames": len(found), "labels": dict(sorted(labels.items()))}
    return {**figures, "unlabelled": unlabelled, "damaged": damaged}


def unlabelled_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.{UNLABELLED}")


def _found(folder: Path) -> tuple[list[tuple[Path, Facts]], int]:
    found: list[tuple[Path, Facts]] = []
    damaged = 0
    for path in sorted(folder.glob("*.json")):
        picture = path.with_suffix(".png")
        try:
            if path.stat().st_size > _MAX_FACTS or picture.is_symlink() or not picture.is_file():
                raise ValueError(path.name)
            found.append((picture, msgspec.json.decode(path.read_bytes(), type=Facts)))
        except (msgspec.DecodeError, UnicodeDecodeError, OSError, ValueError):
            damaged += 1
    return found, damaged


def _folder_name(label: str | None) -> str:
    """A label as the name of a folder below the data set, whatever it holds; "" for none."""
    name = quote(label, safe=" ()+,=@") if label else ""
    if name.startswith(".") or name == SHEET:
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > 200:  # two long labels may begin alike
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name


def _cell(value: Any) -> str:
    """Text that no spreadsheet takes for a formula."""
    text = "" if value is None else str(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text

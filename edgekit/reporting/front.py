"""The front of a study, as `edgekit search --objective accuracy,latency` leaves it beside the study: read, and as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgekit.errors import DataError

from .figures import decoded, number, words

__all__ = ["FRONT_KIND", "FRONT_SUFFIX", "Front", "differ_much", "front_file", "read_front", "row_words"]

FRONT_SUFFIX = ".front.json"
FRONT_KIND = "edgekit front"
MAX_BYTES = 8 << 20


class Front(NamedTuple):
    """``rows`` of finished trials with an accuracy and a latency; ``bundles`` of those on the front, where they are."""

    study: str
    latency: str
    prediction: bool
    notes: tuple[str, ...]
    failed: int
    rows: tuple[Mapping[str, Any], ...]
    bundles: tuple[Path, ...]

    @property
    def best(self) -> list[Mapping[str, Any]]:
        """The rows on the front, by rising latency."""
        return sorted((row for row in self.rows if row["front"]), key=lambda row: float(row["latency_ms"]))

    def chart(self) -> dict[str, Any]:
        """Accuracy (percent) over latency: the trials on the front with a name each, the others, and the step between.

        ``logarithmic``: the axis' ends where latencies differ much, else None.
        """
        points = [{"name": row_words(row), "x": row["latency_ms"], "y": 100 * row["accuracy"]} for row in self.rows]
        best = [row_words(row) for row in self.best]
        low, high = (pick((point["x"] for point in points), default=1.0) for pick in (min, max))
        unit = "Predicted latency (ms)" if self.prediction else "Latency (ms)"
        return {
            "front": [point for point in points if point["name"] in best],
            "others": [point for point in points if point["name"] not in best],
            "step": [{"x": row["latency_ms"], "y": 100 * row["accuracy"]} for row in self.best],
            "logarithmic": [low / 1.25, high * 1.6] if differ_much(low, high) else None,
            "x": unit,
            "y": "Validation accuracy (%)",
        }


def differ_much(low: float, high: float) -> bool:
    """Whether a chart of latencies in ``low`` to ``high`` is better logarithmic: one slow trial squeezes the fast ones."""
    return high > 8 * low > 0


def row_words(row: Mapping[str, Any]) -> str:
    """A trial in a few words: its number and where it departs from the defaults."""
    size, keep, width = (number(row, name) for name in ("size", "keep", "width"))
    parts = [f"{width:g}x" if width else "", f"{size:g} px" if size else ""]
    parts += [f"keep {keep:g}" if keep and keep < 1 else "", words(row, "precision") or ""]
    return f"{row.get('trial')}: " + ", ".join(part for part in parts if part)


def front_file(path: Path) -> Path | None:
    """The front that ``path`` names, itself or as the study beside it; None for what is neither."""
    beside = path.with_name(path.name + FRONT_SUFFIX)
    if path.is_dir():
        return None
    return path if path.name.endswith(FRONT_SUFFIX) else beside if beside.is_file() else None


def read_front(file: Path) -> Front:
    """Raises `DataError` for what is no front."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        data = decoded(file.read_bytes())
        if data["kind"] != FRONT_KIND:
            raise ValueError(f"its kind is {data['kind']!r}")
        trials = [row for row in data["trials"] if isinstance(row, Mapping)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} holds no front: {error}", "a search writes it: edgekit search --objective accuracy,latency --study FILE"
        ) from None
    rows = [row for row in map(_row, trials) if row["latency_ms"] is not None and row["accuracy"] is not None]
    return Front(
        study=words(data, "study") or file.name,
        latency=words(data, "latency") or "",
        prediction=data.get("prediction") is True,
        notes=_notes(data.get("notes")),
        failed=len(trials) - len(rows),
        rows=tuple(rows),
        bundles=tuple(_bundles(file, rows)),
    )


def _row(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a trial; malformed values count as absent."""
    figures = ("accuracy", "latency_ms", "macs", "parameters", "size_bytes", "width", "size", "keep")
    texts = {name: words(stored, name) for name in ("trial", "precision", "bundle")}
    return {**{name: number(stored, name) for name in figures}, **texts, "front": stored.get("front") is True}


def _notes(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _bundles(file: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """The folders that rows on the front name, by rising latency; never one outside the file's own folder."""
    found = []
    for row in sorted(rows, key=lambda row: float(row["latency_ms"])):
        if row["front"] and row["bundle"] is not None:
            path = file.parent / row["bundle"]
            if path.resolve().is_relative_to(file.parent.resolve()) and path.is_dir():
                found.append(path)
    return found

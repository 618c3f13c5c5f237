"""The figures of a chart as a table, for those who cannot see it, and for paper and spreadsheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Table", "table_of"]


class Table(NamedTuple):
    """``rows`` of cells: a text, a number, or None for what was not measured."""

    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def table_of(kind: str, data: Mapping[str, Any]) -> Table | None:
    """Of a chart that report.js draws; None where the page has its figures in a table anyway."""
    if kind == "curves":
        lines: Mapping[str, Sequence[float | None]] = data["lines"]
        return Table(("Epoch", *lines), list(zip(data["x"], *lines.values(), strict=True)))
    if kind == "lines":
        rows = [(line["name"], *point) for line in data["lines"] for point in line["points"]]
        return Table(("Group", data["x"], data["y"]), rows)
    if kind == "histogram":
        edges = data["edges"]
        return Table(("From (ms)", "To (ms)", "Runs (%)"), list(zip(edges[:-1], edges[1:], data["shares"], strict=True)))
    if kind == "bars":
        left = ["left in float" if is_float else "" for is_float in data["float"]]
        return Table(("Layer", data["x"], ""), list(zip(data["names"], data["values"], left, strict=True)))
    if kind == "ranges":
        ends = [(*seen, *(covered or (None, None))) for seen, covered in zip(data["values"], data["covered"], strict=True)]
        rows = [(name, *end, share) for name, end, share in zip(data["names"], ends, data["clipped"], strict=True)]
        return Table(("Tensor", "Seen from", "to", "int8 covers from", "to", "Clipped (%)"), rows)
    if kind == "front":
        points = [(point, where) for where in ("front", "others") for point in data[where]]
        rows = [(point["name"], point["x"], point["y"], "on the front" * (where == "front")) for point, where in points]
        return Table(("Trial", data["x"], data["y"], ""), rows)
    return None

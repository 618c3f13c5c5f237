"""The front of a study as one SVG: accuracy over latency, a dot a trial, the front as a step line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgekit.reporting.front import differ_much, row_words
from edgekit.svg import escape

__all__ = ["MARK", "front_chart"]

MARK = "<!-- edgekit search -->"
_LEFT, _TOP, _WIDTH, _HEIGHT, _RIGHT, _BOTTOM = 70, 84, 760, 400, 40, 74  # pixels
_LETTER, _LINE = 5.9, 14  # pixels of a label's letter, of its line
_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #56616f }
.title { font-size: 17px; font-weight: 600; fill: #16202c }
.label { font-size: 11px; fill: #16202c; paint-order: stroke; stroke: #ffffff; stroke-width: 3px }
.tick { font-variant-numeric: tabular-nums }
.grid { stroke: #e6e9ed } .base { stroke: #8b96a3 } .step { fill: none; stroke: #d55e00; stroke-width: 1.6 }
.other { fill: #a9b4c0 } .front { fill: #0072b2; stroke: #ffffff; stroke-width: 1.5 }
""".strip()


def front_chart(found: Mapping[str, Any]) -> str:
    """What a `pareto` study has found (its ``trials`` and where its figures come from), as an SVG.

    A step, not a slope: between two points of a front there is no model, so the line says what is reached at most within a
    latency.
    """
    rows = [row for row in found["trials"] if row["accuracy"] is not None]
    return "\n".join(_Chart(found, rows).lines() if rows else _empty(found)) + "\n"


def _head(width: float, height: float, title: str) -> list[str]:
    size = f'width="{width:g}" height="{height:g}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width:g} {height:g}" role="img">',
        f"{MARK}<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect {size} fill="#ffffff"/>',
        f'<text class="title" x="24" y="34">{escape(title)}</text>',
    ]


def _title(found: Mapping[str, Any]) -> str:
    return f"{found['study']}: accuracy against latency"


def _empty(found: Mapping[str, Any]) -> list[str]:
    return [*_head(480, 80, _title(found)), '<text x="24" y="58">no trial has finished well yet</text>', "</svg>"]


class _Chart:
    def __init__(self, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        self.found = found
        self.front = sorted((row for row in rows if row["front"]), key=lambda row: row["latency_ms"])
        self.others = [row for row in rows if not row["front"]]
        latencies, shares = [row["latency_ms"] for row in rows], [row["accuracy"] for row in rows]
        self.logs = differ_much(min(latencies), max(latencies))
        self.low, self.high = _padded([self._scale(value) for value in latencies], 0.06)
        self.low = self.low if self.logs else max(self.low, 0.0)
        self.bottom, self.top = _padded(shares, 0.1)
        self.bottom, self.top = max(self.bottom, -0.005), min(self.top, 1.005)
        self.taken: list[tuple[float, float, float, float]] = []

    def lines(self) -> Iterator[str]:
        width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
        yield from _head(width, height, _title(self.found))
        done = len(self.front) + len(self.others)
        failed = len(self.found["trials"]) - done
        counts = f"{done} trials of {self.found['model']} on {self.found['data']}"
        counts += f", {failed} more failed" if failed else ""
        yield f'<text x="24" y="56">{escape(counts)}; {len(self.front)} that no other beats in both</text>'
        yield from self._axes()
        yield from (self._dot(row, "other", 3.5) for row in self.others)
        yield self._step()
        yield from (self._dot(row, "front", 6) for row in self.front)
        yield from self._labels()
        yield "</svg>"

    def _scale(self, latency: float) -> float:
        return math.log(latency) if self.logs else latency

    def _x(self, latency: float) -> float:
        return _LEFT + _WIDTH * (self._scale(latency) - self.low) / (self.high - self.low)

    def _y(self, share: float) -> float:
        return _TOP + _HEIGHT * (self.top - share) / (self.top - self.bottom)

    def _axes(self) -> Iterator[str]:
        right, floor = _LEFT + _WIDTH, _TOP + _HEIGHT
        for share in _ticks(self.bottom, self.top):
            y = self._y(share)
            yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * share:.6g}%</text>'
        span = (math.exp(self.low), math.exp(self.high)) if self.logs else (self.low, self.high)
        for latency in _log_ticks(*span) if self.logs else _ticks(*span):
            x = self._x(latency)
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{floor}"/>'
            yield f'<text class="tick" x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{latency:.4g}</text>'
        yield f'<line class="base" x1="{_LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>'
        what = "latency, ms" + (", logarithmic" if self.logs else "")
        yield f'<text x="{right}" y="{floor + 38}" text-anchor="end">{what}</text>'
        yield f'<text x="{_LEFT}" y="{floor + 58}">{escape(self.found["latency"])}</text>'
        middle = _TOP + _HEIGHT / 2
        metric = escape(f"{self.found['metric']} on validation samples")
        yield f'<text transform="translate(18 {middle:.0f}) rotate(-90)" text-anchor="middle">{metric}</text>'

    def _step(self) -> str:
        x, y = self._x(self.front[0]["latency_ms"]), self._y(self.front[0]["accuracy"])
        path = f"M{x:.1f} {_TOP + _HEIGHT}V{y:.1f}"
        for row in self.front[1:]:
            path += f"H{self._x(row['latency_ms']):.1f}V{self._y(row['accuracy']):.1f}"
        return f'<path class="step" d="{path}H{_LEFT + _WIDTH}"/>'

    def _dot(self, row: Mapping[str, Any], kind: str, radius: float) -> str:
        x, y = self._x(row["latency_ms"]), self._y(row["accuracy"])
        self.taken.append((x - radius, x + radius, y - radius, y + radius))
        hint = escape(f"trial {row_words(row)}: {row['accuracy']:.2%}, {row['latency_ms']:.3g} ms")
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"><title>{hint}</title></circle>'

    def _labels(self) -> Iterator[str]:
        """Beside each point of the front, on the first side that is free; none where all are taken."""
        for row in self.front:
            text = row_words(row)
            x, y, wide = self._x(row["latency_ms"]), self._y(row["accuracy"]), _LETTER * len(text)
            for dx, dy in ((10, 16), (-10 - wide, -8), (10, -8), (-10 - wide, 16), (10, 30), (-10 - wide, -22), (10, -22)):
                box = (x + dx, x + dx + wide, y + dy - _LINE + 3, y + dy + 3)
                inside = (
                    box[0] >= _LEFT and box[1] <= _LEFT + _WIDTH + _RIGHT and box[2] >= _TOP - 20 and box[3] <= _TOP + _HEIGHT
                )
                if inside and not any(box[0] < b and a < box[1] and box[2] < d and c < box[3] for a, b, c, d in self.taken):
                    self.taken.append(box)
                    yield f'<text class="label" x="{x + dx:.1f}" y="{y + dy:.1f}">{escape(text)}</text>'
                    break


_LEAST_SPAN = 1e-9  # of accuracies, milliseconds, megabytes; below it numbers lose the digits that ticks are made of


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of ``values`` and ``share`` of it more on both sides; some range where there is but one value, or nearly so."""
    low, high = min(values), max(values)
    spans = (high - low, abs(high) * 0.2, 1.0)
    span = next(span for span in spans if span >= _LEAST_SPAN)
    return low - share * span, high + share * span


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round values in a range."""
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (5, 2, 1) if (high - low) / (power * factor) >= 4)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in (1, 2, 5) if low <= factor * 10.0**power <= high]

"""The SNR of every layer over depth as one SVG: no plotting library, and any browser shows it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekit.svg import checked_path, escape

__all__ = ["check_picture", "layer_chart"]

_MARK = "<!-- edgekit compare -->"
_LEFT, _RIGHT, _TOP, _CALLOUTS, _PLOT = 60, 28, 84, 46, 280  # pixels
_NAMED_SLOT, _VALUED_SLOT = 15, 36  # the narrowest slots in which a name, and a figure, can be read
_LONGEST_NAME = 18
_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #56616f }
.title { font-size: 17px; font-weight: 600; fill: #16202c }
.value { font-size: 11px; text-anchor: middle; fill: #16202c }
.name { font-size: 11px; text-anchor: end }
.tick { text-anchor: end; font-variant-numeric: tabular-nums }
.callout { font-weight: 600; fill: #b34700; paint-order: stroke; stroke: #ffffff; stroke-width: 4px }
.grid { stroke: #e6e9ed } .base { stroke: #8b96a3 } .leader { stroke: #d55e00; stroke-width: 1; stroke-dasharray: 2 3 }
.limit { stroke: #d55e00; stroke-width: 1.2; stroke-dasharray: 6 4 }
.int8, .fp8 { fill: #0072b2 } .float { fill: #a9b4c0 } .diverging { fill: #d55e00 }
.fitted { fill: none; stroke: #0072b2; stroke-dasharray: 3 2 }
""".strip()


def check_picture(path: Path) -> Path:
    """``path``, fit to be written. Raises `UsageError` where it is no .svg, `OutputExists` for any file but such a chart."""
    return checked_path(path, _MARK)


def layer_chart(answer: Mapping[str, Any], title: str) -> str:
    """What `layers.compare_layers` returns, as an SVG: one bar a layer, int8 and float coloured, the worst two named."""
    return _Chart(answer).svg(title)


class _Chart:
    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = answer["layers"]
        self.first, self.fall = answer["first_diverging"], answer["largest_fall"]
        self.diverge: float = answer["diverge_db"]
        count = len(self.rows)
        self.width = max(min(max(count * 72, 560), 1000), 3 * count)
        self.slot = self.width / count
        self.bar = min(self.slot * (0.62 if self.slot > 12 else 0.8), 40)
        shown = [level for row in self.rows for level in (row["snr_db"], row["fitted_db"]) if level is not None]
        highest = max([level for level in shown if level < 100], default=40.0)  # equal tensors have 200, and are cut off
        self.high = 10 * math.ceil(max(highest, self.diverge + 10, 40.0) / 10)
        self.low = max(-40, min(0, 10 * math.floor(min([*shown, self.diverge]) / 10)))
        self.top = _TOP + _CALLOUTS
        self.bottom = self.top + _PLOT

    def svg(self, title: str) -> str:
        width = self.width + _LEFT + _RIGHT
        height = self.bottom + (118 if self.slot >= _NAMED_SLOT else 48)
        size = f'width="{width}" height="{height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" role="img">'
        parts = [*self._head(title), *self._axis()]
        for i, row in enumerate(self.rows):
            parts += self._layer(i, row)
        parts += self._callouts()
        lines = [head, _MARK, f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>"]
        return "\n".join([*lines, f'<rect {size} fill="#ffffff"/>', *parts, "</svg>", ""])

    def _x(self, i: int) -> float:
        return _LEFT + (i + 0.5) * self.slot

    def _y(self, level: float) -> float:
        share = (min(max(level, self.low), self.high) - self.low) / (self.high - self.low)
        return float(self.bottom - share * _PLOT)

    def _head(self, title: str) -> Iterator[str]:
        yield f'<text class="title" x="{_LEFT}" y="32">{escape(_short(title, 64))}</text>'
        form = "fp8" if any(row["type"] == "fp8" for row in self.rows) else "int8"
        legend = [
            (form, f"{form} layer"),
            ("float", "float layer"),
            ("diverging", f"below {self.diverge:g} dB"),
            ("fitted", "rescaled"),
        ]
        for place, (kind, words) in enumerate(legend if any(row["note"] == "rescaled" for row in self.rows) else legend[:3]):
            x = _LEFT + 112 * place
            yield f'<rect class="{kind}" x="{x}" y="48" width="11" height="11" rx="2"/><text x="{x + 17}" y="58">{words}</text>'

    def _axis(self) -> Iterator[str]:
        right = _LEFT + self.width
        every = 10 if self.high - self.low <= 80 else 20
        for level in range(-(-self.low // every) * every, self.high + 1, every):
            y = self._y(level)
            yield f'<line class="{"base" if level == 0 else "grid"}" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}">{level}</text>'
        middle = self.bottom - _PLOT / 2
        yield f'<text transform="translate(18 {middle:.0f}) rotate(-90)" text-anchor="middle">SNR, dB</text>'
        if self.slot < _NAMED_SLOT:
            step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if s * self.slot >= 48)
            for i in range(step - 1, len(self.rows), step):
                yield f'<text x="{self._x(i):.1f}" y="{self.bottom + 18}" text-anchor="middle">{i + 1}</text>'
            yield f'<text x="{right}" y="{self.bottom + 38}" text-anchor="end">layer, in the order of the graph</text>'

    def _layer(self, i: int, row: Mapping[str, Any]) -> Iterator[str]:
        level = self.low if row["snr_db"] is None else row["snr_db"]
        zero, y, x = self._y(0), self._y(level), self._x(i) - self.bar / 2
        below = row["note"] != "rescaled" and (row["snr_db"] is None or level < self.diverge)
        kind = "diverging" if below else row["type"]
        figure = "not finite" if row["snr_db"] is None else "equal" if level >= 200 else f"{level:.1f} dB"
        figure += "" if row["fitted_db"] is None else f", rescaled: {row['fitted_db']:.1f} dB"
        hint = escape(f"{i + 1}. {row['layer']} ({row['op']}, {row['type']}): {figure}")
        top, tall = min(y, zero), max(abs(y - zero), 1.5)
        size = f'x="{x:.2f}" y="{top:.2f}" width="{self.bar:.2f}" height="{tall:.2f}"'
        yield f'<rect class="bar {kind}" {size} rx="{min(2.5, self.bar / 4):.1f}"><title>{hint}</title></rect>'
        if row["fitted_db"] is not None:
            high = self._y(row["fitted_db"])
            size = f'x="{x:.2f}" y="{high:.2f}" width="{self.bar:.2f}" height="{max(zero - high, 1.5):.2f}"'
            yield f'<rect class="fitted" {size}/>'
            top = min(top, high)
        if self.slot >= _VALUED_SLOT:
            counts = level if row["fitted_db"] is None else row["fitted_db"]
            words = "not finite" if row["snr_db"] is None else "equal" if counts >= 200 else f"{counts:.1f}"
            yield f'<text class="value" x="{self._x(i):.1f}" y="{top - 5:.1f}">{words}</text>'
        if self.slot >= _NAMED_SLOT:
            place = f"translate({self._x(i) + 4:.1f} {self.bottom + 14}) rotate(-55)"
            yield f'<text class="name" transform="{place}">{escape(_short(row["layer"], _LONGEST_NAME))}</text>'

    def _callouts(self) -> Iterator[str]:
        """The limit, and two lines above the bars, each with a leader down to its own."""
        right, y = _LEFT + self.width, self._y(self.diverge)
        yield f'<line class="limit" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        said = []
        if self.first:
            said.append((self.first, f"first below {self.diverge:g} dB: {_short(self.first['layer'], 32)}"))
        if self.fall:
            said.append((self.fall, f"largest fall: {_short(self.fall['layer'], 32)}, {_fall(self.fall)}"))
        texts = []
        for line, (named, words) in enumerate(said):
            i = next(i for i, row in enumerate(self.rows) if row["tensor"] == named["tensor"])
            x, high = self._x(i), _TOP + 12 + 18 * line
            level = self.rows[i]["snr_db"]
            end = self._y(self.low if level is None else max(level, 0)) - (20 if self.slot >= _VALUED_SLOT else 4)
            half = 3.6 * len(words)  # half of the text's width, roughly
            middle = min(max(x, _LEFT + half), right - half)
            if end > high + 8:
                yield f'<line class="leader" x1="{x:.1f}" x2="{x:.1f}" y1="{high + 5}" y2="{end:.1f}"/>'
            texts.append(f'<text class="callout" x="{middle:.1f}" y="{high}" text-anchor="middle">{escape(words)}</text>')
        yield from texts  # over the leaders, which cross them


def _fall(fall: Mapping[str, Any]) -> str:
    before = "exact" if fall["from_db"] >= 200 else f"{fall['from_db']:.1f}"
    return f"{before} to {fall['to_db']:.1f} dB"


def _short(name: str, longest: int) -> str:
    """The end of a long name: exporters put the path in front."""
    return name if len(name) <= longest else "…" + name[1 - longest :]

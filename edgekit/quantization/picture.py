"""What each layer costs, as one SVG: bars of the error that it leaves, in percent of the signal's rms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.bundle import Bundle
from edgekit.files import atomic_write
from edgekit.svg import checked_path, escape

__all__ = ["check_picture", "draw_layers"]

_MARK = "<!-- edgekit quantize -->"
_SHOWN = 40
_LEFT, _RIGHT, _TOP, _ROW = 300, 160, 84, 22  # pixels
_BAR = 420
_NAME, _LABEL = 32, 36  # characters that fit above and beside the bars, in the widest of the fonts
_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #56616f }
.title { font-size: 17px; font-weight: 600; fill: #16202c }
.name { text-anchor: end } .value { fill: #16202c }
.int8 { fill: #0072b2 } .float { fill: #a9b4c0 } .worst { fill: #d55e00 } .base { stroke: #8b96a3 }
""".strip()


def check_picture(path: Path) -> Path:
    """``path``, fit to be written. Raises `UsageError` where it is no .svg, `OutputExists` for any file but such a chart."""
    return checked_path(path, _MARK)


def draw_layers(bundle: Bundle, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture of a `layer_table`; nothing where it has no measured layers.

    The error is that of the output where one layer alone is int8; where that was not measured, of the layer's own output.
    """
    key = "alone_db" if any(row["alone_db"] is not None for row in rows) else "layer_db"
    measured = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])
    if measured:
        atomic_write(path, _svg(measured[:_SHOWN], key, len(measured), bundle.manifest.name).encode())


def _svg(rows: Sequence[dict[str, Any]], key: str, total: int, name: str) -> str:
    errors = [100 * 10 ** (-row[key] / 20) for row in rows]
    most = max(1e-3, *errors)
    what = "at the output, where this layer alone is int8" if key == "alone_db" else "at the layer's own output, all int8"
    title = f"{_shortened(name, _NAME)}: what each layer costs"
    rest = f"the other {total - len(rows)} of {total} layers cost less" if len(rows) < total else ""
    width, height = _LEFT + _BAR + _RIGHT, _TOP + _ROW * len(rows) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"{_MARK}<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text class="title" x="24" y="34">{escape(title)}</text>',
        f'<text x="24" y="58">error {escape(what)}, in percent of the rms; grey: it stays float</text>',
    ]
    for i, row in enumerate(rows):
        y = _TOP + i * _ROW
        kind = "float" if row["type"] == "float" else "worst" if i == 0 else "int8"
        length = errors[i] / most * _BAR
        label = f"{_shortened(row['layer'], _LABEL - len(row['op']) - 3)} ({row['op']})"
        value = f"{errors[i]:.2g}% ({row[key]:.1f} dB)"
        points = "" if row["drop"] is None else f", {row['drop']:+.2f} points of top-1 lost alone"
        parts += [
            f'<text class="name" x="{_LEFT - 10}" y="{y + 14}">{escape(label)}</text>',
            f'<rect class="bar {kind}" x="{_LEFT}" y="{y + 3}" width="{max(length, 1):.1f}" height="{_ROW - 7}" rx="2">'
            f"<title>{escape(row['layer'])}: {value}{points}. {escape(row['why'])}</title></rect>",
            f'<text class="value" x="{_LEFT + max(length, 1) + 8:.1f}" y="{y + 14}">{value}</text>',
        ]
    bottom = _TOP + _ROW * len(rows)
    parts.append(f'<line class="base" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{bottom}"/>')
    return "\n".join([*parts, f'<text x="{_LEFT}" y="{bottom + 16}">{rest}</text></svg>' if rest else "</svg>"]) + "\n"


def _shortened(name: str, longest: int) -> str:
    """Both ends of a long name: exporters put the path in front, and what tells layers apart behind."""
    if len(name) <= longest:
        return name
    head = longest // 3
    return f"{name[:head]}…{name[head + 1 - longest :]}"

"""What each layer costs, as one SVG: bars of the dB that the output gains where only that layer stays float."""

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
_LEFT, _RIGHT, _TOP, _ROW = 250, 120, 84, 22  # pixels
_BAR = 420
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
    """Write the picture of a `layer_table`; nothing where it has no measured layers."""
    measured = [row for row in rows if row["gain_db"] is not None]
    if measured:
        title = f"{bundle.manifest.name}: what each layer costs"
        if len(measured) > _SHOWN:
            title += f" ({_SHOWN} of {len(measured)} layers, the most costly first)"
        atomic_write(path, _svg(measured[:_SHOWN], title).encode())


def _svg(rows: Sequence[dict[str, Any]], title: str) -> str:
    most = max(0.1, *(row["gain_db"] for row in rows))
    width, height = _LEFT + _BAR + _RIGHT, _TOP + _ROW * len(rows) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f"{_MARK}<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text class="title" x="24" y="34">{escape(title)}</text>',
        '<text x="24" y="58">dB that the output gains where this layer alone stays float; grey: it does stay float</text>',
    ]
    for i, row in enumerate(rows):
        y = _TOP + i * _ROW
        kind = "float" if row["type"] == "float" else "worst" if i == 0 else "int8"
        length = max(row["gain_db"], 0.0) / most * _BAR
        name = row["layer"] if len(row["layer"]) <= 30 else "…" + row["layer"][-29:]
        alone = "" if row["alone_db"] is None else f", alone {row['alone_db']:.1f} dB"
        parts += [
            f'<text class="name" x="{_LEFT - 10}" y="{y + 14}">{escape(name)} ({escape(row["op"])})</text>',
            f'<rect class="bar {kind}" x="{_LEFT}" y="{y + 3}" width="{max(length, 1):.1f}" height="{_ROW - 7}" rx="2">'
            f"<title>{escape(row['layer'])}: {row['gain_db']:+.2f} dB{alone}. {escape(row['why'])}</title></rect>",
            f'<text class="value" x="{_LEFT + max(length, 1) + 8:.1f}" y="{y + 14}">{row["gain_db"]:+.2f}</text>',
        ]
    parts.append(f'<line class="base" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{_TOP + _ROW * len(rows)}"/></svg>')
    return "\n".join(parts) + "\n"

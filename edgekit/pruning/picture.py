"""What pruning made of a model, as one SVG: its layers before and after, and how sensitive each group of channels is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edgekit.bundle import Bundle
from edgekit.files import atomic_write
from edgekit.pruned import PrunedLayer, Pruning, kl_ticks, pruning_of
from edgekit.svg import checked_path, escape

__all__ = ["check_picture", "draw_pruning"]

_MARK = "<!-- edgekit prune -->"
_SHOWN = 48  # layers
_NAMED = 6  # curves that can be told apart
_WIDTH, _LEFT, _TOP = 900, 220, 134  # pixels
_BAR, _ROW = 230, 20
_PLOT, _PLOT_LEFT, _PLOT_RIGHT = 260, 80, 250
_NAME, _GAIN = 30, 122  # characters that fit
_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #56616f }
.title { font-size: 17px; font-weight: 600; fill: #16202c } .head { font-size: 14px; font-weight: 600; fill: #16202c }
.name, .tick { text-anchor: end } .value { fill: #16202c } .gone { text-decoration: line-through }
.before { fill: #c2dcec } .after { fill: #0072b2 } .skipped { fill: #f3cfb3 }
.grid { stroke: #e6e9ed } .base { stroke: #8b96a3 } .curve { fill: none; stroke-width: 2 }
.other { stroke: #c3cad2; stroke-width: 1 }
.leader { stroke: #c3cad2 }
""".strip()
_COLOURS = ("#0072b2", "#d55e00", "#00815d", "#a8508a", "#7a6a00", "#4d5fc4")


def check_picture(path: Path) -> Path:
    """``path``, fit to be written. Raises `UsageError` where it is no .svg, `OutputExists` for any file but such a chart."""
    return checked_path(path, _MARK)


def draw_pruning(bundle: Bundle, path: Path) -> None:
    """Write the picture of the last pruning in the history of ``bundle``; nothing where that holds none.

    Layers are drawn in their order, as wide as the channels that they make; of more than 48 those with the most
    multiply-accumulates. The curves are KL divergence in nats over the share of a group's channels that is left.
    """
    run = next((found for entry in reversed(bundle.manifest.history) if (found := pruning_of(entry))), None)
    if run is not None:
        atomic_write(path, _svg(run, bundle.manifest.name).encode())


def _svg(run: Pruning, name: str) -> str:
    shown = _most_work(run.layers)
    parts, bottom = [*_title(run, name)], float(_TOP)
    if shown:
        parts += _layers(shown, sum(layer.kind != "normalisation" for layer in run.layers))
        bottom += _ROW * len(shown) + 34
    if run.sensitivity:
        parts += _curves(run, bottom + 34)
        bottom += 34 + _PLOT + 62
    size = f'width="{_WIDTH}" height="{bottom:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_WIDTH} {bottom:.0f}" role="img">'
    return "\n".join([head, f"{_MARK}<style>{_STYLE}</style>", f'<rect {size} fill="#ffffff"/>', *parts, "</svg>", ""])


def _title(run: Pruning, name: str) -> Iterator[str]:
    yield f'<text class="title" x="24" y="34">{escape(_end(name, 60))}: before and after pruning</text>'
    yield f'<text x="24" y="57">{escape(_start(run.gain or "no latency was measured", _GAIN))}</text>'
    if run.latency_before_ms is not None and run.latency_ms is not None:
        told = f"{run.latency_before_ms:.3g} ms before, {run.latency_ms:.3g} ms after"
        if run.latency_predicted_ms is not None:
            told += f"; predicted by the table of layers: {run.latency_predicted_ms:.3g} ms"
        told += f"; {run.predicted}" if run.predicted else ""
        yield f'<text x="24" y="75">{escape(_start(told, _GAIN))}</text>'
    if run.layers:
        legend = [(24, "before", "channels before"), (156, "after", "left"), (220, "skipped", "in a skipped block")]
        for x, kind, words in legend if any(layer.skipped for layer in run.layers) else legend[:2]:
            yield f'<rect class="{kind}" x="{x}" y="93" width="11" height="11" rx="2"/>'
            yield f'<text x="{x + 17}" y="103">{words}</text>'


def _most_work(layers: Sequence[PrunedLayer]) -> list[PrunedLayer]:
    """In their order, those that the picture has room for; norms are as wide as their neighbours, and say nothing more."""
    worth = [i for i, layer in enumerate(layers) if layer.kind != "normalisation"]
    chosen = sorted(worth, key=lambda i: -(layers[i].macs_before or 0))[:_SHOWN]
    return [layers[i] for i in sorted(chosen)]


def _layers(layers: Sequence[PrunedLayer], total: int) -> Iterator[str]:
    widest = max((layer.widths[0] for layer in layers if layer.widths), default=1) or 1
    columns = (_LEFT + _BAR + 10, _WIDTH - 130, _WIDTH - 24)
    heads = ("channels", "MACs", "µs alone")
    for x, words, anchor in zip(columns, heads, ("start", "end", "end"), strict=True):
        yield f'<text x="{x}" y="{_TOP - 6}" text-anchor="{anchor}">{words}</text>'
    for i, layer in enumerate(layers):
        y = _TOP + i * _ROW
        before, after = layer.widths or (0, 0)
        gone = " gone" if layer.skipped else ""
        yield f'<text class="name{gone}" x="{_LEFT - 10}" y="{y + 14}">{escape(_end(_named(layer), _NAME))}</text>'
        hint = f"<title>{escape(f'{layer.name} ({layer.kind}): {layer.channels()}')}</title>"
        kind = "skipped" if layer.skipped else "before"
        for share, drawn in ((before / widest, kind), (after / widest, "after")):
            if share:
                size = f'x="{_LEFT}" y="{y + 4}" width="{max(share * _BAR, 1):.1f}" height="{_ROW - 7}" rx="2"'
                yield f'<rect class="bar {drawn}" {size}>{hint}</rect>'
        texts = (
            layer.channels(),
            _change(layer.macs_before, layer.macs, _thousands),
            _change(layer.us_before, layer.us, _tenth),
        )
        for x, words, anchor in zip(columns, texts, ("start", "end", "end"), strict=True):
            yield f'<text class="value" x="{x}" y="{y + 14}" text-anchor="{anchor}">{escape(words)}</text>'
    bottom = _TOP + _ROW * len(layers)
    yield f'<line class="base" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{bottom}"/>'
    if len(layers) < total:
        yield f'<text x="{_LEFT}" y="{bottom + 16}">the other {total - len(layers)} of {total} layers have fewer MACs</text>'


def _curves(run: Pruning, top: float) -> Iterator[str]:
    """Lines from all channels, at the left, to few; the most sensitive in colour, named where they end."""
    right, bottom, above = _WIDTH - _PLOT_RIGHT, top + _PLOT, top - 14
    ticks = kl_ticks(max((kl for _, curve in run.sensitivity for _, kl in curve), default=0.0))

    def at(share: float, kl: float) -> tuple[float, float]:
        return _PLOT_LEFT + (1 - share) * (right - _PLOT_LEFT), bottom - math.sqrt(max(kl, 0.0) / ticks[-1]) * _PLOT

    yield f'<text class="head" x="24" y="{above:.0f}">Sensitivity: each group of channels cut alone, before fine-tuning</text>'
    for kl in ticks:
        y = at(1, kl)[1]
        yield f'<line class="{"grid" if kl else "base"}" x1="{_PLOT_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_PLOT_LEFT - 8}" y="{y + 4:.1f}">{kl:.4g}</text>'
    for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        yield f'<text x="{at(share, 0)[0]:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{share:.0%}</text>'
    yield f'<text x="{(right + _PLOT_LEFT) / 2:.0f}" y="{bottom + 38:.1f}" text-anchor="middle">channels left</text>'
    middle = bottom - _PLOT / 2
    words = "KL divergence, nats (axis of roots)"
    yield f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{words}</text>'
    ends = []
    for i, (name, curve) in reversed([*enumerate(run.sensitivity)]):
        places = [at(*point) for point in curve]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        kind = "curve" if i < _NAMED else "curve other"
        colour = f' stroke="{_COLOURS[i]}"' if i < _NAMED else ""
        yield f'<polyline class="{kind}"{colour} points="{line}"><title>{escape(name)}</title></polyline>'
        if i < _NAMED:
            ends.append((places[-1], name, _COLOURS[i]))
    yield from _names(ends, right, bottom)
    if len(run.sensitivity) > _NAMED:
        words = f"grey: {len(run.sensitivity) - _NAMED} less sensitive groups"
        yield f'<text x="{right + 26:.0f}" y="{bottom + 18:.1f}">{words}</text>'


def _names(ends: Sequence[tuple[tuple[float, float], str, str]], right: float, bottom: float) -> Iterator[str]:
    """Right of the plot, in the order of the lines' ends, moved up where two would touch."""
    lowest = bottom + 4
    for (x, y), name, colour in sorted(ends, key=lambda end: -end[0][1]):
        place = min(y + 4, lowest)
        lowest = place - 16
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
        yield f'<line class="leader" x1="{x + 5:.1f}" y1="{y:.1f}" x2="{right + 20}" y2="{place - 4:.1f}"/>'
        yield f'<text x="{right + 26}" y="{place:.1f}" style="fill: {colour}">{escape(_end(name, 30))}</text>'


def _named(layer: PrunedLayer) -> str:
    """Products have no layer of their own, and are named after the module that computes them."""
    return f"{layer.name} {layer.kind}" if layer.kind in ("attention", "product") else layer.name


def _change(before: float | None, after: float | None, shown: Callable[[float], str]) -> str:
    if before is None or after is None:
        return "-"
    return shown(before) if before == after else f"{shown(before)} \N{RIGHTWARDS ARROW} {shown(after)}"


def _thousands(value: float) -> str:
    return f"{value / 1e6:.3g}M" if value >= 999_500 else f"{value / 1e3:.3g}k" if value >= 1000 else f"{value:.0f}"


def _tenth(value: float) -> str:
    return f"{value:.1f}"


def _start(words: str, longest: int) -> str:
    return words if len(words) <= longest else words[: longest - 1] + "…"


def _end(name: str, longest: int) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= longest else "…" + name[1 - longest :]

"""A folder of results: each run of `bench` is added, and drawn beside those before it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgekit.errors import DataError, UsageError
from edgekit.files import atomic_write, check_new
from edgekit.svg import escape

from .stored import Stored, differences, version_differences

__all__ = ["PICTURE", "add", "baseline", "check_history"]

PICTURE = "history.svg"
SHOWN = 60  # runs of a series, the newest
RECENT = 5  # runs, of whose paces a gate is held against the middle one
_SHORTEST, _LONGEST = 1e-9, 1e12  # ms that can be drawn, and that a measurement can give
_MARK = "<!-- edgekit bench history -->"


def check_history(folder: Path) -> None:
    """Raises `UsageError` where ``folder`` is a file, or holds a history.svg that is no such picture, or cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is no folder", "name a folder for results: --history DIR")
    picture = folder / PICTURE
    check_new(picture)
    if picture.exists() and _MARK.encode() not in picture.read_bytes()[:200]:
        raise UsageError(f"{picture} was not drawn by edgekit", "name another folder: --history DIR")


def add(folder: Path, result: dict[str, Any]) -> Path:
    """Write ``result`` into ``folder``, which is made where it is missing, and draw `PICTURE` anew. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    about = [result["model"], result["backend"], result["precision"], result["scenario"]]
    name = re.sub(r"[^\w.-]+", "_", "-".join([result["time"].replace(":", ""), *about]))
    file, count = folder / f"{name}.json", 1
    while file.exists():
        count += 1
        file = folder / f"{name}-{count}.json"
    atomic_write(file, msgspec.json.encode(result) + b"\n")
    atomic_write(folder / PICTURE, _drawn(_read(folder)).encode())
    return file


def baseline(folder: Path, now: Mapping[str, Any], *, force: bool = False) -> Stored:
    """What a run is held against: of the newest five like it that passed their gate, or had none, the one of middle pace.

    Like it: same model, graph, backend, scenario and threads, and whatever else of ``now`` is known (`differences`), the same
    libraries where there are such, with ``force`` of any device. Those that can be trusted come first. A run that failed its
    gate is never taken: the next would be held against the very slowdown. Raises `DataError` where there is none.
    """
    same = ("model", "graph", "scenario", "backend", "threads")
    like = [
        entry
        for _, entry in _files(folder)
        if entry.comparable and entry.passed is not False and all(getattr(entry, key) == now[key] for key in same)
    ]
    if not force:
        like = [entry for entry in like if set(differences(entry, now)) <= set(version_differences(entry, now))]
        like = [entry for entry in like if not version_differences(entry, now)] or like
    like = [entry for entry in like if entry.trustworthy] or like
    if not like:
        raise DataError(
            f"{folder} holds no earlier {now['scenario']} result of {now['model']} ({now['graph']} on {now['backend']}, "
            f"{now['threads']} thread(s)) on this set-up that passed its gate",
            f"make one: edgekit bench B --scenario {now['scenario']} --history {folder}",
        )
    newest = max(like, key=lambda entry: entry.time)
    like = [entry for entry in like if (entry.batch, entry.streams, entry.rate) == (newest.batch, newest.streams, newest.rate)]
    recent = sorted(like, key=lambda entry: entry.time)[-RECENT:]
    recent = [entry for entry in recent if entry.unit == newest.unit]
    return sorted(recent, key=lambda entry: entry.pace)[(len(recent) - 1) // 2]


def _files(folder: Path) -> Iterator[tuple[Path, Stored]]:
    """Results by name, so by time; other files of the folder are left alone."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield path, msgspec.json.decode(path.read_bytes(), type=Stored)
        except (OSError, msgspec.DecodeError):
            continue


def _read(folder: Path) -> dict[str, list[Stored]]:
    series: dict[str, list[Stored]] = defaultdict(list)
    for _, entry in _files(folder):
        shown = [entry.latency_ms.get("p50", 0), entry.latency_ms.get("p90", 1)]
        if all(_SHORTEST < value < _LONGEST for value in shown):
            series[entry.series].append(entry)
    return series


_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #56616f }
.title { font-size: 17px; font-weight: 600; fill: #16202c }
.series { font-weight: 600; fill: #16202c }
.tick { text-anchor: end; font-variant-numeric: tabular-nums }
.grid { stroke: #e6e9ed } .line { fill: none; stroke: #0072b2; stroke-width: 1.5 }
.range { stroke: #9cc9e3; stroke-width: 3 } .run { fill: #0072b2 }
.doubtful { fill: #ffffff; stroke: #d55e00; stroke-width: 1.5 }
""".strip()
_LEFT, _WIDTH, _HIGH, _PANEL, _HEAD = 70, 760, 110, 176, 74  # pixels
_LABELS = 200  # that two of them take, side by side


def _drawn(series: dict[str, list[Stored]]) -> str:
    """One panel a series: p50 of each run, a pale line up to p90, hollow where the run was not to be trusted."""
    width, height = _LEFT + _WIDTH + 30, _HEAD + _PANEL * len(series) + 10
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" role="img">',
        _MARK,
        f"<title>Latency over time</title><style>{_STYLE}</style>",
        f'<rect {size} fill="#ffffff"/>',
        '<text class="title" x="20" y="32">Latency over time, ms</text>',
        '<text x="20" y="54">dots: p50, pale lines: up to p90, hollow: not to be trusted</text>',
    ]
    for place, name in enumerate(sorted(series)):
        parts += _panel(name, series[name][-SHOWN:], _HEAD + _PANEL * place)
    return "\n".join([*parts, "</svg>", ""])


def _panel(name: str, entries: list[Stored], top: int) -> Iterator[str]:
    highest = max(entry.latency_ms.get("p90", entry.latency_ms["p50"]) for entry in entries)
    step = 10.0 ** math.floor(math.log10(highest))
    ceiling: float = next(step * k for k in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15) if step * k >= highest)

    def y(value: float) -> float:
        return top + 24 + _HIGH * (1 - min(value / ceiling, 1))

    yield f'<text class="series" x="20" y="{top + 8}">{escape(name[:110])}</text>'
    for share in (0, 0.5, 1):
        line = y(share * ceiling)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{line:.1f}" y2="{line:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{line + 4:.1f}">{share * ceiling:.3g}</text>'
    slot = _WIDTH / max(len(entries), 8)
    xs = [_LEFT + slot * (i + 0.5) for i in range(len(entries))]
    points = " ".join(f"{x:.1f},{y(entry.latency_ms['p50']):.1f}" for x, entry in zip(xs, entries, strict=True))
    yield f'<polyline class="line" points="{points}"/>'
    for x, entry in zip(xs, entries, strict=True):
        low, high = y(entry.latency_ms["p50"]), y(entry.latency_ms.get("p90", entry.latency_ms["p50"]))
        hint = escape(f"{entry.time}  {entry.digest[:12]}  p50 {entry.latency_ms['p50']:.4g} ms")
        yield f'<line class="range" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        kind = "run" if entry.trustworthy else "doubtful"
        yield f'<circle class="{kind}" cx="{x:.1f}" cy="{low:.1f}" r="4"><title>{hint}</title></circle>'
    # Days at the ends; of runs of one day, and of few runs, the first alone says its day.
    one_day = entries[0].time[:10] == entries[-1].time[:10]
    last = entries[-1].time[11:16] if one_day else entries[-1].time[:10]
    labels = [
        (xs[0], entries[0].time[:16].replace("T", " ") if one_day else entries[0].time[:10], "start"),
        (xs[-1], last, "end"),
    ]
    for x, text, anchor in labels if xs[-1] - xs[0] > _LABELS else labels[:1]:
        yield f'<text x="{x:.1f}" y="{top + 24 + _HIGH + 18}" text-anchor="{anchor}">{escape(text)}</text>'

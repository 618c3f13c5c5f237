"""Where a model's time goes: each layer's share, as the runtime itself takes it."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle import Bundle
from edgekit.errors import UsageError
from edgekit.runtime.graph_file import read_graph
from edgekit.runtime.onnxruntime import session
from edgekit.runtime.tensorrt import TensorRtRunner
from edgekit.svg import checked_path, escape

from .inputs import Feeds

__all__ = ["BACKENDS", "check_profile", "layer_times", "tensorrt_layers", "times_chart"]

BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
MAX_EVENTS = 500_000  # of the million that ONNX Runtime keeps
WARM, LEAST_RUNS, MAX_RUNS = 3, 20, 10_000
_SUFFIX = "_kernel_time"
_CONTROL = ("If", "Loop", "Scan")  # their time holds that of the layers inside
_Key = tuple[str, str]  # index in its graph, name
_MARK = "<!-- edgekit bench layers -->"
SHOWN = 24


def layer_times(bundle: Bundle, graph: str, threads: int, feeds: Feeds, seconds: float) -> dict[str, Any]:
    """``layers``, slowest first: ``layer``, ``op`` (of the graph as ONNX Runtime runs it: fused and laid out anew), ``us``
    (median microseconds a run), ``share`` of the layers' sum, ``output`` (shape), ``inside`` (the loop or branch that holds it:
    its time counts there, and not in the sum; None of others).

    ``run_us``: a whole run while each layer is timed, which is slower than without; ``between_us``: what no layer accounts
    for. ``runs``: how many the medians are of.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-profile-") as folder:
        data, file = read_graph(bundle, graph), str(Path(folder) / "ort")
        run = session(data, threads, profile=file)
        for _ in range(WARM):
            run.run(None, feeds)
        one = _events(run)
        run = session(data, threads, profile=file)
        slowest_us = max(event["dur"] for event in one if event["name"] == "model_run")
        runs = min(round(1e6 * seconds / max(slowest_us, 1)), MAX_EVENTS * WARM // len(one))
        for _ in range(WARM + max(runs, LEAST_RUNS)):
            run.run(None, feeds)
        return _rows(_events(run))


def tensorrt_layers(runner: TensorRtRunner, feeds: Feeds, seconds: float) -> dict[str, Any]:
    """The same of a TensorRT engine, by its profiler: ``layer`` is what the builder made of one node or several, and says
    which; ``op`` and ``output`` are not told. ``runner``: an entered one, of which another is made without CUDA graphs."""
    with type(runner)(runner.bundle, runner.graph, runner.threads, cuda_graph=False) as plain:
        started = time.perf_counter()
        plain.layer_ms(feeds, WARM)
        slowest_s = (time.perf_counter() - started) / WARM
        runs = max(LEAST_RUNS, min(round(seconds / max(slowest_s, 1e-6)), MAX_RUNS))
        started = time.perf_counter()
        taken = plain.layer_ms(feeds, runs)
        run_us = (time.perf_counter() - started) / (runs + 1) * 1e6
    times = {name: float(np.median(ms)) * 1e3 for name, ms in taken.items()}
    total = sum(times.values()) or 1.0
    blank: dict[str, Any] = {"op": "", "output": "", "inside": None}
    rows = [{"layer": name, "us": us, "share": us / total, **blank} for name, us in times.items()]
    rows.sort(key=lambda row: -row["us"])
    return {"layers": rows, "run_us": run_us, "between_us": max(run_us - total, 0.0), "runs": runs}


def _events(run: Any) -> list[dict[str, Any]]:
    """What ONNX Runtime has written down, in the order of time."""
    found: list[dict[str, Any]] = json.loads(Path(run.end_profiling()).read_text(encoding="utf-8"))
    return found


def _rows(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Events come in the order in which they ended: the layers of a body before their loop, all of a run before the run."""
    taken: list[dict[_Key, int]] = []  # microseconds by layer, of each run
    about: dict[_Key, Mapping[str, Any]] = {}
    parents: dict[_Key, str] = {}
    whole: list[int] = []
    run: list[tuple[_Key, int, int]] = []
    for event in events:
        if event["name"] == "model_run":
            taken.append(_sums(run))
            whole.append(event["dur"])
            run = []
        elif event["cat"] == "Node" and event["name"].endswith(_SUFFIX):
            key = event["args"].get("node_index", ""), event["name"].removesuffix(_SUFFIX)
            if event["args"].get("op_name") in _CONTROL:
                parents |= {inner: key[1] for inner, begin, _ in run if begin >= event["ts"] and inner not in parents}
            run.append((key, event["ts"], event["dur"]))
            about[key] = event["args"]
    times = {key: float(np.median([each.get(key, 0) for each in taken[WARM:]])) for key in about}
    total = sum(us for key, us in times.items() if key not in parents) or 1.0
    rows = [
        {
            "layer": key[1] or about[key].get("op_name", ""),
            "op": about[key].get("op_name", ""),
            "us": us,
            "share": us / total,
            "output": _shape(about[key].get("output_type_shape", [])),
            "inside": parents.get(key),
        }
        for key, us in times.items()
    ]
    run_us = float(np.median(whole[WARM:])) if whole[WARM:] else total
    rows.sort(key=lambda row: -row["us"])
    return {"layers": rows, "run_us": run_us, "between_us": max(run_us - total, 0.0), "runs": len(whole[WARM:])}


def _sums(run: list[tuple[_Key, int, int]]) -> dict[_Key, int]:
    """Microseconds of each layer in one run: the body of a loop comes by many times."""
    sums: dict[_Key, int] = defaultdict(int)
    for key, _, taken in run:
        sums[key] += taken
    return sums


def _shape(outputs: list[dict[str, list[int]]]) -> str:
    return "x".join(map(str, next(iter(outputs[0].values())))) if outputs and outputs[0] else ""


def check_profile(backend: str, picture: Path | None) -> None:
    """Raises `UsageError` for another backend than `BACKENDS`, or a picture that cannot be drawn there."""
    if backend not in BACKENDS:
        raise UsageError(f"layers are timed on {', '.join(BACKENDS)}, not on {backend}", f"add --backend {BACKENDS[0]}")
    if picture is not None:
        checked_path(picture, _MARK)


_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #56616f }
.title { font-size: 17px; font-weight: 600; fill: #16202c }
.name { text-anchor: end; fill: #16202c }
.value { font-variant-numeric: tabular-nums }
.bar { fill: #0072b2 } .rest { fill: #a9b4c0 }
""".strip()
_NAME, _BAR, _VALUE, _ROW, _HEAD = 250, 420, 150, 22, 72  # pixels


def times_chart(found: Mapping[str, Any], title: str) -> str:
    """The slowest `SHOWN` layers as bars, and one for all others together."""
    rows = [dict(row) for row in found["layers"][:SHOWN]]
    rest = found["layers"][SHOWN:]
    if rest:
        others = {"layer": f"{len(rest)} others", "op": "", "output": "", "rest": True}
        rows.append({**others, "us": sum(row["us"] for row in rest), "share": sum(row["share"] for row in rest)})
    width, height = _NAME + _BAR + _VALUE + 40, _HEAD + _ROW * len(rows) + 24
    size = f'width="{width}" height="{height}"'
    said = f"{len(found['layers'])} layers of {found['runs']} runs; shares are of all layers, without what lies between them"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" role="img">',
            _MARK,
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect {size} fill="#ffffff"/>',
            f'<text class="title" x="20" y="32">{escape(title[:72])}</text>',
            f'<text x="20" y="54">{escape(said)}</text>',
            *_bars(rows),
            "</svg>",
            "",
        ]
    )


def _bars(rows: list[dict[str, Any]]) -> Iterator[str]:
    longest = max((row["us"] for row in rows), default=0.0) or 1.0
    for i, row in enumerate(rows):
        y = _HEAD + _ROW * i
        length = max(_BAR * row["us"] / longest, 1.0)
        name = row["layer"] if len(row["layer"]) <= 34 else "…" + row["layer"][-33:]
        hint = escape(f"{row['layer']} ({row['op']}) {row['output']}: {row['us']:.1f} us")
        digits = max(0, 2 - int(math.log10(max(row["us"], 1))))
        yield f'<text class="name" x="{_NAME}" y="{y + 13}">{escape(name)}</text>'
        yield (
            f'<rect class="{"rest" if row.get("rest") else "bar"}" x="{_NAME + 10}" y="{y + 2}" width="{length:.1f}" '
            f'height="{_ROW - 7}" rx="2.5"><title>{hint}</title></rect>'
        )
        words = escape(f"{row['us']:.{digits}f} µs, {row['share']:.0%}{' ' + row['op'] if row['op'] else ''}")
        yield f'<text class="value" x="{_NAME + 18 + length:.1f}" y="{y + 13}">{words}</text>'

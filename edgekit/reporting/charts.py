"""What the page's script draws: JSON-plain data, ready to plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from edgekit.pruned import Pruning, kl_ticks, pruning_of

from .bench import Bench, Protocol
from .collect import BundleView, Group, TensorRange
from .figures import MAKERS, Curve, curve, pareto

__all__ = [
    "MAX_BARS",
    "Point",
    "curves",
    "differs",
    "headline",
    "histogram",
    "protocol",
    "prunings",
    "ranges",
    "sensitivity",
    "times",
    "tradeoff",
    "uncurved",
]

MAX_BARS = 30
MAX_TIMES = 16
NAMED = 6  # lines that can be told apart by colour and shape


class Point(NamedTuple):
    """``doubtful``: the cost is not trustworthy."""

    name: str
    group: Group
    cost: float
    top1: float
    doubtful: bool = False


def protocol(views: Sequence[BundleView]) -> Protocol | None:
    """What most bundles were measured with: only such latencies are compared."""
    seen = Counter(key for view in views for key in {b.protocol for b in view.shipped})
    return max(seen, key=lambda key: (seen[key], key.scenario == "single-stream", str(key))) if seen else None


def differs(view: BundleView, key: Protocol | None) -> str | None:
    """What is not equal of a bundle that was timed, though not under that protocol: the least of what any result says."""
    timed = [b for b in view.bench if b.is_latency]
    if not timed or headline(view, key) is not None:
        return None
    parts = [("device", "another device"), ("backend", "another backend"), ("scenario", "another scenario")]
    found = [
        [words for name, words in parts if key is not None and getattr(b.protocol, name) != getattr(key, name)]
        + ([] if b in view.shipped else ["another graph"])
        for b in timed
    ]
    found.sort(key=len)
    return " and ".join(found[0]) or "other conditions"


def headline(view: BundleView, key: Protocol | None) -> Bench | None:
    """A bundle's result under that protocol, of the graph that it ships."""
    return next((b for b in view.shipped if b.protocol == key), None)


def tradeoff(points: Sequence[Point], unit: str) -> dict[str, Any] | None:
    """Accuracy (percent) over a cost, with a Pareto front of each group; None where none has two points to trade."""
    groups = [group for group, _ in Counter(p.group for p in points).most_common()]
    fronts = [pareto((p.cost, p.top1) for p in points if p.group == group) for group in groups]
    if len(points) < len(groups) + 1:
        return None
    place = {group: i for i, group in enumerate(groups)}
    return {
        "points": [
            {"name": p.name, "group": place[p.group], "x": p.cost, "y": 100 * p.top1, "doubtful": p.doubtful} for p in points
        ],
        "groups": [str(group) for group in groups],
        "fronts": [[{"x": cost, "y": 100 * top1} for cost, top1 in front] for front in fronts],
        "x": unit,
        "y": "Top-1 accuracy (%)",
    }


def curves(views: Sequence[BundleView]) -> list[dict[str, Any]]:
    """Each training or fine-tuning run once, though its descendants repeat it in their history."""
    found: dict[tuple[str, str, str], tuple[str, Curve]] = {}
    for view in _elders_first(views):
        for entry in view.history:
            run = curve(entry)
            if run:
                found.setdefault((entry.stage, entry.time, str(entry.config)), (view.name, run))
    return [
        {
            "title": f"{run.stage} · {name}",
            "x": list(run.epochs),
            "losses": run.losses,
            "shares": {
                k: [None if v is None else 100 * v if _is_share(values) else v for v in values]
                for k, values in run.shares.items()
            },
        }
        for name, run in found.values()
    ]


def uncurved(views: Sequence[BundleView]) -> list[str]:
    """The bundles whose history draws no curve."""
    return [view.name for view in views if not any(curve(entry) for entry in view.history)]


def _elders_first(views: Sequence[BundleView]) -> list[BundleView]:
    """So that a run is named after the bundle that it made. Measuring adds to a history too, and makes no child."""
    return sorted(views, key=lambda view: (sum(entry.stage in MAKERS for entry in view.history), len(view.history)))


def _is_share(values: Sequence[float | None]) -> bool:
    return all(v is None or v <= 1 for v in values)


def histogram(bench: Bench) -> dict[str, Any] | None:
    """Edges, shares of the drawn runs (percent) and percentile marks; None where no histogram was stored."""
    if not bench.counts or bench.constant:
        return None
    marks = {"p50": bench.p50, "p90": bench.p90, "p99": bench.p99}
    drawn = sum(bench.counts) or 1.0
    shares = [100 * count / drawn for count in bench.counts]
    return {"edges": bench.edges, "shares": shares, "marks": {k: v for k, v in marks.items() if v is not None}}


def times(bench: Bench) -> list[dict[str, Any]]:
    """The slowest layers, and one row for all others; ``length`` of the bar as a share of the longest."""
    cut = MAX_TIMES if len(bench.layers) > MAX_TIMES + 1 else len(bench.layers)
    shown, others = bench.layers[:cut], bench.layers[cut:]
    rows = [{**layer._asdict(), "rest": False} for layer in shown]
    if others:
        total = {"us": sum(layer.us for layer in others), "share": sum(layer.share for layer in others)}
        rows.append({"name": f"{len(others)} others", "op": "", "output": "", **total, "rest": True})
    longest = max((row["us"] for row in rows), default=0.0) or 1.0
    return [{**row, "length": row["us"] / longest} for row in rows]


def sensitivity(view: BundleView) -> dict[str, Any] | None:
    """The most sensitive layers first."""
    layers = sorted((x for x in view.layers if x.snr_db is not None), key=lambda x: x.snr_db or 0.0)[:MAX_BARS]
    if not layers:
        return None
    return {
        "names": [x.name for x in layers],
        "values": [x.snr_db for x in layers],
        "float": [x.quantized is False for x in layers],
        "x": "SNR with only this layer in int8 (dB)",
    }


def ranges(view: BundleView) -> dict[str, Any] | None:
    """The widest activation ranges first; ``inside`` is the part that int8 covers, ``clipped`` the rest, in percent."""
    found = sorted(view.ranges, key=lambda r: r.low - r.high)[:MAX_BARS]
    if not found:
        return None
    return {
        "names": [r.name for r in found],
        "values": [[r.low, r.high] for r in found],
        "inside": [_inside(r) for r in found],
        "covered": [r.covered for r in found],
        "clipped": [round(100 * r.clipped, 1) for r in found],
        "channels": [r.channels for r in found],
        "x": "Activation value",
    }


def _inside(tensor: TensorRange) -> tuple[float, float] | None:
    low, high = tensor.covered or (tensor.low, tensor.high)
    low, high = max(tensor.low, low), min(tensor.high, high)
    return (low, high) if low <= high else None


def prunings(views: Sequence[BundleView]) -> list[dict[str, Any]]:
    """Each pruning once, under the name of the bundle that it made, though its descendants repeat it in their history."""
    found: dict[tuple[str, str, str], tuple[str, Pruning]] = {}
    for view in _elders_first(views):
        for entry in view.history:
            run = pruning_of(entry)
            if run:
                found.setdefault((entry.stage, entry.time, str(entry.config)), (view.name, run))
    return [
        {"name": name, "run": run, "curves": _curves_of(run), "rows": _rows_of(run), "kept": _kept_of(run)}
        for name, run in found.values()
    ]


def _curves_of(run: Pruning) -> dict[str, Any] | None:
    """Lines of KL over the channels left, in percent; the most sensitive are named."""
    lines = [
        {"name": name, "points": [[100 * share, kl] for share, kl in curve], "named": i < NAMED}
        for i, (name, curve) in enumerate(run.sensitivity)
    ]
    ticks = kl_ticks(max((kl for _, curve in run.sensitivity for _, kl in curve), default=0.0))
    return {"lines": lines, "ticks": ticks, "x": "Channels left (%)", "y": "KL divergence (nats)"} if lines else None


def _rows_of(run: Pruning) -> list[dict[str, Any]]:
    """Layers with the share of the page's widest layer that they have, and of that what is left."""
    widest = max((layer.widths[0] for layer in run.layers if layer.widths), default=1) or 1
    rows = []
    for layer in run.layers:
        before, after = layer.widths or (0, 0)
        rows.append({"layer": layer, "whole": before / widest, "left": after / widest, "words": layer.channels()})
    return rows


def _kept_of(run: Pruning) -> list[tuple[str, list[str]]]:
    """Reasons, with the layers that they hold for."""
    reasons: dict[str, list[str]] = {}
    for layer, reason in run.kept:
        reasons.setdefault(reason, []).append(layer)
    return list(reasons.items())

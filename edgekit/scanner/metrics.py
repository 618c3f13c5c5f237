"""Figures as Prometheus reads them (text format 0.0.4).

Written here rather than with prometheus-client: that library keeps counters of its own, and the scan's figures must come from
one count, taken at one moment, or ``captured = inferred + dropped + in flight`` would not hold in every scrape.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekit.version import __version__

from .pipeline import BUCKETS_MS

__all__ = ["CONTENT_TYPE", "metrics_text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "edgekit_scan"
#: Figures of sinks that only grow.
_GROWING = frozenset({"sent", "delivered"})
#: Words of steps that say a state, and all that they may be: each is a series, 1 for the one that holds.
_STATES = {"shadow": ("idle", "opening", "compared")}
_ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class _Text:
    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, what: str, value: Any, suffix: str = "", **labels: Any) -> None:
        """One sample; those of one name stand together, as the format wants it."""
        family = self._families.setdefault(name, [f"# HELP {name} {what}", f"# TYPE {name} {kind}"])
        inner = ",".join(f'{key}="{str(label).translate(_ESCAPED)}"' for key, label in labels.items())
        family.append(f"{name}{suffix}{{{inner}}} {_number(value)}" if inner else f"{name}{suffix} {_number(value)}")

    def __str__(self) -> str:
        return "".join(f"{line}\n" for family in self._families.values() for line in family)


def metrics_text(figures: Mapping[str, Any], state: str, silent_s: float, ready: bool) -> str:
    """``figures`` as `Scanner.status` gives them, {} before the scan runs."""
    text = _Text()
    gauge = "gauge"
    text.add(f"{PREFIX}_info", gauge, "What runs.", 1, version=__version__, state=state, **_model(figures))
    text.add(f"{PREFIX}_ready", gauge, "1 where /readyz says so.", int(ready))
    text.add(f"{PREFIX}_silent_seconds", gauge, "Since the scanning thread last went round.", silent_s)
    if figures:
        _frames(text, figures)
        _latency(text, figures["latencies"])
        _kpis(text, figures.get("kpis") or {})
        for row in figures["sources"]:
            _source(text, row)
        for row in figures.get("cameras", ()):
            _camera(text, row)
        for row in figures["sinks"]:
            _sink(text, row)
        for row in figures["steps"]:
            _step(text, row)
    _process(text)
    return str(text)


def _model(figures: Mapping[str, Any]) -> dict[str, str]:
    model = figures.get("model") or {}
    return {key: str(model[key]) for key in ("bundle", "digest") if key in model}


def _frames(text: _Text, figures: Mapping[str, Any]) -> None:
    """Captured = inferred + dropped + in flight, in every scrape."""
    rule = "captured = inferred + all dropped + in flight."
    text.add(f"{PREFIX}_captured_frames_total", "counter", f"Frames that came; {rule}", figures["captured"])
    text.add(f"{PREFIX}_inferred_frames_total", "counter", "Frames that were read.", figures["inferred"])
    for reason, count in sorted(figures["dropped"].items()):
        text.add(f"{PREFIX}_dropped_frames_total", "counter", "Frames that were not read, by reason.", count, reason=reason)
    text.add(f"{PREFIX}_in_flight_frames", "gauge", "Frames that wait to be read.", figures["in_flight"])
    text.add(f"{PREFIX}_codes_total", "counter", "Codes on all frames, before votes and duplicates.", figures["codes"])
    text.add(f"{PREFIX}_events_total", "counter", "Events that went to the sinks.", figures["events"])


def _latency(text: _Text, latencies: Mapping[str, Any]) -> None:
    name, below = f"{PREFIX}_latency_seconds", 0
    for bound, count in zip((*BUCKETS_MS, math.inf), latencies["buckets"], strict=True):
        below += count
        what = "From the decoded frame to its answer."
        text.add(name, "histogram", what, below, "_bucket", le=_number(bound / 1e3))
    text.add(name, "histogram", "", latencies["total_ms"] / 1e3, "_sum")
    text.add(name, "histogram", "", latencies["count"], "_count")


def _kpis(text: _Text, kpis: Mapping[str, Any]) -> None:
    if not kpis:
        return
    text.add(f"{PREFIX}_triggers_total", "counter", "Triggers; without [trigger] each frame that was read.", kpis["triggers"])
    text.add(f"{PREFIX}_good_reads_total", "counter", "Triggers with a valid code, or a good label or text.", kpis["good"])
    if kpis["read_rate"] is not None:
        text.add(f"{PREFIX}_read_rate", "gauge", "Good reads of all triggers, 0 to 1, since the start.", kpis["read_rate"])
    if kpis["codes_a_frame"] is not None:
        text.add(f"{PREFIX}_codes_a_frame", "gauge", "Codes on a frame that was read.", kpis["codes_a_frame"])
    for how, count in kpis["misreads"].items():
        what = "Misreads that were noticed, by how: bad GS1 data, a conflict with the text, votes."
        text.add(f"{PREFIX}_misreads_total", "counter", what, count, how=how)


def _source(text: _Text, row: Mapping[str, Any]) -> None:
    source, name = row["source"], f"{PREFIX}_source"
    if "state" in row:
        text.add(f"{name}_up", "gauge", "1 while the camera gives pictures.", int(row["state"] == "up"), source=source)
    text.add(f"{name}_captured_frames_total", "counter", "Frames of one camera.", row["captured"], source=source)
    text.add(f"{name}_in_flight_frames", "gauge", "Frames of one camera that wait.", row["in_flight"], source=source)
    if refused := row.get("refused_packets"):
        what = "Packets of one camera that its decoder refused; no frames."
        text.add(f"{name}_refused_packets_total", "counter", what, refused, source=source)
    for reason, count in sorted(row["dropped"].items()):
        what = "Frames that one camera dropped before they were given out."
        text.add(f"{name}_dropped_frames_total", "counter", what, count, source=source, reason=reason)
    if "fps" in row:
        text.add(f"{name}_fps", "gauge", "Frames a second that come from one camera.", float(row["fps"]), source=source)
    if "attempts" in row:
        text.add(f"{name}_attempts_total", "counter", "Times that one camera was connected to.", row["attempts"], source=source)
    if "notices_dropped" in row:
        what = "Camera and gap events that nobody took in time."
        text.add(f"{name}_dropped_notices_total", "counter", what, row["notices_dropped"], source=source)


def _camera(text: _Text, row: Mapping[str, Any]) -> None:
    source, name = row["source"], f"{PREFIX}_source"
    text.add(
        f"{name}_inferred_frames_total",
        "counter",
        "Frames of one camera or folder that were read.",
        row["inferred"],
        source=source,
    )
    text.add(
        f"{name}_good_frames_total", "counter", "Frames of one camera or folder with a good read.", row["good"], source=source
    )
    for key, quantile in (("p50", "0.5"), ("p99", "0.99")):
        what = "Of one camera or folder, over its last 1024 frames."
        value = row["latency_ms"][key] / 1e3
        text.add(f"{name}_latency_seconds", "gauge", what, value, source=source, quantile=quantile)


def _sink(text: _Text, row: Mapping[str, Any]) -> None:
    """``waiting`` is what lies in the outbox on disk, ``unsaved`` what is in memory only."""
    sink, name = row["sink"], f"{PREFIX}_sink"
    text.add(f"{name}_up", "gauge", "0 while the sink takes nothing.", int(not row.get("down")), sink=sink)
    for key, value in row.items():
        if key == "dropped":
            dropped = value if isinstance(value, Mapping) else {"": value}
            for reason, count in sorted(dropped.items()):
                what = "Events of one sink that were dropped, by reason."
                text.add(f"{name}_dropped_events_total", "counter", what, count, sink=sink, reason=reason)
        elif isinstance(value, int | float):
            growing = key in _GROWING
            full = f"{name}_{_word(key)}" + ("_total" if growing else "")
            text.add(full, "counter" if growing else "gauge", "Events of one sink.", value, sink=sink)


def _step(text: _Text, row: Mapping[str, Any]) -> None:
    step = str(row["step"])
    for name, value in _flat(row):
        text.add(f"{PREFIX}_step", "gauge", "Figures of a step by name.", value, step=step, figure=name)
    if "healthy" in row:
        text.add(f"{PREFIX}_{_word(step)}_healthy", "gauge", "1 while the last one passed.", int(row["healthy"]))
    if step == "drift":
        for part, psi in row["psi"].items():
            text.add(f"{PREFIX}_drift_psi", "gauge", "Population stability index by part.", float(psi), part=part)
            drifted = int(part in row["drifted"])
            text.add(f"{PREFIX}_drifted", "gauge", "1 while a part has drifted.", drifted, part=part)
    for state in _STATES.get(step, ()):
        text.add(f"{PREFIX}_{step}_state", "gauge", "1 for the state that holds.", int(row["state"] == state), state=state)


def _word(name: str) -> str:
    """As a metric's name takes it."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in it, with dotted names."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float):
            yield f"{prefix}{key}", float(value) if isinstance(value, float) else int(value)


def _process(text: _Text) -> None:
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux only
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        size = os.sysconf("SC_PAGE_SIZE")
        text.add("process_resident_memory_bytes", "gauge", "Resident memory size.", pages * size)
        text.add("process_open_fds", "gauge", "Open file descriptors.", len(os.listdir("/proc/self/fd")))
        threads = re.search(r"^Threads:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)
        if threads:
            text.add("process_threads", "gauge", "Threads.", int(threads[1]))


def _number(value: Any) -> str:
    if value is None or value != value:
        return "NaN"
    if isinstance(value, float):
        return {math.inf: "+Inf", -math.inf: "-Inf"}.get(value) or repr(value).removesuffix(".0")
    return str(int(value))

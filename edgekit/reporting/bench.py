"""A result of `edgekit bench` -> what the report says about it; malformed parts count as absent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH

from .figures import mapping, number, numbers, rounded, words

__all__ = ["Bench", "LayerTime", "Protocol", "read_bench"]

BINS, FEWEST_BINS = 40, 12
TAIL = 1.6  # a histogram is drawn up to this multiple of p99: one stall would squeeze the rest into a line


class LayerTime(NamedTuple):
    """A layer as the runtime ran it: median microseconds, and its share of all layers' sum."""

    name: str
    op: str
    us: float
    share: float
    output: str


class Protocol(NamedTuple):
    """What must be equal before two latencies may be compared. ``conditions``: version, threads, batch and so on, in words."""

    backend: str | None
    scenario: str | None
    device: str | None
    conditions: tuple[str, ...]

    def __str__(self) -> str:
        return " · ".join(part for part in (self.backend, self.scenario, self.device, *self.conditions) if part)


class Bench(NamedTuple):
    """One result of `edgekit bench`; times in milliseconds. ``beyond`` runs or more (``sampled``: some that lie there are not
    known of) are slower than the drawn histogram.

    ``constant``: every run took the same time. ``key``: the figure that its scenario compares. ``facts``: (what, words).
    ``layers``: slowest first; ``run_us`` of a run with each layer timed, ``between_us`` of it outside of all layers.
    """

    name: str
    backend: str | None
    precision: str | None
    scenario: str | None
    device: str | None
    conditions: tuple[str, ...]
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    p999: float | None
    cv: float | None
    throughput: float | None
    runs: float | None
    trustworthy: bool | None
    reasons: tuple[str, ...]
    edges: list[float]
    counts: list[float]
    beyond: int
    sampled: bool
    constant: bool
    key: str | None
    facts: tuple[tuple[str, str], ...]
    layers: tuple[LayerTime, ...]
    run_us: float | None
    between_us: float | None

    @property
    def protocol(self) -> Protocol:
        return Protocol(self.backend, self.scenario, self.device, self.conditions)

    @property
    def is_latency(self) -> bool:
        """Whether its times are of answers that somebody waits for: those of offline are of batches as large as pay."""
        return self.p50 is not None and self.scenario != "offline"

    @property
    def percentiles(self) -> list[tuple[str, float | None]]:
        """Name and milliseconds; p95 and p99.9 only where they were taken."""
        found = [("p50", self.p50), ("p90", self.p90), ("p95", self.p95), ("p99", self.p99), ("p99.9", self.p999)]
        return [(name, value) for name, value in found if value is not None or name in ("p50", "p90", "p99")]


def read_bench(name: str, data: Mapping[str, Any], form: str) -> Bench:
    """A result file; ``form`` is what the bundle's quantized graph holds."""
    p99 = number(data, "latency_ms.p99")
    edges, counts, beyond, sampled = _histogram(data, p99)
    reasons = data.get("reasons", ())
    trust = data.get("trustworthy")
    return Bench(
        name=name,
        backend=words(data, "backend"),
        precision={INT8_GRAPH: form, FLOAT_GRAPH: "float"}.get(str(data.get("graph"))) or words(data, "precision"),
        scenario=words(data, "scenario"),
        device=_device(data),
        conditions=tuple(_conditions(data)),
        p50=number(data, "latency_ms.p50"),
        p90=number(data, "latency_ms.p90"),
        p95=number(data, "latency_ms.p95"),
        p99=p99,
        p999=number(data, "latency_ms.p999"),
        cv=number(data, "cv"),
        throughput=number(data, "throughput"),
        runs=number(data, "iterations"),
        trustworthy=trust if isinstance(trust, bool) else None,
        reasons=tuple(map(str, reasons)) if isinstance(reasons, Sequence) and not isinstance(reasons, str) else (),
        edges=edges,
        counts=counts,
        beyond=beyond,
        sampled=sampled,
        constant=_constant(data),
        key=words(data, "key"),
        facts=tuple(_facts(data)),
        layers=_layer_times(data),
        run_us=number(data, "profile.run_us"),
        between_us=number(data, "profile.between_us"),
    )


def _histogram(data: Mapping[str, Any], p99: float | None) -> tuple[list[float], list[float], int, bool]:
    """(edges in ms, counts, runs beyond the last edge, whether these are all that is known of), cut at `TAIL` times p99.

    Where a few stalls left the stored bins too wide for that stretch, the stored samples (every n-th run) are binned anew; of
    the runs beyond those in bins that lie there altogether are known then.
    """
    shape = mapping(data.get("histogram"))
    edges, counts = numbers(shape.get("bins")) or [], numbers(shape.get("counts")) or []
    if len(edges) != len(counts) + 1 or sorted(edges) != edges:
        edges, counts = [], []
    total, limit = sum(counts) + (number(shape, "over") or 0), TAIL * (p99 or float("inf"))
    while len(counts) > 1 and edges[-2] > limit:
        counts.pop()
        edges.pop()
    beyond = int(total - sum(counts))
    stored = numbers(data.get("samples_ms")) or []
    samples = [v for v in stored if v <= limit]
    if len(counts) >= FEWEST_BINS or len(samples) < 2 or min(samples) == max(samples):
        return edges, counts, beyond, False
    low, width = min(samples), (max(samples) - min(samples)) / BINS
    tally = Counter(min(BINS - 1, int((v - low) / width)) for v in samples)
    beyond = max(beyond, len(stored) - len(samples))
    return [low + i * width for i in range(BINS + 1)], [float(tally[i]) for i in range(BINS)], beyond, True


def _device(data: Mapping[str, Any]) -> str | None:
    """The part that ran: the Jetson, the GPU for TensorRT, else the CPU."""
    device = mapping(data.get("device"))
    gpus = device.get("gpu")
    if board := words(device, "jetson.model"):
        return board
    if str(data.get("backend")).startswith("tensorrt") and isinstance(gpus, Sequence) and gpus:
        return str(gpus[0])
    cpu, cores = words(device, "cpu"), words(device, "cores")
    return f"{cpu}, {cores} cores" if cpu and cores else cpu or words(data, "device")


def _conditions(data: Mapping[str, Any]) -> Iterator[str]:
    if version := words(data, "version"):
        yield f"version {version}"
    for name, one, many in (("threads", "thread", "threads"), ("streams", "stream", "streams")):
        if (count := number(data, name)) is not None:
            yield f"{count:.0f} {one if count == 1 else many}"
    if (batch := number(data, "batch")) is not None:
        yield f"batch {batch:.0f}"
    if (rate := number(data, "rate")) is not None:
        yield f"{rounded(rate, 4)} queries a second"
    device = mapping(data.get("device"))
    if driver := words(device, "driver") if str(data.get("backend")).startswith("tensorrt") else None:
        yield f"driver {driver}"
    for name, what in (("governor", "governor"), ("jetson.power_mode", "power mode")):
        if value := words(device, name):
            yield f"{what} {value}"


def _constant(data: Mapping[str, Any]) -> bool:
    low, high = number(data, "latency_ms.min"), number(data, "latency_ms.max")
    return low is not None and low == high


def _facts(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What else was measured. A sensor that was asked and is not there is said, one that nobody asked is not."""
    if words(data, "int8") == "float":
        yield "int8", "computed in float, by a CPU without VNNI"
    for name, what in (("jitter_ms", "jitter"), ("cold_start_ms", "cold start"), ("process_start_ms", "process start")):
        value = number(data, name)
        if value is not None:
            yield what, f"{rounded(value)} ms"
    if (memory := number(data, "memory.rss_mb")) is not None:
        own = number(data, "memory.model_mb")
        yield "memory", f"{memory:.0f} MB" + (f", {own:.1f} by the model" if own is not None else "")
    if "energy" in data:
        yield "energy", _energy(mapping(data["energy"])) or "no power rail to read"
    if "temperatures" in data:
        yield "heat", _heat(data) or "no sensor to read"


def _energy(energy: Mapping[str, Any]) -> str | None:
    """Of the rail that feeds all where there is one, else of each: rails may feed one another, so they are not added up."""
    stated = mapping(energy.get("mj_per_inference"))
    rails = {str(name): value for name in stated if (value := number(stated, str(name))) is not None}
    whole = words(energy, "whole")
    shown = {whole: rails[whole]} if whole in rails else rails
    return ", ".join(f"{rounded(value)} mJ an inference ({rail})" for rail, value in shown.items()) or None


def _heat(data: Mapping[str, Any]) -> str | None:
    """The sensor that was hottest in the end."""
    before, after = (mapping(mapping(data["temperatures"]).get(when)) for when in ("before", "after"))
    known = {str(name): value for name in after if (value := number(after, str(name))) is not None}
    if not known:
        return None
    hottest = max(known, key=lambda name: known[name])
    start = number(before, hottest)
    return (f"{start:.0f} → " if start is not None else "") + f"{known[hottest]:.0f} °C ({hottest})"


def _layer_times(data: Mapping[str, Any]) -> tuple[LayerTime, ...]:
    raw = mapping(data.get("profile")).get("layers")
    found = []
    for row in raw if isinstance(raw, Sequence) and not isinstance(raw, str) else ():
        us, share = number(row, "us"), number(row, "share")
        if us is not None and share is not None and us >= 0:
            name = words(row, "layer") or words(row, "op") or "?"
            found.append(LayerTime(name, words(row, "op") or "", us, share, words(row, "output") or ""))
    return tuple(sorted(found, key=lambda layer: -layer.us))

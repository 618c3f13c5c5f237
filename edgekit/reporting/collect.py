"""A bundle -> what the report says about it: plain values, nothing computed that was not measured."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgekit.bundle import CALIBRATION, FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.files import printable
from edgekit.manifest import History

from .figures import MAKERS, comparable, confusion, latest, mapping, number, numbers, words

__all__ = ["Bench", "BundleView", "Engine", "Layer", "TensorRange", "collect"]

MAX_JSON_BYTES = 8 << 20
BINS, FEWEST_BINS = 40, 12
TAIL = 1.6  # a histogram is drawn up to this multiple of p99: one stall would squeeze the rest into a line


class Bench(NamedTuple):
    """One result of `edgekit bench`; times in milliseconds. ``beyond`` runs are slower than the drawn histogram."""

    name: str
    backend: str | None
    precision: str | None
    scenario: str | None
    device: str | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    mean: float | None
    cv: float | None
    throughput: float | None
    runs: float | None
    trustworthy: bool | None
    reasons: tuple[str, ...]
    edges: list[float]
    counts: list[float]
    beyond: int

    @property
    def protocol(self) -> tuple[str | None, str | None, str | None]:
        """What must be equal before two latencies may be compared."""
        return self.backend, self.scenario, self.device


class Engine(NamedTuple):
    """A compiled engine (``built``) or a kit that the device compiles."""

    target: str
    built: bool
    compiler: str | None
    precision: str | None
    size_bytes: int
    seconds: float | None


class TensorRange(NamedTuple):
    """A calibrated tensor: what was seen, and what its int8 grid covers: of ``channels`` grids from the lowest end to the
    highest; None where it is not known."""

    name: str
    low: float
    high: float
    covered: tuple[float, float] | None
    channels: int = 1

    @property
    def clipped(self) -> float:
        """The share of the seen range that no channel covers."""
        if self.covered is None or self.low == self.high:
            return 0.0
        inside = min(self.high, self.covered[1]) - max(self.low, self.covered[0])
        return 1 - max(inside, 0.0) / (self.high - self.low)


class Layer(NamedTuple):
    """A layer's sensitivity: signal-to-noise ratio in dB with only this layer quantized; None where it was not measured."""

    name: str
    snr_db: float | None
    quantized: bool | None


@dataclass(frozen=True)
class BundleView:
    """What the template shows of one bundle. ``top1`` and ``cer`` (a reader's character error rate) are shares; None
    means: nobody measured it on these weights. ``form`` of its graph: float, int8, or another `Bundle.form`."""

    name: str
    path: str
    task: str
    digest: str
    stage: str
    chain: str
    labels: tuple[str, ...]
    top1: float | None
    cer: float | None
    snr_db: float | None
    parameters: float | None
    macs: float | None
    graph: str
    graph_bytes: int
    form: str
    bench: tuple[Bench, ...]
    engines: tuple[Engine, ...]
    confusion: list[list[int]] | None
    layers: tuple[Layer, ...]
    ranges: tuple[TensorRange, ...]
    history: tuple[History, ...]
    files: tuple[tuple[str, int, str], ...]
    pictures: tuple[tuple[str, bytes], ...]

    @property
    def quantized(self) -> bool:
        return self.graph == INT8_GRAPH


def collect(bundle: Bundle, name: str) -> BundleView:
    """Everything the report needs of an opened bundle. Malformed derived files count as absent; hashes are checked."""
    manifest = bundle.manifest
    calibration = _json(bundle, CALIBRATION) if bundle.has(CALIBRATION) else {}
    own = comparable(manifest.history)
    stages = [entry.stage for entry in manifest.history if entry.stage in MAKERS]
    files = tuple((file, bundle.file(file).stat().st_size, digest) for file, digest in manifest.files.items())
    return BundleView(
        name=name,
        path=printable(bundle.path),
        task=manifest.task,
        digest=bundle.digest,
        stage=stages[-1] if stages else "unknown",
        chain=" → ".join(stages),
        labels=manifest.labels,
        top1=latest(own, "top1", "val_top1", "accuracy"),
        cer=latest(own, "cer"),
        snr_db=latest(own, "snr_db"),
        # Quantization changes neither, so the newest statement of any stage holds.
        parameters=latest(manifest.history, "parameters"),
        macs=latest(manifest.history, "macs"),
        graph=bundle.graph,
        graph_bytes=bundle.size_bytes() if bundle.has(bundle.graph) else 0,
        form=bundle.form if bundle.has(INT8_GRAPH) else "float",
        bench=tuple(_bench(Path(f).stem, _json(bundle, f), bundle.form) for f in manifest.files if _in(f, "bench", ".json")),
        engines=_engines(bundle),
        confusion=confusion(own, len(manifest.labels)),
        layers=_layers(calibration),
        ranges=_ranges(calibration),
        history=manifest.history,
        files=files,
        pictures=tuple((Path(f).name, bundle.file(f).read_bytes()) for f in manifest.files if _in(f, "explanations", ".png")),
    )


def _in(file: str, folder: str, suffix: str) -> bool:
    return file.startswith(f"{folder}/") and file.endswith(suffix)


def _json(bundle: Bundle, file: str) -> Mapping[str, Any]:
    path = bundle.file(file)
    if path.stat().st_size <= MAX_JSON_BYTES:
        with contextlib.suppress(ValueError):
            return mapping(json.loads(path.read_bytes()))
    return {}


def _bench(name: str, data: Mapping[str, Any], form: str) -> Bench:
    p99 = number(data, "latency_ms.p99")
    edges, counts, beyond = _histogram(data, p99)
    reasons = data.get("reasons", ())
    trust = data.get("trustworthy")
    return Bench(
        name=name,
        backend=words(data, "backend"),
        precision={INT8_GRAPH: form, FLOAT_GRAPH: "float"}.get(str(data.get("graph"))) or words(data, "precision"),
        scenario=words(data, "scenario"),
        device=_device(data),
        p50=number(data, "latency_ms.p50"),
        p90=number(data, "latency_ms.p90"),
        p95=number(data, "latency_ms.p95"),
        p99=p99,
        mean=number(data, "latency_ms.mean"),
        cv=number(data, "cv"),
        throughput=number(data, "throughput"),
        runs=number(data, "iterations"),
        trustworthy=trust if isinstance(trust, bool) else None,
        reasons=tuple(map(str, reasons)) if isinstance(reasons, Sequence) and not isinstance(reasons, str) else (),
        edges=edges,
        counts=counts,
        beyond=beyond,
    )


def _histogram(data: Mapping[str, Any], p99: float | None) -> tuple[list[float], list[float], int]:
    """(edges in ms, counts, runs beyond the last edge), cut at `TAIL` times p99.

    Where a few stalls left the stored bins too wide for that stretch, the stored samples (every n-th run) are binned anew.
    """
    shape = mapping(data.get("histogram"))
    edges, counts = numbers(shape.get("bins")) or [], numbers(shape.get("counts")) or []
    if len(edges) != len(counts) + 1 or sorted(edges) != edges:
        edges, counts = [], []
    total, limit = sum(counts) + (number(shape, "over") or 0), TAIL * (p99 or float("inf"))
    while len(counts) > 1 and edges[-2] > limit:
        counts.pop()
        edges.pop()
    if len(counts) >= FEWEST_BINS:
        return edges, counts, int(total - sum(counts))
    samples = [v for v in numbers(data.get("samples_ms")) or [] if v <= limit]
    if len(samples) < 2 or min(samples) == max(samples):
        return edges, counts, int(total - sum(counts))
    low, width = min(samples), (max(samples) - min(samples)) / BINS
    tally = Counter(min(BINS - 1, int((v - low) / width)) for v in samples)
    return [low + i * width for i in range(BINS + 1)], [float(tally[i]) for i in range(BINS)], 0


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


def _engines(bundle: Bundle) -> tuple[Engine, ...]:
    found = []
    for file in bundle.manifest.files:
        sidecar = f"{file.removesuffix('.engine').removesuffix('.kit.zip')}.json"
        built = _in(file, "engines", ".engine")
        if not built and not _in(file, "engines", ".kit.zip"):
            continue
        data = _json(bundle, sidecar) if bundle.has(sidecar) else {}
        found.append(
            Engine(
                target=words(data, "target") or Path(file).name.removesuffix(".engine").removesuffix(".kit.zip"),
                built=built,
                compiler=words(data, "tensorrt"),
                precision=words(data, "precision"),
                size_bytes=bundle.file(file).stat().st_size,
                seconds=number(data, "seconds"),
            )
        )
    return tuple(sorted(found, key=lambda e: (not e.built, e.target)))


def _layers(calibration: Mapping[str, Any]) -> tuple[Layer, ...]:
    """Sensitivity of each layer, as ``calibration.json`` records it."""
    raw = calibration.get("layers")
    rows = [row for row in raw if isinstance(row, Mapping)] if isinstance(raw, Sequence) else []
    layers = []
    for i, row in enumerate(rows):
        int8 = row.get("int8")
        name = words(row, "name") or f"layer {i}"
        layers.append(Layer(name, number(row, "alone_db"), int8 if isinstance(int8, bool) else None))
    return tuple(layers)


def _ranges(calibration: Mapping[str, Any]) -> tuple[TensorRange, ...]:
    """What each calibrated tensor held, and what of it int8 keeps: as its layers read it, where they have a quantizer.

    Tensors of one group share its statistics, and so one row: from the lowest to the highest end of all channels' grids. The
    file names a quantizer that serves several tensors by the first; of the others the group's scale is drawn.
    """
    quantizers, groups = mapping(calibration.get("quantizers")), mapping(calibration.get("groups"))
    ranges = []
    for name, value in mapping(calibration.get("tensors")).items():
        low, high = number(value, "minimum"), number(value, "maximum")
        if low is not None and high is not None and low <= high:
            members = [member for member, group in groups.items() if group == name] or [name]
            grids = [_ends(quantizers.get(member, value)) for member in members]
            ends = [end for grid in grids for end in grid]
            covered = (min(a for a, _ in ends), max(b for _, b in ends)) if ends else None
            ranges.append(TensorRange(name, low, high, covered, max(1, *map(len, grids))))
    return tuple(ranges)


def _ends(quantizer: object) -> list[tuple[float, float]]:
    """Both ends of each channel's grid, round((x - shift) * factor / scale) from -127 to 127; none where it has no scale."""
    scale, known = number(quantizer, "scale"), mapping(quantizer)
    shifts, factors = numbers(known.get("shift")) or [], numbers(known.get("factor")) or []
    if scale is None or min(factors, default=1.0) <= 0:
        return []
    channels = max(len(shifts), len(factors), 1)
    pairs = zip(shifts or [0.0] * channels, factors or [1.0] * channels, strict=False)
    return [(shift - 127 * scale / factor, shift + 127 * scale / factor) for shift, factor in pairs]

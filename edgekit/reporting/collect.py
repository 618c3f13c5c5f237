"""A bundle -> what the report says about it: plain values, nothing computed that was not measured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgekit.bundle import CALIBRATION, EXAMPLES, INT8_GRAPH, Bundle
from edgekit.files import printable
from edgekit.manifest import History

from .bench import Bench, read_bench
from .damage import Damage, whole_files
from .engine_layers import EngineLayers, read_layers
from .examples import Examples, read_examples
from .explanations import MAX_PICTURE_BYTES
from .figures import MAKERS, comparable, confusion, decoded, latest, mapping, number, numbers, words

__all__ = ["BundleView", "Engine", "Layer", "TensorRange", "collect"]

MAX_JSON_BYTES = 8 << 20


class Engine(NamedTuple):
    """A compiled engine (``built``) or a kit that the device compiles."""

    target: str
    built: bool
    compiler: str | None
    precision: str | None
    size_bytes: int
    seconds: float | None
    layers: EngineLayers | None = None


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


class Group(NamedTuple):
    """What bundles must share for their accuracies and sizes to compare: ``data`` as they state it, else ``labels``."""

    task: str
    data: str | None
    labels: tuple[str, ...]

    def __str__(self) -> str:
        return self.data or self.task + (f" of {len(self.labels)} classes" if self.labels else "")


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
    group: Group
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
    examples: Examples
    layers: tuple[Layer, ...]
    ranges: tuple[TensorRange, ...]
    history: tuple[History, ...]
    files: tuple[tuple[str, int, str], ...]
    pictures: tuple[tuple[str, bytes], ...]
    damage: Damage = ()

    @property
    def timed(self) -> bool:
        """Whether any latency was measured, by whatever protocol."""
        return any(bench.is_latency for bench in self.bench)

    @property
    def shipped(self) -> tuple[Bench, ...]:
        """Its latencies of the graph that ships, or of one that is not stated."""
        return tuple(b for b in self.bench if b.is_latency and b.precision in (self.form, "auto", None))

    @property
    def protocols(self) -> list[str]:
        """How its latencies were measured."""
        return sorted({str(bench.protocol) for bench in self.bench if bench.is_latency})

    @property
    def quantized(self) -> bool:
        return self.graph == INT8_GRAPH


def collect(bundle: Bundle, name: str) -> BundleView:
    """Everything the report needs of an opened bundle. Malformed and damaged derived files count as absent; hashes are checked.

    Raises `BundleError` where the model itself is damaged.
    """
    bundle, damage = whole_files(bundle)
    manifest = bundle.manifest
    calibration = _json(bundle, CALIBRATION) if bundle.has(CALIBRATION) else {}
    own = comparable(_of_graph(manifest.history, bundle.graph))
    stages = [entry.stage for entry in manifest.history if entry.stage in MAKERS]
    files = tuple((file, bundle.file(file).stat().st_size, digest) for file, digest in manifest.files.items())
    return BundleView(
        name=name,
        path=printable(bundle.path),
        task=manifest.task,
        group=_group(bundle, own),
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
        bench=tuple(_bench(bundle, file) for file in manifest.files if _in(file, "bench", ".json")),
        engines=_engines(bundle),
        confusion=confusion(own, len(manifest.labels)),
        examples=_examples(bundle, own),
        layers=_layers(calibration),
        ranges=_ranges(calibration),
        history=manifest.history,
        files=files,
        pictures=tuple(_pictures(bundle)),
        damage=damage,
    )


def _group(bundle: Bundle, own: Sequence[History]) -> Group:
    """By the data of the last training, or for want of one of the newest evaluation."""
    manifest = bundle.manifest
    stated = [words(entry.config, "data") for entry in manifest.history if entry.stage == "train"]
    stated = [data for data in stated if data] or [words(entry.config, "data") for entry in own if entry.stage == "eval"]
    data = next((data for data in reversed(stated) if data), None)
    return Group(manifest.task, data, () if data else manifest.labels)


def _of_graph(history: Sequence[History], graph: str) -> list[History]:
    """Without evaluations of another graph than that."""
    return [entry for entry in history if entry.stage != "eval" or entry.config.get("graph", graph) == graph]


def _bench(bundle: Bundle, file: str) -> Bench:
    try:
        return read_bench(Path(file).stem, _json(bundle, file), bundle.form)
    except ArithmeticError:  # figures so odd that nothing can be made of them
        return read_bench(Path(file).stem, {}, bundle.form)


def _examples(bundle: Bundle, own: Sequence[History]) -> Examples:
    """Samples of the evaluation whose matrix is shown, and no other's."""
    classes, newest = len(bundle.manifest.labels), bundle.last("eval")
    if newest is not None and not _of_graph([newest], bundle.graph):
        return {}  # the file is of that one
    entry = next((entry for entry in reversed(own) if confusion([entry], classes)), None)
    if entry is None or not bundle.has(EXAMPLES):
        return {}
    return read_examples(_json(bundle, EXAMPLES), entry.config.get("data"), classes)


def _pictures(bundle: Bundle) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of those that a page can hold."""
    for file in bundle.manifest.files:
        if _in(file, "explanations", ".png") and bundle.file(file).stat().st_size <= MAX_PICTURE_BYTES:
            yield Path(file).name, bundle.file(file).read_bytes()


def _in(file: str, folder: str, suffix: str) -> bool:
    return file.startswith(f"{folder}/") and file.endswith(suffix)


def _json(bundle: Bundle, file: str) -> Mapping[str, Any]:
    path = bundle.file(file)
    if path.stat().st_size <= MAX_JSON_BYTES:
        with contextlib.suppress(ValueError):
            return mapping(decoded(path.read_bytes()))
    return {}


def _engines(bundle: Bundle) -> tuple[Engine, ...]:
    found = []
    for file in bundle.manifest.files:
        stem = file.removesuffix(".engine").removesuffix(".kit.zip")
        sidecar, report = f"{stem}.json", f"{stem}.layers.json"
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
                layers=read_layers(_json(bundle, report)) if bundle.has(report) else None,
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
    ends = [(shift - 127 * scale / factor, shift + 127 * scale / factor) for shift, factor in pairs]
    return ends if all(math.isfinite(low) and math.isfinite(high) for low, high in ends) else []

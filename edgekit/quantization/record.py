"""``calibration.json``: everything that turns one float graph into one int8 graph, bit for bit, without the data.

No times and no paths, so the same inputs give the same bytes. On the device the ranges are the baseline for drift.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekit.errors import DataError
from edgekit.manifest import Preprocessing

from .graph import Parameters, Quantizer, quantized_weight, scaled_weight
from .placement import Placement
from .prepare import constants
from .statistics import BINS, Statistics

__all__ = ["Calibration", "Drawn", "LayerRecord", "TensorRecord", "decode", "encode", "exact"]

TRAINED = " and qat"
SUMMARY_BINS = 64
MAX_BYTES = 256 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class TensorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One quantized tensor. ``scale`` is float32, written so that reading it back is exact; ``clip`` = 127 x scale.

    ``histogram``: counts of |x| > 0 in 64 equal bins over [0, ``top``); ``zeros`` counts x = 0.
    """

    scale: float
    minimum: float
    maximum: float
    mean: float
    rms: float
    count: int
    zeros: int
    top: float
    histogram: tuple[int, ...]

    def __post_init__(self) -> None:
        _positive(self.scale)


class LayerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer. ``layer_db``: SNR of its own output, behind the bias, where all are int8.

    Where only it is int8: ``alone_db`` of the graph's output, ``drop`` in points of top-1, where labels are known.
    ``weights``: a float32 scale for each output channel; ``bias``: the corrected float32 bias; ``integers``: the int8 weights
    less the nearest ones, zlib in base64, where they were fitted (`packed`).
    ``why``: why it is float, or why it loses much.
    """

    name: str
    op: str
    int8: bool
    macs: int
    alone_db: float | None = None
    layer_db: float | None = None
    drop: float | None = None
    weights: tuple[float, ...] = ()
    bias: tuple[float, ...] | None = None
    integers: str | None = None
    why: str = ""
    gain_db: float | msgspec.UnsetType | None = msgspec.UNSET  # of earlier files: read, never written

    def __post_init__(self) -> None:
        for scale in self.weights:
            _positive(scale)
        if self.integers is not None and not (self.int8 and self.weights):
            raise ValueError(f"{self.name!r} has integers without scales")


class QuantizerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer input that is shifted or scaled channel by channel before it is rounded: `graph.Quantizer`."""

    scale: float
    shift: tuple[float, ...] | None = None
    factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _positive(self.scale)
        for factor in self.factor or ():
            _positive(factor)
        if not np.isfinite(np.array(self.shift or (), np.float64)).all():
            raise ValueError("a shift is not finite")


class Drawn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which samples gave the ranges: ids and the sha256 of each one's input tensors, in order."""

    source: str
    data_digest: str | None
    split: str
    seed: int
    ids: tuple[str, ...]
    digests: tuple[str, ...]


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``graph`` and ``int8_graph`` are sha256 of ``model.onnx`` and ``model.int8.onnx``; ``groups`` share a scale.

    ``quantizers``: by the first of the tensors that one serves; inputs without an entry have the scale of their group.
    ``stored``: weights of no layer that are int8 all the same (`store`).
    """

    format: Literal[2]
    graph: str
    int8_graph: str
    method: str
    recovery: str
    samples: Drawn
    preprocessing: Preprocessing | None
    versions: dict[str, str]
    tensors: dict[str, TensorRecord]
    groups: dict[str, str]
    quantizers: dict[str, QuantizerRecord]
    layers: tuple[LayerRecord, ...]
    stored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for digest in (self.graph, self.int8_graph, *self.samples.digests):
            if not _SHA256.fullmatch(digest):
                raise ValueError(f"{digest[:80]!r} is not a sha256")

    @property
    def chosen(self) -> list[str]:
        """Names of the int8 layers."""
        return [layer.name for layer in self.layers if layer.int8]

    def parameters(self, model: onnx.ModelProto, placement: Placement) -> Parameters:
        """The numbers of the int8 graph of a prepared float graph."""
        quantizers = {
            site: Quantizer(entry.scale, _array(entry.shift), _array(entry.factor)) for site, entry in self.quantizers.items()
        }
        parameters = Parameters(
            {name: tensor.scale for name, tensor in self.tensors.items()},
            {layer.name: np.array(layer.weights, np.float32) for layer in self.layers if layer.weights},
            {layer.name: np.array(layer.bias, np.float32) for layer in self.layers if layer.bias is not None},
            quantizers,
        )
        fitted = {layer.name: layer.integers for layer in self.layers if layer.integers is not None}
        for name, nearest in nearest_integers(model, placement, parameters, fitted):
            parameters.integers[name] = unpacked(fitted[name], nearest)
        return parameters


def trained(calibration: bytes, graph: bytes) -> bytes:
    """The calibration of a graph that was trained further: statistics and layers stay, its numbers no longer rebuild it."""
    found = msgspec.json.decode(calibration, type=Calibration)
    digest = hashlib.sha256(graph).hexdigest()
    return encode(msgspec.structs.replace(found, recovery=f"{found.recovery}{TRAINED}", int8_graph=digest))


def _array(values: tuple[float, ...] | None) -> NDArray[np.float32] | None:
    return None if values is None else np.array(values, np.float32)


def nearest_integers(
    model: onnx.ModelProto, placement: Placement, parameters: Parameters, names: Collection[str]
) -> Iterator[tuple[str, NDArray[np.int8]]]:
    """The weights of the named layers rounded to nearest at the recorded scales: what `packed` counts from."""
    known = constants(model.graph)
    for layer in placement.layers:
        if layer.name in names:
            factor = parameters.quantizer(placement, layer.data).factor
            weight = scaled_weight(numpy_helper.to_array(known[layer.weight]), layer, factor)
            yield layer.name, quantized_weight(weight, parameters.weights[layer.name], layer.axis)


def packed(integers: NDArray[np.int8], nearest: NDArray[np.int8]) -> str:
    """int8 weights as text: their distance from the nearest ones is small, and so compresses."""
    return base64.b64encode(zlib.compress((integers - nearest).tobytes(), 9)).decode()


def unpacked(text: str, nearest: NDArray[np.int8]) -> NDArray[np.int8]:
    """The inverse of `packed`. Raises `DataError` for anything else."""
    try:
        found = zlib.decompressobj()
        data = found.decompress(base64.b64decode(text, validate=True), nearest.size + 1)
    except (ValueError, zlib.error) as error:
        raise DataError(f"the calibration's weights are damaged: {error}", "calibrate again, with data") from None
    if len(data) != nearest.size:
        raise DataError(f"the calibration has {len(data)} weights for {nearest.size}", "calibrate again, with data")
    return (np.frombuffer(data, np.int8).reshape(nearest.shape) + nearest).astype(np.int8)


def _positive(scale: float) -> None:
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.float32(scale)
    if not (np.isfinite(narrow) and narrow > 0):
        raise ValueError(f"a scale is a positive float32, not {scale!r}")


def exact(value: float) -> float:
    """A float32 as the double with the shortest text that reads back as the same float32."""
    short = float(str(np.float32(value)))
    return short if np.float32(short) == np.float32(value) else float(np.float32(value))


def exact_all(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(exact(value) for value in values.ravel())


def tensor_record(statistics: Statistics, scale: float) -> TensorRecord:
    mean = statistics.total / max(statistics.count, 1)
    low, high = (statistics.minimum, statistics.maximum) if statistics.count else (0.0, 0.0)  # JSON has no infinity
    return TensorRecord(
        exact(scale), exact(low), exact(high), exact(mean), exact(statistics.rms),
        statistics.count, statistics.zeros, statistics.top,
        tuple(int(n) for n in statistics.counts.reshape(SUMMARY_BINS, BINS // SUMMARY_BINS).sum(1)),
    )  # fmt: skip


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """sha256 of a sample's input tensors: names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def encode(calibration: Calibration) -> bytes:
    return msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n"


def decode(path: Path) -> Calibration:
    """Read and validate. Raises `DataError` for a file that is not a calibration."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES >> 20} MiB", "this is not a calibration.json")
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{path} is no valid calibration: {error}", "take the calibration.json that edgekit quantize wrote"
        ) from None

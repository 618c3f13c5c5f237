"""The layers of an engine, as a verbose build reported them: which compute, and in what precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .figures import words

__all__ = ["EngineLayers", "read_layers"]

#: Constants and the arithmetic of shapes are most of a parsed network, and no kernel of the engine.
PLUMBING = ("CONSTANT", "SHAPE", "GATHER", "SHUFFLE", "SLICE", "IDENTITY")
QUANTIZERS = ("QUANTIZE", "DEQUANTIZE")
MAX_LISTED = 150


class EngineLayer(NamedTuple):
    """``precision`` of its first output: of a layer between Q and DQ that is float, though the kernel multiplies int8."""

    name: str
    kind: str
    precision: str
    output: str


class EngineLayers(NamedTuple):
    """``fused``: of the engine itself, by TensorRT's inspector; else of the network that it was made from. ``listed``: those
    that compute. ``kinds``: (kind, how many) of all. ``shares``: (precision, how many, share) of all but constants
    and shapes."""

    fused: bool
    total: int
    listed: tuple[EngineLayer, ...]
    left_out: int
    kinds: tuple[tuple[str, int], ...]
    shares: tuple[tuple[str, int, float], ...]


def read_layers(data: Mapping[str, Any]) -> EngineLayers | None:
    """``TARGET.layers.json``; None where it holds no layers."""
    raw = data.get("layers")
    rows = [row for row in raw if isinstance(row, Mapping)] if isinstance(raw, Sequence) else []
    layers = [_layer(row) for row in rows]
    if not layers:
        return None
    computing = [layer for layer in layers if layer.kind not in PLUMBING and "int64" not in layer.precision]
    known = Counter(layer.precision for layer in computing if layer.precision)
    listed = [layer for layer in computing if layer.kind not in QUANTIZERS]
    return EngineLayers(
        fused=data.get("source") == "engine",
        total=len(layers),
        listed=tuple(listed[:MAX_LISTED]),
        left_out=max(len(listed) - MAX_LISTED, 0),
        kinds=tuple(Counter(layer.kind for layer in layers).most_common(12)),
        shares=tuple((name, count, count / known.total()) for name, count in known.most_common()),
    )


def _layer(row: Mapping[str, Any]) -> EngineLayer:
    """A row of edgekit's own report, or of TensorRT's inspector, which writes its keys in capitals."""
    outputs = row.get("outputs", row.get("Outputs"))
    first = outputs[0] if isinstance(outputs, list) and outputs else None
    if isinstance(first, Mapping):
        first, said = first.get("Dimensions"), words(first, "Format/Datatype")
    else:
        said = None
    shape = "x".join("?" if axis == -1 else str(axis) for axis in first) if isinstance(first, list) else ""
    kind = words(row, "type", "LayerType") or "?"
    return EngineLayer(words(row, "name", "Name") or "?", kind, words(row, "precision", "Precision") or said or "", shape)

"""Whether an ONNX file keeps weights outside itself, read off protobuf's wire format: the device has no onnx library.

ONNX Runtime follows the paths in such a file, older versions out of the bundle; none of what it finds there is hashed.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["holds_external_data"]

#: message -> field number -> the message in it, for all ways from a model to a tensor (onnx.proto3).
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of TensorProto
_DEEPEST = 64
_VARINT_BITS = 70  # ten bytes hold 64 bits


def holds_external_data(model: bytes) -> bool:
    """True where a tensor of the serialized ``model`` lies in another file, or where the bytes are no protobuf."""
    if b"location" not in model:  # the key of every reference
        return False
    try:
        return _found(memoryview(model), "model", 0)
    except (IndexError, ValueError):
        return True


def _found(data: memoryview, kind: str, depth: int) -> bool:
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    for number, value in _fields(data):
        if kind == "tensor":
            if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value):
                return True
        elif number in _INSIDE[kind] and isinstance(value, memoryview) and _found(value, _INSIDE[kind][number], depth + 1):
            return True
    return False


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, varint or bytes) of a message; fixed-size values as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}.get(wire, -1), at)
        if size < 0 or at + size > len(data):
            raise ValueError("not protobuf")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, where the next byte lies). Raises `IndexError` at the end of the data."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift >= _VARINT_BITS:  # without an end, each byte would cost more than the one before
            raise ValueError("not protobuf")

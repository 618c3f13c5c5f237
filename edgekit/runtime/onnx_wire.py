"""What an ONNX file asks for, read off protobuf's wire format: its operators, and the weights that it keeps outside itself.

The device has no onnx library. Values of weights are skipped by their length: only what lies around them is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Survey", "survey"]

_Span = tuple[int, int]

#: message -> number of a field -> the message in it, for all ways from a model to a node or a tensor (onnx.proto3).
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
#: The same by key, which is the number and the wire type: 2, bytes.
_INSIDE = {kind: {number << 3 | 2: inner for number, inner in fields.items()} for kind, fields in _FIELDS.items()}
_INPUT, _OUTPUT, _NAME, _OP_TYPE, _ATTRIBUTE, _DOMAIN = (number << 3 | 2 for number in (1, 2, 3, 4, 5, 7))  # of NodeProto
_FUNCTION_NAME, _FUNCTION_DOMAIN = 1 << 3 | 2, 10 << 3 | 2
_TENSOR_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8 << 3 | 2, 13 << 3 | 2, 14 << 3  # the last is a number
_ENTRY_KEY, _ENTRY_VALUE = 1 << 3 | 2, 2 << 3 | 2
_DEEPEST = 64
_SHORT = 128  # bytes of an attribute, up to which it is remembered
_RUNTIME_FORMAT = b"ORTM"  # in bytes 4 to 8: ONNX Runtime takes its own format too, which is no protobuf


@dataclass
class Survey:
    """``operators``: (domain, operator) -> the first node that has it, "ai.onnx" as "". ``functions``: what the file itself
    defines, by the (domain, operator) that calls it. ``outside``: (tensor, file, node that reads or holds it) of weights in
    other files. Nodes are told by name, nameless ones by their first output."""

    operators: dict[tuple[str, str], str] = field(default_factory=dict)
    functions: set[tuple[str, str]] = field(default_factory=set)
    outside: list[tuple[str, str, str]] = field(default_factory=list)


def survey(model: bytes) -> Survey:
    """Look at every node and tensor of a serialized ``model``: in subgraphs and functions too.

    Raises `ValueError` where the bytes are no whole protobuf message, or are nested deeper than any exporter nests.
    """
    if model[4:8] == _RUNTIME_FORMAT:
        raise ValueError("it is in ONNX Runtime's own format")
    try:
        found = _Walk(model).survey()
        if any(not node for _, _, node in found.outside):  # who reads them costs another walk, and is an error's alone
            found = _Walk(model, frozenset(name for name, _, _ in found.outside)).survey()
    except IndexError:
        raise ValueError("it ends too early") from None
    return found


class _Walk:
    """One pass. A message may come in parts and in any order, and of a text the last one counts: as in protobuf."""

    def __init__(self, data: bytes, wanted: frozenset[str] = frozenset()) -> None:
        self.data, self.wanted, self.found = data, wanted, Survey()
        self.readers: dict[str, str] = {}
        self._plain: set[bytes] = set()  # short attributes that hold no tensor and no graph: most occur many times

    def survey(self) -> Survey:
        self._inside("model", (0, len(self.data)), "", "", 0)
        self.found.outside = [(name, file, node or self.readers.get(name, "")) for name, file, node in self.found.outside]
        return self.found

    def _inside(self, kind: str, span: _Span, node: str, where: str, depth: int) -> bool:
        """Whether there was anything to look at. ``node``: whose attribute this is; ``where``: in which function."""
        if depth > _DEEPEST:
            raise ValueError("it is nested too deep")
        if kind == "node":
            self._node(span, where, depth)
            return True
        if kind == "tensor":
            self._tensor(span, node)
            return True
        if kind == "function":
            where = self._function(span)
        inside, ways = False, _INSIDE[kind]
        for key, start, stop in _fields(self.data, span):
            if key in ways:
                inside = self._inside(ways[key], (start, stop), node, where, depth + 1) or True
        return inside

    def _node(self, span: _Span, where: str, depth: int) -> None:
        parts: dict[int, _Span] = {}
        attributes, reads = [], []
        for key, start, stop in _fields(self.data, span):
            if key == _ATTRIBUTE:
                attributes.append((start, stop))
            elif key != _OUTPUT or key not in parts:
                parts[key] = (start, stop)
            if key == _INPUT and self.wanted:
                reads.append(self._text((start, stop)))
        domain, op_type = self._text(parts.get(_DOMAIN)), self._text(parts.get(_OP_TYPE))
        operator = ("" if domain == "ai.onnx" else domain, op_type)
        label = (self._text(parts.get(_NAME)) or self._text(parts.get(_OUTPUT))) + where
        self.found.operators.setdefault(operator, label)
        for name in self.wanted.intersection(reads):
            self.readers.setdefault(name, f"{label} ({op_type})")
        for start, stop in attributes:
            short = self.data[start:stop] if stop - start <= _SHORT else b""
            if short in self._plain:
                continue
            inside = self._inside("attribute", (start, stop), f"{label} ({op_type})", where, depth + 1)
            if short and not inside:
                self._plain.add(short)

    def _function(self, span: _Span) -> str:
        parts = {key: (start, stop) for key, start, stop in _fields(self.data, span)}
        name, domain = self._text(parts.get(_FUNCTION_NAME)), self._text(parts.get(_FUNCTION_DOMAIN))
        self.found.functions.add((domain, name))
        return f" in function {name}"

    def _tensor(self, span: _Span, node: str) -> None:
        name, file, outside = None, "", False
        for key, start, stop in _fields(self.data, span):
            if key == _TENSOR_NAME:
                name = start, stop
            elif key == _EXTERNAL_DATA:
                outside = True
                entry = {inner: self._text((first, last)) for inner, first, last in _fields(self.data, (start, stop))}
                file = entry.get(_ENTRY_VALUE, "") if entry.get(_ENTRY_KEY) == "location" else file
            elif key == _DATA_LOCATION:
                outside = outside or any(byte & 0x7F for byte in self.data[start:stop])
        if outside:
            self.found.outside.append((self._text(name), file, node))

    def _text(self, span: _Span | None) -> str:
        return self.data[span[0] : span[1]].decode("utf-8", "replace") if span else ""


def _fields(data: bytes, span: _Span) -> Iterator[tuple[int, int, int]]:
    """(key, where the value begins, where it ends) of a message's bytes and numbers; values of fixed size are passed over."""
    at, end = span
    while at < end:
        key = data[at]
        at += 1
        if key >= 0x80:
            key, at = _varint(data, at - 1)
        wire = key & 7
        if wire == 2:
            size = data[at]
            at += 1
            if size >= 0x80:
                size, at = _varint(data, at - 1)
            if at + size > end:
                raise ValueError("it ends too early")
            yield key, at, at + size
            at += size
        elif wire == 0:
            start = at
            while data[at] >= 0x80:
                at += 1
            at += 1
            if key == _DATA_LOCATION:
                yield key, start, at
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError("it is no protobuf")
    if at != end:
        raise ValueError("it ends too early")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where the next byte lies). Raises `IndexError` at the end of the data, `ValueError` beyond 32 bits: protobuf
    cuts a longer key off and so reads another one."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if value >= 1 << 32 or shift > 63:
            raise ValueError("it is no protobuf")
        if byte < 0x80:
            return value, at
        shift += 7

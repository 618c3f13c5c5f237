"""The event: one JSON object a frame, versioned by ``schema``.

| field | what |
|---|---|
| ``schema`` | 1 |
| ``id`` | unique; the same event sent twice has the same id, so that a receiver can drop the second |
| ``source``, ``seq`` | file, camera or URL, and the number of the frame in it, from 0 |
| ``time`` | when the frame was captured: RFC 3339, UTC, milliseconds |
| ``label``, ``score`` | the model's answer and its probability in 0..1; absent without a model |
| ``text`` | what a text reader read; absent for classifiers |
| ``codes`` | ``[{"text", "format", "gs1", "position"}]``, where the position is four corners [x, y] on the frame; an empty list says that none was found, absence that none was sought |
| ``latency_ms`` | from the decoded frame to the finished event |
| ``event`` | what happened instead of an answer (``damaged``: not decodable, ``unfit``: the model does not take such a frame, ``failed``: the model broke down; ``reason`` says why), or beside (``gap``, ``camera``, ``no_read``, ``drift``, ``model``, ``selftest``, ``incident``) |

All kinds and their fields: `event_schema`.
"""  # noqa: E501  a table row is one line

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import msgspec

__all__ = ["SCHEMA", "Event", "encode", "encode_any", "rfc3339", "whole"]

SCHEMA = 1
Event = dict[str, Any]
_encoder = msgspec.json.Encoder()


def encode(value: Any) -> bytes:
    """An event, or another struct or object of JSON types, as one line of UTF-8 JSON, without the line's end. Half a character,
    as a shell, a file name or an application may give it, appears as ``\\udcNN``: it ends no scan."""
    try:
        return _encoder.encode(value)
    except UnicodeEncodeError:
        return _encoder.encode(_whole(msgspec.to_builtins(value)))


def encode_any(value: Any) -> bytes:
    """`encode`, with whatever has no form in JSON as text: for people."""
    return encode(msgspec.to_builtins(value, enc_hook=str))


def whole(text: str) -> str:
    """A text that every encoding takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, dict):
        return {_whole(key): _whole(each) for key, each in value.items()}
    return [_whole(each) for each in value] if isinstance(value, list | tuple) else value


def rfc3339(seconds: float) -> str:
    """Seconds since the epoch -> ``2026-01-31T12:00:00.000Z``."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")

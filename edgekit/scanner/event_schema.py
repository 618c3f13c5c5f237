"""The event's schema, version `SCHEMA`: what a receiver may rely on.

Within a version fields may be added, and receivers ignore those they do not know; a field that goes or changes its meaning
takes another number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

__all__ = ["EventFields", "event_schema"]

_POSITION = "corners [x, y] in pixels of the frame, clockwise, first the code's own top left"
_Point = Annotated[list[int], Meta(min_length=2, max_length=2)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class CodeFields(msgspec.Struct):
    """One code: its text, its symbology, the GS1 data in it where it carries some, and where it is on the frame."""

    text: str
    format: str
    gs1: dict[str, Any] | UnsetType | None = UNSET
    position: Annotated[list[_Point], Meta(min_length=4, max_length=4, description=_POSITION)] | UnsetType = UNSET


class EventFields(msgspec.Struct, rename={"kind": "event"}):
    """One event; fields that do not apply are absent.

    Without ``event`` it is a frame's answer. With it, it says what happened instead (``damaged``, ``unfit``, ``failed``) or
    beside (``gap``, ``camera``, ``no_read``, ...).
    """

    schema: Literal[1]
    id: Annotated[str, Meta(min_length=1, description="unique; the same event sent twice has the same id")]
    time: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$", description="RFC 3339, UTC: of the capture")]
    source: Annotated[str, Meta(description="file, camera or URL")] | UnsetType = UNSET
    seq: Annotated[int, Meta(ge=-1, description="number of the frame in its source, from 0")] | UnsetType = UNSET
    kind: Annotated[str, Meta(pattern="^[a-z][a-z0-9_]*$")] | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    label: str | UnsetType = UNSET
    score: _Share | UnsetType = UNSET
    text: str | UnsetType = UNSET
    text_score: _Share | UnsetType = UNSET
    codes: list[CodeFields] | UnsetType = UNSET
    latency_ms: Annotated[float, Meta(ge=0, description="from the decoded frame to the finished event")] | UnsetType = UNSET


def event_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of an event."""
    schema = msgspec.json.schema(EventFields)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "edgekit scan event, version 1", **schema}

"""The event's schema, version `SCHEMA`: what a receiver may rely on.

Within a version fields and kinds may be added, and receivers pass over those they do not know; a field that goes or changes
its meaning takes another number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

__all__ = ["KINDS", "event_schema"]

Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0)]
Point = Annotated[list[int], Meta(min_length=2, max_length=2)]
Positive = Annotated[float, Meta(ge=0)]
_POSITION = "corners [x, y] in pixels of the frame, clockwise, first the code's own top left"
#: A part that is left out where it does not apply.
Text = str | UnsetType


class CodeFields(msgspec.Struct):
    """One code. ``gs1``: of a GS1 code, ``{"ais": {identifier: value}}``, or ``{"error": why}`` (a bad check digit too)."""

    text: Annotated[str, Meta(description="the plain content; GS1 fields end with U+001D")]
    format: Annotated[str, Meta(description="the symbology, as zxing-cpp names it")]
    gs1: dict[str, Any] | UnsetType | None = UNSET
    position: Annotated[list[Point], Meta(min_length=4, max_length=4, description=_POSITION)] | UnsetType = UNSET


class TriggerFields(msgspec.Struct):
    """The trigger whose frames made the event."""

    mode: Literal["single", "burst", "presentation", "external"]
    number: Annotated[Count, Meta(description="of the trigger in its scan, from 0")]
    frames: Annotated[Count, Meta(description="that were read")]
    ms: Annotated[Positive, Meta(description="from its beginning to its end")]
    reference: Annotated[str, Meta(description='what was sent with the trigger, "" for nothing')] = ""
    unread: Annotated[dict[str, Count], Meta(description="frames that were not read, by kind")] | UnsetType = UNSET


class Difference(msgspec.Struct):
    """An application identifier for which a code and the text say different things, both as read."""

    ai: str
    code: str | list[str]
    text: str


class FigureFields(msgspec.Struct):
    """What decided on a cause; empty where nothing did."""

    name: Text = UNSET
    value: float | str | UnsetType = UNSET
    limit: float | str | UnsetType = UNSET


class Event(msgspec.Struct, kw_only=True):
    schema: Literal[1]
    id: Annotated[str, Meta(min_length=1, description="unique; the same event sent twice has the same id")]
    time: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$", description="RFC 3339, UTC: of the capture")]
    source: Annotated[str, Meta(description='file, camera or URL; "" for the whole scan')]


class Read(Event, kw_only=True):
    seq: Annotated[int, Meta(ge=-1, description="number of the frame in its source, from 0; -1: no frame")]
    label: Annotated[str, Meta(description="the model's answer")] | UnsetType = UNSET
    score: Annotated[Share, Meta(description="its probability")] | UnsetType = UNSET
    text: Annotated[str, Meta(description="what a text reader read")] | UnsetType = UNSET
    text_score: Share | UnsetType = UNSET
    codes: Annotated[list[CodeFields], Meta(description="empty: none was found; absent: none was sought")] | UnsetType = UNSET
    unconfirmed: Annotated[list[CodeFields], Meta(description="codes that too few frames have read yet")] | UnsetType = UNSET
    duplicates: Annotated[Count, Meta(description="codes left out, reported before")] | UnsetType = UNSET
    agreement: Annotated[list[str], Meta(description="application identifiers on which both agree")] | UnsetType = UNSET
    doubtful: Annotated[list[Difference], Meta(description="the same but for letters taken for each other")] | UnsetType = UNSET
    conflict: list[Difference] | UnsetType = UNSET
    trigger: TriggerFields | UnsetType = UNSET
    kept: Annotated[str, Meta(description="the frame's file in the ring")] | UnsetType = UNSET
    latency_ms: Annotated[Positive, Meta(description="from the decoded frame to the finished event")] | UnsetType = UNSET


class FrameEvent(Read, kw_only=True):
    """A frame's answer, or a trigger's: it has no ``event``."""


class UnreadEvent(Event, rename={"kind": "event"}, kw_only=True):
    """A frame without an answer: not decodable, of a shape that the model does not take, or the model broke down on it."""

    kind: Literal["damaged", "unfit", "failed"]
    seq: Annotated[int, Meta(ge=-1)]
    reason: str


class NoReadEvent(Read, rename={"kind": "event"}, kw_only=True):
    """A trigger without a good read, and why; the other fields are of its best frame."""

    kind: Literal["no_read"]
    cause: Annotated[str, Meta(description="for example blur, glare, too small, cut off, bad check digit, no frame")]
    figure: FigureFields


class CameraEvent(Event, rename={"kind": "event"}, kw_only=True):
    """A camera came up, went down, changed the size of its pictures, or was removed."""

    kind: Literal["camera"]
    state: Literal["up", "down", "removed"]
    width: Count | UnsetType = UNSET
    height: Count | UnsetType = UNSET
    reason: Text = UNSET


class GapEvent(Event, rename={"kind": "event"}, kw_only=True):
    """Frames are missing before the next one: for so many ``seconds``, so many ``frames`` that came damaged, or what was in so
    many ``packets`` that could not be decoded."""

    kind: Literal["gap"]
    reason: str
    seconds: Positive | UnsetType = UNSET
    frames: Count | UnsetType = UNSET
    packets: Count | UnsetType = UNSET


class DriftEvent(Event, rename={"kind": "event"}, kw_only=True):
    """A part of what the scan sees has moved away from its baseline, or is back."""

    kind: Literal["drift"]
    state: Literal["drifted", "back"]
    part: Annotated[str, Meta(description="input, score, brightness, contrast, sharpness or colour")]
    psi: Annotated[Positive, Meta(description="population stability index")]
    ks: Annotated[Share, Meta(description="Kolmogorov-Smirnov distance")]
    level: Annotated[Positive, Meta(description="the psi from which it has drifted")]
    reason: str
    before: dict[str, float]
    now: dict[str, float]
    baseline: Annotated[str, Meta(description="where the baseline is from")]


class ModelEvent(Event, rename={"kind": "event"}, kw_only=True):
    """A bundle was offered in the shadow of the one that runs, then promoted or refused; ``source`` is its path.
    ``returned``: an install did not prove itself, and the scan began with the one before."""

    kind: Literal["model"]
    state: Literal["offered", "promoted", "refused", "returned"]
    digest: str
    before: Annotated[str, Meta(description="the digest of the bundle that ran")]
    reason: Text = UNSET
    frames: Count | UnsetType = UNSET
    agreement: Share | UnsetType | None = UNSET
    p50_ms: Positive | UnsetType = UNSET
    p99_ms: Positive | UnsetType = UNSET
    before_p50_ms: Positive | UnsetType = UNSET
    before_p99_ms: Positive | UnsetType = UNSET
    golden_error: float | UnsetType = UNSET
    report_error: Text = UNSET


class SelfTestEvent(Event, rename={"kind": "event"}, kw_only=True):
    """The golden inputs went through the model: at load, by the clock, or because the device is hot."""

    kind: Literal["selftest"]
    why: Literal["load", "hourly", "due", "hot"]
    digest: str
    ok: bool
    error: Annotated[float | None, Meta(description="relative; null where it cannot be told")] = None
    snr_db: float | UnsetType = UNSET
    reason: Text = UNSET
    celsius: float | UnsetType | None = UNSET


class IncidentEvent(Event, rename={"kind": "event"}, kw_only=True):
    """The seconds before an event were written to a file that `edgekit replay` takes; or could not be, and why."""

    kind: Literal["incident"]
    on: Annotated[str | None, Meta(description="the kind of the event that was the cause")]
    file: Text = UNSET
    frames: Count | UnsetType = UNSET
    seconds: Positive | UnsetType = UNSET
    bytes: Count | UnsetType = UNSET
    reason: Text = UNSET


#: What stands in ``event`` -> the fields of such an event; "" for one without.
KINDS: dict[str, type[msgspec.Struct]] = {
    "": FrameEvent,
    "damaged": UnreadEvent,
    "unfit": UnreadEvent,
    "failed": UnreadEvent,
    "no_read": NoReadEvent,
    "camera": CameraEvent,
    "gap": GapEvent,
    "drift": DriftEvent,
    "model": ModelEvent,
    "selftest": SelfTestEvent,
    "incident": IncidentEvent,
}


def event_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of an event: one form for each kind."""
    forms, parts = msgspec.json.schema_components(tuple(dict.fromkeys(KINDS.values())))
    parts[FrameEvent.__name__]["properties"]["event"] = False  # with one it is another form
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edgekit scan event, version 1",
        "oneOf": list(forms),
        "$defs": parts,
    }

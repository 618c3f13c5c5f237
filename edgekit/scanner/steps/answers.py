"""What several steps ask of an event: which camera it is of, whether its read is good."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from edgekit.preprocess import IMAGE_SUFFIXES

__all__ = ["CHECKED", "camera_of", "good", "require", "symbology", "valid", "which"]

#: What a cross-check adds to an event where text and codes do not agree.
CHECKED = ("conflict", "doubtful")


def camera_of(source: str) -> str:
    """The camera or URL; of an image file its folder: a camera that drops pictures there, not a camera a picture."""
    if "://" in source or os.path.splitext(source)[1].lower() not in IMAGE_SUFFIXES:
        return source
    return os.path.dirname(source) or "."


def valid(code: Mapping[str, Any]) -> bool:
    """Whether a code of an event says something that can be believed: GS1 data with a bad check digit cannot."""
    return "error" not in (code.get("gs1") or {})


def good(event: Mapping[str, Any], score: float = 0.0) -> bool:
    """Whether an event has a good read: a valid code; where no codes were sought, a label or a text with this score."""
    if "event" in event:
        return False
    if "codes" in event:
        return any(valid(code) for code in event["codes"])
    if "label" in event:
        return bool(event.get("score", 0.0) >= score)
    return bool(event.get("text")) and bool(event.get("text_score", event.get("score", 0.0)) >= score)


def which(event: Mapping[str, Any], on: Sequence[str]) -> str:
    """The one of ``on`` that an event is: its ``event``, or what a cross-check found (``conflict``, ``doubtful``); else ""."""
    kind = event.get("event")
    return str(kind) if kind in on else next((name for name in CHECKED if name in on and name in event), "")


def require(fine: bool, words: str) -> None:
    """Raise `ValueError` with ``words`` unless ``fine``: what options answer to a value they cannot take."""
    if not fine:
        raise ValueError(words)


def symbology(name: str) -> str:
    """A format's name as it is compared: ``EAN-13``, ``ean13`` and ``EAN 13`` are one."""
    return "".join(letter for letter in name.lower() if letter.isalnum())

"""Why nothing was read on a frame."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from edgekit.preprocess import Frame
from edgekit.scanner.events import Event

__all__ = ["CAUSES", "Cause", "NoReadOptions", "cause"]

CAUSES = ("bad check digit", "too dark", "glare", "low contrast", "nothing there", "cut off", "too small", "blur", "unclear")


class NoReadOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The limits between causes."""


class Cause(NamedTuple):
    """``cause`` is one of `CAUSES`; ``figure`` what decided, ``{"name", "value", "limit"}``, or nothing."""

    cause: str
    figure: dict[str, Any]


def cause(frame: Frame, event: Event, options: NoReadOptions | None = None) -> Cause:
    """Why a frame gave no read."""
    return Cause("unclear", {})

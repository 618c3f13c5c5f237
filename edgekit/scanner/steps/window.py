"""One trigger's frames, gathered into one event."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.preprocess import Frame
from edgekit.scanner.events import Event
from edgekit.scanner.sources import Captured

from .answers import good, valid

__all__ = ["Window"]


class Window:
    """Of its frames only the best is kept. Times are monotonic seconds."""

    def __init__(self, camera: str, number: int, begun: float, until: float, reference: str) -> None:
        self.camera, self.number, self.begun, self.until, self.reference = camera, number, begun, until, reference
        self.ended: float | None = None
        self.wanted = 0  # frames let in
        self.last = begun  # the moment of the last of them
        self.frames = 0  # of those, read
        self.unread: dict[str, int] = {}  # why others were not
        self.good = False
        self.best: tuple[Captured, Event] | None = None
        self._rank: tuple[float, ...] = ()
        self._codes: dict[tuple[str, str], dict[str, Any]] = {}
        self._unconfirmed: dict[tuple[str, str], dict[str, Any]] = {}

    def end(self, at: float) -> None:
        if self.ended is None:
            self.ended = max(self.begun, at)

    def add(self, captured: Captured, event: Event, good_score: float) -> None:
        """A frame that was read, or that could not be (its event says why)."""
        if "event" in event:
            kind = str(event["event"])
            self.unread[kind] = self.unread.get(kind, 0) + 1
            if self.best is None:
                self.best = captured, event
            return
        self.frames += 1
        for field, into in (("codes", self._codes), ("unconfirmed", self._unconfirmed)):
            for code in event.get(field, ()):
                into.setdefault((code["format"], code["text"]), code)
        is_good = good(event, good_score)
        score = float(event.get("score") or event.get("text_score") or 0.0)
        valid_codes = sum(valid(code) for code in event.get("codes", ()))
        detail = 0.0 if is_good or captured.frame is None else _detail(captured.frame)
        rank = (float(is_good), float(valid_codes), score, detail)
        if rank > self._rank:
            self.best, self._rank = (captured, event), rank
        self.good = self.good or is_good

    def event(self, mode: str, time: str) -> Event:
        """What the trigger says, without a cause; ``time`` is for one without frames."""
        fields: Event = {"source": self.camera, "seq": -1, "time": time}
        if self.best is not None:
            fields = {name: value for name, value in self.best[1].items() if name not in ("event", "reason", "unconfirmed")}
        if "codes" in fields:
            fields["codes"] = list(self._codes.values())
        if waiting := [code for key, code in self._unconfirmed.items() if key not in self._codes]:
            fields["unconfirmed"] = waiting
        about: dict[str, Any] = {"mode": mode, "number": self.number, "frames": self.frames, "ms": self.duration_ms}
        about["reference"] = self.reference
        if self.unread:
            about["unread"] = self.unread
        return {**fields, "trigger": about}

    @property
    def duration_ms(self) -> float:
        return round(((self.last if self.ended is None else self.ended) - self.begun) * 1e3, 3)


def _detail(frame: Frame) -> float:
    """How much changes along a few of its rows: among frames without a read, which is worth keeping."""
    rows = frame[:: max(1, frame.shape[0] // 32)]
    grey = rows[..., 0] if rows.ndim == 3 else rows
    return float(np.abs(np.diff(grey.astype(np.float32), axis=1)).mean()) if grey.shape[1] > 1 else 0.0

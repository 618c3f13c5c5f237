"""One trigger's frames, gathered into one event."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.preprocess import Frame
from edgekit.scanner.events import Event
from edgekit.scanner.sources import Captured

from .answers import good, valid

__all__ = ["Window"]

_PLAIN = ("camera", "number", "begun", "until", "reference", "ended", "wanted", "last", "frames", "good")


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

    def state(self) -> dict[str, Any]:
        """In JSON types, and the best frame: of a good read nobody asks for it again."""
        best = None
        if self.best is not None:
            captured, event = self.best
            best = [None if self.good else captured.frame, *captured[1:], event]
        plain = {name: getattr(self, name) for name in _PLAIN}
        codes, waiting = list(self._codes.values()), list(self._unconfirmed.values())
        return {**plain, "unread": dict(self.unread), "rank": self._rank, "best": best, "codes": codes, "unconfirmed": waiting}

    @classmethod
    def resumed(cls, state: Any) -> Window:
        window = cls(state["camera"], state["number"], state["begun"], state["until"], state["reference"])
        for name in _PLAIN:
            setattr(window, name, state[name])
        window.unread, window._rank = dict(state["unread"]), tuple(state["rank"])
        if state["best"] is not None:
            *captured, event = state["best"]
            window.best = Captured(*captured), event
        for field, into in (("codes", window._codes), ("unconfirmed", window._unconfirmed)):
            into.update({(code["format"], code["text"]): code for code in state[field]})
        return window

    @property
    def duration_ms(self) -> float:
        return round(((self.last if self.ended is None else self.ended) - self.begun) * 1e3, 3)


def _detail(frame: Frame) -> float:
    """How much changes along a few of its rows: among frames without a read, which is worth keeping."""
    rows = frame[:: max(1, frame.shape[0] // 32)]
    grey = rows[..., 0] if rows.ndim == 3 else rows
    return float(np.abs(np.diff(grey.astype(np.float32), axis=1)).mean()) if grey.shape[1] > 1 else 0.0

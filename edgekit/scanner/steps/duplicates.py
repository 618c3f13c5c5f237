"""Duplicates: a code that was reported is not reported again within a window."""

from __future__ import annotations

import base64
import math
from array import array
from collections import OrderedDict
from hashlib import blake2b
from typing import Any

import msgspec

from edgekit.scanner.events import Event
from edgekit.scanner.sources import Captured

from .answers import camera_of, require, symbology

__all__ = ["DuplicateOptions", "Duplicates"]

ONCE = -1.0  # the window of a code that is reported once in a scan
_DIGEST = 16  # bytes
_RECORDED = 100_000  # codes in a recording: looking through more holds the scan up
_LATE_S = 5.0  # of one camera's frames behind another's
_WINDOW = "-1 (once), 0 (off) or milliseconds"
#: Fields that every event of a frame has; one with no others, and without codes, says nothing.
_BARE = frozenset({"source", "seq", "time", "codes", "latency_ms", "duplicates"})


class DuplicateOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``window_ms``: -1 reports a code once in a scan, 0 every time, else again after so many milliseconds.

    The window begins with the read that is reported and does not begin anew with those it suppresses: a code in front of
    a camera is reported once a window. With ``restart`` each suppressed read begins it anew: reported again only after
    it was away for the window. ``per_format``: other windows for some symbologies, named as in events. ``most_remembered``
    bounds the memory: beyond it the oldest codes are forgotten, and would be reported again.
    """

    window_ms: float = 1000.0
    per_format: dict[str, float] = {}
    restart: bool = False
    most_remembered: int = 100_000

    def __post_init__(self) -> None:
        require(_fits(self.window_ms), f"window_ms: {_WINDOW}, not {self.window_ms:g}")
        for name, window in self.per_format.items():
            require(bool(symbology(name)), "per_format: names as in events, for example EAN-13")
            require(_fits(window), f"per_format.{name}: {_WINDOW}, not {window:g}")
        require(1 <= self.most_remembered <= 10_000_000, f"most_remembered: 1 to 10000000 codes, not {self.most_remembered}")


class Duplicates:
    """Takes codes out of ``codes`` that the same camera reported within their window: same symbology, same content.

    ``duplicates`` says how many. An event that has nothing else to say does not go on; its frame is still counted as
    inferred. Two equal codes on one frame are duplicates as well, unless the window is 0.
    """

    name = "duplicates"

    def __init__(self, options: DuplicateOptions | None = None) -> None:
        self.options = options or DuplicateOptions()
        self._windows = {symbology(name): window for name, window in self.options.per_format.items()}
        self._reported: OrderedDict[bytes, float] = OrderedDict()  # digest of camera, symbology, content -> when
        self._counts = {"reported": 0, "suppressed": 0, "silent_frames": 0, "forgotten": 0}
        windows = (self.options.window_ms, *self.options.per_format.values())
        self._longest_s = math.inf if ONCE in windows else max(windows) / 1e3
        self._now = -math.inf

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        codes = event.get("codes")
        if not codes:
            return [event]
        camera = camera_of(str(event["source"]))
        kept = [code for code in codes if self._new(camera, code, captured.monotonic)]
        if len(kept) == len(codes):
            return [event]
        if not kept and _BARE.issuperset(event):
            self._counts["silent_frames"] += 1
            return []
        return [{**event, "codes": kept, "duplicates": len(codes) - len(kept)}]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        return []

    def status(self) -> dict[str, Any]:
        return {**self._counts, "remembered": len(self._reported)}

    def close(self) -> None:
        pass

    def state(self) -> dict[str, bytes]:
        """What can still suppress a code, the latest first; of codes that are reported once in a scan the last 100,000."""
        keys, times = bytearray(), array("d")
        for key, at in reversed(self._reported.items()):
            if self._now - at > self._longest_s + _LATE_S or len(times) == _RECORDED:
                break
            keys += key
            times.append(at)
        return {"keys": bytes(keys), "times": times.tobytes()}

    def resume(self, state: Any) -> None:
        keys, times = base64.b64decode(state["keys"]), array("d", base64.b64decode(state["times"]))
        found = [(keys[i * _DIGEST : (i + 1) * _DIGEST], at) for i, at in enumerate(times)]
        self._reported = OrderedDict(reversed(found))

    def _new(self, camera: str, code: dict[str, Any], now: float) -> bool:
        kind = symbology(code["format"])
        window = self._windows.get(kind, self.options.window_ms)
        if window == 0:
            self._counts["reported"] += 1
            return True
        # A digest, so that a code of 7 KB takes no more room than one of 8 digits; 128 bits: no collisions.
        key = blake2b(f"{camera}\0{kind}\0{code['text']}".encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()
        self._now = max(self._now, now)
        before = self._reported.get(key)
        fresh = before is None or (window != ONCE and now - before >= window / 1e3)
        if fresh or self.options.restart:
            self._reported[key] = now
            self._reported.move_to_end(key)
        self._counts["reported" if fresh else "suppressed"] += 1
        if len(self._reported) > self.options.most_remembered:
            self._reported.popitem(last=False)
            self._counts["forgotten"] += 1
        return fresh


def _fits(window_ms: float) -> bool:
    return math.isfinite(window_ms) and (window_ms in (0.0, ONCE) or window_ms > 0)

"""Votes: what a weak symbology says is believed once several frames say the same."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import msgspec

from edgekit.scanner.events import Event
from edgekit.scanner.sources import Captured

from .answers import camera_of, require, symbology

__all__ = ["WEAK", "VoteOptions", "Votes"]

#: Symbologies in which a part of a symbol, or a damaged one, is often a symbol as well. ITF has no check digit, and its
#: start and stop are bar pairs that digits contain (ITF-14's check digit lets one wrong read in ten pass); Codabar has
#: none, and four start and stop letters; Code 39's is optional and not asked for; DX film edge has one parity bit. The
#: others carry one or more check characters, or Reed-Solomon words, over the whole of a symbol.
WEAK = ("ITF", "ITF-14", "Codabar", "Code 39", "Code 39 Standard", "Code 39 Extended", "DX Film Edge")

PATIENCE_S = 10.0  # a frame that waits for longer before it is read counts no more
MOST_VALUES = 4096  # remembered at a time; a window holds far fewer


class VoteOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``hits`` equal reads in as many frames of one camera within ``window_ms``. ``formats``: names as in events."""

    hits: int = 2
    window_ms: float = 350.0
    formats: tuple[str, ...] = WEAK

    def __post_init__(self) -> None:
        require(2 <= self.hits <= 100, f"hits: 2 to 100 equal reads, not {self.hits}; without votes, leave them out")
        require(0 < self.window_ms <= 3_600_000, f"window_ms: above 0 and up to 3600000 (an hour), not {self.window_ms:g}")
        require(bool(self.formats), "formats: at least one, for example ITF; without votes, leave them out")
        require(all(symbology(name) for name in self.formats), "formats: names as in events, for example ITF or Code 39")


class Votes:
    """Takes codes of `VoteOptions.formats` out of an event's ``codes`` until enough frames have read the same.

    What waits is under ``unconfirmed``. A read in the frame that completes the vote, and in each later one within the
    window, stays in ``codes``. ``outvoted`` counts reads that no others confirmed.
    """

    name = "votes"

    def __init__(self, options: VoteOptions | None = None) -> None:
        self.options = options or VoteOptions()
        self._formats = {symbology(name) for name in self.options.formats}
        self._seen: OrderedDict[tuple[str, str, str], list[_Read]] = OrderedDict()
        self._latest: dict[str, float] = {}  # capture of a camera
        self._counts = {"confirmed": 0, "unconfirmed": 0, "outvoted": 0}

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        camera = camera_of(str(event["source"]))
        if captured.frame is not None:
            self._latest[camera] = max(captured.monotonic, self._latest.get(camera, captured.monotonic))
        codes = event.get("codes")
        if not codes or not any(symbology(code["format"]) in self._formats for code in codes):
            return [event]
        asked: dict[tuple[str, str], bool] = {}  # twice on one frame is one read
        believed: list[Any] = []
        waiting: list[Any] = []
        for code in codes:
            key = (symbology(code["format"]), code["text"])
            if key[0] not in self._formats:
                believed.append(code)
                continue
            if key not in asked:
                asked[key] = self._vote((camera, *key), captured.monotonic)
            (believed if asked[key] else waiting).append(code)
        if not waiting:
            return [event]
        return [{**event, "codes": believed, "unconfirmed": waiting}]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        for key in list(self._seen):  # by the captures' clock: a frame may have waited for longer than the window
            self._prune(key, max(self._latest.get(key[0], -math.inf), monotonic - PATIENCE_S))
        if len(self._latest) > MOST_VALUES:
            self._latest.clear()
        return []

    def status(self) -> dict[str, Any]:
        return dict(self._counts)

    def close(self) -> None:
        for key in list(self._seen):
            self._forget(key)

    def state(self) -> list[tuple[str, str, str, list[tuple[float, bool]]]]:
        return [(*key, [(read.at, read.confirmed) for read in reads]) for key, reads in self._seen.items()]

    def resume(self, state: Any) -> None:
        self._seen = OrderedDict()
        for camera, kind, text, reads in state:
            self._seen[camera, kind, text] = [_Read(float(at), bool(confirmed)) for at, confirmed in reads]

    def _vote(self, key: tuple[str, str, str], now: float) -> bool:
        reads = self._seen.setdefault(key, [])
        self._seen.move_to_end(key)
        reads.append(_Read(now))
        window = self.options.window_ms / 1e3
        inside = [read for read in reads if abs(now - read.at) <= window]
        if confirmed := len(inside) >= self.options.hits:
            for read in inside:
                read.confirmed = True
        self._counts["confirmed" if confirmed else "unconfirmed"] += 1
        self._prune(key, now)
        if len(self._seen) > MOST_VALUES:
            self._forget(next(iter(self._seen)))
        return confirmed

    def _prune(self, key: tuple[str, str, str], now: float) -> None:
        window = self.options.window_ms / 1e3
        kept = []
        for read in self._seen[key]:
            if now - read.at <= window:
                kept.append(read)
            else:
                self._counts["outvoted"] += not read.confirmed
        if kept:
            self._seen[key] = kept[-self.options.hits :] if all(read.confirmed for read in kept) else kept
        else:
            del self._seen[key]

    def _forget(self, key: tuple[str, str, str]) -> None:
        self._counts["outvoted"] += sum(not read.confirmed for read in self._seen.pop(key))


class _Read:
    __slots__ = ("at", "confirmed")

    def __init__(self, at: float, confirmed: bool = False) -> None:
        self.at, self.confirmed = at, confirmed

"""Triggers: which frames are read, and one event for what belongs together."""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from edgekit.errors import InputError
from edgekit.preprocess import Frame
from edgekit.scanner.events import Event, rfc3339
from edgekit.scanner.sources import Captured

from .answers import camera_of, good, require
from .noread import Cause, cause
from .scene import Scene
from .window import Window

__all__ = ["NO_TRIGGER", "Trigger", "TriggerOptions"]

NO_TRIGGER = "no trigger"  # why a frame outside is dropped
MOST_FIRES = 10_000  # that wait, of a camera
FORGET_S = 60.0  # a folder without a new file for so long is triggered no more
PATIENCE_S = 1.0  # frames may wait in a queue for this long before a trigger ends without them
_DURATIONS = 4096
_FIRED = ("single", "burst", "external")


class TriggerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``mode``, and where it ends.

    ``continuous``: every frame is an event. ``single``: from a trigger to the first good read, or until ``time_ms`` are
    over. ``burst``: ``frames`` frames from a trigger on, within ``time_ms``. ``external``: all frames of ``time_ms`` from a
    trigger on, or until the next. ``presentation``: from the moment a thing is there (``scene_share`` of the picture
    changed by more than ``scene_level`` grey levels) until it is away for ``leave_ms``, or ``time_ms`` are over.

    Frames count from ``delay_ms`` after the trigger on; negative: also such that were captured before and not yet read.
    ``end_on_good_read``: as ``single`` ends; where it is not set the mode says. ``good_score``: what makes a label or a text a
    good read where no codes are sought. ``inputs``: where triggers come from, as in `TRIGGER_INPUTS`.
    """

    mode: Literal["continuous", "single", "burst", "presentation", "external"] = "continuous"
    time_ms: float = 1000.0
    frames: int = 3
    delay_ms: float = 0.0
    leave_ms: float = 300.0
    scene_share: float = 0.05
    scene_level: float = 12.0
    end_on_good_read: bool | None = None
    good_score: float = 0.5
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        modes = ("continuous", *_FIRED, "presentation")
        require(self.mode in modes, f"mode: one of {', '.join(modes)}, not {self.mode!r}")
        require(1 <= self.time_ms <= 3_600_000, f"time_ms: 1 to 3600000 (an hour), not {self.time_ms:g}")
        require(1 <= self.frames <= 10_000, f"frames: 1 to 10000, not {self.frames}")
        require(abs(self.delay_ms) <= 60_000, f"delay_ms: -60000 to 60000, not {self.delay_ms:g}")
        require(0 <= self.leave_ms <= 60_000, f"leave_ms: 0 to 60000, not {self.leave_ms:g}")
        require(0 < self.scene_share <= 1, f"scene_share: above 0 and up to 1 of the picture, not {self.scene_share:g}")
        require(0 < self.scene_level < 255, f"scene_level: above 0 and below 255 grey levels, not {self.scene_level:g}")
        require(0 <= self.good_score <= 1, f"good_score: 0 to 1, not {self.good_score:g}")
        require(not self.inputs or self.mode in _FIRED, f"inputs: mode {self.mode} is not triggered from outside")

    @property
    def ends_on_good(self) -> bool:
        return self.mode == "single" if self.end_on_good_read is None else self.end_on_good_read


class _Fire:
    __slots__ = ("at", "reference", "source")

    def __init__(self, source: str | None, reference: str, at: float) -> None:
        self.source, self.reference, self.at = source, reference, at

    def state(self) -> tuple[str | None, str, float]:
        return self.source, self.reference, self.at


class _Camera:
    """What goes on at one camera."""

    def __init__(self, name: str, scene: Scene | None) -> None:
        self.name, self.scene = name, scene
        self.open: Window | None = None
        self.waiting: deque[_Fire] = deque()
        self.there = False  # a thing, and its presentation has ended: wait until it leaves
        self.there_at = -math.inf
        self.seen = -math.inf

    def state(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "scene": None if self.scene is None else self.scene.state(),
            "open": None if self.open is None else self.open.state(),
            "waiting": [fire.state() for fire in self.waiting],
            "there": self.there,
            "there_at": None if math.isinf(self.there_at) else self.there_at,  # JSON has no infinity
            "seen": None if math.isinf(self.seen) else self.seen,
        }

    def resume(self, state: Any) -> None:
        if self.scene is not None:
            self.scene.resume(state["scene"])
        self.open = None if state["open"] is None else Window.resumed(state["open"])
        self.waiting = deque(_Fire(*fire) for fire in state["waiting"])
        self.there, self.there_at = bool(state["there"]), -math.inf if state["there_at"] is None else state["there_at"]
        self.seen = -math.inf if state.get("seen") is None else state["seen"]


class Trigger:
    """Drops frames outside a trigger before they are read, and makes one event of those inside it at its end.

    Each camera has its own triggers; of image files, each folder. A trigger that comes while one is running ends that one:
    each gives exactly one event and camera. ``cameras`` are known before their first frame. ``diagnose`` says why nothing
    was read on a frame. ``clock`` is `time.monotonic`.
    """

    name = "trigger"

    def __init__(
        self,
        options: TriggerOptions | None = None,
        *,
        cameras: Sequence[str] = (),
        diagnose: Callable[[Frame, Event], Cause] = cause,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options or TriggerOptions()
        self._diagnose, self._clock = diagnose, clock
        self._lock = threading.Lock()
        self._heard: Callable[[str | None, str, float], None] | None = None
        self._fires: deque[_Fire] = deque()
        self._cameras: dict[str, _Camera] = {}
        self._unplaced: deque[_Fire] = deque()  # for all cameras, before any was known
        self._owner: dict[tuple[str, int], Window] = {}
        self._ended: list[Window] = []
        self._idle = True
        self._pictures: dict[str, tuple[int, Frame]] = {}
        self._durations = array("d")
        self._causes: dict[str, int] = {}
        self._counts = {"fired": 0, "refused": 0, "triggers": 0, "good": 0, "no_read": 0, "frames": 0, "codes": 0}
        self.inputs: list[Callable[[], dict[str, Any]]] = []  # what each trigger input says of itself
        self._named = bool(cameras)  # else they are files: a folder is known from its first frame on
        for name in cameras:
            self._camera(name)

    def fire(self, source: str | None = None, reference: str = "") -> bool:
        """Trigger a camera, or all; from any thread. ``reference`` comes back in the event. False where too many wait, or no
        such camera is known."""
        with self._lock:
            known = source is None or not self._named or source in self._cameras
            placed = max((len(camera.waiting) for camera in list(self._cameras.values())), default=0)
            waiting = len(self._fires) + len(self._unplaced) + placed
            fits = known and self.options.mode in _FIRED and waiting < MOST_FIRES
            self._counts["fired" if fits else "refused"] += 1
            if fits:
                self._fires.append(_Fire(source, reference, self._clock() + self.options.delay_ms / 1e3))
        return fits

    def listen(self, heard: Callable[[str | None, str, float], None]) -> None:
        """``heard`` learns of each trigger as the scanning thread takes it: camera or None, reference, from when it counts."""
        self._heard = heard

    def again(self, source: str | None, reference: str, at: float) -> None:
        """`fire` with what ``heard`` learnt."""
        with self._lock:
            self._fires.append(_Fire(source, reference, at))

    def wants(self, captured: Captured) -> str:
        if self.options.mode == "continuous":
            return ""
        self._idle = False
        self._place_fires()
        camera, now = self._camera(camera_of(captured.source)), captured.monotonic
        camera.seen = now
        self._advance(camera, now)
        if self.options.mode == "presentation":
            self._watch(camera, captured)
        window = camera.open
        if window is None or window.ended is not None or now < window.begun:
            self._counts["outside"] = self._counts.get("outside", 0) + 1
            return NO_TRIGGER
        window.wanted, window.last = window.wanted + 1, now
        self._owner[captured.source, captured.seq] = window
        if self.options.mode == "burst" and window.wanted == self.options.frames:
            self._end(camera, now)
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        if self.options.mode == "continuous":
            if "event" not in event:
                self._counted(event)
                self._counts["triggers"] += 1
                self._counts["good" if good(event, self.options.good_score) else "no_read"] += 1
            return [event]
        window = self._owner.pop((captured.source, captured.seq), None)
        if window is None:
            if event.get("event") == "camera":
                self._told(captured, event)
            return [event]
        if "event" not in event:
            self._counted(event)
        window.add(captured, event, self.options.good_score)
        camera = self._cameras[window.camera]
        if window.good and self.options.ends_on_good and camera.open is window:
            self._end(camera, captured.monotonic)
            camera.there = self.options.mode == "presentation"
        return []

    def due(self, monotonic: float, wall: float) -> list[Event]:
        if self.options.mode == "continuous":
            return []
        self._owner.clear()  # what was wanted has been read by now, or another step dropped it
        self._pictures.clear()  # the steps behind have had them
        self._place_fires()
        # Frames that were captured in time may still wait in a queue; none does once the source had nothing to give.
        until = monotonic if self._idle else monotonic - PATIENCE_S
        self._idle = True
        for camera in self._cameras.values():
            self._advance(camera, until)
        if monotonic == math.inf or (self._unplaced and self._unplaced[0].at + self.options.time_ms / 1e3 < until):
            self._end_unplaced(until)
        if not self._named and len(self._cameras) > 1:
            self._forget(until - FORGET_S - PATIENCE_S)
        ended, self._ended = self._ended, []
        return [self._event(window, wall) for window in sorted(ended, key=lambda window: window.number)]

    def picture(self, event: Event) -> Frame | None:
        """The frame that an event of this step is about; of each camera's last trigger only."""
        seq, frame = self._pictures.get(camera_of(str(event.get("source", ""))), (None, None))
        return frame if seq == event.get("seq") else None

    def status(self) -> dict[str, Any]:
        counts = dict(self._counts)
        triggers, frames = counts["triggers"], counts["frames"]
        p50, p99 = np.percentile(self._durations, [50, 99]).round(3).tolist() if self._durations else (None, None)
        return {
            "mode": self.options.mode,
            **counts,
            "read_rate": round(counts["good"] / triggers, 4) if triggers else None,
            "codes_a_frame": round(counts["codes"] / frames, 4) if frames else None,
            "causes": dict(self._causes),
            "duration_ms": {"p50": p50, "p99": p99},
            **({"inputs": [status() for status in self.inputs]} if self.inputs else {}),
        }

    def close(self) -> None:
        self._pictures.clear()

    def state(self) -> dict[str, Any]:
        cameras = [camera.state() for camera in self._cameras.values()]
        unplaced = [fire.state() for fire in self._unplaced]
        known = {"named": self._named, "unplaced": unplaced, "cameras": cameras}
        return {"idle": self._idle, "triggers": self._counts["triggers"], **known}

    def resume(self, state: Any) -> None:
        self._idle, self._counts["triggers"] = bool(state["idle"]), int(state["triggers"])
        self._named = bool(state.get("named"))
        self._unplaced = deque(_Fire(*fire) for fire in state["unplaced"])
        self._cameras = {}
        for each in state["cameras"]:
            self._cameras[each["name"]] = camera = _Camera(each["name"], self._scene())
            camera.resume(each)

    def _camera(self, name: str) -> _Camera:
        if name not in self._cameras:
            camera = self._cameras[name] = _Camera(name, self._scene())
            camera.waiting, self._unplaced = self._unplaced, deque()
        return self._cameras[name]

    def _forget(self, before: float) -> None:
        """Of files each folder is a camera: those that gave nothing for long go, but for the latest."""
        latest = max(self._cameras.values(), key=lambda camera: camera.seen)
        idle = [each.name for each in self._cameras.values() if each.seen < before and not each.open and not each.waiting]
        for name in idle:
            if name != latest.name:
                del self._cameras[name]

    def _told(self, captured: Captured, event: Event) -> None:
        """A camera that was added is triggered from its first word on; one that was removed, no more."""
        if event.get("state") != "removed":
            if self._named:  # of files: a folder has something to tell, and gives no frame
                self._camera(captured.source)
        elif (camera := self._cameras.get(captured.source)) is not None:
            self._place_fires()
            self._advance(camera, captured.monotonic)
            self._end(camera, captured.monotonic)
            del self._cameras[captured.source]

    def _scene(self) -> Scene | None:
        options = self.options
        return Scene(options.scene_share, options.scene_level) if options.mode == "presentation" else None

    def _place_fires(self) -> None:
        """Bring what other threads fired to the cameras."""
        while self._fires:
            fire = self._fires.popleft()
            if self._heard is not None:
                self._heard(fire.source, fire.reference, fire.at)
            if fire.source is not None and self._named and fire.source not in self._cameras:
                with self._lock:  # it was removed meanwhile
                    self._counts["fired"] -= 1
                    self._counts["refused"] += 1
            elif fire.source is not None:
                self._camera(fire.source).waiting.append(fire)
            elif not self._cameras:
                self._unplaced.append(fire)
            else:
                latest = max(camera.seen for camera in self._cameras.values())
                for camera in self._cameras.values():
                    if self._named or camera.seen >= min(latest, fire.at - FORGET_S):
                        camera.waiting.append(fire)

    def _advance(self, camera: _Camera, until: float) -> None:
        """All that happens at a camera by the moment ``until``: triggers run out of time, others begin."""
        while camera.waiting and camera.waiting[0].at <= until:
            fire = camera.waiting.popleft()
            self._end(camera, fire.at)
            camera.open = self._begun(camera.name, fire.at, fire.reference)
        if camera.open is not None and until > camera.open.until:
            self._end(camera, camera.open.last if until == math.inf else until)

    def _watch(self, camera: _Camera, captured: Captured) -> None:
        """Presentation: a thing that comes begins a trigger, its leaving ends it."""
        now, window = captured.monotonic, camera.open
        there = captured.frame is not None and camera.scene is not None and camera.scene.update(captured.frame)
        if there:
            camera.there_at = now
            if window is None and not camera.there:
                camera.open = self._begun(camera.name, now, "")
        elif now - camera.there_at >= self.options.leave_ms / 1e3:
            camera.there = False
            if window is not None:
                self._end(camera, camera.there_at)

    def _begun(self, camera: str, at: float, reference: str) -> Window:
        self._counts["triggers"] += 1
        return Window(camera, self._counts["triggers"] - 1, at, at + self.options.time_ms / 1e3, reference)

    def _end(self, camera: _Camera, at: float) -> None:
        window, camera.open = camera.open, None
        if window is None:
            return
        window.end(min(at, window.until))
        self._ended.append(window)
        if camera.scene is not None and at > window.until:
            camera.scene.accept()  # it stays: its going is no new thing either

    def _end_unplaced(self, until: float) -> None:
        """Triggers for all cameras, where none ever gave a frame."""
        while self._unplaced and self._unplaced[0].at + self.options.time_ms / 1e3 < until:
            fire = self._unplaced.popleft()
            window = self._begun("", fire.at, fire.reference)
            window.end(fire.at if until == math.inf else window.until)
            self._ended.append(window)

    def _counted(self, event: Event) -> None:
        self._counts["frames"] += 1
        self._counts["codes"] += len(event.get("codes", ()))

    def _why(self, frame: Frame, event: Event) -> Cause:
        """The cause of a no-read; a frame of a shape that only the application's own reader takes has none to be seen."""
        try:
            return self._diagnose(frame, event)
        except InputError:
            return Cause("unclear", {})

    def _event(self, window: Window, wall: float) -> Event:
        event = window.event(self.options.mode, rfc3339(wall))
        if len(self._durations) == _DURATIONS:
            del self._durations[0]
        self._durations.append(window.duration_ms)
        frame = None if window.best is None else window.best[0].frame
        if frame is None:
            self._pictures.pop(window.camera, None)
        else:
            self._pictures[window.camera] = event["seq"], frame
        if window.good:
            self._counts["good"] += 1
            return event
        self._counts["no_read"] += 1
        why = Cause("no frame", {}) if frame is None or not window.frames else self._why(frame, event)
        self._causes[why.cause] = self._causes.get(why.cause, 0) + 1
        about = {name: event[name] for name in ("source", "seq", "time")}
        return {**about, "event": "no_read", "cause": why.cause, "figure": why.figure, **event}

"""Incidents: what came in the last seconds before one, in a file that `edgekit replay` runs again."""

from __future__ import annotations

import math
import queue
import re
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import refuse_inside_bundle
from edgekit.scanner.codes import CodeReader
from edgekit.scanner.events import Event, encode, rfc3339
from edgekit.scanner.png import encode_png
from edgekit.scanner.reading import Reading
from edgekit.scanner.recording import SUFFIX, Came, Model, Recording, Round, StepState, write_recording
from edgekit.scanner.sinks import without_secrets
from edgekit.scanner.sources import Captured
from edgekit.scanner.sources.address import shown
from edgekit.version import __version__

__all__ = ["IncidentOptions", "Incidents"]

_CHUNKS = 4  # of the wanted seconds: whole ones go, so that a file begins where the steps' state is known
_BACKLOG = 64  # frames that wait to be packed; beyond, they stay as they are
_SECRET = re.compile(r"pass|secret|token|key|credential|user", re.IGNORECASE)


class IncidentOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``folder``: where files go. ``seconds`` before an event whose ``event`` is one of ``on``; frames beyond
    ``most_megabytes``, in memory or in a file, are left out, the oldest first. No second file within ``cooldown_s``; of more
    than ``most_files`` the oldest is removed."""

    folder: str
    seconds: float = 10.0
    most_megabytes: float = 64.0
    on: tuple[str, ...] = ("no_read", "failed", "drift", "conflict")
    cooldown_s: float = 60.0
    most_files: int = 50

    def __post_init__(self) -> None:
        if not self.folder or not self.on:
            raise ValueError("folder and on are not empty")
        if not (self.seconds > 0 and self.most_megabytes > 0 and self.cooldown_s >= 0 and self.most_files >= 1):
            raise ValueError("seconds, most_megabytes and most_files are more than 0, cooldown_s is at least 0")


class _Kept:
    """A frame in memory: as it came, then packed."""

    def __init__(self, frame: NDArray[np.uint8]) -> None:
        self.frame: NDArray[np.uint8] | None = frame
        self.png = b""
        self.size = frame.nbytes

    def pack(self) -> bytes:
        if (frame := self.frame) is not None:
            self.png = encode_png(frame)
            self.frame, self.size = None, len(self.png)
        return self.png


@dataclass
class _Turn:
    """A `Round` while it is made, and its events."""

    came: list[dict[str, Any]] = field(default_factory=list)
    frames: list[_Kept] = field(default_factory=list)
    due: tuple[float, float] | None = None
    events: list[bytes] = field(default_factory=list)


@dataclass
class _Chunk:
    """Some rounds, and the steps' states before the first of them."""

    states: tuple[StepState, ...]
    first: int
    begin: float
    turns: list[_Turn] = field(default_factory=list)

    def size(self) -> int:
        return sum(kept.size for turn in self.turns for kept in turn.frames)


class Incidents:
    """A `Step`, the first of all, that keeps what comes; and a `Sink`, the last, that sees what is sent.

    Frames are packed, and files written, by a thread of its own. ``watch`` tells it what it records; without, a file holds no
    model and no steps. A step that has ``state()`` (JSON types) and ``resume(state)`` is replayed exactly; others begin anew.
    """

    name = "incident"

    def __init__(self, options: IncidentOptions) -> None:
        refuse_inside_bundle(Path(options.folder) / "x")
        self.options = options
        self._reading: Reading | None = None
        self._steps: Sequence[Any] = ()
        self._config: Any = None
        self._bundle: Any = None
        self._run_id = ""
        self._chunks: deque[_Chunk] = deque()
        self._turn = _Turn()
        self._number = 0  # of events sent
        self._why: Event | None = None
        self._quiet_until = -math.inf
        self._counts = {"files": 0, "cooled": 0, "failed": 0}
        self._done: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def watch(self, reading: Reading, steps: Sequence[Any] = (), config: Any = None) -> None:
        """What the scan reads with, its steps in order (this one left out), and its configuration; passwords are taken out."""
        self._reading, self._steps = reading, tuple(step for step in steps if step is not self)
        self._config = _without_secrets(msgspec.to_builtins(config))

    # As a step

    def wants(self, captured: Captured) -> str:
        kept = self._opened().frames
        came = {"source": captured.source, "seq": captured.seq, "time": captured.time, "monotonic": captured.monotonic}
        frame = captured.frame
        if frame is not None and frame.dtype == np.uint8 and (frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 3)):
            kept.append(_Kept(frame if frame.base is None else np.array(frame)))
            came["frame"] = len(kept) - 1
            if self._jobs.qsize() < _BACKLOG:
                self._job(kept[-1])
        self._turn.came.append({**came, "error": captured.error})
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        if captured.frame is None and captured.seq < 0:
            came = {"source": captured.source, "seq": -1, "time": captured.time, "monotonic": captured.monotonic}
            self._opened().came.append({**came, "kind": captured.error, "event": dict(event)})
            return [event]
        for came in self._turn.came:
            if came["seq"] == captured.seq and came["source"] == captured.source and "answer" not in came:
                came["answer"] = dict(event)
                break
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        self._opened().due = (monotonic, wall)
        if math.isinf(monotonic):
            self._finish()
            self.flush(2.0)
        return [self._done.get() for _ in range(self._done.qsize())]

    # As a sink

    def send(self, event: Event) -> None:
        """An event as it left."""
        run_id, _, number = str(event.get("id", "")).rpartition("-")
        self._run_id = run_id
        self._number = int(number) + 1 if number.isdigit() else self._number + 1
        self._turn.events.append(encode(event))
        if event.get("event") in self.options.on and self._why is None:
            self._why = event
            if math.isinf((self._turn.due or (0.0,))[0]):
                self._finish()

    def flush(self, patience_s: float = 2.0) -> None:
        """Wait for a file that is being written."""
        self._finish()
        if self._thread is not None:
            done = threading.Event()
            self._jobs.put(done.set)
            done.wait(patience_s)

    def status(self) -> dict[str, Any]:
        frames = [kept for chunk in self._chunks for turn in chunk.turns for kept in turn.frames]
        held = {"frames": len(frames), "megabytes": round(sum(kept.size for kept in frames) / 1e6, 2)}
        return {"sink": self.name, "sent": self._number, **self._counts, **held}

    def close(self) -> None:
        self.flush()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join(2.0)

    def _opened(self) -> _Turn:
        """The round that is going on; the one before ends with its `due`, and the events that left after it."""
        if self._turn.due is None:
            if not self._chunks:
                self._begin(0.0)
            return self._turn
        self._finish()
        now = self._turn.due[0]
        self._turn = _Turn()
        self._trim(now)
        self._chunks[-1].turns.append(self._turn)
        return self._turn

    def _begin(self, now: float) -> None:
        states = tuple(_state(step) for step in self._steps)
        self._chunks.append(_Chunk(states, self._number, now, [self._turn]))
        self._bundle = self._running()

    def _running(self) -> Any:
        return self._reading.model.bundle if self._reading is not None and self._reading.model is not None else None

    def _trim(self, now: float) -> None:
        """Begin a new chunk where the last is full, and forget what is too old or too much."""
        last, most = self._chunks[-1], self.options.most_megabytes * 1e6
        if last.begin == 0.0:
            last.begin = now
        if self._bundle is not self._running():
            self._chunks.clear()  # the frames before were read by another model
        elif now - last.begin < self.options.seconds / _CHUNKS and last.size() < most / _CHUNKS:
            return
        states = tuple(_state(step) for step in self._steps)
        self._chunks.append(_Chunk(states, self._number, now))
        self._bundle = self._running()
        while len(self._chunks) > 2 and now - self._chunks[1].begin >= self.options.seconds:
            self._chunks.popleft()
        while len(self._chunks) > 2 and sum(chunk.size() for chunk in self._chunks) > most:
            self._chunks.popleft()

    def _finish(self) -> None:
        """Write a file if the round that ended had an incident."""
        why, self._why = self._why, None
        if why is None or self._turn.due is None:
            self._why = why
            return
        now = self._turn.due[0]
        if now < self._quiet_until:
            self._counts["cooled"] += 1
            return
        if math.isfinite(now):
            self._quiet_until = now + self.options.cooldown_s
        self._job((self._about(why, now), [turn for chunk in self._chunks for turn in chunk.turns], self._turn.due[1]))

    def _about(self, why: Event, now: float) -> Recording:
        reading, first = self._reading, self._chunks[0]
        codes = None if reading is None or reading.codes is None else getattr(reading.codes, "budget_ms", -1.0)
        if codes is not None and reading is not None and not isinstance(reading.codes, CodeReader):
            codes = -1.0
        return Recording(
            format=1,
            edgekit=__version__,
            run_id=self._run_id,
            first=first.first,
            why=why,
            model=_model(reading.model) if reading and reading.model is not None else None,
            text=_model(reading.text) if reading and reading.text is not None else None,
            codes=codes,
            region=tuple(reading.region) if reading and reading.region is not None else None,  # type: ignore[arg-type]
            steps=first.states,
            config=self._config,
            seconds=round(now - first.begin, 3) if math.isfinite(now) and first.begin else 0.0,
            frames=sum(len(turn.frames) for chunk in self._chunks for turn in chunk.turns),
        )

    # The thread

    def _job(self, job: Any) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="incident", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, _Kept):
                job.pack()
            elif callable(job):
                job()
            else:
                self._write(*job)

    def _write(self, about: Recording, turns: list[_Turn], wall: float) -> None:
        event: Event = {"event": "incident", "source": str(about.why.get("source", "")), "time": rfc3339(wall)}
        event["on"] = about.why.get("event")
        stamp = re.sub(r"[^0-9TZ]", "", rfc3339(wall))
        path = Path(self.options.folder) / f"{stamp}-{about.why['event']}-{about.why.get('id', '')[-12:]}{SUFFIX}"
        frames = [kept for turn in turns for kept in turn.frames]
        try:
            events = [each for turn in turns for each in turn.events]
            size = write_recording(path, about, _rounds(turns), events, (kept.pack() for kept in frames))
            self._counts["files"] += 1
            old = sorted(Path(self.options.folder).glob(f"*{SUFFIX}"))[: -self.options.most_files]
            for each in old:
                each.unlink(missing_ok=True)
            event |= {"file": str(path), "frames": len(frames), "seconds": about.seconds, "bytes": size}
        except OSError as error:
            self._counts["failed"] += 1
            event["reason"] = f"{self.options.folder}: {error.strerror}"
        self._done.put(event)


def _rounds(turns: list[_Turn]) -> list[Round]:
    found, before = [], 0
    for turn in turns:
        came = [{**each, "frame": before + each["frame"]} if "frame" in each else each for each in turn.came]
        before += len(turn.frames)
        monotonic, wall = turn.due or (0.0, 0.0)
        monotonic = monotonic if math.isfinite(monotonic) else -1.0  # JSON has no infinity
        found.append(Round(tuple(Came(**each) for each in came), monotonic, wall, len(turn.events)))
    return found


def _model(model: Any) -> Model:
    bundle, runner = model.bundle, getattr(model, "runner", None)
    backend = runner.name if runner is not None else "auto"
    return Model(str(bundle.path), bundle.digest, backend, runner.graph if runner is not None else bundle.graph)


def _state(step: Any) -> StepState:
    options = getattr(step, "options", None)
    known = hasattr(step, "state") and hasattr(step, "resume")
    return StepState(
        step.name,
        msgspec.to_builtins(options) if isinstance(options, msgspec.Struct) else None,
        step.state() if known else None,
        known,
    )


def _without_secrets(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {str(key): _without_secrets(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(each, name) for each in value]
    if isinstance(value, str):
        return "..." if _SECRET.search(name) else shown(without_secrets(value) if "://" in value else value)
    return value

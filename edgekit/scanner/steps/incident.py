"""Incidents: what came in the last seconds before one, in a file that `edgekit replay` runs again."""

from __future__ import annotations

import contextlib
import math
import queue
import re
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle import refuse_inside_bundle
from edgekit.scanner.codes import CodeReader
from edgekit.scanner.events import Event, encode, rfc3339
from edgekit.scanner.journal import Chunk, Kept, Turn, model_of, plain, recordable, rounds_of, state_of
from edgekit.scanner.reading import Reading
from edgekit.scanner.recording import MAX_PARTS, MAX_ROUNDS, MAX_TEXT, SUFFIX, Recording, write_recording
from edgekit.scanner.sources import Captured
from edgekit.version import __version__

from .answers import require, which

__all__ = ["IncidentOptions", "Incidents"]

_CHUNKS = 4  # of the wanted seconds: whole ones go, so that a file begins where the steps' state is known
_ROUND = 256  # bytes of a round, of what came in it and of a trigger, each beside its event, about
_PART = -(-MAX_TEXT // MAX_PARTS)  # bytes that a list or an object counts as, so that a bound on bytes is one on these
_FILES = 2  # that are written, or wait for it
_BACKLOG = 64  # frames that wait to be packed; beyond, they stay as they are


class IncidentOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``folder``: where files go. ``seconds`` before an event that is one of ``on`` (its ``event``; of a cross-check
    ``conflict`` and ``doubtful``); frames beyond ``most_megabytes``, in memory or in a file, are left out, the oldest first.
    No second file within ``cooldown_s``, nor while two are being written; of more than ``most_files`` the oldest is removed."""

    folder: str
    seconds: float = 10.0
    most_megabytes: float = 64.0
    on: tuple[str, ...] = ("no_read", "failed", "drift", "conflict")
    cooldown_s: float = 60.0
    most_files: int = 50

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder: where files go, for example /var/lib/edgekit/incidents")
        require(bool(self.on), "on: the events that make a file, for example no_read")
        require(0 < self.seconds <= 3600, f"seconds: above 0 and up to 3600, not {self.seconds:g}")
        require(0 < self.most_megabytes <= 1e6, f"most_megabytes: above 0 and up to 1000000, not {self.most_megabytes:g}")
        require(0 <= self.cooldown_s <= 1e9, f"cooldown_s: 0 or seconds, not {self.cooldown_s:g}")
        require(1 <= self.most_files <= 1_000_000, f"most_files: 1 to 1000000, not {self.most_files}")


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
        self._chunks: deque[Chunk] = deque()
        self._turn = Turn()
        self._written: deque[Path] | None = None
        self._number = 0  # of events sent
        self._why: Event | None = None
        self._on = ""
        self._quiet_until = -math.inf
        self._counts = {"files": 0, "cooled": 0, "busy": 0, "failed": 0}
        self._begun = self._finished = 0  # files: each counted by one thread
        self._done: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ending = False
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def watch(self, reading: Reading, steps: Sequence[Any] = (), config: Any = None) -> None:
        """What the scan reads with, its steps in order (this one left out), and its configuration; passwords are taken out."""
        self._reading, self._steps = reading, tuple(step for step in steps if step is not self)
        self._config = plain(msgspec.to_builtins(config))
        for step in self._steps:
            if hasattr(step, "listen"):
                step.listen(self._fired)

    # As a step

    def wants(self, captured: Captured) -> str:
        kept = self._opened().frames
        came = {"source": captured.source, "seq": captured.seq, "time": captured.time, "monotonic": captured.monotonic}
        frame = captured.frame
        if frame is not None and recordable(frame):
            came["frame"] = self._keep(kept, frame)
        self._turn.came.append({**came, "error": captured.error})
        self._chunks[-1].text += _ROUND
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        if captured.frame is None and captured.seq < 0:
            came = {"source": captured.source, "seq": -1, "time": captured.time, "monotonic": captured.monotonic}
            self._opened().came.append({**came, "kind": captured.error, "event": dict(event)})
            self._chunks[-1].text += _ROUND + _weight(encode(event))
            return [event]
        for came in self._turn.came:
            if came["seq"] == captured.seq and came["source"] == captured.source and "answer" not in came:
                came["answer"] = dict(event)
                self._chunks[-1].text += _weight(encode(event))
                break
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        self._opened().due = (monotonic, wall)
        if math.isinf(monotonic):
            self._ending = True
            self._finish()
        return [self._done.get() for _ in range(self._done.qsize())]

    # As a sink

    def send(self, event: Event) -> None:
        """An event as it left."""
        run_id, _, number = str(event.get("id", "")).rpartition("-")
        self._run_id = run_id
        self._number = int(number) + 1 if number.isdigit() else self._number + 1
        self._turn.events.append(line := encode(event))
        if self._chunks:
            self._chunks[-1].text += _weight(line)
        if self._why is None and (found := which(event, self.options.on)):
            self._why, self._on = event, found
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
        held = {
            "frames": sum(chunk.frames for chunk in self._chunks),
            "megabytes": round(sum(chunk.size() for chunk in self._chunks) / 1e6, 2),
        }
        return {"sink": self.name, "sent": self._number, **self._counts, **held}

    def close(self) -> None:
        self.flush()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join(2.0)

    def _opened(self) -> Turn:
        """The round that is going on; the one before ends with its `due`, and the events that left after it."""
        if self._turn.due is None:
            if not self._chunks:
                self._begin(0.0)
                self._add(self._turn)
            return self._turn
        self._finish()
        now = self._turn.due[0]
        self._turn = Turn()
        self._trim(now)
        self._add(self._turn)
        return self._turn

    def _add(self, turn: Turn) -> None:
        self._chunks[-1].turns.append(turn)
        self._chunks[-1].text += _ROUND

    def _begin(self, now: float) -> None:
        reading = self._reading
        models = (model_of(reading.model), model_of(reading.text)) if reading is not None else (None, None)
        chunk = Chunk((), [], models, self._number, now)
        self._chunks.append(chunk)
        chunk.states = tuple(state_of(step, lambda frame: self._keep(chunk.kept, frame)) for step in self._steps)
        self._bundle = self._running()

    def _keep(self, kept: list[Kept], frame: Any) -> int:
        one = Kept(frame, waits=self._jobs.qsize() < _BACKLOG)
        kept.append(one)
        self._chunks[-1].add(one)
        if one.waits:
            self._job(one)
        return len(kept) - 1

    def _fired(self, source: str | None, reference: str, at: float) -> None:
        turn = self._turn
        turn.fires.append((len(turn.came) if turn.due is None else -1, source, reference, at))
        if self._chunks:
            self._chunks[-1].text += _ROUND + len(reference)

    def _running(self) -> Any:
        return self._reading.model.bundle if self._reading is not None and self._reading.model is not None else None

    def _trim(self, now: float) -> None:
        """Begin a new chunk where the last is full, and forget what is too old or too much."""
        last, most = self._chunks[-1], self.options.most_megabytes * 1e6
        if last.begin == 0.0:
            last.begin = now
        if self._bundle is not self._running():
            self._chunks.clear()  # the frames before were read by another model
        elif (
            now - last.begin < self.options.seconds / _CHUNKS
            and last.size() < most / _CHUNKS
            and last.text < MAX_TEXT / 3 / _CHUNKS  # a file holds twice as many chunks, and each may end with something long
            and len(last.turns) < MAX_ROUNDS / 2 / _CHUNKS
        ):
            return
        self._begin(now)
        while len(self._chunks) > 2 and now - self._chunks[1].begin >= self.options.seconds:
            self._chunks.popleft()
        while len(self._chunks) > 2 and (len(self._chunks) > 2 * _CHUNKS or sum(chunk.size() for chunk in self._chunks) > most):
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
        if self._begun - self._finished >= _FILES:  # each holds its frames
            self._counts["busy"] += 1
            return
        self._begun += 1
        if math.isfinite(now):
            self._quiet_until = now + self.options.cooldown_s
        turns = [turn for chunk in self._chunks for turn in chunk.turns]
        self._job((self._about(why, now), self._on, self._chunks[0].kept, turns, self._turn.due[1]))

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
            model=first.models[0],
            text=first.models[1],
            codes=codes,
            formats=getattr(reading.codes, "formats", ()) if reading is not None else (),
            region=tuple(reading.region) if reading and reading.region is not None else None,  # type: ignore[arg-type]
            line=tuple(reading.line) if reading and reading.line is not None else None,  # type: ignore[arg-type]
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
            if isinstance(job, Kept):
                if not self._ending:  # a file packs what it needs
                    with contextlib.suppress(MemoryError):
                        job.pack()
            elif callable(job):
                job()
            else:
                try:
                    self._write(*job)
                finally:
                    self._finished += 1

    def _write(self, about: Recording, on: str, before: list[Kept], turns: list[Turn], wall: float) -> None:
        event: Event = {"event": "incident", "source": str(about.why.get("source", "")), "time": rfc3339(wall)}
        event["on"] = on
        stamp = re.sub(r"[^0-9TZ]", "", rfc3339(wall))
        path = Path(self.options.folder) / f"{stamp}-{re.sub(r'[^a-z0-9_]', '', on)}-{about.why.get('id', '')[-12:]}{SUFFIX}"
        frames = [*before, *(kept for turn in turns for kept in turn.frames)]
        try:
            rounds = rounds_of(turns, len(before))
            events = [each for turn, made in zip(turns, rounds, strict=True) for each in turn.events[: made.sent]]
            size = write_recording(path, about, rounds, events, (kept.pack() for kept in frames))
            self._counts["files"] += 1
            self._remove_oldest(path)
            event |= {"file": str(path), "frames": about.frames, "seconds": about.seconds, "bytes": size}
        except (OSError, MemoryError) as error:
            self._counts["failed"] += 1
            event["reason"] = f"{self.options.folder}: {getattr(error, 'strerror', None) or 'it does not fit into memory'}"
        self._done.put(event)

    def _remove_oldest(self, latest: Path) -> None:
        """By the order in which they were written: names begin with the wall clock's time, and that may go back."""
        if self._written is None:
            for left in latest.parent.glob(f".*{SUFFIX}.*"):  # what a killed scan was writing
                left.unlink(missing_ok=True)
            found = sorted(each for each in latest.parent.glob(f"*{SUFFIX}") if each != latest and not each.is_dir())
            self._written = deque(found)
        self._written.append(latest)
        while len(self._written) > self.options.most_files:
            self._written.popleft().unlink(missing_ok=True)


def _weight(line: bytes) -> int:
    """Of JSON, towards the text that a file may hold."""
    return max(len(line), _PART * (line.count(b"[") + line.count(b"{")))

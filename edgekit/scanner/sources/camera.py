"""`Camera`: one camera, stream or video file, read by a process of its own that is watched and started again."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np

from edgekit.children import calling, start

from . import Captured, Notice
from .address import LIVE, PATTERN, kind_of, shown
from .gaps import Backoff, GapWatch
from .intake import Intake, Waiting
from .options import CameraOptions
from .slots import Link, Slots

__all__ = ["Camera"]

#: Whoever waits for a camera hears within 3 s that it is not there.
TELL_S = 2.5
#: Python's own start, which takes long on a busy machine.
_START_S = 10.0
_GOODBYE_S = 0.3
_LOOK_S = 0.2


class Ending(NamedTuple):
    """Why an attempt ended: "" at the source's own end; ``final`` where another one would find the same."""

    reason: str
    final: bool = False


class _Clock:
    """Monotonic seconds of what a process said last; it has connected once there is a ``picture``."""

    def __init__(self, begun: float) -> None:
        self.now = self.begun = self.sign = begun
        self.ready = begun + _START_S
        self.picture: float | None = None

    def heard(self, message: dict[str, Any]) -> None:
        self.sign = self.now
        if "ready" in message:
            self.ready = self.now
        elif "frame" in message or (message.get("beat") and self.picture is not None):  # a true beat: it waits on purpose
            self.picture = self.now


class Camera:
    """``came`` is called when something can be taken. Start it, take from it, close it; each from any thread."""

    def __init__(
        self,
        spec: str,
        name: str = "",
        options: CameraOptions | None = None,
        came: Callable[[], None] = lambda: None,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.spec, self.name, self.options = spec, name or shown(spec), options or CameraOptions()
        self._kind = kind_of(spec)
        found = PATTERN.match(spec)
        #: One that is tried again when it ends; others are at their end then.
        self.live = self._kind in LIVE or self.options.loop or bool(found and not found[4])
        paced = self._kind in LIVE or bool(found and float(found[3])) or self.options.paced
        self._waits = (self.options.queue or ("newest" if paced else "wait")) == "wait"
        self.intake = Intake(self.options.depth, came)
        self.ended = False
        self.state, self.reason = "connecting", ""
        self._came, self._wall = came, wall
        self._leave = threading.Event()
        self._backoff = Backoff(self.options.retry_s, self.options.retry_most_s, random.random)
        self._gaps = GapWatch()
        self._attempts = self._seq = self._damaged = 0
        self._refused = self._refused_told = 0
        self._size = (0, 0)
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name=f"camera {self.name}"[:60], daemon=True)

    def begin_at(self, seq: int) -> None:
        """The first frame's number; before it starts."""
        self._seq = seq

    def start(self) -> None:
        self._thread.start()

    def take(self, frames_only: bool = False) -> Captured | Notice | None:
        """The next item; a frame is copied out of the shared memory: it stays as it is."""
        item = self.intake.take(frames_only)
        if not isinstance(item, Waiting):
            return item
        try:
            frame, error = item.take(), ""
        except MemoryError:
            frame, error = None, "the frame does not fit into memory"
        item.leave()
        return Captured(frame, self.name, item.seq, item.time, error, item.monotonic)

    def counts(self) -> dict[str, Any]:
        """The row of `Counting.counts`, with the state of the camera."""
        process = self._process
        return {
            "source": self.name,
            "state": self.state,
            "reason": self.reason,
            "queue": "wait" if self._waits else "newest",
            **self.intake.counts(),
            "refused_packets": self._refused,
            "attempts": self._attempts,
            "pid": process.pid if process else None,
            "width": self._size[1],
            "height": self._size[0],
            "fps": round(self._gaps.rate, 2),
        }

    def leave(self, reason: str) -> None:
        """Begin to end it: what waits is dropped with ``reason``."""
        self._leave.set()
        self.intake.close(reason)

    def join(self, seconds: float = 2.0) -> None:
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while not self._leave.is_set():
            ending = self._attempt()
            if self._leave.is_set():
                break
            if not self.live:
                if ending.reason:
                    self._down(ending.reason)
                else:
                    self._tell_damaged()
                    self.state = "ended"
                break
            self._down(ending.reason or "the stream ended")
            pause = self._backoff.pause(time.monotonic())
            self._leave.wait(max(pause, self.options.retry_most_s) if ending.final else pause)
        self.ended = True
        self._came()

    def _attempt(self) -> Ending:
        """One process, from its start to its end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link = Link(ours)
        self._attempts += 1
        try:
            with theirs:
                self._process = start(calling("edgekit.scanner.sources.child"), theirs, os.getpid())
            ending = self._listen(link)
        except OSError as error:  # no process, no memory, or the process went as it was spoken to
            ending = Ending(f"its process cannot be used: {error.strerror or error}")
        except ValueError as error:
            ending = Ending(f"its process broke down: {error}")
        except Exception as error:  # noqa: BLE001  no memory, a mistake of ours: this thread ends, and nobody hears of the camera
            ending = Ending(f"it broke down: {type(error).__name__} {error}".rstrip())
        finally:
            self._end_process()
            link.close()
        return ending

    def _listen(self, link: Link) -> Ending:
        """What the process says, until it ends, hangs, or is to go."""
        options, places = self.options, self.options.depth + (0 if self._waits else 2)
        spec = os.fsencode(os.path.abspath(self.spec) if self._kind == "video" else self.spec).hex()
        link.send({"spec": spec, "options": msgspec.to_builtins(options), "places": places, "wait": self._waits})
        clock = _Clock(time.monotonic())
        memory: Slots | None = None
        while not self._leave.is_set():
            ready = select.select([link.socket], [], [], _LOOK_S)[0]
            clock.now = time.monotonic()
            if ready:
                received = link.receive()
                if received is None:
                    return Ending(self._exit_words())
                message, fds = received
                self._lost(message)
                if "end" in message:
                    return Ending(message["end"], message["final"])
                clock.heard(message)
                if fds:
                    memory = Slots(fds[0], *message["memory"])
                elif "frame" in message and memory is not None:
                    self._frame(link, memory, message["frame"])
            if hung := self._hung(clock):
                return Ending(hung)
        return Ending("")

    def _hung(self, clock: _Clock) -> str:
        """Why the process must go, "" where it is well. One that has not connected yet is told of in time."""
        options, now = self.options, clock.now
        if clock.picture is None:
            if now - clock.ready > options.open_s + 1:
                return f"no picture within {options.open_s:g} s: is it switched on, and is the address right?"
            if self.live and now - clock.begun > TELL_S and self.state == "connecting":
                self._down("no picture yet, still connecting")
            return ""
        if now - clock.sign > options.stall_s:
            return f"no picture for {options.stall_s:g} s"
        if now - clock.picture > max(options.open_s, options.stall_s):
            return f"data, but no picture for {max(options.open_s, options.stall_s):g} s"
        return ""

    def _frame(self, link: Link, memory: Slots, about: list[Any]) -> None:
        slot, generation, height, width, monotonic, at = about
        pixels = memory.view(slot, height, width)
        self._up(height, width, monotonic)
        gap = self._gaps.seen(monotonic, at, self._waits)
        if gap:
            self._gap(monotonic, {"seconds": round(gap, 3), "reason": "no picture came"})
        wall = self._wall() - (time.monotonic() - monotonic)

        def leave() -> None:
            try:
                link.send({"free": [generation, slot]})
            except OSError:
                return  # the process is gone, its place with it

        seq, self._seq = self._seq, self._seq + 1
        self.intake.put(Waiting(seq, wall, monotonic, lambda: np.array(pixels), leave))

    def _lost(self, message: dict[str, Any]) -> None:
        for reason, count in message.get("lost", {}).items():
            self.intake.lost(reason, count)
            self._seq += count
            self._gaps.skipped()
            if reason == "damaged":
                self._damaged += count
        if refused := message.get("refused", 0):
            self._refused += refused
            self._gaps.skipped()

    def _up(self, height: int, width: int, monotonic: float) -> None:
        """Before a frame: the state, the size, and what is missing since the one before."""
        if self.state == "up" and self._size == (height, width):
            self._tell_damaged()
            return
        was, size = self.state, self._size
        self.state, self.reason, self._size = "up", "", (height, width)
        details = {"state": "up", "width": width, "height": height}
        if was != "up":
            self._backoff.up(monotonic)
            if self.live:
                self._say("camera", monotonic, details)
            if self._gaps.last is not None:
                self._gap(monotonic, {"seconds": round(monotonic - self._gaps.last, 3), "reason": "reconnected"})
            self._gaps.restart()
        elif size != (height, width):
            self._say("camera", monotonic, {**details, "reason": f"its pictures were {size[1]} x {size[0]}"})
        self._tell_damaged()

    def _tell_damaged(self) -> None:
        if self._damaged:
            self._gap(time.monotonic(), {"frames": self._damaged, "reason": "damaged"})
            self._damaged = 0
        if refused := self._refused - self._refused_told:
            self._gap(time.monotonic(), {"packets": refused, "reason": "not decodable"})
            self._refused_told = self._refused

    def _down(self, reason: str) -> None:
        """Said once, and again where the reason is another one."""
        self._tell_damaged()
        if (self.state, self.reason) != ("down", reason):
            self.state, self.reason = "down", reason
            self._say("camera", time.monotonic(), {"state": "down", "reason": reason})

    def _gap(self, monotonic: float, details: dict[str, Any]) -> None:
        self._say("gap", monotonic, details)

    def _say(self, kind: str, monotonic: float, details: dict[str, Any]) -> None:
        self.intake.say(Notice(kind, self.name, self._wall() - (time.monotonic() - monotonic), monotonic, details))

    def _exit_words(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(_GOODBYE_S)
        except subprocess.TimeoutExpired:
            return "its process closed the connection"
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"

    def _end_process(self) -> None:
        """Ask, so that a camera hears goodbye; then kill, with what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GOODBYE_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

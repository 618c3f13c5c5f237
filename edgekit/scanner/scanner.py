"""`Scanner`: a whole scan as an object, for the command line and for applications on the device."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.errors import UsageError
from edgekit.progress import say

from .assembly import Parts, assemble
from .board import Board
from .config import ScanConfig, SourceOptions, config_of
from .events import Event
from .health import Health
from .kpis import Tally
from .logs import Life, LogOptions, logging
from .pipeline import Pipeline, Summary
from .preview import Preview
from .reading import Answer
from .server import StatusServer
from .sources import Captured
from .steps import Step
from .steps.triggers import Trigger
from .stop import Stop
from .systemd import Systemd

if TYPE_CHECKING:
    from .sources.cameras import Cameras

__all__ = ["Scanner"]

#: Events kept for whoever looks.
RECENT = 20
#: Between two status lines for systemd.
STATUS_S = 10.0
#: For the sinks of a source that has ended.
FINISH_S = 600


class Scanner:
    """All that a `ScanConfig` (or its tables in a dict, or the path of its TOML file) says, once.

    ``run()`` scans to the end of the source or until `stop`; ``for event in Scanner(config)`` and ``async for`` give each event
    once every sink has taken it, and leaving the loop stops the scan in order. ``on_event`` hears each event too. ``frames``:
    arrays of the application's own, uint8 (H, W) or (H, W, 3) RGB, in place of the config's sources.

    **Threads.** All about a frame happens in the thread that runs the scan: the caller's, with ``async for`` one of its own. A
    consumer that is slow holds the scan up; its cameras then drop frames by their queue's policy, and count them. Beside it
    there is one that says where that one hangs, one a network sink, a jsonl: sink that syncs, a trigger input and a camera, one
    each for [ring], [incidents], [harvest] and [shadow], and with [server] one, and one a connection (16 at the most). `stop`
    and `status` may be called from any thread; SIGTERM is the caller's (`stop_on_signals`). All have ended when the scan has,
    but for a delivery that a receiver does not answer: it is left behind.

    **Processes.** Each camera, stream and video file is a process of its own, so that a read that hangs can be ended.

    **Memory.** Some 70 MB with codes, 110 MB with a small model as well, 50 MB a camera's process (Python and numpy are 40 of
    each); ``depth`` + 2 frames a camera in shared memory; latencies of the last 65,536 frames (0.5 MB). What grows with time
    is on disk, and bounded.

    Raises `UsageError` for a config that cannot be; opening happens where the scan starts and raises what `scan` raises.
    """

    def __init__(
        self,
        config: ScanConfig | Mapping[str, Any] | str,
        *,
        on_event: Callable[[Event], None] | None = None,
        frames: Iterable[Any] | None = None,
        stop: Stop | None = None,
    ) -> None:
        self.config = config_of(config, sourced=frames is None)
        if frames is None and not self.config.source:
            raise UsageError("there is no source", "add [[source]] with an address, or give frames=")
        self.summary: Summary | None = None
        self.url = ""  #: of the server, once it runs
        self._board = Board()
        self._steps: list[Step] = []
        self._on_event, self._frames, self._stop = on_event, frames, stop or Stop()
        self._recent: deque[Event] = deque(maxlen=RECENT)
        self._systemd = Systemd()
        self._tell = 0.0
        self._cameras: object = None

    def run(self) -> Summary:
        """Scan; returns the figures. Raises `OSError` or `EdgekitError` where a sink cannot take an event."""
        for _ in self:
            pass
        assert self.summary is not None
        return self.summary

    def stop(self) -> None:
        """End after the frame in hand; from any thread or signal handler."""
        self._stop.set()

    def fire(self, source: str | None = None, reference: str = "") -> bool:
        """Trigger a camera, or all, as [trigger] says; from any thread. ``reference`` comes back in the event. False where the
        scan does not run, has no such camera, no [trigger] that waits for one, or too many wait already."""
        fires = [step.fire for step in self._steps if isinstance(step, Trigger)]
        return bool(fires) and min(fire(source, reference) for fire in fires)

    def add(self, source: SourceOptions | Mapping[str, Any] | str) -> str:
        """Another camera, stream or video file while the scan runs: an address, or what a [[source]] says. Returns its name.

        From any thread. Raises `UsageError`, also where the scan does not run or reads no cameras; `DataError`, `MissingExtra`.
        """
        if not isinstance(source, SourceOptions):
            table = {"address": source} if isinstance(source, str) else source
            try:
                source = msgspec.convert(table, SourceOptions)
            except msgspec.ValidationError as error:
                raise UsageError(f"this is no source: {error}", 'give an address, or {"address": ..., "name": ...}') from None
        return self._running_cameras().add(source.address, source.name, source.camera())

    def remove(self, name: str) -> None:
        """End a camera while the scan runs; its waiting frames are dropped, reason ``removed``.

        The scan ends with the last one. From any thread. Raises `UsageError` for an unknown name, and as `add` does.
        """
        self._running_cameras().remove(name)

    def _running_cameras(self) -> Cameras:
        from .sources.cameras import Cameras

        if not isinstance(self._cameras, Cameras):
            raise UsageError(
                "there are no cameras in this scan, or it does not run", "start it with one: pattern:, camera:, rtsp:"
            )
        return self._cameras

    def status(self) -> dict[str, Any]:
        """``state`` (starting, running, stopping), ``ready``, the ``reasons`` why not, ``silent_s`` since the loop went round;
        once it runs also `Summary`'s figures of now, ``latencies``, and ``recent`` events. From any thread."""
        figures = self._board.figures()
        reasons = self._board.readiness(figures)
        silent = round(self._board.silent_s(), 3)
        return {"state": self._board.state, "ready": not reasons, "reasons": reasons, "silent_s": silent, **figures}

    def __iter__(self) -> Generator[Event, None, None]:
        with contextlib.ExitStack() as stack:
            if self.config.log != LogOptions():
                stack.enter_context(logging(self.config.log))
            life = stack.enter_context(Life(self.config.log))
            tally, preview = Tally(), self._serve(stack)
            health = stack.enter_context(Health(self.config, self._stop))
            parts = assemble(self.config, stack, self._stop, self._frames)
            health.loaded(parts)
            if health.told:
                parts.steps.insert(0, health)
            self._steps = parts.steps
            stack.callback(setattr, self, "_steps", [])

            def answered(captured: Captured, answer: Answer | None) -> None:
                tally.see(captured, answer)
                health.hear(answer)
                if preview is not None:
                    preview.show(captured, answer)

            def heard(event: Event) -> None:
                life.hear(event)
                if preview is not None and event.get("event") == "camera" and event["state"] == "removed":
                    preview.forget(str(event["source"]))
                self._heard(event)

            self._cameras = parts.source
            stack.callback(lambda: setattr(self, "_cameras", None))
            pipeline = Pipeline(
                source=parts.source,
                reading=parts.reading,
                steps=parts.steps,
                sinks=parts.sinks,
                batch=parts.batch,
                stop=self._stop,
                on_event=heard,
                on_round=lambda monotonic: self._round(pipeline, life, health, monotonic),
                on_answer=answered,
                on_last=self._finish,
            )
            if preview is not None:
                preview.by_source = hasattr(parts.source, "counts")
            life.ready(self.config, parts.model, [sink.name for sink in parts.sinks])
            try:
                yield from self._running(pipeline, parts, tally)
            finally:
                if self.summary is not None:
                    life.ended(self.summary)

    async def __aiter__(self) -> AsyncIterator[Event]:
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        loop, events = asyncio.get_running_loop(), iter(self)
        thread = ThreadPoolExecutor(1, "scan")  # one: a model belongs to a thread
        try:
            while (event := await loop.run_in_executor(thread, next, events, None)) is not None:
                yield event
        finally:
            self.stop()
            await asyncio.shield(loop.run_in_executor(thread, events.close))
            thread.shutdown(wait=False)

    def _serve(self, stack: contextlib.ExitStack) -> Preview | None:
        options = self.config.server
        if options is None:
            return None
        region = self.config.region
        preview = Preview(region.region() if region else None) if options.preview else None
        server = StatusServer(options, self._board, preview)
        stack.callback(server.close)
        self.url = server.url
        say(f"{server.url}" + (" shows the newest frames" if preview else "metrics"), url=server.url)
        return preview

    def _running(self, pipeline: Pipeline, parts: Parts, tally: Tally) -> Generator[Event, None, None]:
        def summary() -> Summary:
            found = pipeline.summary()
            return replace(found, model=parts.running_model(), kpis=tally.figures(found.steps))

        def figures() -> dict[str, Any]:
            more = {"latencies": pipeline.latencies(), "cameras": tally.cameras(), "recent": list(self._recent)}
            return {**summary().figures(), **more}

        self._board.start(figures, parts.reasons)
        self._systemd.send("READY=1", "STATUS=scanning")
        well = True
        try:
            with self._board.watched(), contextlib.closing(pipeline.stream()) as stream:
                for event in stream:
                    with self._board.resting():
                        yield event
        except Exception:
            well = False  # what failed may not give its figures either
            raise
        finally:
            self._systemd.send("STOPPING=1")
            self._board.stop(well)
            if well:
                self.summary = summary()

    def _heard(self, event: Event) -> None:
        self._recent.append(event)
        if self._on_event:
            self._on_event(event)

    def _finish(self) -> None:
        """No pings come while sinks are flushed: systemd is told to wait for the end, and longer than for a stop."""
        self._board.finish()
        self._systemd.send("STOPPING=1", *([] if self._stop.is_set() else [f"EXTEND_TIMEOUT_USEC={FINISH_S * 10**6}"]))

    def _round(self, pipeline: Pipeline, life: Life, health: Health, monotonic: float) -> None:
        self._board.round(monotonic)
        health.round(monotonic)
        self._systemd.round(monotonic)
        if self._stop.is_set():
            self._systemd.send("STOPPING=1")
            life.stopping(self._stop.signal)
        elif self._systemd.active and monotonic >= self._tell:
            self._tell = monotonic + STATUS_S
            self._systemd.send(f"STATUS={pipeline.summary().line()}")

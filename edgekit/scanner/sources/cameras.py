"""`Cameras`: several cameras, streams and video files at once, as one source."""

from __future__ import annotations

import importlib.util
import os
import shlex
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgekit.errors import DataError, MissingExtra, UsageError
from edgekit.files import printable
from edgekit.scanner.stop import Stop

from . import SOURCES, Captured, Notice
from .address import LIVE, PATTERN, kind_of, shown
from .camera import Camera
from .options import CameraOptions

__all__ = ["FORMER", "IDLE_S", "Cameras", "open_camera"]

#: Where nothing comes the iterator gives None this often.
IDLE_S = 0.25
#: Rows of removed cameras in `counts`; older ones are added up in one.
FORMER = 32
#: Names of removed cameras whose numbers go on where they are added again.
NAMES = 10_000
_LONGEST_SPEC = 2048
_NETWORK = LIVE - {"camera", "v4l2", "gst"}


def open_camera(target: str, watch: bool, stop: Stop, options: CameraOptions | None = None) -> Cameras:
    """One camera, stream or video file. Raises `UsageError`, `DataError`, `MissingExtra`."""
    if watch:
        raise UsageError(f"--watch wants a folder, not {shown(target)}", "leave --watch out")
    return Cameras([target], options, stop)


class Cameras:
    """``specs``: addresses, or name -> address; ``options`` for all of them, or name -> options.

    An iterator of `Captured`, `Notice` and, at least four times a second, None. Cameras take turns, frame by frame. It ends
    once all of them have (video files do), or ``stop`` is set. Their processes start with the first
    item asked for; `close` ends them. Iterate in one thread. Raises `UsageError`, `DataError`, `MissingExtra`; so does the
    iterator where the only source is a file that cannot be read.
    """

    def __init__(
        self,
        specs: Sequence[str] | Mapping[str, str],
        options: CameraOptions | Mapping[str, CameraOptions] | None = None,
        stop: Stop | None = None,
    ) -> None:
        self._stop = stop or Stop()
        self._options = options if isinstance(options, CameraOptions) else None
        self._something = threading.Condition()
        self._cameras: dict[str, Camera] = {}
        self._former: list[dict[str, Any]] = []
        self._numbers: dict[str, int] = {}  # frames that the removed ones gave, by name
        self._leaving: list[Camera] = []
        self._notices: deque[Notice] = deque()
        self._turn = 0
        self._started = self._closed = False
        own = options if isinstance(options, Mapping) else {}
        named = list(specs.items()) if isinstance(specs, Mapping) else [("", spec) for spec in specs]
        if unknown := set(own) - {name or shown(spec) for name, spec in named}:
            raise UsageError(f"there are options for {min(unknown)}, which is no source", "name the sources as the options do")
        for name, spec in named:
            self.add(spec, name, own.get(name or shown(spec)))

    def __iter__(self) -> Iterator[Captured | Notice | None]:
        return self

    def __next__(self) -> Captured | Notice | None:
        end = time.monotonic() + IDLE_S
        with self._something:
            self._start()
            while not self._closed and not self._stop.is_set():
                ended = all(camera.ended for camera in self._cameras.values())
                if (item := self._taken(frames_only=False)) is not None:
                    return item
                if ended:
                    break
                left = end - time.monotonic()
                if left <= 0:
                    return None
                self._something.wait(left)
        self._refuse_unreadable()
        raise StopIteration

    def add(self, spec: str, name: str = "", options: CameraOptions | None = None) -> str:
        """From any thread, also while it runs; returns the camera's name. Raises `UsageError`, `DataError`, `MissingExtra`."""
        _check(spec)
        camera = Camera(spec, name, options or self._options, self._came)
        with self._something:
            while any(each.name == camera.name for each in self._leaving) and not self._closed:
                self._something.wait(IDLE_S)  # its last number is not known yet
            if camera.name in self._cameras:
                raise UsageError(f"there are two sources {camera.name}", "give each a name of its own")
            if self._closed:
                raise UsageError("these cameras are closed", "open others")
            self._cameras[camera.name] = camera
            camera.begin_at(self._numbers.get(camera.name, 0))  # a number of a frame is its own in a scan
            if self._started:
                camera.start()
        return camera.name

    def remove(self, name: str) -> None:
        """From any thread; its waiting frames are dropped, reason ``removed``. Raises `UsageError` for an unknown name."""
        with self._something:
            camera = self._cameras.pop(name, None)
            if camera is None:
                raise UsageError(f"there is no source {name}", f"there are {', '.join(self._cameras) or 'none'}")
            self._leaving.append(camera)
            camera.leave("removed")
        camera.join()
        with self._something:
            self._leaving.remove(camera)
            row = camera.counts()
            self._former.append({**row, "state": "removed", "reason": ""})
            self._numbers[name] = self._numbers.pop(name, 0) + row["captured"]
            if len(self._numbers) > NAMES:
                del self._numbers[next(iter(self._numbers))]
            if len(self._former) > FORMER:
                self._former[:2] = [_added_up(*self._former[:2], name="removed cameras")]
            self._notices.append(Notice("camera", name, time.time(), time.monotonic(), {"state": "removed"}))
            self._something.notify_all()

    def more(self, count: int) -> list[Captured]:
        """Up to ``count`` frames that wait already; a camera with a notice before its next frame is left out."""
        found: list[Captured] = []
        with self._something:
            while len(found) < count and isinstance(item := self._taken(frames_only=True), Captured):
                found.append(item)
        return found

    def counts(self) -> list[dict[str, Any]]:
        """As `Counting.counts`, a row a camera, those that ended or were removed too; with ``state``, ``reason`` and more."""
        with self._something:
            rows: dict[str, dict[str, Any]] = {}
            for row in [*self._former, *(camera.counts() for camera in (*self._leaving, *self._cameras.values()))]:
                name = row["source"]  # one that was removed and added again is one camera
                rows[name] = _added_up(rows[name], row, name=name, pid=row["pid"]) if name in rows else dict(row)
            return list(rows.values())

    def close(self) -> None:
        """End every camera's process; frames that wait are dropped, reason ``stopped``."""
        with self._something:
            self._closed = True
            cameras = list(self._cameras.values())
            for camera in cameras:
                camera.leave("stopped")
            self._something.notify_all()
        for camera in cameras:
            camera.join()

    def __enter__(self) -> Cameras:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()

    def _came(self) -> None:
        with self._something:
            self._something.notify_all()

    def _start(self) -> None:
        if not self._started and not self._closed:
            self._started = True
            for camera in self._cameras.values():
                camera.start()

    def _taken(self, frames_only: bool) -> Captured | Notice | None:
        """From the camera whose turn it is, or the next one that has something."""
        if self._notices:
            return None if frames_only else self._notices.popleft()
        cameras = list(self._cameras.values())
        for step in range(len(cameras)):
            camera = cameras[(self._turn + step) % len(cameras)]
            if (item := camera.take(frames_only)) is not None:
                self._turn = (self._turn + step + 1) % len(cameras)
                return item
        return None

    def _refuse_unreadable(self) -> None:
        if len(self._cameras) == 1 and not self._former and not self._closed and not self._stop.is_set():
            (camera,) = self._cameras.values()
            if not camera.live and camera.state == "down" and not camera.intake.counts()["captured"]:
                cause, _, cure = camera.reason.partition(": ")
                raise DataError(f"{camera.name}: {cause}", cure or "play it with another program to see what it is")


def _check(spec: str) -> None:
    """Whether there can be such a camera, before its process starts."""
    kind = kind_of(spec)
    if spec and not kind and os.path.exists(spec):
        raise UsageError(f"{shown(spec)} cannot be one of several sources", "scan images and folders on their own")
    if not spec or kind not in SOURCES or not kind:
        raise UsageError(f"{shown(spec) or 'an empty address'} is no camera, stream or video file", "see edgekit scan --help")
    if len(spec) > _LONGEST_SPEC:
        raise UsageError(f"an address of {len(spec)} characters is too long", f"{_LONGEST_SPEC} are the most")
    if kind == "pattern" and not PATTERN.match(spec):
        raise UsageError(f"{spec} is no test picture", "write pattern:WIDTHxHEIGHT@FPS, for example pattern:640x480@30")
    if kind == "camera" and not spec.partition(":")[2].isdecimal():
        raise UsageError(f"{spec} names no camera", "write camera:0 for /dev/video0")
    if kind == "v4l2" and not spec.partition(":")[2]:
        raise UsageError(f"{spec} names no device", "write v4l2:/dev/video0")
    if kind in _NETWORK:
        _check_url(kind, spec)
    if kind == "video" and not os.path.isfile(spec):
        raise DataError(f"there is no video file at {printable(spec)}", "check --source")
    if kind == "gst":
        _check_pipeline(spec.partition(":")[2])
    module = {"pattern": "", "camera": "cv2", "v4l2": "cv2"}.get(kind, "av")
    if module and importlib.util.find_spec(module) is None:
        raise MissingExtra("camera" if module == "cv2" else "video", module)


def _check_url(kind: str, spec: str) -> None:
    try:
        url = urllib.parse.urlsplit(spec)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise UsageError(f"{shown(spec)} is no address: {error}", f"write {kind}://HOST:PORT/...") from None
    datagrams = kind in ("udp", "rtp")  # from anywhere
    if not (host or datagrams) or not (port or kind in ("rtsp", "rtsps", "http", "https")):
        raise UsageError(
            f"{shown(spec)} names no {'host' if not (host or datagrams) else 'port'}", f"write {kind}://HOST:PORT/..."
        )


def _check_pipeline(pipeline: str) -> None:
    try:
        words = shlex.split(pipeline)
    except ValueError as error:
        raise UsageError(f"the pipeline cannot be split into words: {error}", "close the quotation marks in it") from None
    if not words:
        raise UsageError("the pipeline is empty", "write gst:PIPELINE, without a sink at its end")


def _added_up(one: dict[str, Any], other: dict[str, Any], *, name: str, pid: int | None = None) -> dict[str, Any]:
    dropped = {
        reason: one["dropped"].get(reason, 0) + other["dropped"].get(reason, 0) for reason in one["dropped"] | other["dropped"]
    }
    growing = ("captured", "given", "in_flight", "notices_dropped", "refused_packets", "attempts")
    summed = {key: one[key] + other[key] for key in growing}
    return {**other, "source": name, "pid": pid, **summed, "dropped": dropped}

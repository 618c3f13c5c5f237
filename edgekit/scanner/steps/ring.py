"""The ring: the last frames that matter, as PNG, each beside the JSON of its event."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import re
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edgekit.errors import InputError, MissingExtra
from edgekit.files import printable
from edgekit.preprocess import Frame, canonical_frame
from edgekit.progress import say
from edgekit.scanner.events import Event, encode
from edgekit.scanner.sources import Captured

from .answers import good, require

__all__ = ["Ring", "RingOptions"]

_NAME = re.compile(r"^(\d{9,})-(?:[0-9a-f]{8}-)?(no-read|good)\.(png|json)$")
_TEMPORARY = ".being-written."
_BACKLOG = 8  # frames that wait to be written


class RingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``keep``: frames without a good read, those with one, or both. The oldest go beyond ``most_frames`` or ``most_megabytes``
    (of 1,000,000 bytes, frames and events together)."""

    folder: str
    keep: Literal["no-read", "good", "both"] = "no-read"
    most_frames: int = 500
    most_megabytes: float = 500.0
    good_score: float = 0.5

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder: where frames are kept, for example /var/lib/edgekit/frames")
        require(self.keep in ("no-read", "good", "both"), f"keep: no-read, good or both, not {self.keep!r}")
        require(1 <= self.most_frames <= 1_000_000, f"most_frames: 1 to 1000000, not {self.most_frames}")
        require(0 < self.most_megabytes <= 1e7, f"most_megabytes: above 0 and up to 10000000, not {self.most_megabytes:g}")
        require(0 <= self.good_score <= 1, f"good_score: 0 to 1, not {self.good_score:g}")


class Ring:
    """Keeps frames; their events say under which name (``kept``). What cannot be written (``failed``, ``too_large``) is
    counted, and said once; then there is no file of that name.

    A thread of its own writes them; what comes faster than it can is counted (``busy``) and not kept. A pair is written to
    temporary names, then renamed, the JSON last. ``picture`` gives the frame of an event that does
    not come with its own (`Trigger.picture`). Raises `MissingExtra` without Pillow, `OSError` where the folder cannot be
    made or listed.
    """

    name = "ring"

    def __init__(self, options: RingOptions, picture: Callable[[Event], Frame | None] = lambda event: None) -> None:
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise MissingExtra("scan", "PIL") from None
        self.options, self._picture = options, picture
        self._folder = Path(options.folder)
        self._limit = int(options.most_megabytes * 1e6)
        self._kept: deque[tuple[str, int]] = deque()  # stem, bytes; the oldest first
        self._bytes = self._number = 0
        self._run = os.urandom(4).hex()  # a name that an event was given and no file got is never another frame's
        self._said = False
        self._counts = {"written": 0, "removed": 0, "failed": 0, "too_large": 0, "busy": 0}
        self._jobs: queue.Queue[tuple[str, Frame, Event] | Callable[[], None] | None] = queue.Queue(_BACKLOG)
        self._thread: threading.Thread | None = None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._take_stock()

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        kind = self._kind(event)
        if kind == "" or self.options.keep not in (kind, "both"):
            return [event]
        own = captured.frame is not None and (captured.source, captured.seq) == (event["source"], event["seq"])
        frame = captured.frame if own else self._picture(event)
        if frame is None:
            return [event]
        stem = f"{self._number:09d}-{self._run}-{kind}"
        kept = {**event, "kept": f"{stem}.png"}
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="ring", daemon=True)
            self._thread.start()
        try:
            self._jobs.put_nowait((stem, frame, kept))
        except queue.Full:
            self._counts["busy"] += 1
            return [event]
        self._number += 1
        return [kept]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        return []

    def status(self) -> dict[str, Any]:
        return {**self._counts, "frames": len(self._kept), "bytes": self._bytes}

    def flush(self, patience_s: float = 1.0) -> None:
        """Wait until what was taken is on disk."""
        done = threading.Event()
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._jobs.put(done.set, timeout=patience_s)
                done.wait(patience_s)

    def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(queue.Full):
                self._jobs.put(None, timeout=1.0)
                thread.join(1.0)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if callable(job):
                job()
                continue
            try:
                self._keep(*job)
            except (OSError, InputError) as error:
                self._counts["failed"] += 1
                if not self._said:
                    reason = getattr(error, "strerror", None) or str(error)
                    say(f"no frame can be kept in {printable(self._folder)} ({reason}); the scan goes on", "warning")
                self._said = True

    def _kind(self, event: Event) -> str:
        """``no-read``, ``good``, or "" where the event is not of a frame that was read."""
        if event.get("event") == "no_read":
            return "no-read"
        if "event" in event or not {"codes", "label", "text"} & event.keys():
            return ""
        return "good" if event.get("duplicates") or good(event, self.options.good_score) else "no-read"

    def _keep(self, stem: str, frame: Frame, event: Event) -> None:
        files = {".png": _png(frame), ".json": encode(event) + b"\n"}
        size = sum(map(len, files.values()))
        if size > self._limit:
            self._counts["too_large"] += 1
            return
        self._make_room(1, size)
        written: list[Path] = []
        try:
            for suffix, data in files.items():
                written.append(self._folder / f"{_TEMPORARY}{stem}{suffix}")
                written[-1].write_bytes(data)
            for suffix, temporary in zip(files, list(written), strict=True):
                final = self._folder / f"{stem}{suffix}"
                os.replace(temporary, final)
                written.append(final)
        except OSError:
            for path in written:  # half a pair is none
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        self._kept.append((stem, size))
        self._bytes += size
        self._counts["written"] += 1
        self._said = False

    def _make_room(self, frames: int, size: int) -> None:
        """Remove the oldest until so many more fit. Raises `OSError` where a file cannot be removed."""
        while self._kept and (len(self._kept) + frames > self.options.most_frames or self._bytes + size > self._limit):
            stem, freed = self._kept[0]
            for suffix in (".json", ".png"):  # the JSON first: without it a picture is none of the ring's
                (self._folder / f"{stem}{suffix}").unlink(missing_ok=True)
            self._kept.popleft()
            self._bytes -= freed
            self._counts["removed"] += 1

    def _take_stock(self) -> None:
        """What an earlier scan left: whole pairs stay, halves and temporary files go."""
        found: dict[str, dict[str, int]] = {}
        for entry in os.scandir(self._folder):
            if entry.name.startswith(_TEMPORARY):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
            elif _NAME.match(entry.name):
                stem, _, suffix = entry.name.rpartition(".")
                with contextlib.suppress(OSError):
                    found.setdefault(stem, {})[suffix] = entry.stat().st_size
        for stem in sorted(found, key=lambda stem: (int(stem.split("-")[0]), stem)):
            self._number = int(stem.split("-")[0]) + 1
            if len(found[stem]) == 2:
                self._kept.append((stem, sum(found[stem].values())))
            else:
                with contextlib.suppress(OSError):
                    (self._folder / f"{stem}.{next(iter(found[stem]))}").unlink()
        self._bytes = sum(size for _, size in self._kept)
        with contextlib.suppress(OSError):
            self._make_room(frames=0, size=0)


def _png(frame: Frame) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    # Level 1: a third of the time of the default, a tenth larger.
    Image.fromarray(np.ascontiguousarray(canonical_frame(frame))).save(data, "PNG", compress_level=1)
    return data.getvalue()

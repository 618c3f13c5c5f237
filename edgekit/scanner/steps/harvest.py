"""A sampler that keeps the frames which teach a model most: what it was unsure of, what nobody read, and a few at random."""

from __future__ import annotations

import contextlib
import random
import re
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import refuse_inside_bundle
from edgekit.files import atomic_write, printable
from edgekit.progress import say
from edgekit.scanner.events import Event, encode, rfc3339
from edgekit.scanner.png import encode_png
from edgekit.scanner.reading import Region
from edgekit.scanner.sources import Captured

from .answers import require, which
from .shadow import ShadowedModel

__all__ = ["Facts", "Harvest", "HarvestOptions", "near_hash"]

_RECENT = 8  # frames that an event without one may be about
_BACKLOG, _BACKLOG_BYTES = 64, 64 << 20  # that wait to be written
_JOIN_S = 0.3
_RANDOM_PART = 0.2  # of most_frames, at least, for the random ones


class HarvestOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``folder`` keeps at most ``most_frames`` frames of ``most_megabytes``; better ones push worse ones out.

    A frame is kept where its score is below ``score``, its event is one of ``on``, a model in the shadow disagrees, or by
    chance (``random_share``). One whose perceptual hash is within ``near_bits`` of 64 of a kept one is left out
    (0: only equal ones).
    """

    folder: str
    most_frames: int = 500
    most_megabytes: float = 500.0
    score: float = 0.6
    random_share: float = 0.001
    on: tuple[str, ...] = ("no_read", "drift", "failed", "unfit")
    near_bits: int = 4

    def __post_init__(self) -> None:
        require(bool(self.folder), "folder: where frames are kept, for example /var/lib/edgekit/harvest")
        require(1 <= self.most_frames <= 1_000_000, f"most_frames: 1 to 1000000, not {self.most_frames}")
        require(0 < self.most_megabytes <= 1e7, f"most_megabytes: above 0 and up to 10000000, not {self.most_megabytes:g}")
        require(0 <= self.near_bits <= 32, f"near_bits: 0 to 32 of 64, not {self.near_bits}")
        require(0 <= self.score <= 1, f"score: 0 to 1, not {self.score:g}")
        require(0 <= self.random_share <= 1, f"random_share: 0 to 1, not {self.random_share:g}")


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """Beside a kept frame, as JSON. ``why``: score, random, disagreement or an event's name; ``value``: high is good."""

    why: str
    value: float
    source: str
    seq: int
    time: str
    hash: str = ""
    label: str | None = None
    text: str | None = None
    score: float | None = None
    other: str | None = None


class _Entry(NamedTuple):
    facts: Facts
    name: str
    size: int


class Harvest:
    """A `Step`, before those that hold events back, and a `Sink`, for events that later steps make.

    ``shadow``: the model whose disagreements are harvested as well. Hashing and writing are done by a thread of its own, the
    most telling frame first; what comes faster than it can is counted (``busy``), the least telling left out.
    """

    name = "harvest"

    def __init__(self, options: HarvestOptions, shadow: ShadowedModel | None = None, region: Region | None = None) -> None:
        refuse_inside_bundle(Path(options.folder) / "x")
        self.options = options
        self._shadow, self._region = shadow, region
        self._recent: deque[tuple[Captured, Event]] = deque(maxlen=_RECENT)
        self._random = random.Random(0)  # noqa: S311  which frames, not which keys
        self._news = threading.Condition()
        self._waiting: list[tuple[NDArray[np.uint8], Facts]] = []
        self._ended = self._working = self._late = False
        self._thread: threading.Thread | None = None
        self._kept: list[_Entry] = []
        self._number = 0
        self._sent = 0
        self._said = False
        self._counts = {"seen": 0, "near": 0, "pushed_out": 0, "busy": 0, "failed": 0}

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        if captured.frame is None or "seq" not in event:  # of another step, which `send` hears of
            return [event]
        self._recent.append((captured, event))
        score = event.get("score")
        if event.get("event") in self.options.on:
            self._take(captured.frame, event, str(event["event"]), 2.0)
        elif isinstance(score, int | float) and score < self.options.score:
            self._take(captured.frame, event, "score", 1.0 + (self.options.score - score))
        elif self._random.random() < self.options.random_share:
            self._take(captured.frame, event, "random", self._random.random())
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        for each in self._shadow.take_disagreements() if self._shadow is not None else ():
            about = {"source": each.shown.source, "seq": each.shown.seq, "time": rfc3339(wall), **each.before}
            self._take(
                each.shown.frame, about, "disagreement", 3.0, str(each.after.get("label", each.after.get("text"))), whole=True
            )
        return []

    def send(self, event: Event) -> None:
        """An event of ``on`` that a step made is about the frame it names, or the latest."""
        self._sent += 1
        why = which(event, self.options.on)
        if not why or why in ("failed", "unfit") or not self._recent:  # those it saw as a step
            return
        named = [each for each in self._recent if (each[0].source, each[0].seq) == (event.get("source"), event.get("seq"))]
        same = [each for each in self._recent if each[0].source == event.get("source")]
        captured, answered = (named or same or list(self._recent))[-1]
        assert captured.frame is not None
        self._take(captured.frame, answered, why, 2.0)

    def flush(self, patience_s: float = 2.0) -> None:
        """Wait until what was taken is on disk."""
        with self._news:
            self._late = not self._news.wait_for(lambda: not self._waiting and not self._working, patience_s)

    def status(self) -> dict[str, Any]:
        return {"sink": self.name, "sent": self._sent, "kept": len(self._kept), **self._counts}

    def close(self) -> None:
        if not self._late:  # else there is no more time: it was waited for in vain
            self.flush()
        with self._news:
            self._ended = True
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
            self._thread = None
        if lost := self._counts["busy"] + len(self._waiting):
            say(f"harvest: {lost} frames came faster than they can be kept; they were the least telling ones")

    def _take(
        self, frame: NDArray[Any], event: Event, why: str, value: float, other: str | None = None, whole: bool = False
    ) -> None:
        if frame.dtype != np.uint8 or frame.ndim not in (2, 3) or (frame.ndim == 3 and frame.shape[2] != 3):
            return
        self._counts["seen"] += 1
        part = np.array(frame if whole or self._region is None else self._region.of(frame))
        known = {key: event[key] for key in ("label", "text", "score") if isinstance(event.get(key), str | int | float)}
        facts = Facts(why, value, str(event["source"]), int(event["seq"]), str(event["time"]), other=other, **known)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="harvest", daemon=True)
            self._thread.start()
        with self._news:
            self._waiting.append((part, facts))
            while len(self._waiting) > 1 and (
                len(self._waiting) > _BACKLOG or sum(each.nbytes for each, _ in self._waiting) > _BACKLOG_BYTES
            ):
                self._pick(min)
                self._counts["busy"] += 1
            self._news.notify_all()

    def _pick(self, which: Callable[..., int]) -> tuple[NDArray[np.uint8], Facts]:
        """Take out what waits and tells least (``min``) or most (``max``); of equals the first."""
        return self._waiting.pop(which(range(len(self._waiting)), key=lambda place: self._waiting[place][1].value))

    def _next(self) -> tuple[NDArray[np.uint8], Facts] | None:
        with self._news:
            self._working = False
            self._news.notify_all()
            self._news.wait_for(lambda: self._waiting or self._ended)
            self._working = not self._ended
            return None if self._ended else self._pick(max)

    def _work(self) -> None:
        self._load()
        while (job := self._next()) is not None:
            try:
                self._keep(*job)
            except (OSError, MemoryError) as error:  # a full disk must not stop the scan
                self._counts["failed"] += 1
                if not self._said:
                    reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
                    why = f"no frame can be kept in {printable(self.options.folder)} ({reason})"
                    say(f"{why}; the scan goes on", level="warning")
                self._said = True

    def _load(self) -> None:
        for path in Path(self.options.folder).glob(".*.*.*"):  # what a killed scan was writing
            if re.match(r"^\.\d{8}\.(png|json)\.", path.name):
                with contextlib.suppress(OSError):
                    path.unlink()
        for path in sorted(Path(self.options.folder).glob("*.json")):
            with contextlib.suppress(msgspec.DecodeError, OSError, ValueError):
                facts = msgspec.json.decode(path.read_bytes(), type=Facts)
                int(facts.hash or "0", 16)
                size = path.stat().st_size + path.with_suffix(".png").stat().st_size
                self._kept.append(_Entry(facts, path.stem, size))
                self._number = max(self._number, int(path.stem) + 1)

    def _keep(self, frame: NDArray[np.uint8], facts: Facts) -> None:
        own = near_hash(frame)
        limit = self.options.near_bits
        if any((int(entry.facts.hash, 16) ^ own).bit_count() <= limit for entry in self._kept if entry.facts.hash):
            self._counts["near"] += 1
            return
        facts = msgspec.structs.replace(facts, hash=f"{own:016x}")
        folder, name = Path(self.options.folder), f"{self._number:08d}"
        files = {".png": encode_png(frame), ".json": encode(facts)}
        entry = _Entry(facts, name, sum(map(len, files.values())))
        self._kept.append(entry)
        most = self.options.most_megabytes * 1e6
        try:
            while len(self._kept) > self.options.most_frames or sum(e.size for e in self._kept) > most:
                worst = self._worst()
                if worst is not entry:
                    for suffix in (".json", ".png"):
                        (folder / f"{worst.name}{suffix}").unlink(missing_ok=True)
                self._kept.remove(worst)
                self._counts["pushed_out"] += 1
                if worst is entry:
                    return
            self._number += 1
            folder.mkdir(parents=True, exist_ok=True)
            for suffix, data in files.items():
                atomic_write(folder / f"{name}{suffix}", data)
        except OSError:
            self._kept.remove(entry)  # half a frame is none
            with contextlib.suppress(OSError):
                (folder / f"{name}.png").unlink(missing_ok=True)
            raise
        self._said = False

    def _worst(self) -> _Entry:
        """The least telling frame; of the random ones only while they are more than their part."""
        chance = [entry for entry in self._kept if entry.facts.why == "random"]
        rest = [entry for entry in self._kept if entry.facts.why != "random"]
        among = chance if not rest or len(chance) > _RANDOM_PART * self.options.most_frames else rest
        return min(among, key=lambda entry: entry.facts.value)


def near_hash(frame: NDArray[np.uint8]) -> int:
    """64 bits that like pictures share: whether each of 8x8 places is brighter than its right neighbour (a difference hash)."""
    grey = frame if frame.ndim == 2 else frame[:, :, 1]
    rows, columns = (np.linspace(0, size, count + 1).astype(int)[:-1] for size, count in zip(grey.shape, (8, 9), strict=True))
    sums = np.add.reduceat(np.add.reduceat(grey, rows, 0, dtype=np.float64), columns, 1)
    bits = (sums[:, :-1] > sums[:, 1:]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")

"""A new bundle runs in the shadow of the old one, on live frames, and takes its place only where it has earned it."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgekit.bundle import Bundle
from edgekit.errors import BundleError, EdgekitError
from edgekit.manifest import ImagePreprocessing
from edgekit.runtime import Model, Prediction
from edgekit.runtime.golden import Golden
from edgekit.runtime.model import Precision
from edgekit.scanner.events import Event, rfc3339
from edgekit.scanner.probe import probe
from edgekit.scanner.reading import Region
from edgekit.scanner.sources import Captured
from edgekit.scanner.trial import Disagreement, Shown, Trial, Verdict, write_report

from .answers import require

__all__ = ["Shadow", "ShadowOptions", "ShadowedModel"]

_FILES = 10_000  # of a bundle that is looked at for changes
_STOP_S = 0.1
_JOIN_S = 1.0  # a bundle that is just being opened must not hold up the end of a scan


class ShadowOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``candidate``: where new bundles appear, a bundle's path or an install's ROOT/current; "" for `offer` alone.

    After ``frames`` frames a candidate is promoted where the share of like answers (the same label or text, and both or neither
    with ``good_score``) is ``agreement`` or more and no more than 1% of its frames take longer than ``p99_share`` times the old
    one's p99 (more than chance gives). ``busy_share``: of one core's time, what the comparison may take. ``open_s``: how long
    it may take to open and to pass its golden check, and to answer a frame. ``report``: a JSON file for each verdict, "" for
    none. ``kept``: where it is written down what was promoted, so that a restarted scan begins with it; "" for a file in the
    state folder.
    """

    candidate: str = ""
    frames: int = 300
    agreement: float = 0.98
    p99_share: float = 1.2
    busy_share: float = 0.25
    poll_s: float = 2.0
    examples: int = 20
    good_score: float = 0.5
    open_s: float = 60.0
    report: str = ""
    kept: str = ""

    def __post_init__(self) -> None:
        require(1 <= self.frames <= 10_000_000, f"frames: 1 to 10000000, not {self.frames}")
        require(0 <= self.examples <= 10_000, f"examples: 0 to 10000, not {self.examples}")
        require(0 <= self.good_score <= 1, f"good_score: 0 to 1, not {self.good_score:g}")
        require(0 <= self.agreement <= 1, f"agreement: 0 to 1, not {self.agreement:g}")
        require(0 < self.busy_share <= 1, f"busy_share: above 0 and up to 1, not {self.busy_share:g}")
        require(0 < self.p99_share <= 1e6, f"p99_share: above 0, for example 1.2, not {self.p99_share:g}")
        require(0 < self.open_s <= 3600, f"open_s: above 0 and up to 3600, not {self.open_s:g}")
        require(0 < self.poll_s <= 86_400, f"poll_s: above 0 and up to 86400, not {self.poll_s:g}")


class ShadowedModel:
    """Stands in `Model`'s place, from the scanning thread. ``model`` is open; `close` closes it, or what took its place.

    What is offered is opened and held against its golden outputs in a process of its own, then again by a thread of this one,
    which runs it beside the old one on frames that `Shadow` shows it: both on the same frame, so that the two are timed under
    the same load. The swap is made by the scanning thread, between two frames. ``adopted`` hears of it, in that thread.
    """

    def __init__(
        self,
        model: Model,
        options: ShadowOptions | None = None,
        *,
        backend: str = "auto",
        precision: Precision = "auto",
        threads: int = 1,
        adopted: Callable[[Model], None] = lambda model: None,
    ) -> None:
        self.options = options or ShadowOptions()
        self.wants_frame = False
        self.state = "idle"  # or opening, compared
        self.last: dict[str, Any] = {}
        self.promoted = self.refused = 0
        self._model, self._how, self._adopt = model, (backend, precision, threads), adopted
        self._shown: queue.Queue[Shown] = queue.Queue(1)
        self._offers: deque[str] = deque()
        self._events: deque[Event] = deque()
        self._disagreements: deque[Disagreement] = deque(maxlen=16)
        self._ready: tuple[Model, Verdict] | None = None
        self._adopted, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._running: tuple[float, Verdict, str] | None = None  # since when, and what it has not done then
        self._stamp: Any = None  # of the candidate that was tried last
        self._look = 0.0
        if self.options.candidate:
            self._start()

    @property
    def bundle(self) -> Bundle:
        return self._model.bundle

    @property
    def runner(self) -> Any:
        return self._model.runner

    @property
    def labels(self) -> tuple[str, ...]:
        return self._model.labels

    def preprocess(self, frame: Any) -> Any:
        return self._model.preprocess(frame)

    def __call__(self, frame: Any) -> Prediction:
        return self._model(frame)

    def predict_batch(self, frames: Sequence[Any]) -> list[Prediction]:
        return self._model.predict_batch(frames)

    def offer(self, path: str | os.PathLike[str]) -> None:
        """Try the bundle at ``path``, from any thread. It takes the place of one that is being tried."""
        self._offers.append(os.fspath(path))
        self._start()

    def show(self, shown: Shown) -> None:
        """A frame for the comparison; left out where it is still busy with the one before."""
        with contextlib.suppress(queue.Full):
            self._shown.put_nowait(shown)

    def adopt(self) -> None:
        """Swap the models if a candidate has earned it; from the scanning thread, between two frames."""
        if self._ready is None:
            return
        (candidate, verdict), self._ready = self._ready, None
        try:
            fresh = candidate.share()  # entered in the thread that will use it
            fresh.__enter__()
        except EdgekitError as error:
            self._say(verdict.refused(error.message))
        else:
            old, self._model = self._model, fresh
            old.__exit__(None, None, None)
            self._adopt(fresh)
            self._say(verdict)
        self._adopted.set()

    def unstick(self) -> None:
        """Give a candidate up that has not opened or answered for ``open_s``, and the thread that waits for it; from the
        scanning one."""
        running = self._running  # its thread may end it at any moment
        if running is None or time.monotonic() - running[0] < self.options.open_s:
            return
        verdict, self._running = running[1], None
        self.wants_frame, self.state, self._thread = False, "idle", None
        self._say(verdict.refused(f"it {running[2]} for {self.options.open_s:g} s"))
        self._start()

    def take_events(self) -> list[Event]:
        return [self._events.popleft() for _ in range(len(self._events))]

    def take_disagreements(self) -> list[Disagreement]:
        """The latest frames on which the two did not agree, up to 16, each given once."""
        return [self._disagreements.popleft() for _ in range(len(self._disagreements))]

    def close(self) -> None:
        """End the comparison and close both models."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
        self._model.__exit__(None, None, None)

    def _start(self) -> None:
        if self._thread is None and not self._stopping.is_set():
            self._thread = threading.Thread(target=self._watch, name="shadow", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        """The thread: wait for a bundle, try it, say what came of it."""
        seen: Any = None
        while not self._ends():
            if self._offers:
                self._try(self._offers.popleft(), offered=True)
                continue
            if self.options.candidate:
                now = _stamp(Path(self.options.candidate))
                if now and now == seen and now != self._stamp:  # it stood still: a copy in progress is left alone
                    self._stamp = now
                    self._try(self.options.candidate, offered=False)
                    continue
                seen = now
            self._wait(self.options.poll_s)

    def _ends(self) -> bool:
        """Whether this thread is to end: the scan does, or it was given up."""
        return self._stopping.is_set() or threading.current_thread() is not self._thread

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._offers and (left := end - time.monotonic()) > 0 and not self._stopping.wait(min(left, _STOP_S)):
            pass

    def _try(self, path: str, *, offered: bool) -> None:
        verdict = Verdict(path, before=self.bundle.digest)
        try:
            with contextlib.ExitStack() as stack:
                bundle = Bundle.open(path, but="engines")
                verdict = verdict.of(bundle.digest)
                if bundle.digest == self.bundle.digest:
                    if offered:
                        self._say(verdict.refused("it is the bundle that runs already"))
                    return
                self._event(verdict, "offered")
                self.state = "opening"
                _check_kind(bundle, self.bundle)
                backend, precision, threads = self._how
                probe(os.fspath(bundle.path), backend, precision, threads, self.options.open_s, self._stopping)
                self._running = time.monotonic(), verdict, "did not open here"
                candidate = stack.enter_context(Model.open(bundle, backend, precision=precision, threads=threads))
                golden = Golden.of(candidate.runner)
                error = golden.check(candidate.runner).relative
                old = stack.enter_context(self._model.share())
                if self._ends():
                    return
                self._running = None
                verdict = self._compare(verdict, old, candidate, error)
                if verdict.state == "promoted":
                    self._adopted.clear()
                    self._ready = (candidate, verdict)
                    while not self._adopted.wait(_STOP_S) and not self._ends():
                        pass
                    return
        except EdgekitError as error:
            verdict = verdict.refused(error.message)
        except OSError as error:
            verdict = verdict.refused(f"{error.strerror or error}")
        except Exception as error:  # noqa: BLE001  whatever a bundle does, the scan goes on
            verdict = verdict.refused(f"{type(error).__name__}: {error}")
        finally:
            if not self._ends():
                self.wants_frame, self.state, self._running = False, "idle", None
        if verdict.state and not self._ends():
            self._say(verdict)

    def _compare(self, verdict: Verdict, old: Model, new: Model, golden_error: float) -> Verdict:
        """Both on live frames until the verdict is clear, or something ends it."""
        options = self.options
        names = ("frames", "agreement", "p99_share", "good_score", "examples")
        trial = Trial(old, new, **{name: getattr(options, name) for name in names})
        self.state, start = "compared", time.monotonic()
        while not self._ends():
            if self._offers or self._changed(verdict.path):
                return verdict.with_(trial, golden_error).refused("a newer bundle was offered")
            self.wants_frame = True
            try:
                shown = self._shown.get(timeout=_STOP_S)
            except queue.Empty:
                continue
            self.wants_frame = False
            begin = time.monotonic()
            self._running = begin, verdict, "gave no answer to a frame"
            disagreement = trial.run(shown)
            if self._ends():
                break
            self._running = None
            if disagreement is not None:
                self._disagreements.append(disagreement)
            if (reason := trial.verdict()) is not None:
                verdict = verdict.with_(trial, golden_error)
                return verdict.refused(reason) if reason else verdict.promoted()
            took = time.monotonic() - begin
            self._stopping.wait(took * (1 / options.busy_share - 1))
            self.last = {"compared": trial.frames, "seconds": round(time.monotonic() - start, 1)}
        return verdict

    def _changed(self, path: str) -> bool:
        """Whether another bundle lies where this one was found. Looked at every ``poll_s``."""
        now = time.monotonic()
        if path != self.options.candidate or now < self._look:
            return False
        self._look = now + self.options.poll_s
        return bool(_stamp(Path(path)) != self._stamp)

    def _say(self, verdict: Verdict) -> None:
        self.promoted += verdict.state == "promoted"
        self.refused += verdict.state == "refused"
        self.last = verdict.figures()
        problem = write_report(self.options.report, verdict) if self.options.report else ""
        self._event(verdict, verdict.state, **({"report_error": problem} if problem else {}))

    def _event(self, verdict: Verdict, state: str, **more: Any) -> None:
        head = {"event": "model", "source": verdict.path, "time": rfc3339(time.time()), "state": state}
        self._events.append({**head, **verdict.figures(), **more})


class Shadow:
    """The step beside a `ShadowedModel`: shows it the frames, swaps the models, tells the verdicts. Put it first.

    ``region``: the part of a frame that the model sees.
    """

    name = "shadow"

    def __init__(self, model: ShadowedModel, region: Region | None = None) -> None:
        self.options = model.options
        self._model, self._region = model, region

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        if self._model.wants_frame and captured.frame is not None and "event" not in event:
            part = captured.frame if self._region is None else self._region.of(captured.frame)
            self._model.show(Shown(captured.source, captured.seq, np.array(part)))
            self._model.wants_frame = False
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        self._model.adopt()
        self._model.unstick()
        return self._model.take_events()

    def status(self) -> dict[str, Any]:
        model = self._model
        return {"state": model.state, "promoted": model.promoted, "refused": model.refused, **model.last}

    def close(self) -> None:
        """The model is closed by who opened it."""


def _check_kind(new: Bundle, old: Bundle) -> None:
    """Raises `BundleError` where the answers of the two could not be held against each other."""
    task, spec, hint = new.manifest.task, new.manifest.preprocessing, "offer one of the same kind"
    if task != old.manifest.task:
        raise BundleError(f"{new.path} is for {task}, the model that runs for {old.manifest.task}", hint)
    if not isinstance(spec, ImagePreprocessing):
        raise BundleError(f"{new.path} takes {'raw tensors' if spec is None else 'no pictures'}, not frames", hint)
    other = set(new.manifest.labels) ^ set(old.manifest.labels)
    if other and task == "image-classification":
        named = ", ".join(sorted(other)[:5]) + (", ..." if len(other) > 5 else "")
        raise BundleError(f"{new.path} has other labels than the model that runs: only one of them has {named}", hint)
    if not new.manifest.golden:
        raise BundleError(f"{new.path} states no tolerance for its golden outputs", "make the bundle again")


def _stamp(path: Path) -> Any:
    """What changes when a bundle does: names, sizes and times of its files, and where a link leads. None where nothing is."""
    try:
        folder = path.resolve(strict=True)
        found: list[tuple[str, int, int, int]] = []
        for root, _, names in os.walk(folder):
            for name in names:
                status = os.stat(os.path.join(root, name), follow_symlinks=False)
                found.append((os.path.join(root, name), status.st_size, status.st_mtime_ns, status.st_ino))
                if len(found) > _FILES:
                    return None
    except OSError:  # not there, or going away while it was looked at
        return None
    return (str(folder), sorted(found)) if found else None

"""A new bundle runs in the shadow of the old one, on live frames, and takes its place only where it has earned it."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgekit.bundle import Bundle
from edgekit.errors import BundleError, EdgekitError
from edgekit.manifest import ImagePreprocessing
from edgekit.runtime import Model, Prediction
from edgekit.runtime.golden import Golden
from edgekit.scanner.events import Event, rfc3339
from edgekit.scanner.reading import Region
from edgekit.scanner.sources import Captured
from edgekit.scanner.trial import Disagreement, Shown, Trial, Verdict, write_report

__all__ = ["Shadow", "ShadowOptions", "ShadowedModel"]

_FILES = 10_000  # of a bundle that is looked at for changes
_STOP_S = 0.1
_JOIN_S = 1.0  # a bundle that is just being opened must not hold up the end of a scan


class ShadowOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``candidate``: where new bundles appear, a bundle's path or an install's ROOT/current; "" for `offer` alone.

    After ``frames`` frames a candidate is promoted where the share of like answers is ``agreement`` or more and no more than 1%
    of its frames take longer than ``p99_share`` times the old one's p99 (more than chance gives). ``busy_share``: of one core's
    time, what the comparison may take. ``report``: a JSON file for each verdict, "" for none.
    """

    candidate: str = ""
    frames: int = 300
    agreement: float = 0.98
    p99_share: float = 1.2
    busy_share: float = 0.25
    poll_s: float = 2.0
    examples: int = 20
    report: str = ""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.examples < 0:
            raise ValueError("frames is at least 1, examples at least 0")
        if not (0 <= self.agreement <= 1 and 0 < self.busy_share <= 1 and self.p99_share > 0 and self.poll_s > 0):
            raise ValueError("agreement and busy_share are shares up to 1, p99_share and poll_s more than 0")


class ShadowedModel:
    """Stands in `Model`'s place, from the scanning thread. ``model`` is open; `close` closes it, or what took its place.

    A thread of its own opens what is offered, holds it against its golden outputs, and runs it beside the old one on frames
    that `Shadow` shows it: both on the same frame, so that the two are timed under the same load. The swap is made by the
    scanning thread, between two frames.
    """

    def __init__(self, model: Model, options: ShadowOptions | None = None, *, backend: str = "auto", threads: int = 1) -> None:
        self.options = options or ShadowOptions()
        self.wants_frame = False
        self.state = "idle"  # or opening, compared
        self.last: dict[str, Any] = {}
        self.promoted = self.refused = 0
        self._model, self._how = model, (backend, threads)
        self._shown: queue.Queue[Shown] = queue.Queue(1)
        self._offers: deque[str] = deque()
        self._events: deque[Event] = deque()
        self._disagreements: deque[Disagreement] = deque(maxlen=16)
        self._ready: tuple[Model, Verdict] | None = None
        self._adopted, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
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
            self._say(verdict)
        self._adopted.set()

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
        while not self._stopping.is_set():
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
                candidate = stack.enter_context(Model.open(bundle, self._how[0], threads=self._how[1]))
                golden = Golden.of(candidate.runner)
                if not any(array.size for array in golden.outputs.values()):
                    raise BundleError(f"{path} holds no golden outputs", "make the bundle again")
                error = golden.check(candidate.runner).relative
                old = stack.enter_context(self._model.share())
                verdict = self._compare(verdict, old, candidate, error)
                if verdict.state == "promoted":
                    self._adopted.clear()
                    self._ready = (candidate, verdict)
                    while not self._adopted.wait(_STOP_S) and not self._stopping.is_set():
                        pass
                    return
        except EdgekitError as error:
            verdict = verdict.refused(error.message)
        except OSError as error:
            verdict = verdict.refused(f"{error.strerror or error}")
        except Exception as error:  # noqa: BLE001  whatever a bundle does, the scan goes on
            verdict = verdict.refused(f"{type(error).__name__}: {error}")
        finally:
            self.wants_frame, self.state = False, "idle"
        if verdict.state and not self._stopping.is_set():
            self._say(verdict)

    def _compare(self, verdict: Verdict, old: Model, new: Model, golden_error: float) -> Verdict:
        """Both on live frames until the verdict is clear, or something ends it."""
        options = self.options
        trial = Trial(old, new, options.frames, options.agreement, options.p99_share, options.examples)
        self.state, start = "compared", time.monotonic()
        while not self._stopping.is_set():
            if self._offers or self._changed(verdict.path):
                return verdict.with_(trial, golden_error).refused("a newer bundle was offered")
            self.wants_frame = True
            try:
                shown = self._shown.get(timeout=_STOP_S)
            except queue.Empty:
                continue
            self.wants_frame = False
            begin = time.monotonic()
            disagreement = trial.run(shown)
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
        return self._model.take_events()

    def status(self) -> dict[str, Any]:
        model = self._model
        return {"state": model.state, "promoted": model.promoted, "refused": model.refused, **model.last}

    def close(self) -> None:
        """The model is closed by who opened it."""


def _check_kind(new: Bundle, old: Bundle) -> None:
    if new.manifest.task != old.manifest.task or not isinstance(new.manifest.preprocessing, ImagePreprocessing):
        raise BundleError(
            f"{new.path} is for {new.manifest.task}, the model that runs for {old.manifest.task}", "offer one of the same kind"
        )


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

"""The trial of a new model beside the old one: the same frames, their answers and times, and a verdict."""

from __future__ import annotations

import math
import time
from pathlib import Path
from time import perf_counter_ns
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import refuse_inside_bundle
from edgekit.errors import EdgekitError, InputError
from edgekit.files import atomic_write
from edgekit.runtime import Model, Prediction

from .events import rfc3339

__all__ = ["Disagreement", "Shown", "Trial", "Verdict", "write_report"]

_WARM = 3  # pairs that are not timed
_SIGMAS = 3.0


class Shown(NamedTuple):
    """A live frame, uint8 (H, W[, 3]), a copy of its own."""

    source: str
    seq: int
    frame: NDArray[np.uint8]


class Disagreement(NamedTuple):
    """``before`` and ``after``: what the old and the new model answered; ``{"error": why}`` where one gave no answer."""

    shown: Shown
    before: dict[str, Any]
    after: dict[str, Any]

    def figures(self) -> dict[str, Any]:
        return {"source": self.shown.source, "seq": self.shown.seq, "before": self.before, "after": self.after}


class Trial:
    """Runs two open models on each frame, in changing order. Answers are alike where they say the same, and both or neither
    with ``good_score``. ``examples``: how many disagreements are kept."""

    def __init__(
        self,
        old: Model,
        new: Model,
        *,
        frames: int,
        agreement: float,
        p99_share: float,
        good_score: float = 0.5,
        examples: int = 20,
    ) -> None:
        self.good_score = good_score
        self.wanted, self.agreement, self.p99_share = frames, agreement, p99_share
        self.frames = self.alike = 0
        self.disagreements: list[Disagreement] = []
        self._models, self._examples = (old, new), examples
        self._times: tuple[list[float], list[float]] = ([], [])
        self._runs = 0

    def run(self, shown: Shown) -> Disagreement | None:
        """One frame. Raises `EdgekitError` where the new model breaks down on it, and the old one does not."""
        answers: list[dict[str, Any]] = [{}, {}]
        times = [0.0, 0.0]
        for which in (0, 1) if self._runs % 2 else (1, 0):
            start = perf_counter_ns()
            try:
                answers[which] = _answer(self._models[which](shown.frame))
            except InputError as error:
                answers[which] = {"error": error.message}
            times[which] = (perf_counter_ns() - start) / 1e6
        self._runs += 1
        if "error" in answers[0]:  # a frame that the old one does not take judges nobody
            return None
        if self._runs > _WARM:
            for kept, took in zip(self._times, times, strict=True):
                kept.append(took)
        self.frames += 1
        said, sure = zip(*(self._told(answer) for answer in answers), strict=True)
        if said[0] == said[1] and sure[0] == sure[1]:
            self.alike += 1
            return None
        found = Disagreement(shown, *answers)
        if len(self.disagreements) < self._examples:
            self.disagreements.append(found)
        return found

    def _told(self, answer: dict[str, Any]) -> tuple[tuple[Any, ...], bool]:
        """What it says, and whether that is a good read."""
        return tuple(answer.get(key) for key in ("label", "text", "error")), (answer.get("score") or 0.0) >= self.good_score

    def verdict(self) -> str | None:
        """None: not yet; "": it has earned the place; else the reason why it has not."""
        apart = self.frames - self.alike
        if apart > (1 - self.agreement) * self.wanted + 1e-9:
            may = int((1 - self.agreement) * self.wanted + 1e-9)
            return f"it answers otherwise on {apart} of {self.frames} frames; {may} of {self.wanted} may"
        if self.frames < self.wanted or not self._times[0]:
            return None
        slow, allowed = self.slower()
        if slow > allowed:
            times = self.latencies()
            return (
                f"its p99 is {times['p99_ms']:.3g} ms, {self.p99_share:g} times {times['before_p99_ms']:.3g} ms are allowed:"
                f" {slow} of {len(self._times[1])} frames were slower"
            )
        return ""

    def slower(self) -> tuple[int, float]:
        """(frames above the limit, how many may be): 1% of them, and what chance adds to that."""
        limit = self.p99_share * float(np.percentile(self._times[0], 99))
        expected = 0.01 * len(self._times[1])
        return sum(took > limit for took in self._times[1]), expected + _SIGMAS * math.sqrt(expected) + 1

    def latencies(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, times in zip(("before_", ""), self._times, strict=True):
            if times:
                p50, p99 = np.percentile(times, [50, 99])
                found |= {f"{name}p50_ms": round(float(p50), 3), f"{name}p99_ms": round(float(p99), 3)}
        return found

    def figures(self) -> dict[str, Any]:
        share = self.alike / self.frames if self.frames else None
        return {"frames": self.frames, "agreement": None if share is None else round(share, 4), **self.latencies()}


class Verdict(NamedTuple):
    """``state``: "" (none yet), "promoted" or "refused"; ``digest`` of the candidate, ``before`` of the model that runs."""

    path: str
    digest: str = ""
    before: str = ""
    state: str = ""
    reason: str = ""
    measured: dict[str, Any] = {}  # noqa: RUF012  never changed
    disagreements: tuple[Disagreement, ...] = ()

    def of(self, digest: str) -> Verdict:
        return self._replace(digest=digest)

    def with_(self, trial: Trial, golden_error: float) -> Verdict:
        measured = {**trial.figures(), "golden_error": float(f"{golden_error:.3g}")}
        return self._replace(measured=measured, disagreements=tuple(trial.disagreements))

    def refused(self, reason: str) -> Verdict:
        return self._replace(state="refused", reason=reason)

    def promoted(self) -> Verdict:
        return self._replace(state="promoted", reason="")

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {"digest": self.digest, "before": self.before}
        return {**found, **({"reason": self.reason} if self.reason else {}), **self.measured}


def write_report(path: str, verdict: Verdict) -> str:
    """Replace the report; why it could not be written, "" where it was."""
    report = {
        "path": verdict.path,
        "state": verdict.state,
        "time": rfc3339(time.time()),
        **verdict.figures(),
        "disagreements": [each.figures() for each in verdict.disagreements],
    }
    try:
        refuse_inside_bundle(path)
        atomic_write(Path(path), msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    except OSError as error:
        return f"{path}: {error.strerror}"
    except EdgekitError as error:
        return error.message
    return ""


def _answer(prediction: Prediction) -> dict[str, Any]:
    found: dict[str, Any] = {"score": round(prediction.score, 6) if math.isfinite(prediction.score) else None}
    if prediction.label is not None:
        found["label"] = prediction.label
    if prediction.text is not None:
        found["text"] = prediction.text
    if found["score"] is None:
        found["error"] = "the scores are not finite"
    return found

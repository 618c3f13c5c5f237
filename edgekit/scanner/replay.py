"""`replay`: a recorded incident again, event by event, held against what was sent then."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from edgekit.bundle import FLOAT_GRAPH
from edgekit.errors import EdgekitError, UsageError
from edgekit.runtime import Model

from .codes import CodeReader
from .events import Event, encode
from .pipeline import Pipeline
from .reading import Answer, Reading, Region
from .recording import Came, Recorded, Recording, Round, StepState, open_recording
from .recording import Model as RecordedModel
from .sources import Captured
from .steps import Step

__all__ = ["Replay", "replay"]

#: Events that come from clocks, disks and threads, not from frames: taken as they were recorded.
GIVEN = frozenset({"drift", "incident", "model", "selftest"})
#: Steps that make those, or only keep frames, and are not run again.
_NOT_RUN = frozenset({"drift", "harvest", "incident", "ring", "selftest", "shadow"})
#: name of a step -> (module, class, options).
_STEPS = {
    "crosscheck": ("crosscheck", "CrossCheck", "CrossCheckOptions"),
    "duplicates": ("duplicates", "Duplicates", "DuplicateOptions"),
    "trigger": ("triggers", "Trigger", "TriggerOptions"),
    "votes": ("votes", "Votes", "VoteOptions"),
}


class Replay(NamedTuple):
    """``difference``: None where every event came out byte for byte, else the first that did not (``number``, ``recorded``,
    ``replayed``; None where there is none). ``given`` events were taken from the recording. ``fresh`` steps began without the
    state that they had, ``absent`` ones could not be made again."""

    frames: int
    events: int
    given: int
    difference: dict[str, Any] | None
    fresh: list[str]
    absent: list[str]
    model: str | None
    why: dict[str, Any]

    def figures(self) -> dict[str, Any]:
        return {"same": self.difference is None, **self._asdict()}


def replay(
    path: str | os.PathLike[str],
    *,
    bundle: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    steps: Callable[[Sequence[StepState]], Sequence[Step]] | None = None,
) -> Replay:
    """Run the frames of a recording again: the same numbers, times and latencies, and hold the events against those recorded.

    ``bundle``: another place of the model, or another model. ``backend``: another than it ran on. ``steps`` makes the scan's
    steps from their records; by default those that edgekit knows. Raises `DataError` for a file that is no recording,
    `UsageError` where its model is not there, `BundleError`, `BackendError`.
    """
    with contextlib.ExitStack() as stack:
        recorded = open_recording(path)
        stack.callback(recorded.close)
        about = recorded.about
        made, absent = (list(steps(about.steps)), []) if steps else _steps(about.steps)
        fresh = _resume(made, about.steps)
        reading = _reading(about, bundle, backend, stack)
        again = _Again(recorded, reading, made)
        difference, given = again.compare()
        digest = reading.model.bundle.digest if reading.model is not None else None
        return Replay(again.frames, len(recorded.events), given, difference, fresh, absent, digest, about.why)


class _Again(Pipeline):
    """The scan's loop with recorded clocks and latencies."""

    def __init__(self, recorded: Recorded, reading: Reading, steps: Sequence[Step]) -> None:
        self._replayed = _Replayed(reading)
        super().__init__(source=(), reading=self._replayed, steps=steps, run_id=recorded.about.run_id)  # type: ignore[arg-type]
        self._recorded = recorded
        self._clock = (0.0, 0.0)
        self.frames = 0

    def compare(self) -> tuple[dict[str, Any] | None, int]:
        """(the first difference, how many events were given)."""
        position = given = 0
        for each in self._recorded.rounds:
            expected = self._recorded.events[position : position + each.sent]
            found = iter([msgspec.json.decode(encode(event)) for event in self._round(each)])
            for line in expected:
                then = msgspec.json.decode(line)
                if isinstance(then, dict) and then.get("event") in GIVEN:
                    given += 1
                else:
                    now = next(found, None)
                    if now is not None:  # an event that is given has a number too, and is none of ours
                        now["id"] = f"{self.run_id}-{self._recorded.about.first + position}"
                    if now is None or encode(now) != line:
                        return {"number": position, "recorded": then, "replayed": now}, given
                position += 1
            if (more := next(found, None)) is not None and each is not self._recorded.rounds[-1]:
                return {"number": position, "recorded": None, "replayed": more}, given
        return None, given

    def _round(self, each: Round) -> list[Event]:
        self._clock = (each.monotonic if each.monotonic >= 0 else float("inf"), each.wall)
        captured = [self._captured(came) for came in each.came if not came.kind]
        made: list[Event] = []
        if captured:
            made += [self._numbered(event) for event in self._read(captured)]
        for came in each.came:
            if came.kind:
                about = (Captured(None, came.source, -1, came.time, came.kind, came.monotonic), dict(came.event or {}))
                made += [self._numbered(event) for event in self._through([about])]
        wall = each.wall
        for index, step in enumerate(self._steps):
            for event in step.due(self._clock[0], wall):
                source, kind = str(event.get("source", "")), str(event.get("event", ""))
                about = (Captured(None, source, -1, wall, kind, self._clock[0]), event)
                made += [self._numbered(each) for each in self._through([about], index + 1)]
        return made

    def _captured(self, came: Came) -> Captured:
        frame = self._recorded.frame(came.frame) if came.frame is not None else None
        self.frames += frame is not None
        if frame is not None and came.answer is not None:
            self._replayed.recorded[id(frame)] = came.answer
        return Captured(frame, came.source, came.seq, came.time, came.error, came.monotonic)


class _Replayed:
    """A reading whose latencies, and what a function of the user's own read, are the recorded ones."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.recorded: dict[int, Event] = {}
        self.model, self.codes, self.text, self.region = reading.model, reading.codes, reading.text, reading.region

    def answer(self, frame: Any) -> Answer:
        return self._as_recorded(frame, self._reading.answer(frame))

    def answers(self, frames: Sequence[Any]) -> list[Answer]:
        found = self._reading.answers(frames)
        return [self._as_recorded(frame, answer) for frame, answer in zip(frames, found, strict=True)]

    def _as_recorded(self, frame: Any, answer: Answer) -> Answer:
        then = self.recorded.pop(id(frame), {})
        fields = dict(answer.fields)
        if isinstance(self.codes, _NoCodes) and "codes" in fields:
            fields["codes"] = then.get("codes", [])
        latency = then.get("latency_ms", 0.0)
        return answer._replace(fields=fields, latency_ms=latency if isinstance(latency, int | float) else 0.0)


class _NoCodes:
    """Stands for a function that read codes, which no file can hold."""

    def __call__(self, frame: Any) -> list[Any]:
        return []


def _reading(about: Recording, bundle: Any, backend: str | None, stack: contextlib.ExitStack) -> Reading:
    model = _opened(about.model, bundle, backend, stack) if about.model is not None else None
    text = _opened(about.text, None, backend, stack) if about.text is not None else None
    codes = None if about.codes is None else _NoCodes() if about.codes < 0 else CodeReader(about.codes)
    if model is None and text is None and codes is None:
        raise UsageError("the recording does not say what the scan read with", "record with Incidents.watch(reading, steps)")
    return Reading(model, codes, text, Region(*about.region) if about.region else None)


def _opened(record: RecordedModel, bundle: Any, backend: str | None, stack: contextlib.ExitStack) -> Model:
    place = record.path if bundle is None else bundle
    try:
        precision: Any = "float" if record.graph == FLOAT_GRAPH else "int8"
        return stack.enter_context(Model.open(place, backend or record.backend, precision=precision))
    except EdgekitError as error:
        hint = f"name it: --bundle B (the scan ran {record.digest[:12]} on {record.backend})"
        raise type(error)(error.message, hint) from None


def _steps(records: Sequence[StepState]) -> tuple[list[Step], list[str]]:
    made: list[Step] = []
    absent: list[str] = []
    for record in records:
        if record.name in _NOT_RUN:
            continue
        try:
            module, kind, options = _STEPS[record.name]
            found = importlib.import_module(f"edgekit.scanner.steps.{module}")
            made.append(getattr(found, kind)(msgspec.convert(record.options, getattr(found, options))))
        except (KeyError, ImportError, AttributeError, TypeError, msgspec.ValidationError):
            absent.append(record.name)
    return made, absent


def _resume(steps: Sequence[Any], records: Sequence[StepState]) -> list[str]:
    """Give the steps the state they had; the names of those that begin without."""
    known: dict[str, Iterator[StepState]] = {}
    for record in records:
        if record.known:
            known[record.name] = iter([*known.get(record.name, ()), record])
    fresh = []
    for step in steps:
        then = next(known.get(step.name, iter(())), None)
        if then is not None and hasattr(step, "resume"):
            step.resume(then.state)
        else:
            fresh.append(step.name)
    return fresh

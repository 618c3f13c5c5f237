"""`replay`: a recorded incident again, event by event, held against what was sent then."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from edgekit.bundle import FLOAT_GRAPH
from edgekit.errors import BundleError, DataError, EdgekitError, UsageError
from edgekit.runtime import Model

from .codes import CodeReader
from .events import Event, encode
from .pipeline import Pipeline
from .reading import Answer, Reading, Region
from .recording import FRAME, Came, Recorded, Recording, Round, StepState, open_recording
from .recording import Model as RecordedModel
from .sources import Captured
from .steps import Step

__all__ = ["Difference", "Replay", "replay"]

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
MOST_SHOWN = 50


class Difference(NamedTuple):
    """Event ``number`` of the file: as it was sent, and as it is now; None where there is none."""

    number: int
    recorded: Any
    replayed: Any

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """field -> (recorded, replayed), of those that differ; a whole event under ``event`` where the other side has none."""
        then, now = self.recorded, self.replayed
        if not isinstance(then, dict) or not isinstance(now, dict):
            return {"event": (then, now)}
        return {name: (then.get(name), now.get(name)) for name in {**then, **now} if then.get(name) != now.get(name)}


class Replay(NamedTuple):
    """``differing``: how many events did not come out byte for byte; ``differences``: the first 50 of them.

    ``given`` events were taken from the recording, and so were the codes of ``given_codes`` frames: what a picture gives only
    once it was enhanced hangs on time. ``fresh`` steps began without the state that they had, ``absent`` ones could not be
    made again. ``model``: the digest that ran now; ``changed``: the models that are others than those recorded, in words.
    """

    frames: int
    events: int
    given: int
    given_codes: int
    differing: int
    differences: list[Difference]
    fresh: list[str]
    absent: list[str]
    model: str | None
    changed: list[str]
    why: dict[str, Any]

    @property
    def difference(self) -> dict[str, Any] | None:
        """The first; None where every event came out byte for byte."""
        return self.differences[0]._asdict() if self.differences else None

    def figures(self) -> dict[str, Any]:
        differences = [each._asdict() for each in self.differences]
        return {"same": not self.differing, **self._asdict(), "difference": self.difference, "differences": differences}


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
        reading = _reading(about, bundle, backend, stack)
        try:
            fresh = _resume(made, recorded)
            again = _Again(recorded, reading, made)
            again.compare()
        except (EdgekitError, OSError):
            raise
        except Exception as error:  # noqa: BLE001  what a file says of steps and events is theirs to refuse, in any way
            words = f"what it says does not fit together ({type(error).__name__})"
            raise DataError(
                f"{recorded.path} cannot be replayed: {words}", "replay it with the edgekit that wrote it"
            ) from None
        digest = reading.model.bundle.digest if reading.model is not None else None
        return Replay(
            frames=again.frames,
            events=len(recorded.events),
            given=again.given,
            given_codes=again.reading.given_codes,
            differing=again.differing,
            differences=again.differences,
            fresh=fresh,
            absent=absent,
            model=digest,
            changed=[*_changed("model", about.model, reading.model), *_changed("text", about.text, reading.text)],
            why=about.why,
        )


class _Again(Pipeline):
    """The scan's loop with recorded clocks and latencies."""

    reading: _Replayed  # type: ignore[assignment]

    def __init__(self, recorded: Recorded, reading: Reading, steps: Sequence[Step]) -> None:
        self._fires = _Fires(steps)
        super().__init__(source=(), reading=_Replayed(reading), steps=[self._fires, *steps], run_id=recorded.about.run_id)  # type: ignore[arg-type]
        self._recorded = recorded
        self._kept = any(record.name == "ring" for record in recorded.about.steps)
        self._clock = (0.0, 0.0)
        self.frames = self.given = self.differing = 0
        self.differences: list[Difference] = []

    def compare(self) -> None:
        position = 0
        for each in self._recorded.rounds:
            expected = self._recorded.events[position : position + max(0, each.sent)]
            found = iter([msgspec.json.decode(encode(event)) for event in self._round(each)])
            for line in expected:
                self._compare(position, line, found)
                position += 1
            if each is not self._recorded.rounds[-1]:
                for more in found:
                    self._differs(Difference(position, None, more))

    def _compare(self, position: int, line: bytes, found: Iterator[Event]) -> None:
        then = msgspec.json.decode(line)
        if isinstance(then, dict) and then.get("event") in GIVEN:
            self.given += 1
            return
        now = next(found, None)
        if now is not None:  # an event that is given has a number too, and is none of ours
            now["id"] = f"{self.run_id}-{self._recorded.about.first + position}"
            if self._kept and "kept" in then:  # the name of a file that the ring wrote
                now["kept"] = then["kept"]
        if now is None or encode(now) != line:
            self._differs(Difference(position, then, now))

    def _differs(self, difference: Difference) -> None:
        self.differing += 1
        if len(self.differences) < MOST_SHOWN:
            self.differences.append(difference)

    def _round(self, each: Round) -> list[Event]:
        self._clock = (each.monotonic if each.monotonic >= 0 else float("inf"), each.wall)
        self._fires.begin(each)
        captured = [self._captured(came) for came in each.came if not came.kind]
        made: list[Event] = []
        if captured:
            made += [self._numbered(event) for event in self._read(captured)]
        self.reading.recorded.clear()
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
            self.reading.recorded[id(frame)] = came.answer
        return Captured(frame, came.source, came.seq, came.time, came.error, came.monotonic)


class _Fires:
    """Gives the steps the triggers from outside, each at the place where the scan took it. The first of the steps."""

    name = "fires"

    def __init__(self, steps: Sequence[Any]) -> None:
        self._again = [step.again for step in steps if hasattr(step, "again")]
        self._round = Round()
        self._came = 0

    def begin(self, each: Round) -> None:
        self._round, self._came = each, 0

    def wants(self, captured: Captured) -> str:
        self._came += 1
        self._fire(self._came)
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        if captured.seq < 0:  # a notice; triggers are taken before a camera that was removed goes
            self._came += 1
            self._fire(self._came)
        return [event]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        self._fire(-1)
        return []

    def status(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

    def _fire(self, place: int) -> None:
        for came, source, reference, at in self._round.fires:
            if came == place:
                for again in self._again:
                    again(source, reference, at)


class _Replayed:
    """A reading whose latencies, and what hangs on time or on a function of the user's own, are the recorded ones."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.recorded: dict[int, Event] = {}
        self.given_codes = 0
        self.model, self.codes, self.text, self.region = reading.model, reading.codes, reading.text, reading.region
        self.line = reading.line

    def answer(self, frame: Any) -> Answer:
        return self._as_recorded(frame, self._reading.answer(frame))

    def answers(self, frames: Sequence[Any]) -> list[Answer]:
        found = self._reading.answers(frames)
        return [self._as_recorded(frame, answer) for frame, answer in zip(frames, found, strict=True)]

    def _as_recorded(self, frame: Any, answer: Answer) -> Answer:
        then = self.recorded.pop(id(frame), {})
        fields = dict(answer.fields)
        if "codes" in fields and not fields["codes"] and then.get("codes"):
            fields["codes"] = then["codes"]
            self.given_codes += 1
        latency = then.get("latency_ms", 0.0)
        return answer._replace(fields=fields, latency_ms=latency if isinstance(latency, int | float) else 0.0)


class _NoCodes:
    """Stands for a function that read codes, which no file can hold."""

    def __call__(self, frame: Any) -> list[Any]:
        return []


def _reading(about: Recording, bundle: Any, backend: str | None, stack: contextlib.ExitStack) -> Reading:
    if bundle is not None and about.model is None:
        raise UsageError("the scan had no model that another bundle could stand for", "leave --bundle out")
    model = _opened(about.model, bundle, backend, stack) if about.model is not None else None
    text = _opened(about.text, None, backend, stack) if about.text is not None else None
    codes: Any = None
    if about.codes is not None:  # plain reading only: enhanced pictures are tried while there is time
        codes = _NoCodes() if about.codes < 0 else CodeReader(0, about.formats or None)
    if model is None and text is None and codes is None:
        raise UsageError("the recording does not say what the scan read with", "record with Incidents.watch(reading, steps)")
    region, line = (Region(*part) if part else None for part in (about.region, about.line))
    return Reading(model, codes, text, region, line)


def _opened(record: RecordedModel, bundle: Any, backend: str | None, stack: contextlib.ExitStack) -> Model:
    place = record.path if bundle is None else bundle
    precision: Any = "auto" if bundle is not None else "float" if record.graph == FLOAT_GRAPH else "int8"
    try:
        return stack.enter_context(Model.open(place, backend or record.backend, precision=precision, beam=record.beam))
    except EdgekitError as error:
        ran = f"the scan ran {record.digest[:12]} on {record.backend}"
        hint = f"name the bundle, or one that runs here: --bundle B ({ran}; --backend onnxruntime runs it anywhere)"
        raise BundleError(error.message, hint) from None


def _changed(name: str, record: RecordedModel | None, model: Any) -> list[str]:
    if record is None or model is None or model.bundle.digest == record.digest:
        return []
    return [f"the {name} was {record.digest[:12]}, {model.bundle.path} is {model.bundle.digest[:12]}"]


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


def _resume(steps: Sequence[Any], recorded: Recorded) -> list[str]:
    """Give the steps the state they had; the names of those that begin without."""
    known: dict[str, Iterator[StepState]] = {}
    for record in recorded.about.steps:
        if record.known:
            known[record.name] = iter([*known.get(record.name, ()), record])
    fresh = []
    for step in steps:
        then = next(known.get(step.name, iter(())), None)
        if then is not None and hasattr(step, "resume"):
            step.resume(_with_frames(then.state, recorded))
        else:
            fresh.append(step.name)
    return fresh


def _with_frames(value: Any, recorded: Recorded) -> Any:
    if isinstance(value, dict):
        if value.keys() == {FRAME}:
            return recorded.frame(int(value[FRAME]))
        return {key: _with_frames(each, recorded) for key, each in value.items()}
    return [_with_frames(each, recorded) for each in value] if isinstance(value, list) else value

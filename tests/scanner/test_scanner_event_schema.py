"""Every kind of event that a scan sends fits the published schema, field by field; no kind is missing from it."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest

import edgekit.scanner
from edgekit.bundle import Bundle
from edgekit.data import load
from edgekit.errors import BackendError
from edgekit.manifest import Tolerance
from edgekit.runtime import Model
from edgekit.scanner import Captured, Code, Notice, Pipeline, Scanner, event_schema, open_sources, scan
from edgekit.scanner.gs1 import parse_gs1
from edgekit.scanner.schema import KINDS
from edgekit.scanner.steps.crosscheck import CrossCheck
from edgekit.scanner.steps.duplicates import Duplicates
from edgekit.scanner.steps.selftest import SelfTest
from edgekit.scanner.steps.triggers import Trigger, TriggerOptions
from edgekit.scanner.steps.votes import Votes

Event = dict[str, Any]
SCHEMA = event_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def check(events: list[Event], *kinds: str) -> None:
    """All fit, all their fields are documented, and these kinds are among them."""
    for event in events:
        VALIDATOR.validate(event)
        form = SCHEMA["$defs"][KINDS[event.get("event", "")].__name__]
        assert event.keys() <= form["properties"].keys(), event
    assert set(kinds) <= {event.get("event", "") for event in events}


def test_the_schema_is_one_and_names_every_kind_once() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for kind, form in KINDS.items():
        named = SCHEMA["$defs"][form.__name__]["properties"]["event"]
        assert named is False if not kind else kind in named["enum"]
        assert SCHEMA["$defs"][form.__name__]["description"]
    assert sum(len(each["properties"]["event"]["enum"]) for each in SCHEMA["$defs"].values() if _kinds(each)) == len(KINDS) - 1


def _kinds(form: dict[str, Any]) -> bool:
    return bool(form["properties"].get("event"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"event": "surprise"},
        {"event": "gap"},
        {"id": ""},
        {"time": "2026-01-31 12:00"},
        {"score": 1.5},
        {"codes": [{"text": "1"}]},
        {"schema": 2},
    ],
)
def test_what_is_no_event_does_not_fit(wrong: Event) -> None:
    good = {"schema": 1, "id": "a-0", "time": "2026-01-31T12:00:00.000Z", "source": "s", "seq": 0}
    VALIDATOR.validate(good)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate({**good, **wrong})


def sent_in_code() -> set[str]:
    """Kinds that the scanner's source names: in a dict's or an assigned ``"event"``, and in what cameras say."""
    found: set[str] = set()
    for path in Path(edgekit.scanner.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values: list[ast.expr | None] = []
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                values = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "event"]
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                key = node.targets[0].slice
                values = [node.value] if isinstance(key, ast.Constant) and key.value == "event" else []
            elif isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                values = [node.args[0]] if name in ("Notice", "_say") and len(node.args) >= 3 else []
            found |= {each.value for each in values if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    return found


def test_no_kind_in_the_code_is_missing_from_the_schema() -> None:
    named = sent_in_code()
    assert {"drift", "selftest", "model", "incident", "no_read", "gap", "camera"} <= named  # the search finds what it should
    assert named <= KINDS.keys()


def renamed(bundle: Bundle, path: Path) -> Path:
    """The same model, another digest."""
    with Bundle.create(path) as draft:
        for name in bundle.manifest.files:
            draft.write(name, bundle.read(name))
        draft.manifest = msgspec.structs.replace(bundle.manifest, labels=tuple("abcdefghij"))
    return path


def test_a_scan_with_everything_on(digits_bundle: Bundle, tmp_path: Path) -> None:
    """Things come and go, the light goes down, a bundle is offered; each frame without a code is a no-read."""
    split = load("digits").test
    digits = [np.pad(split.read(i), 20) for i in range(40)]
    events: list[Event] = []
    wanted = {"drift", "selftest", "no_read", "incident"}

    def frames() -> Iterator[Any]:
        end = time.monotonic() + 40
        number = 0
        while time.monotonic() < end:
            kinds = {event.get("event") for event in events}
            if wanted <= kinds and any(event.get("state") == "refused" for event in events):
                return
            there = number % 8 > 1
            frame = digits[number % 40] if there else np.zeros_like(digits[0])
            yield frame // 4 if number > 80 else frame
            time.sleep(0.004)
            number += 1

    tables = {
        "model": {"bundle": str(digits_bundle.path)},
        "codes": {"budget_ms": 0},
        "votes": {},
        "trigger": {"mode": "presentation", "leave_ms": 5, "time_ms": 500, "scene_share": 0.01},
        "crosscheck": {},
        "duplicates": {},
        "ring": {"folder": str(tmp_path / "ring"), "keep": "both"},
        "drift": {"every_frames": 1, "window_frames": 20, "learn_frames": 20},
        "selftest": {},
        "shadow": {"candidate": str(renamed(digits_bundle, tmp_path / "new.edge")), "frames": 10, "poll_s": 0.05},
        "incidents": {"folder": str(tmp_path / "incidents"), "seconds": 1},
    }
    Scanner(tables, frames=frames(), on_event=events.append).run()
    check(events, "no_read", "drift", "selftest", "model", "incident")
    assert {event["state"] for event in events if event.get("event") == "model"} >= {"offered", "refused"}
    assert all(event["file"] for event in events if event.get("event") == "incident")
    assert any("kept" in event for event in events)


def test_frames_of_a_folder(kit: Any, cli: Any, digits_bundle: Bundle, pictures: Path, tmp_path: Path) -> None:
    sink = tmp_path / "e.jsonl"
    scan(digits_bundle, codes=True, source=str(pictures), sinks=[f"jsonl:{sink}"])
    check(kit.read_events(sink), "", "damaged")


class Broken:
    """A model that breaks down on a frame with a white corner."""

    def __init__(self, model: Model) -> None:
        self.bundle, self._model = model.bundle, model

    def __call__(self, frame: Any) -> Any:
        if frame.flat[0] == 255:
            raise BackendError("it broke down", "restart it")
        return self._model(frame)


class Says:
    """In a text reader's place."""

    name = "says"

    def wants(self, captured: Captured) -> str:
        return ""

    def frame(self, captured: Captured, event: Event) -> list[Event]:
        return [event if "event" in event else {**event, "text": "(01)04006381333931(10)AB1Z(21)7", "text_score": 0.9}]

    def due(self, monotonic: float, wall: float) -> list[Event]:
        return []

    def status(self) -> Event:
        return {}

    def close(self) -> None:
        pass


def read(frame: Any) -> list[Code]:
    good, bad = "010400638133393110AB12\x1d219", "010400638133393210AB12"
    both = [Code(text, "Data Matrix", parse_gs1(text)) for text in (good, bad)]
    return [*both, Code("1234", "ITF", None), Code("1234", "ITF", None)]


@pytest.mark.parametrize("mode", ["continuous", "burst"])
def test_frames_with_codes_and_text_and_what_a_camera_says(digits_bundle: Bundle, mode: Any) -> None:
    frames = [np.zeros((28, 28), np.uint8), np.zeros((28, 28, 2), np.uint8), np.full((28, 28), 255, np.uint8), None]

    def source(trigger: Trigger) -> Iterator[Any]:
        yield Notice("camera", "cam", 1e9, 0.0, {"state": "up", "width": 28, "height": 28})
        trigger.fire("cam", "parcel 1")
        for seq, frame in enumerate(frames):
            yield Captured(frame, "cam", seq, 1e9, "cut off" if frame is None else "", time.monotonic())
        yield Notice("gap", "cam", 1e9, 0.0, {"seconds": 1.5, "reason": "no picture came"})
        yield Notice("gap", "cam", 1e9, 0.0, {"frames": 2, "reason": "damaged"})
        yield Notice("gap", "cam", 1e9, 0.0, {"packets": 2, "reason": "not decodable"})
        trigger.fire("cam")
        time.sleep(0.01)

    events: list[Event] = []
    trigger = Trigger(TriggerOptions(mode=mode, time_ms=500), cameras=["cam"])
    steps = [Says(), Votes(), trigger, CrossCheck(), Duplicates()]
    with Model.open(digits_bundle.path) as model:
        Pipeline(source=source(trigger), model=Broken(model), codes=read, steps=steps, on_event=events.append).run()
    if mode == "continuous":
        check(events, "", "camera", "gap", "unfit", "failed", "damaged")
    else:
        check(events, "", "camera", "gap", "no_read")
        assert "no frame" in {event.get("cause") for event in events}
    (frame,) = [event for event in events if "event" not in event]
    assert {"conflict", "doubtful", "agreement", "unconfirmed"} <= frame.keys()


def test_a_self_test_that_fails_or_is_hot(digits_bundle: Bundle, tmp_path: Path) -> None:
    wrong = msgspec.structs.replace(digits_bundle.manifest, golden={"model.onnx": Tolerance("relative", -1.0)})
    events: list[Event] = []
    with Model.open(Bundle(digits_bundle.path, wrong)) as model:
        Pipeline(source=iter([None]), model=model, steps=[SelfTest(model)], on_event=events.append).run()
    check(events, "selftest")
    assert events[0]["ok"] is False


def test_a_camera_that_is_not_there(kit: Any) -> None:
    cameras = open_sources({"dock": f"rtsp://127.0.0.1:{kit.free_port()}/x"})
    events: list[Event] = []

    def source() -> Iterator[Any]:
        for item in cameras:
            yield item
            if events:
                break
        cameras.close()  # type: ignore[attr-defined]

    Pipeline(source=source(), codes=read, on_event=events.append).run()
    check(events, "camera")
    assert events[0]["state"] == "down"

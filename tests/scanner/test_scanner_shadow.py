"""A new model beside the old one: refused, promoted, kept."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgekit.bundle import Bundle
from edgekit.runtime import Model, Prediction
from edgekit.runtime.golden import Golden
from edgekit.runtime.onnxruntime import OnnxRuntimeRunner
from edgekit.scanner import Captured, Pipeline, Scanner
from edgekit.scanner.steps.shadow import Shadow, ShadowedModel, ShadowOptions
from edgekit.scanner.trial import Shown, Trial

from .digit_frames import frames, renamed


def wait_for(condition: Any, model: ShadowedModel, step: Shadow, digits: list[Any]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    end = time.monotonic() + 30
    seq = 0
    while not condition(events):
        assert time.monotonic() < end, events
        captured = next(frames(digits, 1, seq))
        prediction = model(captured.frame)
        events += step.frame(captured, {"label": prediction.label})[1:] + step.due(0.0, 0.0)
        seq += 1
        time.sleep(0.001)
    return events


def ended(events: list[dict[str, Any]]) -> bool:
    return any(event["state"] in ("promoted", "refused") for event in events)


def test_a_like_bundle_is_promoted_and_every_model_closed(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"open": 0, "closed": 0}
    enter, leave = OnnxRuntimeRunner.__enter__, OnnxRuntimeRunner.__exit__

    def counted_enter(self: Any) -> Any:
        counts["open"] += 1
        return enter(self)

    def counted_leave(self: Any, *args: Any) -> None:
        counts["closed"] += 1
        leave(self, *args)

    monkeypatch.setattr(OnnxRuntimeRunner, "__enter__", counted_enter)
    monkeypatch.setattr(OnnxRuntimeRunner, "__exit__", counted_leave)
    options = ShadowOptions(frames=20, p99_share=50, busy_share=1.0)
    model = ShadowedModel(Model.open(digits_bundle.path).__enter__(), options)
    step = Shadow(model)
    new = renamed(digits_bundle, tmp_path / "new.edge")
    model.offer(new)
    events = wait_for(ended, model, step, digits)
    assert [event["state"] for event in events] == ["offered", "promoted"]
    assert events[-1]["agreement"] == 1
    assert events[-1]["frames"] == 20
    assert model.bundle.digest == Bundle.open(new).digest == events[-1]["digest"]
    model.close()
    assert counts["open"] == counts["closed"] == 4


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "otherwise": ({"labels": tuple("9876543210")}, {}, "answers otherwise"),
    "labels": ({"labels": tuple("0123456789a")}, {}, "other labels than the model that runs: only one of them has a"),
    "task": ({"task": "tensor"}, {}, "is for tensor"),
    "input": ({"preprocessing": None}, {}, "takes raw tensors"),
    "golden": ({"wrong": True}, {}, "misses the golden outputs"),
    "untested": ({"golden": {}}, {}, "states no tolerance"),
    "slow": ({}, {"p99_share": 0.001}, "its p99 is"),
    "corrupt": ({}, {}, "damaged"),
    "missing": ({}, {}, "no bundle"),
    "crash": ({}, {}, "crashed (SIGSEGV)"),
    "hang": ({}, {"open_s": 0.3}, "was not open within 0.3 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_bundle_changes_nothing(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, how, words = FAULTS[fault]
    path = renamed(digits_bundle, tmp_path / "new.edge", **changes)
    if fault == "corrupt":
        graph = path / "model.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    elif fault in ("crash", "hang"):
        what = "os.kill(os.getpid(), 11)" if fault == "crash" else "time.sleep(60)"
        monkeypatch.setattr("edgekit.scanner.probe._CHILD", f"import os, time; {what}")
    elif fault in ("otherwise", "slow"):  # it passes that
        monkeypatch.setattr("edgekit.scanner.steps.shadow.probe", lambda *about: None)
    report = tmp_path / "report.json"
    options = ShadowOptions(**{"frames": 20, "busy_share": 1.0, "report": str(report), **how})
    model = ShadowedModel(Model.open(digits_bundle.path).__enter__(), options)
    step = Shadow(model)
    model.offer(tmp_path / "none.edge" if fault == "missing" else path)
    events = wait_for(ended, model, step, digits)
    assert events[-1]["state"] == "refused"
    assert words in events[-1]["reason"]
    assert model.bundle.digest == digits_bundle.digest
    assert model(digits[0]).label is not None
    assert ('"seq"' in report.read_text()) == (fault == "otherwise")
    model.close()


def test_a_bundle_that_hangs_on_a_frame_is_given_up(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()
    monkeypatch.setattr("edgekit.scanner.steps.shadow.probe", lambda *about: None)
    with monkeypatch.context() as patch:
        patch.setattr("edgekit.scanner.trial.Trial.run", lambda self, shown: stuck.wait(20))
        options = ShadowOptions(frames=5, busy_share=1.0, open_s=0.2, p99_share=50)
        model = ShadowedModel(Model.open(digits_bundle.path).__enter__(), options)
        step = Shadow(model)
        model.offer(renamed(digits_bundle, tmp_path / "new.edge"))
        events = wait_for(ended, model, step, digits)
    assert "no answer to a frame for 0.2 s" in events[-1]["reason"]
    stuck.set()
    model.options = msgspec.structs.replace(options, open_s=60.0)
    model.offer(tmp_path / "new.edge")  # the next one is tried as if nothing had been
    assert wait_for(ended, model, step, digits)[-1]["state"] == "promoted"
    assert model.take_events() == []
    model.close()


def test_a_candidate_that_appears_takes_over_without_a_frame_lost_and_stays(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, capsys: Any
) -> None:
    candidate, current = tmp_path / "releases", tmp_path / "current"
    candidate.mkdir()
    new = renamed(digits_bundle, candidate / "new.edge")
    options = {"candidate": str(current), "frames": 20, "p99_share": 50, "busy_share": 1.0, "poll_s": 0.02}
    tables = {"model": {"bundle": str(digits_bundle.path)}, "shadow": options}
    seen: list[dict[str, Any]] = []

    def passing() -> Iterator[Any]:
        end, more = time.monotonic() + 60, 10
        for number in itertools.count():
            if number == 5:
                current.symlink_to(new)
            if any(event.get("state") in ("promoted", "refused") for event in seen):
                more -= 1
            if not more or time.monotonic() > end:
                return
            yield digits[number % len(digits)]

    scanner = Scanner(tables, frames=passing(), on_event=seen.append)
    summary = scanner.run()
    assert [event["state"] for event in seen if event.get("event") == "model"] == ["offered", "promoted"]
    assert [event["seq"] for event in seen if "label" in event] == list(range(summary.captured))
    digest = Bundle.open(new).digest
    assert summary.model["digest"] == digest

    current.unlink()
    again = Scanner(tables, frames=digits[:2]).run()
    assert again.model["digest"] == digest
    (new / "model.onnx").write_bytes(b"torn")
    third = Scanner(tables, frames=digits[:2]).run()
    assert (third.model["digest"], third.inferred) == (digits_bundle.digest, 2)
    assert "the bundle that was promoted cannot run" in capsys.readouterr().err


def test_several_cameras_in_batches_miss_nothing_at_the_switch(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.scanner.steps.shadow.probe", lambda *about: None)
    model = ShadowedModel(Model.open(digits_bundle.path).__enter__(), ShadowOptions(frames=20, p99_share=50, busy_share=1.0))
    new = renamed(digits_bundle, tmp_path / "new.edge")
    model.offer(new)

    class Cameras:
        seq, left = 0, 10

        def __iter__(self) -> Iterator[Captured]:
            end = time.monotonic() + 30
            while self.left and time.monotonic() < end:
                self.left -= bool(model.promoted or model.refused)
                yield self.more(1)[0]

        def more(self, count: int) -> list[Captured]:
            self.seq += count
            return [Captured(digits[i % 1000], f"cam {i % 3}", i, 1e9, "", 0.0) for i in range(self.seq - count, self.seq)]

    source, events = Cameras(), []  # type: ignore[var-annotated]
    summary = Pipeline(source=source, model=model, steps=[Shadow(model)], batch=4, on_event=events.append).run()
    assert [event["seq"] for event in events if "label" in event] == list(range(source.seq))
    assert summary.captured == summary.inferred == source.seq
    assert (model.promoted, model.bundle.digest) == (1, Bundle.open(new).digest)
    model.close()


def test_a_bundle_that_does_not_open_here_is_given_up(
    digits_bundle: Bundle, digits: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did in a process of its own; what is offered after it has its trial."""
    stuck, golden = threading.Event(), Golden.check
    model = ShadowedModel(Model.open(digits_bundle.path).__enter__(), ShadowOptions(frames=20, p99_share=50, open_s=0.5))
    step = Shadow(model)
    with monkeypatch.context() as patch:
        patch.setattr("edgekit.scanner.steps.shadow.probe", lambda *about: None)
        patch.setattr(Golden, "check", lambda self, runner: (stuck.wait(60), golden(self, runner))[1])
        model.offer(renamed(digits_bundle, tmp_path / "hangs.edge"))
        events = wait_for(ended, model, step, digits)
        assert "did not open here for 0.5 s" in events[-1]["reason"]
    model.offer(tmp_path / "none.edge")
    assert "no bundle" in wait_for(ended, model, step, digits)[-1]["reason"]
    stuck.set()
    model.close()


def test_answers_that_are_no_good_reads_any_more_are_not_alike(digits: list[Any]) -> None:
    old, new = ((lambda frame, score=score: Prediction("7", score, (), None, 1.0)) for score in (0.9, 0.3))
    for good_score, alike in ((0.5, 0), (0.2, 3), (0.95, 3)):
        trial = Trial(old, new, frames=3, agreement=0.5, p99_share=50, good_score=good_score)  # type: ignore[arg-type]
        for seq in range(3):
            trial.run(Shown("c", seq, digits[seq]))
        assert trial.alike == alike

"""`Pipeline` as a library: every frame accounted for, whatever comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgekit.bundle import Bundle
from edgekit.errors import BackendError, UsageError
from edgekit.runtime import Model
from edgekit.scanner import (
    CameraOptions,
    Cameras,
    Captured,
    Code,
    Notice,
    Pipeline,
    Stop,
    Summary,
    frames_of,
    open_source,
    scan,
)

from .camera_kit import until_given


class Memory:
    """A sink of three lines, as a user would write it."""

    name = "memory"

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def send(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def flush(self, patience_s: float = 0.0) -> None:
        pass

    def status(self) -> dict[str, Any]:
        return {"sink": self.name, "sent": len(self.events)}

    def close(self) -> None:
        pass


GOOD, DAMAGED, UNFIT = "good", "damaged", "unfit"


def captured(kind: str, seq: int) -> Captured:
    if kind == DAMAGED:
        return Captured(None, f"{seq}.png", seq, 0.0, "torn")
    shape = (30 + seq, 28, 3) if kind == GOOD else (4, 4, 7)
    return Captured(np.full(shape, seq % 256, np.uint8), f"{seq}.png", seq, 1e9 + seq)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(kinds=st.lists(st.sampled_from([GOOD, GOOD, DAMAGED, UNFIT]), max_size=30), with_codes=st.booleans())
def test_captured_is_inferred_plus_dropped(digits_bundle: Bundle, kinds: list[str], with_codes: bool) -> None:
    sink = Memory()
    source = (captured(kind, i) for i, kind in enumerate(kinds))
    with Model.open(digits_bundle.path) as model:
        codes = (lambda frame: [Code("A", "QR Code", None)]) if with_codes else None
        summary = Pipeline(source=source, model=model, codes=codes, sinks=[sink]).run()
    counts = {reason: kinds.count(reason) for reason in (DAMAGED, UNFIT) if reason in kinds}
    assert summary.captured == summary.events == len(sink.events) == len(kinds)
    assert summary.dropped == counts
    assert summary.inferred == summary.captured - sum(counts.values()) == kinds.count(GOOD)
    assert summary.codes == (summary.inferred if with_codes else 0)
    assert len({event["id"] for event in sink.events}) == len(kinds)
    for kind, event in zip(kinds, sink.events, strict=True):
        assert ("label" in event) == (kind == GOOD)
        assert ("codes" in event) == (kind == GOOD and with_codes)
        assert event.get("event") == (None if kind == GOOD else kind)
        assert ("reason" in event) == (kind != GOOD)


def test_a_model_that_breaks_down_drops_frames_with_the_reason(digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.open(digits_bundle.path) as model:
        scanner = Pipeline(source=[captured(GOOD, i) for i in range(3)], model=model)

        def broken(feeds: Any) -> Any:
            raise BackendError("the device is gone")

        monkeypatch.setattr(model, "run", broken)
        summary = scanner.run()
    assert (summary.inferred, summary.dropped) == (0, {"failed": 3})
    assert summary.latency_ms == {"p50": None, "p99": None}


def test_scores_that_are_no_numbers_are_not_reported_as_answers(digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Memory()
    with Model.open(digits_bundle.path) as model:
        monkeypatch.setattr(model, "run", lambda feeds: {model.outputs[0].name: np.full((1, 10), np.nan, np.float32)})
        summary = Pipeline(source=[captured(GOOD, 0)], model=model, sinks=[sink]).run()
    assert summary.dropped == {"failed": 1}
    assert "label" not in sink.events[0]


def test_time_is_the_capture_time_in_utc() -> None:
    sink = Memory()
    Pipeline(source=[captured(GOOD, 0)], codes=lambda frame: [], sinks=[sink]).run()
    assert sink.events[0]["time"] == "2001-09-09T01:46:40.000Z"


def test_stop_ends_after_the_frame_in_hand() -> None:
    stop, sink = Stop(), Memory()

    def endless() -> Any:
        for seq in range(10**9):
            if seq == 5:
                stop.set()
            yield captured(GOOD, seq % 200)

    summary = Pipeline(source=endless(), codes=lambda frame: [], sinks=[sink], stop=stop).run()
    assert summary.captured == summary.events == len(sink.events) == 6


def test_nothing_to_read_with_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError):
        Pipeline(source=[])
    with Model.open(tiny_bundle.path) as model, pytest.raises(UsageError, match="raw tensors"):
        Pipeline(source=[], model=model)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    names = ["b.png", "a.png", "sub/c.png", "B.png", "10.png", "9.png"]
    (tmp_path / "sub").mkdir()
    for name in names:
        Image.new("L", (4, 4)).save(tmp_path / name)
    found = list(open_source(str(tmp_path)))
    assert [Path(c.source).relative_to(tmp_path).as_posix() for c in found] == sorted(names)
    assert [c.seq for c in found] == list(range(len(names)))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(share=st.integers(0, 99))
def test_a_truncated_picture_is_reported_never_raised(tmp_path: Path, share: int) -> None:
    whole = tmp_path / "whole.jpg"
    if not whole.exists():
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(whole)
    cut = tmp_path / "cut" / "cut.jpg"
    cut.parent.mkdir(exist_ok=True)
    data = whole.read_bytes()
    cut.write_bytes(data[: len(data) * share // 100])
    summary = scan(source=str(cut.parent), codes=True)
    assert summary.captured == 1
    assert summary.inferred + sum(summary.dropped.values()) == 1


def test_a_buffer_that_is_filled_again_does_not_change_what_was_seen() -> None:
    buffer = np.zeros((8, 8), np.uint8)

    def frames() -> Iterator[Any]:
        for value in range(5):
            buffer[:] = value
            yield buffer

    taken = [captured.frame for captured in frames_of(frames()) if captured is not None]
    assert [int(frame[0, 0]) for frame in taken if frame is not None] == [0, 1, 2, 3, 4]


def test_the_last_line_names_events_that_a_sink_lost() -> None:
    before = {"waiting": 3, "refused": 1, "dropped": {"most events": 30}}
    sinks = [
        {"sink": "http://a/", "sent": 9, "refused": 3, "dropped": {"most events": 35}, "before": before},
        {"sink": "jsonl:b", "sent": 9, "dropped": {}},
    ]
    none: Any = {"p50": None, "p99": None}
    summary = Summary(9, 9, 0, {}, 9, 0, sinks, [], [], none)
    assert summary.line() == "9 captured, 9 read, 0 codes; of the events for http://a/ 5 dropped and 2 refused"


def test_numbers_of_a_camera_go_on_however_many_came_and_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.scanner.sources.cameras.FORMER", 1)
    with Cameras(["pattern:64x48@5"], CameraOptions(stall_s=0.6)) as cameras:
        cameras.add("pattern:32x32@100", "second")
        last = until_given(cameras, "second").seq
        cameras.remove("second")
        for name in ("third", "fourth"):
            cameras.add("pattern:8x8@1", name)
            cameras.remove(name)
        cameras.add("pattern:32x32@100", "second")
        assert (again := until_given(cameras, "second").seq) > last
        join = cameras._cameras["second"].join
        monkeypatch.setattr(cameras._cameras["second"], "join", lambda: (time.sleep(0.5), join()))  # it takes its time to go
        going = threading.Thread(target=cameras.remove, args=("second",))
        going.start()
        while "second" in cameras._cameras:
            time.sleep(0.01)
        cameras.add("pattern:32x32@100", "second")
        going.join()
        states = []
        for item in cameras:
            if isinstance(item, Notice) and item.source == "second":
                states.append(item.details["state"])
            elif isinstance(item, Captured) and item.source == "second":
                assert item.seq > again
                break
        assert states[-2:] == ["removed", "up"]

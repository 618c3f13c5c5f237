"""Triggers, votes, duplicates, the ring of frames and the cross-check, as the pipeline runs them."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.scanner import Captured, Code, Notice, Pipeline
from edgekit.scanner.events import encode
from edgekit.scanner.steps.crosscheck import CrossCheck
from edgekit.scanner.steps.duplicates import DuplicateOptions, Duplicates
from edgekit.scanner.steps.harvest import Harvest, HarvestOptions
from edgekit.scanner.steps.incident import IncidentOptions, Incidents
from edgekit.scanner.steps.noread import Cause
from edgekit.scanner.steps.ring import Ring, RingOptions
from edgekit.scanner.steps.triggers import NO_TRIGGER, Trigger, TriggerOptions
from edgekit.scanner.steps.votes import VoteOptions, Votes

Event = dict[str, Any]
EMPTY, THING = np.full((24, 32), 90, np.uint8), np.full((24, 32), 90, np.uint8)
THING[6:18, 8:24] = 220


def shot(seq: int, at: float, code: int = 0, camera: str = "camera:0", there: bool = True, wall: float = 0.0) -> Captured:
    """A frame; its first pixel is the code that is on it, 0 for none."""
    frame = (THING if there else EMPTY).copy()
    frame[0, 0] = code
    return Captured(frame, camera, seq, 1e9 + wall + at, "", at)


def read(frame: np.ndarray[Any, Any]) -> list[Code]:
    return [Code(f"C{frame.flat[0]}", "Code 128", None)] if frame.flat[0] else []


def unclear(frame: Any, event: Any) -> Cause:
    return Cause("unclear", {})


class Run:
    """A pipeline over frames and fires ``(at, reference)`` in the order of their times; the clock is theirs."""

    def __init__(self, items: list[Any], steps: list[Any], trigger: Trigger | None = None) -> None:
        self.now = 0.0
        self.trigger, self.items = trigger, items
        if trigger is not None:
            trigger._clock = lambda: self.now
        self.events: list[Event] = []
        self.pipeline = Pipeline(source=self._source(), codes=read, steps=steps, on_event=self.events.append)
        with pytest.MonkeyPatch.context() as patch:  # of this module only: the pipeline's clock is the frames'
            patch.setattr("edgekit.scanner.pipeline.time", SimpleNamespace(monotonic=lambda: self.now, time=time.time))
            self.summary = self.pipeline.run()

    def _source(self) -> Iterator[Any]:
        for item in self.items:
            if isinstance(item, Captured | Notice):
                self.now = item.monotonic
                yield item
            else:
                assert self.trigger is not None
                self.now = item[0]
                self.trigger.fire(None, item[1])


def triggered(items: list[Any], **options: Any) -> Run:
    trigger = Trigger(TriggerOptions(**options), diagnose=unclear)
    return Run(items, [trigger], trigger)


def test_continuous_changes_nothing() -> None:
    run = triggered([shot(i, i / 10, i % 2) for i in range(4)])
    assert [event["codes"] for event in run.events] == [[], [{"text": "C1", "format": "Code 128"}]] * 2
    assert not any("trigger" in event for event in run.events)
    assert run.summary.steps[0]["read_rate"] == 0.5


def test_single_ends_with_the_first_good_read() -> None:
    items = [shot(0, 0.0), (0.05, "box 7"), *(shot(i, i / 10, code=5 if i == 3 else 0) for i in range(1, 6))]
    run = triggered(items, mode="single")
    (event,) = run.events
    assert event["trigger"] == {"mode": "single", "number": 0, "frames": 3, "ms": 250.0, "reference": "box 7"}
    assert (event["seq"], [code["text"] for code in event["codes"]]) == (3, ["C5"])
    assert run.summary.dropped == {NO_TRIGGER: 3}


def test_a_single_trigger_without_a_read_says_so_once() -> None:
    run = triggered([shot(0, -1.0), (0.0, ""), *(shot(i, i / 4) for i in range(1, 9))], mode="single", time_ms=1000)
    (event,) = run.events
    assert (event["event"], event["cause"], event["trigger"]["frames"], event["trigger"]["ms"]) == (
        "no_read",
        "unclear",
        4,
        1000,
    )
    assert run.summary.steps[0]["causes"] == {"unclear": 1}


def test_burst_takes_so_many_frames_and_all_their_codes() -> None:
    run = triggered([shot(0, -1.0), (0.0, ""), *(shot(i, i / 100, i) for i in range(1, 9))], mode="burst", frames=3)
    (event,) = run.events
    assert [code["text"] for code in event["codes"]] == ["C1", "C2", "C3"]
    assert run.summary.inferred == 3


def test_external_goes_on_to_the_next_trigger_and_frames_before_it_do_not_count() -> None:
    run = triggered(
        [shot(0, 0.0, 9), (0.1, "a"), shot(1, 0.2, 1), (0.3, "b"), shot(2, 0.4, 2), shot(3, 2.0, 3)], mode="external"
    )
    assert [(e["trigger"]["reference"], [c["text"] for c in e["codes"]]) for e in run.events] == [("a", ["C1"]), ("b", ["C2"])]


def test_a_trigger_without_frames_is_a_no_read_too() -> None:
    (event,) = triggered([(0.1, "lonely")], mode="single").events
    assert (event["event"], event["cause"], event["seq"], event["trigger"]["reference"]) == (
        "no_read",
        "no frame",
        -1,
        "lonely",
    )


def test_presentation_begins_and_ends_with_the_thing() -> None:
    there = [0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0]
    items = [shot(i, i / 5, code=7 if i == 3 else 0, there=bool(t)) for i, t in enumerate(there)]
    run = triggered(items, mode="presentation", time_ms=5000)
    assert [e.get("event") for e in run.events] == [None, "no_read"]
    assert [e["trigger"]["ms"] for e in run.events] == [400.0, 200.0]
    stays = triggered([shot(i, i / 5, there=i > 0) for i in range(40)] + [shot(40, 9.0, there=False)], mode="presentation")
    assert len(stays.events) == 1  # it stays: nothing new, and its going is nothing new either


def test_damaged_frames_and_notices_in_a_trigger() -> None:
    torn = Captured(None, "camera:0", 1, 1e9, "torn", 0.1)
    notice = Notice("gap", "camera:0", 1e9, 0.15, {"missing": 2})
    run = triggered([shot(0, -1.0), (0.0, ""), torn, notice, shot(2, 0.2, 4)], mode="single")
    assert [event.get("event") for event in run.events] == ["gap", None]
    assert run.events[1]["trigger"]["unread"] == {"damaged": 1}
    assert run.summary.dropped == {NO_TRIGGER: 1, "damaged": 1}


FIRED = st.sampled_from(["single", "burst", "external"])


@settings(deadline=None, max_examples=60)
@given(
    mode=FIRED,
    steps=st.lists(st.tuples(st.integers(0, 400), st.sampled_from(["frame", "frame", "good", "fire", "torn"])), max_size=40),
    wall=st.floats(-86400, 86400),
)
def test_every_frame_and_every_trigger_is_accounted_for(mode: Any, steps: list[tuple[int, str]], wall: float) -> None:
    now, seq = 10.0, 0
    items: list[Any] = []
    for wait, what in steps:
        now += wait / 1e3
        if what == "fire":
            items.append((now, str(len(items))))
        else:
            taken = shot(seq, now, int(what == "good"), wall=wall * (seq % 2))
            items.append(taken if what != "torn" else taken._replace(frame=None, error="torn"))
            seq += 1
    run = triggered(items, mode=mode, time_ms=500)
    assert run.summary.captured == seq == run.summary.inferred + sum(run.summary.dropped.values())
    references = [event["trigger"]["reference"] for event in run.events]
    assert references == [item[1] for item in items if not isinstance(item, Captured)]
    figures = run.summary.steps[0]
    assert figures["good"] + figures["no_read"] == figures["triggers"] == len(references)
    assert sum(event["trigger"]["frames"] for event in run.events) == run.summary.inferred


@settings(deadline=None, max_examples=60)
@given(
    reads=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 3), st.sampled_from("ab")), max_size=40),
    window=st.sampled_from([-1.0, 0.0, 300.0]),
    wall=st.floats(-86400, 86400),
)
def test_duplicates_within_a_window(reads: list[tuple[int, int, str]], window: float, wall: float) -> None:
    now, items = 0.0, []
    for seq, (wait, code, camera) in enumerate(reads):
        now += wait / 1e3
        items.append(shot(seq, now, code, camera, wall=wall * (seq % 2)))
    step = Duplicates(DuplicateOptions(window_ms=window))
    run = Run(items, [step])
    assert run.summary.inferred == len(items) == len(run.events) + step.status()["silent_frames"]
    let = {(event["source"], event["seq"]) for event in run.events}
    last: dict[tuple[str, int], float] = {}
    for item in items:
        assert item.frame is not None
        key = item.source, int(item.frame[0, 0])
        expected = key not in last or window == 0 or (window > 0 and item.monotonic - last[key] >= window / 1e3)
        assert ((item.source, item.seq) in let) == expected
        if expected:
            last[key] = item.monotonic


def test_duplicates_keep_what_else_an_event_says_and_their_memory_is_bounded() -> None:
    step = Duplicates(DuplicateOptions(window_ms=-1, per_format={"qr code": 0}, most_remembered=2))
    event = {"source": "a.png", "seq": 0, "time": "", "codes": [{"text": "1", "format": "EAN-13"}], "label": "box"}
    assert step.frame(shot(0, 0), event) == [event]
    assert step.frame(shot(1, 1), event)[0]["codes"] == []
    qr = {**event, "codes": [{"text": "1", "format": "QR Code"}] * 2}
    assert step.frame(shot(2, 2), qr) == [qr]
    for text in "2345":
        step.frame(shot(3, 3), {**event, "codes": [{"text": text, "format": "EAN-13"}]})
    assert step.status() == {"reported": 7, "suppressed": 1, "silent_frames": 0, "forgotten": 3, "remembered": 2}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 3)), max_size=30), st.integers(2, 4))
def test_votes_believe_what_enough_frames_say(reads: list[tuple[int, int]], hits: int) -> None:
    step = Votes(VoteOptions(hits=hits))
    now, seen = 0.0, []
    for seq, (wait, value) in enumerate(reads):
        now += wait / 1e3
        seen.append((now, value))
        code = {"text": str(value), "format": "ITF"}
        strong = {"text": "s", "format": "QR Code"}
        event = {"source": "camera:0", "seq": seq, "codes": [code, code, strong]}
        (answer,) = step.frame(shot(seq, now), event)
        enough = sum(v == value and now - at <= 0.35 for at, v in seen) >= hits
        assert answer["codes"] == ([code, code, strong] if enough else [strong])
        assert ("unconfirmed" in answer) == (not enough)
    step.close()
    figures = step.status()
    assert figures["confirmed"] + figures["unconfirmed"] == len(reads)
    assert figures["outvoted"] <= figures["unconfirmed"]


def test_votes_count_what_was_never_confirmed() -> None:
    step = Votes()
    for at, text in ((0.0, "123456"), (0.1, "12"), (0.2, "123456"), (5.0, "9")):
        step.frame(shot(0, at), {"source": "c", "codes": [{"text": text, "format": "ITF"}]})
    step.due(6.0, 0.0)
    assert step.status() == {"confirmed": 1, "unconfirmed": 3, "outvoted": 1}
    step.due(16.0, 0.0)
    assert step.status()["outvoted"] == 2


def test_votes_of_frames_that_waited_for_longer_than_the_window_count() -> None:
    """A slow reader: each frame is read 0.6 s after its capture."""
    step = Votes()
    for seq in range(10):
        at = seq / 10
        step.frame(shot(seq, at), {"source": "camera:0", "codes": [{"text": "123456", "format": "ITF"}]})
        step.due(at + 0.6, 0.0)
    assert step.status() == {"confirmed": 9, "unconfirmed": 1, "outvoted": 0}


def test_a_camera_that_is_gone_is_triggered_no_more_and_one_that_came_is() -> None:
    step = Trigger(TriggerOptions(mode="single", time_ms=100), cameras=["a", "b"], clock=lambda: 1.0)
    assert not step.fire("c")
    for name, state in (("b", "removed"), ("c", "up")):
        notice = Captured(None, name, -1, 1e9, "camera", 0.5)
        assert step.frame(notice, {"source": name, "event": "camera", "state": state})
    assert not step.fire("b")
    assert step.fire()
    assert step.fire("c")
    made = [*step.due(10.0, 0.0), *step.due(20.0, 0.0)]
    assert sorted(event["source"] for event in made) == ["a", "c", "c"]


def test_the_last_events_wait_for_no_file(tmp_path: Path) -> None:
    """A scan that has to end sends what its steps still have first; only then may frames be packed and files written."""
    incidents, harvest = Incidents(IncidentOptions(folder=str(tmp_path))), Harvest(HarvestOptions(folder=str(tmp_path)))
    for step in (incidents, harvest):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "flush", lambda patience_s=0.0: pytest.fail("it waited"))
            assert step.due(math.inf, 0.0) == []


@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(1, 40), max_size=15), frames=st.integers(1, 5), kilobytes=st.integers(1, 8))
def test_the_ring_never_exceeds_its_bounds(tmp_path_factory: Any, sizes: list[int], frames: int, kilobytes: int) -> None:
    folder = tmp_path_factory.mktemp("ring")
    options = RingOptions(str(folder), "both", most_frames=frames, most_megabytes=kilobytes / 1000)
    random = np.random.default_rng(0)
    ring = Ring(options)
    for seq, size in enumerate(sizes):
        if seq == 7:
            ring.close()
            ring = Ring(options)  # a restart
        captured = Captured(random.integers(0, 256, (size, size), np.uint8), "c", seq, 0.0)
        (event,) = ring.frame(captured, {"source": "c", "seq": seq, "codes": []})
        ring.flush()
        files = list(folder.iterdir())
        assert len(files) <= 2 * frames
        assert sum(file.stat().st_size for file in files) == ring.status()["bytes"] <= kilobytes * 1000
        assert len(files) == 2 * ring.status()["frames"]
        if (folder / event["kept"]).exists():  # one that is too large is not written
            kept = json.loads((folder / event["kept"]).with_suffix(".json").read_bytes())
            assert kept == event
    ring.close()


def test_the_ring_keeps_what_its_policy_says_and_a_broken_folder_stops_nothing(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "000000004-good.png").write_bytes(b"half of a pair")
    (tmp_path / "ring" / "notes.txt").write_text("not the ring's")
    trigger = Trigger(TriggerOptions("burst", frames=2), diagnose=unclear)
    ring = Ring(RingOptions(str(tmp_path / "ring")), trigger.picture)
    items = [shot(0, 0.0), (0.1, ""), shot(1, 0.2), shot(2, 0.3), (0.4, ""), shot(3, 0.5, 3), shot(4, 0.6)]
    run = Run(items, [trigger, ring], trigger)
    ring.flush()
    name, none = (event.get("kept") for event in run.events)
    assert none is None
    assert re.fullmatch(r"000000005-[0-9a-f]{8}-no-read\.png", name)
    names = {file.name for file in (tmp_path / "ring").iterdir()}
    assert names == {name, name.replace("png", "json"), "notes.txt"}
    for file in (tmp_path / "ring").iterdir():
        file.unlink()
    (tmp_path / "ring").rmdir()
    for seq in range(3):
        ring.frame(shot(seq, 0), {"source": "camera:0", "seq": seq, "codes": []})
    ring.flush()
    assert ring.status()["failed"] == 3
    assert capsys.readouterr().err.count("no frame can be kept") == 1


LABEL = {"01": "09501101530003", "17": "301231", "10": "AB-1028"}


@pytest.mark.parametrize(
    ("text", "agreement", "doubtful", "conflict"),
    [
        ("(01)09501101530003(17)301231(10)AB-1028", ["01", "10", "17"], [], []),
        ("(01) 0950 1101 5300 03 (10) A8-1O28", ["01"], ["10"], []),
        ("(10)AB-1029", [], [], ["10"]),
        ("LOT: AB-1028 EXP 2030-12-31", ["10", "17"], [], []),
        ("EXP 31.12.2030", ["17"], [], []),
        ("USE BY 30.12.31", [], ["17"], []),
        ("EXP 01.12.2030", [], [], ["17"]),
        ("9501101530003", ["01"], [], []),
        ("95O11O1530003", [], ["01"], []),
        ("FRAGILE", [], [], []),
    ],
)
def test_text_against_codes(text: str, agreement: list[str], doubtful: list[str], conflict: list[str]) -> None:
    event = {"text": text, "codes": [{"text": "", "format": "Data Matrix", "gs1": {"ais": LABEL}}]}
    (checked,) = CrossCheck().frame(shot(0, 0), event)
    assert checked.get("agreement", []) == agreement
    for name, expected in (("doubtful", doubtful), ("conflict", conflict)):
        assert [each["ai"] for each in checked.get(name, [])] == expected
        assert all(each["code"] == LABEL[each["ai"]] for each in checked.get(name, []))
    assert checked["codes"] == event["codes"]


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (TriggerOptions, {"mode": "sometimes"}),
        (TriggerOptions, {"time_ms": math.nan}),
        (TriggerOptions, {"inputs": ["tcp://:1"]}),
        (VoteOptions, {"hits": 1}),
        (DuplicateOptions, {"window_ms": -2}),
        (DuplicateOptions, {"per_format": {"ITF": math.inf}}),
        (RingOptions, {"folder": ""}),
        (RingOptions, {"folder": "x", "colour": "red"}),
    ],
)
def test_options_refuse_what_makes_no_sense(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, kind)


def test_a_frame_of_the_readers_own_kind_does_not_end_the_scan() -> None:
    """An application's own reader may take frames of five channels; why nothing was read on one nobody can say."""
    frames = [shot(i, i / 4)._replace(frame=np.zeros((20, 20, 5), np.uint8)) for i in range(1, 9)]
    trigger = Trigger(TriggerOptions(mode="single", time_ms=1000))
    run = Run([shot(0, -1.0), (0.0, ""), *frames], [trigger], trigger)
    assert [(event["event"], event["cause"]) for event in run.events] == [("no_read", "unclear")]


def test_folders_that_gave_nothing_for_long_are_triggered_no_more_and_hold_no_picture() -> None:
    at = 0.0
    step = Trigger(TriggerOptions(mode="burst", frames=1, time_ms=100), diagnose=unclear, clock=lambda: at)
    for seq in range(100):
        at = seq * 2.0
        step.fire()
        step.wants(shot(0, at, camera=f"in/{seq}/a.png"))
        step.due(at, 0.0)
    assert len(step.state()["cameras"]) < 40
    step.fire()
    assert len(step.due(300.0, 0.0)) < 80  # two triggers of each folder that is still one


def test_half_a_character_ends_no_scan() -> None:
    found = encode({"reference": "parcel \udc80", "codes": [{"text": "a\ud800"}]})
    assert json.loads(found) == {"reference": "parcel \\udc80", "codes": [{"text": "a\\ud800"}]}

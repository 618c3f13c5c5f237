"""Cameras: every frame accounted for, and what a camera's process may do is no harm to the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import DataError, MissingExtra, UsageError
from edgekit.scanner import (
    CameraOptions,
    Cameras,
    Captured,
    Notice,
    Pipeline,
    Scanner,
    Stop,
    frames_of,
    open_source,
    open_sources,
)
from edgekit.scanner.sources.address import safe_words, shown
from edgekit.scanner.sources.gaps import Backoff, GapWatch
from edgekit.scanner.sources.intake import MOST_NOTICES, Intake, Waiting
from edgekit.scanner.sources.slots import Link

from . import camera_kit
from .camera_kit import notices, of, until, until_given

FAST = CameraOptions(stall_s=0.6, retry_s=0.05, retry_most_s=0.1)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No process of a camera, no memory of its pictures, no zombie."""
    yield
    assert not camera_kit.left_over()


def number_of(frame: Any) -> int:
    """What a test picture carries in its first bytes."""
    return int.from_bytes(frame.reshape(-1)[:8].tobytes(), "little")


def pid_of(cameras: Cameras, name: str) -> int:
    return next(int(row["pid"]) for row in cameras.counts() if row["source"] == name)


# One after the other: a frame comes, the process reports lost ones, the scan takes, a notice is said, it ends.
STEPS = st.lists(st.sampled_from(["put", "put", "put", "lost", "take", "take", "frames", "say", "close"]), max_size=60)


@given(steps=STEPS, depth=st.integers(1, 5))
def test_captured_is_given_out_plus_dropped_plus_in_flight(steps: list[str], depth: int) -> None:
    left: list[int] = []
    intake = Intake(depth, lambda: None)
    came = given = 0
    for seq, step in enumerate(steps):
        if step == "put":
            intake.put(Waiting(seq, 0.0, 0.0, lambda: None, lambda seq=seq: left.append(seq)))  # type: ignore[misc]
            came += 1
        elif step == "lost":
            intake.lost("damaged", 2)
            came += 2
        elif step in ("take", "frames"):
            item = intake.take(frames_only=step == "frames")
            given += isinstance(item, Waiting)
            assert step == "take" or not isinstance(item, Notice)
        elif step == "say":
            intake.say(Notice("gap", "c", 0.0, 0.0, {}))
        else:
            intake.close("stopped")
        counts = intake.counts()
        assert counts["captured"] == came == given + sum(counts["dropped"].values()) + counts["in_flight"]
        assert (counts["given"], counts["in_flight"] <= depth) == (given, True)
    assert sum(counts["dropped"].get(each, 0) for each in ("queue full", "stopped")) == len(left) if steps else True


def test_the_oldest_waiting_frame_goes_first_and_notices_stay_in_their_place() -> None:
    intake = Intake(2, lambda: None)
    for seq in range(4):
        intake.say(Notice("gap", "c", 0.0, 0.0, {"before": seq}))
        intake.put(Waiting(seq, 0.0, 0.0, lambda: None, lambda: None))
    order = [item.seq if isinstance(item, Waiting) else item.details for item in iter(intake.take, None)]
    assert order == [{"before": 0}, {"before": 1}, {"before": 2}, 2, {"before": 3}, 3]
    for _ in range(MOST_NOTICES + 3):
        intake.say(Notice("gap", "c", 0.0, 0.0, {}))
    assert intake.counts()["notices_dropped"] == 3


def test_the_last_words_of_a_process_that_left_ours_unread_are_heard() -> None:
    ours, theirs = (Link(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    theirs.send({"frame": 39})
    ours.send({"free": [1, 0]})
    theirs.close()
    assert ours.receive() == ({"frame": 39}, [])
    assert ours.receive() is None
    ours.close()


def test_pauses_double_up_to_the_longest_and_a_flapping_camera_does_not_start_anew() -> None:
    backoff = Backoff(0.5, 4.0, chance=lambda: 1.0)
    assert [backoff.pause(0.0) for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, 4.0]
    backoff.up(10.0)
    assert backoff.pause(11.0) == 4.0
    backoff.up(20.0)
    assert backoff.pause(20.0 + Backoff.SETTLED_S) == 0.5
    assert Backoff(1.0, 4.0, chance=lambda: 0.0).pause(0.0) == 0.5


def test_a_gap_is_pictures_that_are_missing_not_late_ones() -> None:
    def judge(times: list[tuple[float, float | None]], waits: bool = False) -> list[float]:
        watch = GapWatch()
        return [round(watch.seen(monotonic, at, waits), 3) for monotonic, at in times]

    steady = [(i / 10, i / 10) for i in range(10)]
    assert not any(judge([*steady, (1.0, 1.0)]))
    assert judge([*steady, (2.9, 2.9)])[-1] == 2.0
    assert judge([*steady, (2.9, None)])[-1] == 2.0
    assert judge([*steady, (2.9, 1.0)])[-1] == 0  # late by our clock, not missing by the camera's
    assert judge([*steady, (1.0, 3601.0)])[-1] == 0  # the camera's clock was set
    assert judge([*steady, (2.9, 2.9)], waits=True)[-1] == 0
    seconds = [(float(i), float(i)) for i in range(10)]
    assert not any(judge(seconds))  # a camera of one picture a second misses none


def test_the_wall_clock_may_jump_by_a_day() -> None:
    from edgekit.scanner.sources.camera import Camera

    now = [1e9]

    def wall() -> float:
        now[0] += 86400.0 if int(now[0]) % 2 else -86399.0
        return now[0]

    camera = Camera("pattern:64x48@100,20", options=FAST, wall=wall)
    camera.start()
    camera.join(30)
    items = list(iter(camera.take, None))
    camera.leave("stopped")
    assert camera.counts()["captured"] == 20
    assert not notices(items, "gap")
    stamps = [item.monotonic for item in items]
    assert stamps == sorted(stamps)


def test_frames_come_whole_and_in_order_and_a_file_like_source_ends() -> None:
    with Cameras({"a": "pattern:64x48@0,40", "b": "pattern:48x32@0,40"}) as cameras:
        items = until(cameras, lambda items: False)
        for name, shape in (("a", (48, 64, 3)), ("b", (32, 48, 3))):
            frames = of(items, name)
            assert [frame.seq for frame in frames] == list(range(40)) == [number_of(frame.frame) for frame in frames]
            assert {frame.frame.shape for frame in frames if frame.frame is not None} == {shape}
        assert not [item for item in items if isinstance(item, Notice)]
        assert [row["state"] for row in cameras.counts()] == ["ended", "ended"]


def test_a_slow_scan_drops_the_oldest_by_name_and_reads_in_batches() -> None:
    options = CameraOptions(depth=2)
    with Cameras(["pattern:64x48@200"], options) as cameras:
        (first,) = of(until(cameras, lambda items: of(items, "pattern:64x48@200")), "pattern:64x48@200")
        time.sleep(0.2)
        more = cameras.more(8)
        assert 1 <= len(more) <= 2
        assert more[0].seq > first.seq + 1
        (row,) = cameras.counts()
        assert set(row["dropped"]) == {"queue full"}
    (row,) = cameras.counts()
    assert row["in_flight"] == 0
    assert row["captured"] == row["given"] + sum(row["dropped"].values())


def test_one_hangs_and_one_dies_while_others_go_on_and_both_come_back() -> None:
    names = {"hung": "pattern:64x48@50", "dead": "pattern:64x48@50", "well": "pattern:64x48@50"}
    with Cameras(names, FAST) as cameras:
        until(cameras, lambda items: {item.source for item in items if isinstance(item, Captured)} == set(names))
        hung, dead = pid_of(cameras, "hung"), pid_of(cameras, "dead")
        os.kill(hung, signal.SIGSTOP)
        os.kill(dead, signal.SIGKILL)
        begun = time.monotonic()
        items = until(cameras, lambda items: len(notices(items, "gap", reason="reconnected")) == 2)
        down = {each.source: each for each in notices(items, "camera", state="down")}
        assert down["hung"].details["reason"] == "no picture for 0.6 s"
        assert down["dead"].details["reason"] == "its process was ended by SIGKILL"
        assert down["hung"].monotonic - begun < FAST.stall_s + 5  # loaded machines; 1 s elsewhere
        assert {each.source for each in notices(items, "camera", state="up")} == {"hung", "dead"}
        for gap in notices(items, "gap", reason="reconnected"):
            assert gap.details["seconds"] > 0
        well = of(items, "well")
        assert well[-1].seq - well[0].seq + 1 <= len(well) / 0.95  # what it dropped, if anything
        for name in names:
            seqs = [frame.seq for frame in of(items, name)]
            assert seqs == sorted(set(seqs))
    for pid in (hung, dead):
        assert not Path(f"/proc/{pid}").exists()


def test_what_breaks_here_takes_the_camera_down_and_not_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for a picture, a mistake of ours: a thread that ended would be a camera that nobody misses."""
    gaps = iter([MemoryError()])

    def seen(self: GapWatch, *about: Any) -> float:
        for error in gaps:
            raise error
        return GapWatch.seen(self, *about)

    monkeypatch.setattr("edgekit.scanner.sources.camera.GapWatch", type("Short", (GapWatch,), {"seen": seen}))
    with Cameras({"camera": "pattern:64x48@50"}, FAST) as cameras:
        items = until(cameras, lambda items: len(notices(items, "camera", state="up")) == 2)
        (down,) = notices(items, "camera", state="down")
        assert down.details["reason"] == "it broke down: MemoryError"
        assert until(cameras, lambda items: len(of(items, "camera")) > 3)


def test_cameras_come_and_go_while_it_runs() -> None:
    with Cameras(["pattern:64x48@100"], FAST) as cameras:
        until(cameras, lambda items: of(items, "pattern:64x48@100"))
        assert cameras.add("pattern:32x32@100", "second") == "second"
        until_second = until_given(cameras, "second")
        assert until_second
        before = sum(row["captured"] for row in cameras.counts())
        cameras.remove("second")
        with pytest.raises(UsageError, match="there is no source second"):
            cameras.remove("second")
        with pytest.raises(UsageError, match="two sources"):
            cameras.add("pattern:64x48@100")
        rows = {row["source"]: row for row in cameras.counts()}
        assert rows["second"]["state"] == "removed"
        was = rows["second"]["captured"]
        cameras.add("pattern:32x32@100", "second")
        assert until_given(cameras, "second")
        again = [row for row in cameras.counts() if row["source"] == "second"]
        assert [row["state"] for row in again] == ["up"]  # one row
        assert again[0]["captured"] > was
        assert rows["second"]["captured"] == rows["second"]["given"] + sum(rows["second"]["dropped"].values())
        assert sum(row["captured"] for row in rows.values()) >= before


def test_a_running_scan_takes_cameras_and_gives_them_back() -> None:
    heard: list[dict[str, Any]] = []
    scanner = Scanner({"codes": {"budget_ms": 0}, "source": [{"address": "pattern:32x32@40", "name": "first"}]})
    with pytest.raises(UsageError, match="does not run"):
        scanner.add("pattern:32x32@40")
    added = gone = 0
    for event in scanner:
        heard.append(event)
        seen = {each["source"] for each in heard if "codes" in each}
        if not added and seen:
            assert scanner.add({"address": "pattern:48x32@40", "name": "second", "depth": 2}) == "second"
            with pytest.raises(UsageError, match=r"this is no source: .*`deep`"):
                scanner.add({"address": "pattern:48x32@40", "deep": 2})
            with pytest.raises(UsageError, match="there are two sources"):
                scanner.add({"address": "pattern:48x32@40", "name": "second"})
            added = len(heard)
        elif not gone and seen == {"first", "second"}:
            scanner.remove("first")
            with pytest.raises(UsageError, match="there is no source first"):
                scanner.remove("first")
            gone = len(heard)
        elif gone and len(heard) == gone + 5:
            assert {each["source"] for each in heard[gone:] if "event" not in each} == {"second"}
            assert scanner.status()["ready"]
            scanner.remove("second")  # the last one: the scan ends
    assert scanner.summary is not None
    assert [each["source"] for each in heard if each.get("state") == "removed"] == ["first", "second"]
    summary = scanner.summary
    assert summary.in_flight == 0
    assert summary.captured == summary.inferred + sum(summary.dropped.values())
    assert summary.inferred == sum("codes" in each for each in heard)
    with pytest.raises(UsageError, match="does not run"):
        scanner.remove("second")


def test_what_is_left_is_found() -> None:
    with Cameras(["pattern:64x48@50"]) as cameras:
        until(cameras, lambda items: of(items, "pattern:64x48@50"))
        assert {line.startswith("process ") for line in camera_kit.left_over()} == {True, False}


def test_a_killed_scan_leaves_no_process() -> None:
    program = (
        "from edgekit.scanner import Cameras, Captured\n"
        "c = Cameras(['pattern:64x48@50'])\n"
        "for item in c:\n"
        "    if isinstance(item, Captured): print(c.counts()[0]['pid'], flush=True)\n"
    )
    shared = set(os.listdir("/dev/shm"))  # noqa: S108
    scan = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert scan.stdout is not None
    child = int(scan.stdout.readline())
    scan.kill()
    scan.wait()
    scan.stdout.close()
    end = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z (" not in _state(child):
        assert time.monotonic() < end, "the camera's process is still there"
        time.sleep(0.02)
    new = set(os.listdir("/dev/shm")) - shared  # noqa: S108
    assert not {name for name in new if "edgekit" in name or name.startswith("psm_")}


def _state(pid: int) -> str:
    try:
        return next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State"))
    except (OSError, StopIteration):
        return "Z ("


def test_a_scan_counts_what_its_cameras_dropped() -> None:
    stop, seen = Stop(), []

    def slow(frame: Any) -> list[Any]:
        seen.append(frame)
        if len(seen) == 8:
            stop.set()
        time.sleep(0.03)
        return []

    cameras = open_source("pattern:64x48@200", stop=stop, options=CameraOptions(depth=1))
    summary = Pipeline(source=cameras, codes=slow, stop=stop).run()
    assert summary.inferred == 8
    assert summary.in_flight == 0
    assert summary.dropped["queue full"] > 0
    assert summary.captured == summary.inferred + sum(summary.dropped.values())
    assert summary.sources[0]["source"] == "pattern:64x48@200"


def test_any_iterable_of_arrays_is_a_source() -> None:
    picture = np.zeros((4, 5, 3), np.uint8)
    found = list(frames_of([picture, None, picture.astype(float), "x", picture[:, :, 0]], "mine"))
    assert found[1] is None
    assert [each.error for each in found if each] == [
        "",
        "the frame is float64, not uint8",
        "the frame is a str, not an array",
        "",
    ]
    assert [each.seq for each in found if each] == [0, 1, 2, 3]


def test_what_cannot_be_a_camera_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in ("gopher://x", "", "gst: ", "camera:x", "pattern:64x48", f"rtsp://{'x' * 3000}"):
        with pytest.raises(UsageError):
            open_source(spec)
    with pytest.raises(DataError, match="no video file"):
        open_source(str(tmp_path / "missing.mp4"))
    with pytest.raises(UsageError, match="several sources"):
        open_sources([str(tmp_path), "pattern:64x48@1"])
    with pytest.raises(UsageError, match="options for c"):
        Cameras({"a": "pattern:64x48@1"}, {"c": FAST})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as refused:
        open_source("rtsp://camera/")
    assert "video" in refused.value.hint


def test_options_are_checked() -> None:
    for wrong in ({"depth": 0}, {"stall_s": float("nan")}, {"retry_s": 9.0, "retry_most_s": 1.0}, {"width": 640}):
        with pytest.raises(UsageError):
            CameraOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"stall": 3}, CameraOptions)


def test_no_password_is_shown() -> None:
    spec = "rtsp://admin:s3%2Fcret@10.0.0.9/live?token=abc&x=1"
    assert shown(spec) == "rtsp://10.0.0.9/live?token=...&x=1"
    words = safe_words(f"cannot open {spec}: s3/cret is wrong, abc", spec)
    assert not [secret for secret in ("s3", "cret", "abc", "admin") if secret in words]

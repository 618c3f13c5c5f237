"""A scan inside an application: the example as it stands, what a scan takes and gives back, signals and passwords."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.bundle import Bundle
from edgekit.errors import EdgekitError
from edgekit.progress import say
from edgekit.runtime import Model
from edgekit.scanner import Reading, Scanner
from edgekit.scanner.assembly import Parts
from edgekit.scanner.kpis import Tally, kpi_line
from edgekit.scanner.reading import Answer
from edgekit.scanner.sources import Captured
from edgekit.scanner.sources.address import shown

EXAMPLE = Path(__file__).parents[2] / "examples" / "on_device.py"
HIDDEN = "g3heim"


def test_the_example_runs_as_it_stands(kit: Any, tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 22
    (tmp_path / "inbox").mkdir()
    for name, text in (("a", "PALLET-1"), ("b", "PALLET-2"), ("c", "PALLET-1")):
        Image.fromarray(kit.code_picture(text, "Code128")).save(tmp_path / "inbox" / f"{name}.png")
    command = [sys.executable, EXAMPLE, "inbox", "PALLET-1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert lines == ["open PALLET-1", "keep shut PALLET-2"]  # the third is a duplicate
    assert last.startswith("3 captured, 3 read, 3 codes")
    assert "read rate 100.0% (3 of 3), 1 codes a frame" in last
    assert kit.lines_of(tmp_path / "gate.jsonl") == 2


# What it takes, and gives back


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children() -> set[str]:
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_memory_stays_while_thousands_of_frames_are_read() -> None:
    sizes: list[int] = []
    frame = np.zeros((48, 64), np.uint8)

    def frames() -> Iterator[Any]:
        for number in range(6000):
            if number % 1000 == 999:
                sizes.append(resident())
            yield frame.copy()

    summary = Scanner({"codes": {"budget_ms": 0, "formats": ["QR Code"]}, "duplicates": {}}, frames=frames()).run()
    assert summary.inferred == 6000
    assert sizes[-1] - sizes[1] < 2 << 20, sizes


@pytest.mark.parametrize("how", ["for", "async for"])
def test_threads_processes_and_handles_are_given_back(kit: Any, how: str, tmp_path: Path) -> None:
    tables = {
        "codes": {"budget_ms": 0},
        "source": [{"address": "pattern:64x48@100,20", "name": "a"}, {"address": "pattern:64x48@100", "name": "b"}],
        "sink": [{"address": "mqtt://127.0.0.1:9/line"}],
        "outbox": {"path": str(tmp_path / "outbox.sqlite")},
        "server": {"address": "127.0.0.1:0"},
    }
    before = set(threading.enumerate()), children(), handles()
    seen: list[Any] = []
    scanner = Scanner(tables, on_event=lambda event: (seen.append(event), len(seen) > 30 and scanner.stop()))
    if how == "for":
        for _ in scanner:
            assert scanner.status()["events"] > 0  # of the same thread, and at once
            if len(seen) > 30:
                break
    else:

        async def scan() -> None:
            async for event in scanner:
                assert event in seen

        asyncio.run(scan())
    assert len(seen) > 30
    assert scanner.summary is not None
    assert scanner.summary.captured == scanner.summary.inferred + sum(scanner.summary.dropped.values())
    kit.wait_for(lambda: (set(threading.enumerate()), children()) == before[:2])
    kit.wait_for(lambda: handles() <= before[2])


# Key figures


def test_key_figures_count_valid_reads_and_noticed_misreads() -> None:
    tally = Tally()
    assert kpi_line(tally.figures([])) == ""
    good, bad = {"text": "a", "format": "QR Code"}, {"text": "b", "format": "Code 128", "gs1": {"error": "(00) check digit"}}
    for codes in ([good, good], [bad], []):
        tally.see(Captured(None, "dock", 0, 0.0), Answer({"codes": codes}, 2.0))
    tally.see(Captured(None, "dock", 0, 0.0), Answer({}, 2.0, "failed", "why"))
    steps = [{"step": "crosscheck", "conflict": 2}, {"step": "votes", "outvoted": 4}]
    found = tally.figures(steps)
    assert found == {
        "triggers": 3,
        "good": 1,
        "read_rate": 0.3333,
        "codes_a_frame": 1.0,
        "misreads": {"gs1": 1, "conflict": 2, "unconfirmed": 4},
    }
    words = "misreads: 1 with a GS1 error, 2 in conflict with the text, 4 without enough votes"
    assert kpi_line(found) == f"read rate 33.3% (1 of 3), 1 codes a frame, {words}"
    assert kpi_line({**found, "good": 0, "read_rate": 0.0, "codes_a_frame": 0.0}) == "no codes (0 of 3)"
    of_triggers = tally.figures([{"step": "trigger", "triggers": 2, "good": 1}])
    assert (of_triggers["triggers"], of_triggers["read_rate"]) == (2, 0.5)
    assert tally.cameras() == [{"source": "dock", "inferred": 3, "good": 1, "latency_ms": {"p50": 2.0, "p99": 2.0}}]


def test_the_model_that_runs_is_told_after_a_promotion(digits_bundle: Bundle) -> None:
    """Metrics and summary once named the first model for ever."""
    with Model.open(digits_bundle.path) as promoted:
        parts = Parts(
            reading=Reading(promoted), model={"bundle": "old.edge", "digest": "0", "backend": "onnxruntime", "batch": 2}
        )
        found = parts.running_model()
    assert found == {**parts.model, "bundle": str(digits_bundle.path), "digest": digits_bundle.digest}


def test_two_scans_at_once_leave_no_log_behind(pictures: Path) -> None:
    """The first to start ends first: the other's lines go on as JSON, and then nobody's do."""
    tables = {"codes": {"budget_ms": 0}, "source": [{"address": str(pictures)}], "log": {"format": "json"}}
    first, second = (iter(Scanner(tables)) for _ in range(2))
    with redirect_stderr(io.StringIO()) as said:
        next(first), next(second)
        first.close()
        second.close()
        assert [json.loads(line)["life"] for line in said.getvalue().splitlines()].count("ended") == 2
        say("plain")
        assert said.getvalue().endswith("\nplain\n")


# Signals


def test_sigterm_ends_a_scan_of_cameras_whatever_hangs(kit: Any, tmp_path: Path) -> None:
    """Ctrl-C does in `test_scanner_view.py`."""
    out = tmp_path / "events.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as camera, socket.create_server(("127.0.0.1", 0)) as sink:  # they never answer
        sources = ["--source", "pattern:64x48@20", "--source", f"tcp://127.0.0.1:{camera.getsockname()[1]}"]
        sinks = ["--sink", f"jsonl:{out}", "--sink", f"http://127.0.0.1:{sink.getsockname()[1]}/"]
        more = ["--outbox", tmp_path / "outbox.sqlite", "--json"]
        process = kit.start_scan("--codes", *sources, *sinks, *more, env={**os.environ, "no_proxy": "*"})
        kit.wait_for(lambda: kit.lines_of(out) > 3, 60)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    summary = json.loads(stdout)
    assert summary["captured"] == summary["inferred"] + sum(summary["dropped"].values())
    assert summary["sinks"][1]["waiting"] == summary["events"]
    assert out.read_bytes().endswith(b"\n")


HANGS = """
import sys, time
from edgekit.scanner import Scanner, stop_on_signals
def frames():
    yield None
    print("hangs", flush=True)
    while True:
        try: time.sleep(1000)
        except KeyboardInterrupt: print("interrupted", flush=True); raise
with stop_on_signals() as stop:
    Scanner({"codes": {}}, frames=frames(), stop=stop).run()
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_frame_that_hangs_and_the_second_at_once(times: int) -> None:
    """Once it waited for the frame for ever."""
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n"
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        if times == 2:
            threading.Event().wait(0.2)
    stdout, stderr = process.communicate(timeout=30)
    if times == 1:
        assert (process.returncode, stderr) == (0, "stopped while a frame or a sink was still busy\n")
    else:
        assert stdout == "interrupted\n"
        assert process.returncode != 0


def test_ctrl_c_in_a_folder_says_that_pictures_are_left(kit: Any, tmp_path: Path) -> None:
    for number in range(300):
        Image.new("L", (400, 300)).save(tmp_path / f"{number}.png")
    out = tmp_path / "events.jsonl"
    process = kit.start_scan("--codes", "--source", tmp_path, "--sink", f"jsonl:{out}")
    kit.wait_for(lambda: kit.lines_of(out) > 0, 60)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: interrupted, some of the pictures are not read\nhint: the same command reads all of them again" in stderr
    assert re.match(r"\d+ captured, \d+ read", stdout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_a_sink_that_is_down_is_waited_for_says_what_waits(
    kit: Any, pictures: Path, tmp_path: Path, number: int
) -> None:
    """All pictures are read: nothing is left for another time, and nothing hangs."""
    events, dead = tmp_path / "e.jsonl", f"tcp://127.0.0.1:{kit.free_port()}"
    words = [
        "scan",
        "--codes",
        "--source",
        pictures,
        "--sink",
        f"jsonl:{events}",
        "--sink",
        dead,
        "--outbox",
        tmp_path / "o.db",
    ]
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as scan:
        kit.wait_for(lambda: events.exists() and kit.lines_of(events) == 4)
        time.sleep(0.3)  # it is in its flush
        start = time.monotonic()
        scan.send_signal(number)
        out, err = scan.communicate(timeout=30)
    assert time.monotonic() - start < 4.0
    assert scan.returncode == 0, err
    assert out.startswith("4 captured, 3 read")
    assert "4 events wait in" in err
    assert "busy" not in err


# Passwords and the log


def heard(tables: dict[str, Any], until: Callable[[list[Any]], bool]) -> str:
    """All that a scan says and shows in any way."""
    events: list[Any] = []
    errors = io.StringIO()
    with redirect_stderr(errors):
        try:
            scanner = Scanner({"codes": {"budget_ms": 0}, "log": {"format": "json"}, **tables})
            for event in scanner:
                events.append(event)
                if until(events):
                    break
        except EdgekitError as error:
            return f"{error.message} {error.hint} {errors.getvalue()}"
    for line in errors.getvalue().splitlines():
        json.loads(line)
    return json.dumps([events, scanner.status()]) + errors.getvalue()


def test_no_password_is_said_or_shown(tmp_path: Path) -> None:
    """Sources without a name of their own once had their whole address in events, metrics and status."""
    cameras = [f"rtsp://admin:{HIDDEN}@127.0.0.1:9/a", f"http://127.0.0.1:9/b?token={HIDDEN}", f"gst:x user-pw={HIDDEN} ! y"]
    sinks = [f"mqtt://me:{HIDDEN}@127.0.0.1:9/a", f"http://me:{HIDDEN}@127.0.0.1:9/?key={HIDDEN}"]
    tables: dict[str, Any] = {
        "source": [{"address": address} for address in cameras],
        "sink": [{"address": address} for address in sinks],
        "outbox": {"path": str(tmp_path / "outbox.sqlite")},
    }
    text = heard(tables, lambda events: len({event["source"] for event in events}) == 3)
    assert HIDDEN not in text
    assert '"source": "rtsp://127.0.0.1:9/a"' in text
    for life in ("starting", "ready", "ended"):
        assert f'"life":"{life}"' in text
    assert '"level":"warning","message":"rtsp://127.0.0.1:9/a is down: ' in text
    twice = heard({"source": [{"address": cameras[0]}] * 2}, bool)
    assert "give each a name of its own" in twice
    assert '"level":"error"' in twice
    assert HIDDEN not in twice


@pytest.mark.parametrize(
    ("address", "safe"),
    [
        (f"rtsp://admin:{HIDDEN}/x@cam/s", "rtsp://cam/s"),  # a slash that should have been %2F
        (f"rtsp://cam:554/user=admin_password={HIDDEN}_channel=1.sdp", "rtsp://cam:554/user=admin_password=..."),
        (
            f'gst:rtspsrc location=rtsp://u:{HIDDEN}@cam user-pw="{HIDDEN} 2" ! y',
            "gst:rtspsrc location=rtsp://cam user-pw=... ! y",
        ),
        ("rtsp://cam:554/s@1", "rtsp://cam:554/s@1"),
        ("mqtt://broker:1883/a@b", "mqtt://broker:1883/a@b"),
    ],
)
def test_an_address_is_shown_without_its_password(address: str, safe: str) -> None:
    assert shown(address) == safe

"""``edgekit scan --tui``: what is drawn on a terminal of any size, in a real pseudo terminal, and without one."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from edgekit.cli.scan_picture import picture
from edgekit.cli.scan_view import Rates, ScanView
from edgekit.scanner import Scanner

CODE = {"text": "A\x1b[2J\x1d1[red]", "format": "QR Code"}
CAMERA = {"in_flight": 2, "queue": "newest", "captured": 1200, "width": 640, "height": 480}
STATUS: dict[str, Any] = {
    "state": "running",
    "ready": False,
    "reasons": ["quay is down: no answer in time"],
    "silent_s": 0.1,
    "captured": 1000,
    "inferred": 990,
    "dropped": {"queue full": 7, "damaged": 1},
    "in_flight": 2,
    "codes": 985,
    "events": 991,
    "latency_ms": {"p50": 4.2, "p99": 11.0},
    "kpis": {"triggers": 500, "good": 486, "read_rate": 0.972, "codes_a_frame": 0.99, "misreads": {"gs1": 3, "conflict": 0}},
    "model": {"bundle": "/opt/models/parcel.edge", "digest": "a" * 64, "backend": "onnxruntime", "batch": 2},
    "cameras": [{"source": "dock 3", "inferred": 990, "good": 480, "latency_ms": {"p50": 4.2, "p99": 11.0}}],
    "sources": [
        {"source": "dock 3", "state": "up", "reason": "", "dropped": {"queue full": 7}, **CAMERA},
        {"source": "quay", "state": "down", "reason": "no answer in time", "dropped": {}, **CAMERA},
    ],
    "sinks": [
        {"sink": "jsonl:events.jsonl", "sent": 991, "unsaved": 0, "dropped": {}},
        {"sink": "mqtt://broker/line1", "sent": 991, "waiting": 41, "refused": 0, "dropped": {}, "down": "no answer in time"},
    ],
    "steps": [
        {"step": "drift", "drifted": ["brightness"], "learning": False, "psi": {"brightness": 0.41, "score": 0.02}},
        {"step": "selftest", "healthy": True, "runs": 4, "failures": 0},
        {"step": "shadow", "state": "compared", "promoted": 0, "refused": 1, "compared": 120},
    ],
    "recent": [
        {"time": "2026-01-31T12:00:00.000Z", "source": "dock 3", "seq": 7, "codes": [CODE]},
        {"time": "12:00", "source": "quay", "event": "camera", "state": "down", "reason": "no answer in time"},
    ],
}


def drawn(status: dict[str, Any], width: int, height: int, said: list[str]) -> list[str]:
    """The lines of the picture, as they stand on a terminal of this size."""
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=True, color_system="truecolor")
    console.print(picture(status, {"": 29.9, "dock 3": 29.9}, said, 61.0, width, height))
    found = out.getvalue()
    assert "\x1b[2J" not in found  # a code's text is no command to the terminal
    return re.sub(r"\x1b\[[\d;]*m", "", found).splitlines()


def test_an_operator_sees_what_matters() -> None:
    text = "\n".join(drawn(STATUS, 120, 40, ["mqtt://broker/line1 is down"]))
    for words in (
        "running, not ready",
        "quay is down: no answer in time",
        "parcel.edge aaaaaaaaaaaa on onnxruntime, batch 2",
        "captured 1,000 = read 990 + dropped 8 + in flight 2",
        "7 queue full, 1 damaged",
        "read rate 97.2% (486 of 500)",
        "misreads: 3 gs1",
        "p50 4.2 ms, p99 11 ms",
        "drift drifted: brightness, highest PSI 0.41 (brightness)",
        "self-test passed",
        "shadow compared, 0 promoted, 1 refused, 120 frames compared",
        "A␛[2J␝1[red] (QR Code)",
        "camera down no answer in time",
        "mqtt://broker/line1 is down",
    ):
        assert words in text, words
    assert "not exact" not in text
    rows = [line.split() for line in text.splitlines()]
    assert ["dock", "3", "up", "29.9", "4.2", "11", "2", "newest", "7", "queue", "full"] in rows
    assert ["mqtt://broker/line1", "991", "41", "no", "answer", "in", "time"] in rows
    assert "the count is not exact" in "\n".join(drawn({**STATUS, "captured": 1001}, 120, 40, []))


@pytest.mark.parametrize("width", [20, 45, 70, 200])
@pytest.mark.parametrize("height", [6, 12, 24, 60])
def test_it_fits_into_every_terminal(width: int, height: int) -> None:
    many = {**STATUS, "sources": STATUS["sources"] * 8, "recent": STATUS["recent"] * 10}
    lines = drawn(many, width, height, ["said"] * 9)
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 6)
    assert lines[0].startswith("edgekit scan")


def test_a_scan_that_starts_is_drawn_with_what_is_said() -> None:
    lines = drawn(
        {"state": "starting", "ready": False, "reasons": ["the scan is starting"], "silent_s": 0.0}, 80, 10, ["hello"]
    )
    assert lines[0].endswith("starting")
    assert lines[1] == "hello"


def test_rates_are_of_the_last_seconds() -> None:
    rates = Rates(over_s=3.0)
    for second in range(10):
        status = {"inferred": 10 * second, "cameras": [{"source": "dock", "inferred": 5 * second}]}
        found = rates.of(status, float(second))
    assert found == {"": 10.0, "dock": 5.0}


def test_the_view_runs_beside_a_scan_in_any_thread_and_survives_a_terminal_that_is_gone() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    frames = [np.zeros((48, 64), np.uint8)] * 300
    for stream in (io.StringIO(), Gone()):
        scanner = Scanner({"codes": {"budget_ms": 0}}, frames=iter(frames))
        view = ScanView(scanner.status, Console(file=stream, force_terminal=True, width=80, height=24), every_s=0.01)
        found: list[Any] = []

        def scan(scanner: Scanner = scanner, view: ScanView = view, found: list[Any] = found) -> None:
            with view:
                found.append(scanner.run())

        thread = threading.Thread(target=scan)
        thread.start()
        thread.join(60)
        assert found[0].inferred == 300
        assert ("Input/output" in view.problem) == isinstance(stream, Gone)
    assert not [each for each in threading.enumerate() if each.name == "scan view"]


# A real pseudo terminal


def in_terminal(arguments: list[str], until: bytes, keys: bytes) -> tuple[bytes, int]:
    """Run edgekit in a terminal of its own; press ``keys`` once ``until`` is on it. All that was written, and the exit code."""
    terminal, other_end = pty.openpty()
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", *arguments]
    process = subprocess.Popen(
        command,
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
    )
    os.close(other_end)
    seen, pressed, end = b"", False, time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                seen += os.read(terminal, 1 << 16)
            except OSError:  # the other end is closed
                break
        if not pressed and until in seen:
            pressed = bool(os.write(terminal, keys))
    os.close(terminal)
    return seen, process.wait(10)


def test_in_a_real_terminal_ctrl_c_ends_the_scan_in_order(tmp_path: Path) -> None:
    out = tmp_path / "events.jsonl"
    arguments = ["scan", "--codes", "--source", "pattern:64x48@20", "--sink", f"jsonl:{out}", "--tui"]
    begun = time.monotonic()
    seen, code = in_terminal(arguments, b"pattern:64x48@20 is up", b"\x03")
    took = time.monotonic() - begun
    assert code == 0, seen
    before, left, after = seen.partition(b"\x1b[?1049l")
    assert left
    assert before.count(b"\x1b[?1049h") == 1
    assert b"captured" in before
    assert b"\x1b[?25h" in seen
    assert b"Traceback" not in seen
    assert re.search(rb"\d+ captured, \d+ read, 0 codes", after)
    assert before.count(b"edgekit scan  ") <= 4 * took + 2  # four pictures a second at the most
    assert out.read_bytes().endswith(b"\n")


# Without a terminal


def test_without_a_terminal_the_scan_runs_and_says_so(cli: Callable[..., Any], tmp_path: Path) -> None:
    Image.new("L", (30, 30)).save(tmp_path / "a.png")
    done = cli("scan", "--codes", "--source", tmp_path / "a.png", "--tui")
    assert done.code == 0
    assert done.out.count('"seq":0') == 1
    assert "stdout is no terminal" in done.err
    assert "1 captured" in done.err


def test_json_and_tui_exclude_each_other(cli: Callable[..., Any], tmp_path: Path) -> None:
    assert cli("scan", "--codes", "--source", tmp_path, "--tui", "--json").code == 2


def test_without_rich_its_extra_is_named(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    done = cli("scan", "--codes", "--source", tmp_path, "--tui")
    assert done.code == 1
    assert "pip install 'edgekit[tui]'" in done.err

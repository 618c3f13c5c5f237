"""Who waits for whom under a root, for how long, and who cannot keep others waiting."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle import Bundle
from edgekit.deployment import install, installing, rollback, slots, starting, status
from edgekit.errors import EdgekitError
from edgekit.files import locked
from edgekit.installed import LOCK, Record, fault, hold, mark

HOLD = """
import signal, sys, time
from pathlib import Path
from edgekit.installed import hold
signal.signal(signal.SIGINT, signal.default_int_handler)
with hold(Path(sys.argv[2]) / sys.argv[1], 60):
    print("held", flush=True)
    time.sleep(60)
"""


def process(name: str, root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, name, str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def root(tmp_path: Path, versions: list[Path], keys: Any) -> Path:
    install(versions[0], root=tmp_path / "root", pub=keys.pub)
    return tmp_path / "root"


@pytest.fixture(params=[".", "slots"])
def held(root: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """The lock that another process holds, and its id."""
    with process(request.param, root) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        yield request.param, other.pid
        other.kill()


def test_a_lock_that_is_held(
    root: Path,
    versions: list[Path],
    keys: Any,
    held: tuple[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An install says whom it waits for and ends; a start never waits for an install, and for a switch only a moment."""
    name, pid = held
    folder = root / name
    with pytest.raises(EdgekitError, match=rf"process {pid} \(.*\) has been at work in "), hold(folder, 1.2):
        pass
    assert re.search(rf"waiting for process {pid} \(.*\), which is at work in {folder}", capfd.readouterr().err)
    for module in (installing, slots):
        monkeypatch.setattr(module, "PATIENCE_S", 0.1)
    monkeypatch.setattr("edgekit.installed.starts.START_S", 0.1)
    for act in (lambda: install(versions[1], root=root, pub=keys.pub), lambda: rollback(root)):
        with pytest.raises(EdgekitError, match=f"process {pid} "):
            act()
    begun = time.monotonic()
    start = starting(root)
    assert time.monotonic() - begun < 1.0
    assert start.bundle == root / "slots" / "a"
    assert (f"process {pid} " in start.doubt) == (name == "slots")


def test_who_may_only_read_holds_no_lock(root: Path, versions: list[Path], keys: Any) -> None:
    """Any user that may enter a folder can lock it; the files of the locks are for their owner to open."""
    handles = []
    for path in [root, *root.rglob("*")]:
        if path.stat().st_mode & 0o004 and not path.is_symlink():
            handles.append(os.open(path, os.O_RDONLY))
            fcntl.flock(handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        assert len(handles) > 5
        install(versions[1], root=root, pub=keys.pub)
        assert not starting(root).doubt
        rollback(root)
    finally:
        for handle in handles:
            os.close(handle)
    assert {(folder / ".lock").stat().st_mode & 0o777 for folder in (root, root / "slots")} == {0o600}


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_a_lock_made_by_root_is_its_folders_owners(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with hold(folder, 0.0):
        assert (folder / ".lock").stat().st_uid == 12345
    # What the owner puts in its place is not given to him.
    other.write_text("secret")
    for place in (os.symlink, os.link):
        (folder / ".lock").unlink()
        place(other, folder / ".lock")
        with contextlib.suppress(OSError), hold(folder, 0.0):
            pass
        assert other.stat().st_uid == 0


def test_a_wait_is_ended_by_a_signal(root: Path, held: tuple[str, int]) -> None:
    with process(held[0], root) as waiting:
        assert waiting.stderr
        assert f"waiting for process {held[1]}" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(5) != 0
        assert "KeyboardInterrupt" in waiting.stderr.read()


def test_a_lock_that_is_removed_while_one_waits_is_taken_anew(tmp_path: Path) -> None:
    """A refused first install takes its lock with it: who waited for that one has another file than who comes next."""
    with hold(tmp_path, 0.0):
        (tmp_path / ".lock").unlink()
        with hold(tmp_path, 0.0):
            assert (tmp_path / ".lock").exists()
    with process(".", tmp_path) as first:
        assert first.stdout
        assert first.stdout.readline() == "held\n"
        with process(".", tmp_path) as waits:
            assert waits.stderr
            assert "waiting for" in waits.stderr.readline()
            (tmp_path / ".lock").unlink()
            with hold(tmp_path, 0.0):
                first.kill()
                assert waits.stdout
                os.set_blocking(waits.stdout.fileno(), False)
                time.sleep(0.3)
                assert not waits.stdout.readline()
            os.set_blocking(waits.stdout.fileno(), True)
            assert waits.stdout.readline() == "held\n"
            waits.kill()


def test_bundles_are_hashed_while_nobody_waits(
    root: Path, versions: list[Path], keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes take seconds; a start that waited for the lock so long would run without a note."""
    asked: list[str] = []

    def looked(place: Path, record: Record | None) -> str:
        with hold(root / "slots", 0.0):
            asked.append(place.name)
        return fault(place, record)

    monkeypatch.setattr("edgekit.installed.state.fault", looked)
    starting(root).confirm()
    install(versions[1], root=root, pub=keys.pub)
    assert asked == []
    install(versions[2], root=root, pub=keys.pub)  # over one that never proved itself
    assert asked == ["a"]
    rollback(root)
    assert asked == ["a", "a"]
    install(versions[1], root=root, pub=keys.pub, starts=1)
    mark(root, "start")
    assert asked == ["a", "a"]
    assert mark(root, "start").returned
    assert asked == ["a", "a", "a"]


def test_lost_notes_are_found_again_while_nobody_waits(
    root: Path, versions: list[Path], keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Looked:
        @staticmethod
        def open(place: Path) -> Bundle:
            with hold(root / "slots", 0.0):
                asked.append(place.name)
            return Bundle.open(place)

    (root / "state.json").write_text("{")
    monkeypatch.setattr("edgekit.installed.state.Bundle", Looked)
    install(versions[1], root=root, pub=keys.pub)
    assert asked == ["bundle", "a"]
    assert status(root)["previous"]["name"] == "v0"


def test_an_end_that_could_not_be_written_may_be_told_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.installed.starts.START_S", 0.05)
    start = starting(root)
    with hold(root / "slots", 0.0):
        assert not start.confirm()
        assert not start.withdraw()
    assert "has been at work" in start.doubt
    assert start.open
    assert start.confirm()
    assert not start.open
    assert status(root)["confirmed"]


def test_a_lock_that_goes_with_its_folder(tmp_path: Path) -> None:
    folder, said = tmp_path / "root", list[str]()
    folder.mkdir()

    def wait() -> None:
        try:
            with hold(folder, 10.0):
                pass
        except EdgekitError as error:
            said.append(error.message)

    waiting = threading.Thread(target=wait)
    with hold(folder, 0.0):
        waiting.start()
        time.sleep(0.1)  # it has the file open by then, and waits
        (folder / LOCK).unlink()
        folder.rmdir()
    kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
    waiting.join()
    assert said == [f"there is no folder {folder} any more"]
    for each in kept:
        os.close(each)  # nobody else has: a descriptor is closed once


def test_who_writes_a_bundle_says_that_it_waits_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can open a folder can lock it."""
    monkeypatch.setattr("edgekit.files.LOCKED_S", 1.2)
    said: list[str] = []
    with locked(tmp_path), pytest.raises(EdgekitError, match="another command is writing"), locked(tmp_path, told=said.append):
        pass
    assert said == [f"waiting for another command, which is writing {tmp_path}"]

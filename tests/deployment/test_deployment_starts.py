"""Who counts as running, as failed or as stopped, what was left before, and a root whose notes are gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.deployment import install, mark, pack, rollback, starting, status
from edgekit.deployment import installing as module
from edgekit.errors import BundleError, EdgekitError
from edgekit.installed import START_S, Record, State, hold, read_state, write_state
from edgekit.installed.state import MOST_LEFT

from .test_deployment_trial import dies

HOLD = "import sys; from edgekit.deployment import starting; starting(sys.argv[1]); print(flush=True); sys.stdin.read()"


@pytest.fixture
def root(tmp_path: Path, versions: list[Path], keys: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """v0 is confirmed, v1 runs and is on trial; what an install tries is left out."""
    tried = {"golden": {"relative": 0.0, "snr_db": 99.0}, "latency_ms": None, "latency_before_ms": None}
    monkeypatch.setattr(module, "_tried", lambda *arguments: tried)
    install(versions[0], root=tmp_path / "root", pub=keys.pub)
    starting(tmp_path / "root").confirm()
    install(versions[1], root=tmp_path / "root", pub=keys.pub)
    return tmp_path / "root"


def trial(root: Path) -> tuple[int, bool | None]:
    """How many starts failed, and whether one runs."""
    found = status(root)["trial"]
    return found["failed"], found["running"]


def files(root: Path) -> list[str]:
    return [path.name for path in (root / "slots").iterdir() if path.name.startswith(".start-")]


# A start holds a lock


def test_a_start_in_another_pid_namespace_runs(root: Path) -> None:
    """Containers share a root: the process has another number there, and none that is seen here."""
    apart = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no pid namespace can be made here")
    command = [*apart, sys.executable, "-c", HOLD, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdin
        other.stdout.readline()
        starting(root).withdraw()
        assert trial(root) == (0, True)
        other.stdin.close()
    assert trial(root) == (1, False)


def test_a_child_that_outlives_its_parent_is_no_start(root: Path) -> None:
    """A forked helper that hangs on must not keep the start of a killed application open."""
    reader, writer = os.pipe()

    def parent() -> None:
        starting(root)
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)  # until the test ends
            os._exit(0)

    assert dies(parent) == -signal.SIGKILL
    assert trial(root) == (1, False)
    os.close(reader)
    os.close(writer)


def test_files_of_starts_that_ended_go(root: Path) -> None:
    for _ in range(2):
        dies(lambda: starting(root))
    mine = starting(root)
    assert len(files(root)) == 1  # those of the dead are gone
    assert trial(root) == (2, True)
    mine.withdraw()
    assert files(root) == []


def test_a_token_that_is_none_is_of_no_start_that_runs(root: Path) -> None:
    whole = json.loads((root / "state.json").read_text())
    for token in ("", "gone", "../../current", "a\0b", "x" * 5000):
        whole["trial"]["starts"] = [token]
        (root / "state.json").write_text(json.dumps(whole))
        assert trial(root) == ((0, None) if token == "" else (1, False))
        mark(root, "start")
        assert trial(root) == (1, None)


def test_notes_of_starts_by_process_are_still_read(root: Path) -> None:
    """What this version's first users have on their devices: a number, its beginning and the boot."""
    state = json.loads((root / "state.json").read_text())
    own = {"pid": os.getpid(), "began": 5, "boot": "0f3d"}
    state["trial"]["starts"] = [own, {"pid": 0, "began": 0, "boot": ""}]
    del state["left"]
    (root / "state.json").write_text(json.dumps(state))
    assert trial(root) == (1, None)
    mark(root, "healthy")
    assert status(root)["confirmed"]


def test_an_end_is_on_disk_before_a_second_one_returns(root: Path) -> None:
    """The scan ends in order, and by force meanwhile: the process must not go before the first has written."""
    start, ends = starting(root), []
    threads = [threading.Thread(target=lambda: ends.append(start.withdraw())) for _ in range(2)]
    with hold(root / "slots", START_S):
        for thread in threads:
            thread.start()
        threads[1].join(0.2)
        assert ends == []
    for thread in threads:
        thread.join()
    assert ends == [True, True]
    assert trial(root) == (0, False)


# A scan that is ended by force

LOADING = """
import os, sys, time
from edgekit.runtime import Model
from edgekit.scanner import health
health.YOUNG_S, slow_s, fsync = float(sys.argv[2]), float(sys.argv[3]), os.fsync
def slow(handle):
    time.sleep(slow_s)
    fsync(handle)
def hang(*arguments, **named):
    print(flush=True)
    time.sleep(60)
os.fsync, Model.open = slow, hang
from edgekit.cli import main
main(["scan", sys.argv[1] + "/current", "--source", "pattern:64x48@5", "--sink", "jsonl:" + sys.argv[1] + "/e.jsonl"])
"""


def test_a_hang_while_loading_counts_and_a_restart_does_not(root: Path) -> None:
    """A model that never loads, ended by SIGTERM: soon by an operator (on a slow disk), or late by systemd."""
    cases = {"restart": ("120", "0.4", (0, False)), "hang": ("0", "0", (1, False))}
    running = {}
    for name, (young_s, slow_s, _) in cases.items():
        copy = shutil.copytree(root, root.parent / name, symlinks=True)
        command = [sys.executable, "-c", LOADING, copy, young_s, slow_s]
        running[name] = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for process in running.values():
        assert process.stdout
        assert process.stdout.readline() == b"\n"
    begun = time.monotonic()
    for process in running.values():
        process.send_signal(signal.SIGTERM)
    for process in running.values():
        assert process.wait(20) == 0
        process.stdout.close()  # type: ignore[union-attr]
    assert time.monotonic() - begun < 5.0  # TimeoutStopSec of the unit
    for name, (_, _, expected) in cases.items():
        assert trial(root.parent / name) == expected, name


# What replaced a trial


def test_a_start_speaks_for_its_own_install_alone(root: Path, versions: list[Path], keys: Any) -> None:
    start = starting(root)
    mark(root, "start")
    slot = status(root)["slot"]
    install(versions[2], root=root, pub=keys.pub)
    assert status(root)["slot"] == slot
    assert not start.confirm()
    assert "another bundle was installed" in start.doubt
    with pytest.raises(EdgekitError, match="no start of what is on trial"):
        mark(root, "healthy")
    assert (status(root)["confirmed"], trial(root)) == (None, (0, False))
    mark(root, "stopped")  # a stop twice is none the worse
    mark(root, "start")
    mark(root, "healthy")
    assert status(root)["confirmed"]


def test_what_was_started_before_a_rollback_says_nothing_for_what_runs_after(
    tmp_path: Path, versions: list[Path], keys: Any, root: Path
) -> None:
    other = tmp_path / "never"
    for version in versions[:2]:
        install(version, root=other, pub=keys.pub)
    mark(other, "start")
    rollback(other)
    mark(other, "healthy")
    assert status(other)["confirmed"] is None


# What was left


def test_a_bundle_that_was_left_is_refused_with_a_code_of_its_own(
    cli: Any, tmp_path: Path, root: Path, versions: list[Path], keys: Any
) -> None:
    with Bundle.create(tmp_path / "same" / "v0.edge") as draft:  # the next release of the same name
        old = Bundle.open(tmp_path / "v0.edge")
        for name in (FLOAT_GRAPH, GOLDEN):
            draft.write(name, old.file(name).read_bytes())
        draft.manifest = msgspec.structs.replace(old.manifest, files={}, labels=("newer",))
    newer = pack(tmp_path / "same" / "v0.edge", out=tmp_path / "newer.zip", key=keys.key, release=2**50)
    rollback(root)
    install(newer, root=root, pub=keys.pub)
    rollback(root)
    before = (root / "state.json").read_bytes()
    (stick := tmp_path / "stick").mkdir()
    for version in (versions[0], newer):
        shutil.copy(version, stick)
    for source in (newer, stick):  # the newest of a folder; what is older takes no place of it
        refused = cli("install", source, "--root", root, "--pub", keys.pub, "--json")
        assert refused.code == 3
        assert "left by a way back" in refused.json["error"]
        assert "--again" in refused.json["hint"]
        assert (root / "state.json").read_bytes() == before
    shown = cli("status", "--root", root)
    assert re.search(r"^left +[0-9a-f]{12}, [0-9a-f]{12}: install takes them only with --again$", shown.out, re.M)
    assert cli("install", newer, "--root", root, "--pub", keys.pub, "--again").code == 0
    assert len(cli("status", "--root", root, "--json").json["left"]) == 1


def test_a_rollback_that_was_cut_off_leaves_what_runs_to_be_installed(root: Path, versions: list[Path], keys: Any) -> None:
    """It is noted before the switch: the one that still runs was not left."""
    state = read_state(root)
    write_state(root, state.leaving(state.slots["b"]))
    assert status(root)["left"] == []
    assert install(versions[1], root=root, pub=keys.pub)["unchanged"]


def test_so_many_bundles_are_remembered() -> None:
    state = State()
    for number in [*range(MOST_LEFT + 5), 50]:
        state = state.leaving(Record("n", str(number), 1, "x"))
    assert len(state.left) == MOST_LEFT
    assert state.left[-1] == "50"
    assert "4" not in state.left


# Notes that are gone


@pytest.mark.parametrize("content", [b"{", None])
def test_a_root_whose_notes_are_gone(
    cli: Any, root: Path, versions: list[Path], keys: Any, content: bytes | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """An application starts, an install writes new notes, and the bundle that ran is its way back."""
    before = starting(root)
    if content is None:
        (root / "state.json").unlink()
    else:
        (root / "state.json").write_bytes(content)
        started = cli("status", "--root", root, "--mark", "start", "--json")
        assert (started.code, started.json["bundle"]) == (0, str(root / "slots" / "b"))
        assert "damaged" in started.json["doubt"]
        assert "damaged" in started.err
        with pytest.raises(BundleError, match="install again"):
            mark(root, "healthy")
    done = cli("install", versions[1], "--root", root, "--pub", keys.pub, "--json")  # the same as runs
    assert (done.code, done.json["unchanged"], done.json["slot"]) == (0, False, "a")
    assert not before.confirm()
    now = status(root)
    assert (now["healthy"], now["confirmed"], now["previous"]["name"]) == (True, None, "v1")
    install(versions[2], root=root, pub=keys.pub)
    for _ in range(3):
        dies(lambda: starting(root))
    assert starting(root).returned
    assert status(root)["name"] == "v1"


def test_notes_are_gone_and_what_runs_is_damaged(root: Path, versions: list[Path], keys: Any) -> None:
    (root / "state.json").write_bytes(b"")
    (root / "slots" / "b" / "model.onnx").write_bytes(b"")
    install(versions[1], root=root, pub=keys.pub)
    now = status(root)
    assert (now["healthy"], now["slot"], now["previous"]) == (True, "a", None)


def test_a_forked_worker_cannot_end_the_start_of_its_parent(root: Path) -> None:
    start = starting(root)

    def child() -> None:
        assert not start.confirm()
        assert start.doubt == "this process was forked: the start is its parent's, to be ended there"
        os._exit(7)

    assert dies(child) == 7
    assert trial(root) == (0, True)
    assert start.confirm()


def test_what_is_wrong_with_a_root_comes_with_a_devices_cure(root: Path, cli: Any, tmp_path: Path) -> None:
    def scanned() -> str:
        done = cli("scan", root / "current", "--source", tmp_path)
        assert done.code == 1
        return str(done.err)

    (tmp_path / "loop").symlink_to("loop")
    assert "there is no bundle at" in cli("bench", tmp_path / "loop").err
    assert "leads nowhere" in cli("install", "p.zip", "--root", tmp_path / "loop", "--unsigned").err
    done = cli("status", "--root", root / "current")
    assert (done.code, f"--root {root}" in done.err) == (2, True)
    slot = (root / "current").resolve()
    (slot / "golden.npz").write_bytes(b"damaged")
    assert f"edgekit rollback --root {root}" in scanned()
    (root / "current").unlink()
    done = cli("status", "--root", root)
    assert (done.code, f"{root}/current is gone" in done.err) == (1, True)
    assert f"edgekit status --root {root}" in scanned()

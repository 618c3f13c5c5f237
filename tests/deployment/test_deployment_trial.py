"""After a switch a bundle has to show that it works: starts are counted, health ends the trial, failures lead back."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.deployment import install, pack, rollback, starting, status
from edgekit.errors import BackendError, BudgetNotMet, BundleError, EdgekitError, GoldenError, TurnedDown, UsageError
from edgekit.installed import hold
from edgekit.runtime import Model
from edgekit.runtime.golden import load_golden, save_golden
from edgekit.scanner import Scanner
from edgekit.scanner.health import ANSWERS
from edgekit.scanner.schema import KINDS

FRAME = np.zeros((28, 28), np.uint8)


@pytest.fixture
def root(tmp_path: Path, versions: list[Path], keys: Any) -> Path:
    """v0 is confirmed, v1 runs and is on trial."""
    install(versions[0], root=tmp_path / "root", pub=keys.pub)
    starting(tmp_path / "root").confirm()
    install(versions[1], root=tmp_path / "root", pub=keys.pub)
    return tmp_path / "root"


def dies(act: Callable[[], object]) -> int:
    """Run it in a process of its own that dies without a word behind it; its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_starts_without_health_lead_back(root: Path, versions: list[Path], keys: Any) -> None:
    for number in range(3):
        assert status(root)["trial"] == {"start": number, "allowed": 3, "failed": number, "running": False, "error": None}
        assert dies(lambda: starting(root)) == -signal.SIGKILL
    start = starting(root)
    assert start.returned
    assert start.bundle == root / "slots" / "a"
    now = status(root)
    assert (now["name"], now["trial"], now["previous"]) == ("v0", None, None)
    assert now["returned"]["left"]["name"] == "v1"
    assert "3 starts without a sign of health" in now["returned"]["reason"]
    assert starting(root).returned is None  # and stays there
    with pytest.raises(BundleError, match="no older bundle"):
        rollback(root)
    with pytest.raises(TurnedDown, match="was installed here before, and left"):  # a timer would try it every hour
        install(versions[1], root=root, pub=keys.pub)
    assert status(root)["name"] == "v0"
    assert status(root)["left"] == [now["returned"]["left"]["digest"]]
    install(versions[1], root=root, pub=keys.pub, starts=1, again=True)
    assert status(root)["trial"]["allowed"] == 1
    assert status(root)["left"] == []
    rollback(root)
    with pytest.raises(TurnedDown):
        install(versions[1], root=root, pub=keys.pub)
    install(versions[2], root=root, pub=keys.pub)
    assert status(root)["name"] == "v2"


def test_health_ends_the_trial(root: Path) -> None:
    dies(lambda: starting(root))
    dies(lambda: starting(root))
    start = starting(root)
    assert start.trial
    assert start.trial.failed == 2
    assert start.confirm()
    now = status(root)
    assert now["trial"] is None
    assert now["confirmed"]
    for _ in range(5):
        dies(lambda: starting(root))
    assert status(root)["name"] == "v1"


def test_what_was_stopped_in_order_counts_for_nothing(root: Path) -> None:
    for _ in range(5):
        assert dies(lambda: starting(root).withdraw()) == -signal.SIGKILL
    assert status(root)["trial"]["failed"] == 0
    starting(root).fail("no memory")
    assert status(root)["trial"]["error"] == "no memory"


def test_a_process_that_still_runs_is_no_failure(root: Path) -> None:
    """Two services on one root: the second start is none that failed, until the first one's process has gone."""
    code = "import sys; from edgekit.deployment import starting; starting(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        for _ in range(3):
            starting(root).withdraw()
        assert status(root)["trial"] == {"start": 1, "allowed": 3, "failed": 0, "running": True, "error": None}
        other.kill()
    assert status(root)["trial"]["failed"] == 1


def test_a_confirmed_bundle_stays_the_way_back(root: Path, versions: list[Path], keys: Any) -> None:
    """v1 never worked: v2 takes its place, not that of v0."""
    install(versions[2], root=root, pub=keys.pub)
    now = status(root)
    assert (now["name"], now["slot"], now["previous"]["name"]) == ("v2", "b", "v0")
    for _ in range(3):
        dies(lambda: starting(root))
    starting(root)
    assert status(root)["name"] == "v0"


def test_without_a_whole_older_bundle_there_is_no_return(root: Path) -> None:
    (root / "slots" / "a" / FLOAT_GRAPH).unlink()
    for _ in range(4):
        dies(lambda: starting(root))
    start = starting(root)
    assert "no whole older bundle" in start.doubt
    assert status(root)["name"] == "v1"


def test_a_new_bundle_that_lost_its_manifest(root: Path) -> None:
    shutil.rmtree(root / "slots" / "b")
    assert status(root)["previous"]["name"] == "v0"
    for _ in range(3):
        dies(lambda: starting(root))
    starting(root)
    assert status(root)["name"] == "v0"


def test_nothing_is_installed(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nothing is installed"):
        starting(tmp_path)


def test_other_applications_mark_their_starts(cli: Any, root: Path) -> None:
    for number in range(2):  # one is open until the next: nobody knows whether it runs
        cli("status", "--root", root, "--mark", "start")
        shown = cli("status", "--root", root, "--json").json["trial"]
        assert (shown["start"], shown["failed"], shown["running"]) == (number + 1, number, None)
    assert "on trial   start 2 of 3, 1 failed, running as far as is known" in cli("status", "--root", root).out
    starting(root).withdraw()  # another application's start says nothing of it
    cli("status", "--root", root, "--mark", "stopped")
    assert cli("status", "--root", root, "--json").json["trial"]["failed"] == 1
    refused = cli("status", "--root", root, "--mark", "healthy")
    assert refused.code == 1
    assert "no start of what is on trial" in refused.err
    assert "--mark start" in refused.err
    cli("status", "--root", root, "--mark", "start")
    assert cli("status", "--root", root, "--mark", "healthy", "--json").json["confirmed"]
    gone = cli("rollback", "--root", root)
    assert gone.code == 0
    shown = cli("status", "--root", root)
    assert "from v1" in shown.out
    assert "asked for" in shown.out
    assert cli("status", "--root", root / "slots", "--mark", "start").code == 1


# Latency


def test_a_latency_budget(cli: Any, tmp_path: Path, root: Path, versions: list[Path], keys: Any) -> None:
    before = (root / "state.json").read_bytes()
    command = ("install", versions[2], "--root", root, "--pub", keys.pub)
    refused = cli(*command, "--max-latency-ms", 0.00001, "--json")
    assert refused.code == 3
    assert refused.json["latency_ms"]["p99"] > 0.00001
    assert "ms are allowed" in refused.json["error"]
    assert (root / "state.json").read_bytes() == before
    done = cli(*command, "--max-latency-ms", 60_000)
    assert done.code == 0
    assert "before:" in done.out
    assert "golden" in done.out
    with pytest.raises(UsageError):
        install(versions[2], root=root, pub=keys.pub, max_latency_ms=float("nan"))
    with pytest.raises(BudgetNotMet):
        install(versions[0], root=root, pub=keys.pub, max_latency_ms=0.00001)


# The scanner


@pytest.fixture
def scanned(tmp_path: Path, digits_bundle: Bundle, keys: Any) -> Path:
    """Two digits models, d0 confirmed and d1 on trial."""
    root = tmp_path / "scanned"
    for number in range(2):
        with Bundle.create(tmp_path / f"d{number}.edge") as draft:
            for name in (FLOAT_GRAPH, GOLDEN):
                draft.write(name, digits_bundle.file(name).read_bytes())
            old = digits_bundle.manifest
            kept = {name: old.golden[name] for name in (FLOAT_GRAPH,)}
            draft.manifest = msgspec.structs.replace(
                old, name=f"d{number}", files={}, golden=kept, history=(), labels=old.labels
            )
        packed = pack(tmp_path / f"d{number}.edge", out=tmp_path / f"d{number}.zip", key=keys.key)
        install(packed, root=root, pub=keys.pub)
        if number == 0:
            starting(root).confirm()
    return root


def scan(root: Path, frames: Any) -> list[dict[str, Any]]:
    return list(Scanner({"model": {"bundle": str(root / "current")}}, frames=frames))


def test_a_scan_that_ends_in_order_confirms(scanned: Path) -> None:
    assert len(scan(scanned, [FRAME] * 3)) == 3
    assert status(scanned)["confirmed"]
    assert status(scanned)["trial"] is None


def test_a_running_scan_confirms_after_some_frames(scanned: Path) -> None:
    def frames() -> Iterator[Any]:
        for number in range(25):
            if number in (1, 24):
                confirmed.append(bool(status(scanned)["confirmed"]))
            yield FRAME

    confirmed: list[bool] = []
    scan(scanned, frames())
    assert confirmed == [False, True]


def test_a_scan_that_is_left_or_stopped_proves_nothing(scanned: Path) -> None:
    scanner = Scanner({"model": {"bundle": str(scanned / "current")}}, frames=iter([FRAME] * 9))
    for _ in scanner:
        assert status(scanned)["trial"]["running"]
        break
    stopped = Scanner({"model": {"bundle": str(scanned / "current")}}, frames=iter([FRAME] * 9))
    for _ in stopped:
        stopped.stop()
    assert status(scanned)["trial"] == {"start": 0, "allowed": 3, "failed": 0, "running": False, "error": None}


def test_scans_that_die_lead_back(scanned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def frames() -> Iterator[Any]:
        yield FRAME
        os.kill(os.getpid(), signal.SIGKILL)

    for number in range(3):
        assert status(scanned)["trial"]["failed"] == number
        assert dies(lambda: scan(scanned, frames())) == -signal.SIGKILL
    capfd.readouterr()
    events = scan(scanned, [FRAME])
    assert status(scanned)["name"] == "d0"
    said = [event for event in events if event.get("event") == "model"]
    assert [event["state"] for event in said] == ["returned"]
    for event in events:
        msgspec.convert(event, KINDS[event.get("event", "")])
    assert said[0]["before"] == status(scanned)["returned"]["left"]["digest"]
    assert "back to the bundle before d1" in capfd.readouterr().err


def test_a_model_that_is_damaged_or_answers_otherwise_leads_back(scanned: Path) -> None:
    """Another graph under the same name, and one of whole hashes that no longer gives its golden outputs."""
    place = scanned / "slots" / "b"
    whole = (place / FLOAT_GRAPH).read_bytes()
    (place / FLOAT_GRAPH).write_bytes(whole[:-8])
    for _ in range(2):
        with pytest.raises(BundleError, match="damaged"):
            scan(scanned, [FRAME])
    assert "damaged" in status(scanned)["trial"]["error"]
    assert dies(lambda: scan(scanned, [FRAME])) == 1
    assert len(scan(scanned, [FRAME])) == 2  # the return, and the frame
    assert status(scanned)["name"] == "d0"


def test_a_model_that_answers_otherwise_on_this_device_is_not_healthy(scanned: Path) -> None:
    """Its hashes are whole; its golden outputs are not what the scan's own model gives."""
    place = scanned / "slots" / "b"
    opened = Bundle.open(place)
    inputs, outputs = load_golden(opened)
    graph = opened.read(FLOAT_GRAPH)
    shutil.rmtree(place)
    with Bundle.create(place) as draft:
        draft.write(FLOAT_GRAPH, graph)
        draft.write(GOLDEN, save_golden(inputs, {name: array + 1 for name, array in outputs.items()}))
        draft.manifest = msgspec.structs.replace(opened.manifest, files={})
    with pytest.raises(GoldenError):
        scan(scanned, [FRAME])
    assert "misses the golden outputs" in status(scanned)["trial"]["error"]


def test_a_model_that_takes_no_frame_is_not_healthy(scanned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Model, sample: Any) -> Any:
        raise BackendError("out of memory")

    monkeypatch.setattr(Model, "__call__", refuses)
    assert {event["event"] for event in scan(scanned, [FRAME] * 30)} == {"failed"}
    assert status(scanned)["confirmed"] is None
    assert status(scanned)["trial"]["failed"] == 0  # it may have been the source
    monkeypatch.setattr("edgekit.scanner.health.ALIVE_S", 0.0)
    scan(scanned, [FRAME] * 30)
    trial = status(scanned)["trial"]
    assert trial["failed"] == 1
    assert re.fullmatch(r"the model refused (2\d|30) of (2\d|30) frames", trial["error"])


def test_a_root_that_cannot_be_written_is_said_and_the_scan_runs(scanned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        root = Path(shutil.copytree(scanned, Path(name) / "root", symlinks=True))
        root.chmod(0o555)

        def as_nobody() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            assert len(scan(root, [FRAME] * 30)) == 30

        assert dies(as_nobody) == -signal.SIGKILL
        said = capfd.readouterr().err
        assert said.count("Permission denied") == 1
        assert status(root)["trial"]["start"] == 0
        (root / "state.json").write_bytes(b"{")
        assert len(scan(root, [FRAME])) == 1
        assert "damaged" in capfd.readouterr().err


def test_a_running_scan_says_that_another_bundle_waits(
    scanned: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgekit.scanner.health.LOOK_S", 0.0)

    def frames() -> Iterator[Any]:
        yield FRAME
        rollback(scanned)
        yield from [FRAME] * 3

    scan(scanned, frames())
    assert capfd.readouterr().err.count("a restart takes it") == 1
    assert status(scanned)["name"] == "d0"


def test_a_bundle_that_took_the_place_of_the_running_one_is_noticed(
    tmp_path: Path, scanned: Path, keys: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An install while one is on trial lands in its slot; the scan that runs the older one has nothing to say for it."""
    monkeypatch.setattr("edgekit.scanner.health.LOOK_S", 0.0)

    def frames() -> Iterator[Any]:
        yield FRAME
        install(tmp_path / "d0.zip", root=scanned, pub=keys.pub, allow_older=True)
        yield from [FRAME] * 30

    slot = status(scanned)["slot"]
    scan(scanned, frames())
    now, said = status(scanned), capfd.readouterr().err
    assert (now["slot"], now["sequence"], now["confirmed"]) == (slot, 3, None)
    assert now["trial"]["start"] == 0
    assert said.count("a restart takes it") == 1
    assert "the trial is over" not in said


def test_a_file_system_without_links(tmp_path: Path, versions: list[Path], keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")  # what vfat answers

    monkeypatch.setattr(os, "symlink", refused)
    with pytest.raises(EdgekitError, match="no symbolic links"):
        install(versions[0], root=tmp_path / "vfat", pub=keys.pub)
    assert not (tmp_path / "vfat").exists()


def test_a_scan_notes_that_it_works_as_soon_as_it_can(scanned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for a while, or notes that another writes just then, cost a working model nothing."""
    monkeypatch.setattr("edgekit.installed.starts.START_S", 0.02)
    busy = contextlib.ExitStack()

    def frames() -> Iterator[Any]:
        for number in range(30):
            if number == 5:
                busy.enter_context(hold(scanned / "slots", 1.0))
            yield FRAME
        busy.close()
        scanner.stop()

    scanner = Scanner({"model": {"bundle": str(scanned / "current")}}, frames=frames())
    assert len(list(scanner)) >= ANSWERS
    assert status(scanned)["trial"] is None
    assert status(scanned)["confirmed"]

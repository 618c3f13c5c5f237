"""The outbox: its limits, exact counts of what they drop, a full disk and a freed one."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgekit.errors import DataError, UsageError
from edgekit.scanner import Outbox, OutboxOptions, open_sink
from edgekit.scanner.events import encode
from edgekit.scanner.sinks import forward, local

from .outbox_kit import event, full_disk, ids


@pytest.mark.parametrize(
    "wrong", [{"most_events": 99}, {"most_megabytes": 0}, {"most_megabytes": float("nan")}, {"policy": "drop all"}]
)
def test_limits_that_cannot_be_met_are_refused(wrong: Any) -> None:
    with pytest.raises(UsageError):
        OutboxOptions(**wrong)
    with pytest.raises((UsageError, msgspec.ValidationError)):
        msgspec.convert(wrong, OutboxOptions)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"most_event": 1000}, OutboxOptions)


@pytest.mark.parametrize("policy", ["drop oldest", "drop newest"])
def test_what_the_limit_drops_is_counted_for_each_sink_and_survives_a_restart(
    tmp_path: Path, policy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = OutboxOptions(most_events=100, policy=policy)
    outbox = Outbox(tmp_path / "o.sqlite", options)
    for i in range(130):
        outbox.append("s", f"{i}", b"{}")
        outbox.append("other", f"{i}", b"{}") if i < 50 else None
    outbox.append("s", "129", b"{}")  # the same event again takes no place of another
    kept = range(30, 130) if policy == "drop oldest" else range(100)
    assert ids(outbox)[:100] == [f"{i}" for i in kept]
    total = 30 if policy == "drop oldest" else 31
    assert outbox.dropped("s") == {"most events": total}
    assert outbox.count("s") == 100
    assert outbox.count("other") == 50
    assert outbox.dropped("other") == {}
    outbox.close()
    assert capsys.readouterr().err.count("the outbox is full") == 1
    outbox = Outbox(tmp_path / "o.sqlite", options)
    outbox.append("s", "last", b"{}")
    assert outbox.dropped("s") == {"most events": total + 1}
    outbox.close()


def test_events_in_delivery_are_not_dropped(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.sqlite", OutboxOptions(most_events=100))
    for i in range(100):
        outbox.append("s", f"{i}", b"{}")
    taken = outbox.head("s", 32)
    for i in range(100, 110):
        outbox.append("s", f"{i}", b"{}")
    outbox.delivered("s", [each.position for each in taken])
    assert ids(outbox) == [f"{i}" for i in range(42, 110)]
    assert outbox.dropped("s") == {"most events": 10}
    assert outbox.count("s") == 110 - 32 - 10
    outbox.close()


def test_refused_events_make_room_first(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.sqlite", OutboxOptions(most_events=100))
    for i in range(100):
        outbox.append("s", f"{i}", b"{}")
    for each in outbox.head("s", 3):
        outbox.refuse("s", each.position, "no")
    assert (outbox.count("s"), outbox.count("s", refused=True)) == (97, 3)
    outbox.head("s", 0)
    for i in range(100, 105):
        outbox.append("s", f"{i}", b"{}")
    assert outbox.dropped("s") == {"refused": 3, "most events": 2}
    assert ids(outbox) == [f"{i}" for i in range(5, 105)]
    outbox.close()


def test_the_file_keeps_to_its_megabytes(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.sqlite", OutboxOptions(most_megabytes=0.1))
    body = b"x" * 250
    for i in range(500):
        outbox.append("http://host/x", f"{'0' * 32}-{i}", body)
    dropped = outbox.dropped("http://host/x")["most megabytes"]
    assert dropped + outbox.count("http://host/x") == 500
    assert ids(outbox, "http://host/x")[-1].endswith("-499")
    outbox.close()
    assert 0.06e6 < outbox.path.stat().st_size < 0.18e6


def test_the_policy_stop_says_that_it_is_full(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "o.sqlite", OutboxOptions(most_events=100, policy="stop"))
    for i in range(100):
        outbox.append("s", f"{i}", b"{}")
    with pytest.raises(DataError, match=r"is full: 100 events wait for s \(most events\)"):
        outbox.append("s", "100", b"{}")
    assert len(ids(outbox)) == outbox.count("s") == 100
    with full_disk(0), pytest.raises(OSError, match=r".") as caught:
        outbox.append("t", "0", b"{}")
    assert caught.value.errno in (errno.EIO, errno.ENOSPC)
    outbox.close()


def test_an_outbox_of_the_version_before_is_taken_on(tmp_path: Path) -> None:
    path = tmp_path / "o.sqlite"
    outbox = Outbox(path)
    outbox.append("s", "1", b"{}")
    outbox.close()
    with sqlite3.connect(path) as connection:
        connection.executescript("DROP TABLE dropped; DROP INDEX outbox_refused")
    connection.close()
    outbox = Outbox(path)
    assert ids(outbox) == ["1"]
    assert outbox.dropped("s") == {}
    outbox.close()


class Deliveries:
    """A transport that takes all it gets while ``up``."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.up = False

    def deliver(self, event_id: str, event: bytes) -> None:
        if not self.up:
            raise forward.Undelivered("it is down")
        self.ids.append(event_id)

    def close(self) -> None:
        pass


@pytest.fixture(params=["limit", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """``(folder, full)``: a disk that is full while ``full()`` is open. A small tmpfs where it can be mounted."""
    if request.param == "limit":
        yield tmp_path, lambda: full_disk(70_000)
        return
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")

    @contextlib.contextmanager
    def full() -> Iterator[None]:
        with (folder / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(b"x" * 4096):
                pass
        try:
            yield
        finally:
            (folder / "ballast").unlink()

    try:
        yield folder, full
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("up", [False, True])
def test_a_disk_full_and_freed_loses_nothing(
    kit: Any, disk: Any, up: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sink is down, or up, while the disk is full; the local sinks beside it wait too."""
    monkeypatch.setattr("edgekit.scanner.outage.QUIET_S", 0.0)
    monkeypatch.setattr(forward, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(forward, "LONGEST_PAUSE_S", 0.05)
    folder, full = disk
    outbox, transport = Outbox(folder / "o.sqlite"), Deliveries()
    sinks: list[Any] = [forward.ForwardSink("s", transport, outbox)]
    sinks += [open_sink(f"{kind}:{folder}/events.{kind}", lambda: outbox) for kind in ("jsonl", "sqlite")]

    def send(numbers: range) -> None:
        for i in numbers:
            for sink in sinks:
                sink.send(event(i, 300))

    send(range(20))
    with full():
        transport.up = up
        send(range(20, 220))
        assert all(sink.status()["unsaved"] for sink in sinks[1:])
        assert up or sinks[0].status()["unsaved"]
        if up:
            kit.wait_for(lambda: len(transport.ids) >= 220)
    send(range(220, 230))
    transport.up = True
    for sink in sinks:
        sink.flush()
        status = sink.status()
        assert (status["sent"], status["unsaved"], status["dropped"]) == (230, 0, {})
    wanted = [f"run-{i}" for i in range(230)]
    assert transport.ids == wanted
    assert [e["id"] for e in kit.read_events(folder / "events.jsonl")] == wanted
    for sink in sinks:
        sink.close()
    outbox.close()
    connection = sqlite3.connect(folder / "events.sqlite")
    assert [row[0] for row in connection.execute("SELECT id FROM events ORDER BY position")] == wanted
    connection.close()
    said = capsys.readouterr().err
    assert "wait in memory" in said
    assert f"there is room again for {folder / 'events.jsonl'}" in said


def test_memory_for_a_full_disk_is_bounded_and_what_it_drops_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgekit.scanner.outbox.MOST_HELD", 50)
    monkeypatch.setattr(local, "MOST_HELD", 50)
    monkeypatch.setattr(local, "FULL_S", 0.0)
    outbox = Outbox(tmp_path / "o.sqlite")
    sink = open_sink(f"jsonl:{tmp_path / 'e.jsonl'}", lambda: outbox)
    with full_disk(0):
        for i in range(60):
            outbox.append("s", f"{i}", b"{}")
            sink.send(event(i))
        assert outbox.dropped("s") == {"disk full": 10}
        assert ids(outbox) == [f"{i}" for i in range(10, 60)]
        assert sink.status() == {"sink": sink.name, "sent": 60, "unsaved": 50, "dropped": {"disk full": 10}}
        with pytest.raises(OSError, match="50 events are lost"):
            sink.flush()
    outbox.close()
    sink.close()
    outbox = Outbox(tmp_path / "o.sqlite")
    assert outbox.dropped("s") == {"disk full": 10}
    assert len(ids(outbox)) == 50
    with full_disk(0):
        outbox.append("s", "60", b"{}")
        outbox.close()
    assert "1 events are lost" in capsys.readouterr().err


def test_a_log_on_the_full_disk_loses_no_event(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Standard error is a file here; what could not be written to it once came up through `append`."""
    outbox = Outbox(tmp_path / "o.sqlite")
    with full_disk(0):
        outbox.append("s", "1", b"{}")
    assert outbox.count("s") == 1
    outbox.close()


@pytest.mark.parametrize("kind", ["outbox", "sqlite", "jsonl"])
def test_a_folder_that_cannot_be_written_is_said(cli: Any, pictures: Path, kind: str) -> None:
    if kind == "outbox":
        options = ["--sink", "http://127.0.0.1:1/x", "--outbox", "/sys/kernel/o.sqlite"]
    else:
        options = ["--sink", f"{kind}:/sys/kernel/events"]
    done = cli("scan", "--codes", "--source", pictures, *options)
    assert done.code == 1
    assert "/sys/kernel" in done.err
    assert "hint:" in done.err


def test_two_scans_with_one_outbox_are_told_apart(cli: Any, pictures: Path, tmp_path: Path) -> None:
    with contextlib.closing(Outbox(tmp_path / "o.sqlite")) as outbox:
        done = cli("scan", "--codes", "--source", pictures, "--sink", "http://127.0.0.1:1/x", "--outbox", outbox.path, "--json")
    assert done.code == 1
    assert "in use by another scan" in done.json["error"]
    assert "--outbox" in done.json["hint"]


def test_a_disk_that_fills_again_and_again_drops_nothing_while_there_is_room_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says it once."""
    monkeypatch.setattr(local, "MOST_HELD_BYTES", 2000)
    sink = open_sink(f"jsonl:{tmp_path}/e.jsonl", lambda: pytest.fail("no outbox"))
    write, full = type(sink)._write, [False]

    def brink(self: Any, event: Any) -> None:
        full[0] = not full[0]
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, event)

    monkeypatch.setattr(type(sink), "_write", brink)
    for i in range(200):
        sink.send(event(i, 40))
    assert sink.status()["dropped"] == {}
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.undo()
    sink.close()


@pytest.mark.parametrize("kind", ["sqlite", "outbox"])
def test_a_lock_of_another_program_is_waited_for(tmp_path: Path, kind: str) -> None:
    """A clean-up job that holds the file for long neither ends the scan nor holds it up."""
    path = tmp_path / "e.db"
    with contextlib.ExitStack() as stack:
        if kind == "sqlite":
            sink = open_sink(f"sqlite:{path}", lambda: pytest.fail("no outbox"))
            stack.callback(sink.close)
        else:
            outbox = stack.enter_context(contextlib.closing(Outbox(path)))
        other = stack.enter_context(contextlib.closing(sqlite3.connect(path, isolation_level=None)))
        other.execute("BEGIN IMMEDIATE")
        for i in range(5):
            if kind == "sqlite":
                sink.send(event(i, 40))
            else:
                outbox.append("s", f"run-{i}", encode(event(i, 40)))
        figures = sink.status() if kind == "sqlite" else outbox.figures("s")
        assert (figures["sent"], figures["unsaved"]) == (5, 5)
        other.execute("ROLLBACK")
        if kind == "sqlite":
            sink.flush()
        else:
            outbox.settle()
        table = "events" if kind == "sqlite" else "outbox"
        found = other.execute(f"SELECT id FROM {table} ORDER BY position").fetchall()  # noqa: S608
        assert found == [(f"run-{i}",) for i in range(5)]


def test_events_for_a_sink_that_is_none_any_more_are_spoken_of(cli: Any, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "o.sqlite"
    with contextlib.closing(Outbox(path)) as outbox:
        outbox.append("mqtt://gone:1883/t", "run-1", b"{}")
    outcome = cli("scan", "--codes", "--source", pictures, "--sink", "tcp://127.0.0.1:9", "--outbox", path)
    assert f"1 events for mqtt://gone:1883/t, which is no sink of this scan, wait in {path}" in outcome.err


def test_a_lock_that_is_gone_is_not_waited_for_any_longer(tmp_path: Path) -> None:
    """Events come faster than the lock is tried: they must not put the next attempt off for ever."""
    path = tmp_path / "o.sqlite"
    with contextlib.closing(Outbox(path)) as outbox:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            outbox.append("s", "run-0", encode(event(0)))
            assert outbox.unsaved("s") == 1
            other.execute("ROLLBACK")
        end, i = time.monotonic() + 10, 0
        while outbox.unsaved("s"):
            assert time.monotonic() < end
            outbox.append("s", f"run-{(i := i + 1)}", encode(event(i)))
            time.sleep(0.01)
        assert ids(outbox) == [f"run-{each}" for each in range(i + 1)]


def test_what_one_sink_asks_for_leaves_another_ones_deliveries_alone(tmp_path: Path) -> None:
    with contextlib.closing(Outbox(tmp_path / "o.sqlite")) as outbox:
        with full_disk(1):
            outbox.append("b", "run-0", encode(event(0)))
            (first,) = outbox.head("b", 32)
        outbox.settle()  # it gets another place, on disk, while it is in delivery
        assert outbox.head("a", 32) == []
        outbox.delivered("b", [first.position])
        assert outbox.head("b", 32) == []
        assert (outbox.figures("b")["waiting"], outbox.figures("b")["delivered"]) == (0, 1)


def test_the_policy_stop_drops_nothing_while_the_file_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was accepted into memory goes to disk whatever the limit says; what does not fit there is refused."""
    path = tmp_path / "o.sqlite"
    monkeypatch.setattr("edgekit.scanner.outbox.MOST_HELD", 3)
    with contextlib.closing(Outbox(path, OutboxOptions(policy="stop", most_events=100))) as outbox:
        for i in range(98):
            outbox.append("s", f"run-{i}", encode(event(i)))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for i in (98, 99):
                outbox.append("s", f"run-{i}", encode(event(i)))
            with pytest.raises(DataError, match="is full: 100 events wait"):
                outbox.append("s", "run-100", encode(event(100)))
            outbox.append("other", "run-0", encode(event(0)))
            with pytest.raises(OSError, match="holds a lock"):
                outbox.append("other", "run-1", encode(event(1)))
            other.execute("ROLLBACK")
        outbox.settle()
        assert (outbox.unsaved("s"), outbox.count("s"), outbox.count("other"), outbox.dropped("s")) == (0, 100, 1, {})
    with contextlib.closing(Outbox(path)) as outbox:
        assert len(ids(outbox)) == 100

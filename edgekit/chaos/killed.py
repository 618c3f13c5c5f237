"""kill -9 of scans and writers, and power cuts by replaying what SQLite wrote."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any

from edgekit.scanner import Outbox, open_sink
from edgekit.scanner.sinks.forward import ForwardSink

from . import write_log
from .case import Bench, NotHere
from .stage import Receiver, cameras_of, check_arrivals, check_summary, forked, ids_in, scan_bundle, start_scan

__all__ = ["outbox_killed", "power_cut", "scan_killed"]

_SINK = "chaos"


def scan_killed(bench: Bench) -> None:
    """Every fourth kill comes while the scan starts or has just started, the others while events flow."""
    bundle, receiver = scan_bundle(bench), Receiver()
    lines, outbox = bench.folder / "events.jsonl", bench.folder / "outbox.sqlite"
    sinks = [receiver.address, f"jsonl:{lines}"]
    cameras: list[int] = []
    for number in bench.each():
        before = _size(lines)
        process = start_scan(bundle, "pattern:64x48@200", sinks, outbox)
        if number % 4 != 3:
            bench.wait_for(partial(_grown, lines, before), "the scan gives no event", 60)
            with contextlib.suppress(OSError):
                cameras += cameras_of(process.pid)
        time.sleep(bench.rng.uniform(0.0, 0.4))
        process.kill()
        process.communicate()
        bench.count("kills")
    begun, had = time.monotonic(), len(receiver.ids)
    process = start_scan(bundle, "pattern:64x48@200,40", sinks, outbox)
    bench.wait_for(lambda: len(receiver.ids) > had, "nothing arrives after the last kill", 60)
    bench.figures["restart_to_first_delivery_s"] = round(time.monotonic() - begun, 3)
    out, _ = process.communicate(timeout=120)
    bench.check(process.returncode == 0, f"the scan after the kills ended with exit code {process.returncode}")
    check_summary(bench, json.loads(out))
    check_arrivals(bench, receiver.ids, ids_in(bench, lines))
    bench.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in cameras), "a camera's process is left", 10)
    receiver.close()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _grown(path: Path, before: int) -> bool:
    return _size(path) > before


class _File:
    """In the network's place: a file that outlives the writer."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / "received", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def deliver(self, event_id: str, event: bytes) -> None:
        os.write(self._file, f"{event_id}\n".encode())

    def close(self) -> None:
        os.close(self._file)


def _write(folder: Path, life: int, acknowledged: int, count: int) -> None:
    """Three kinds of sinks as a scan has them. An id is acknowledged once all of them have taken the event."""
    outbox = Outbox(folder / "outbox.sqlite")
    sinks: list[Any] = [ForwardSink(_SINK, _File(folder), outbox)]
    sinks.append(open_sink(f"jsonl:{folder}/events.jsonl?rotate=2K&keep=9999", lambda: outbox))
    sinks.append(open_sink(f"sqlite:{folder}/events.db", lambda: outbox))
    for i in range(count):
        event = {"schema": 1, "id": f"{life}-{i}", "source": "s", "seq": i, "time": "t", "text": "x" * (37 * i % 300)}
        for sink in sinks:
            sink.send(event)
        os.write(acknowledged, f"{life}-{i}\n".encode())
    for sink in sinks:
        sink.flush()
        sink.close()
    outbox.close()


def outbox_killed(bench: Bench) -> None:
    acknowledged: list[str] = []
    for life in bench.each():
        acknowledged += _life(bench, life, killed=True)
        bench.count("kills")
    acknowledged += _life(bench, bench.done, killed=False)  # brings out what waits
    received = (bench.folder / "received").read_text().split()
    check_arrivals(bench, received, acknowledged)
    lines = []
    for path in [*sorted(bench.folder.glob("events.jsonl.*")), bench.folder / "events.jsonl"]:
        lines += ids_in(bench, path)
    bench.check(set(acknowledged) <= set(lines), "JSON lines have lost an event that was acknowledged")
    bench.check(len(lines) == len(set(lines)), "JSON lines hold an event twice")
    with contextlib.closing(sqlite3.connect(bench.folder / "events.db")) as connection:
        stored = {row[0] for row in connection.execute("SELECT id FROM events")}
        sound = connection.execute("PRAGMA integrity_check").fetchone()[0]
    bench.check(sound == "ok", f"the SQLite sink's file is damaged: {sound}")
    bench.check(set(acknowledged) <= stored, "the SQLite sink has lost an event that was acknowledged")


def _life(bench: Bench, life: int, *, killed: bool) -> list[str]:
    """A writer; returns the ids that it acknowledged."""
    reading, writing = os.pipe()

    def act() -> None:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # each says how much of the last one's waits
        _write(bench.folder, life, writing, 10**9 if killed else 3)

    text = b""
    with forked(act) as pid:
        os.close(writing)
        if killed:
            if life % 8:
                select.select([reading], [], [], 10.0)
            time.sleep(bench.rng.uniform(0.0, 0.02))
            os.kill(pid, signal.SIGKILL)
        while block := os.read(reading, 1 << 16):
            text += block
        _, status = os.waitpid(pid, 0)
    os.close(reading)
    wanted = -signal.SIGKILL if killed else 0
    bench.check(os.waitstatus_to_exitcode(status) == wanted, "a writer did not live until it was killed")
    return text.decode().split()


def power_cut(bench: Bench) -> None:
    """The model of a power cut: what a file's last sync covered is on the disk. Of what was written after it, any part may be:
    nothing, all, or some of the writes and of the last one some sectors of 512 bytes. Names and lengths of files are in order.
    """
    log = write_log.recording()
    if log is None:
        raise NotHere("this Python's sqlite3 does not use the system's library: its writes cannot be recorded")
    steps = _recorded(bench, log)
    syncs = [i for i, step in enumerate(steps) if step[0] == "sync"]
    bench.check(syncs, "SQLite synced nothing: a power cut may lose every event")
    first = next(i for i, step in enumerate(steps) if step[0] == "acked")  # a cut before it can lose nothing: it shows nothing
    syncs = [i for i in syncs if i > first]
    bench.check(syncs, "after the first event SQLite synced nothing: a power cut may lose every later one")
    cuts = [(i + after, part) for i in syncs for after, part in ((0, 0.0), (0, 1.0), (0, 0.5), (1, 0.5))]
    bench.rng.shuffle(cuts)
    acked_at_end = 0
    for number in bench.each():
        cut, part = cuts[number % len(cuts)]
        acked_at_end = max(acked_at_end, _cut(bench, steps[:cut], part))
    _cut(bench, steps, 0.0)  # after the last event, with nothing on disk but what was synced
    bench.check(bench.figures["cuts"] == bench.done + 1, "a round made no cut")
    bench.figures |= {"syncs": len(syncs), "events": acked_at_end}


def _recorded(bench: Bench, log: write_log.Log) -> list[Any]:
    with log:
        outbox = Outbox(bench.folder / "outbox.sqlite")
        outbox._connection.execute("PRAGMA wal_autocheckpoint = 12")  # so that there are checkpoints to cut
        for i in range(60):
            outbox.append(_SINK, f"{i}", b"x" * (50 + 61 * (i % 50)))
            log.mark(("acked", f"{i}"))
            if i % 9 == 8:
                batch = outbox.head(_SINK, 6)
                log.mark(("gone", [each.id for each in batch]))
                outbox.delivered(_SINK, [each.position for each in batch])
        steps = list(log.steps)
        outbox.close()
    return steps


def _cut(bench: Bench, steps: list[Any], part: float) -> int:
    """Opens what a cut after ``steps`` leaves; returns how many events had been acknowledged."""
    acked = {step[1] for step in steps if step[0] == "acked"}
    gone = {each for step in steps if step[0] == "gone" for each in step[1]}
    write_log.image(steps, bench.folder / "cut", part, bench.rng)
    opened = Outbox(bench.folder / "cut" / "outbox.sqlite")
    try:
        found = [each.id for each in opened.head(_SINK, 1000)]
        sound = opened._connection.execute("PRAGMA integrity_check").fetchone()[0]
    finally:
        opened.close()
    bench.count("cuts")
    bench.check(sound == "ok", f"the outbox is damaged after a cut: {sound}")
    lost = acked - gone - set(found)
    bench.count("events_lost", len(lost))
    bench.check(not lost, f"{len(lost)} events that were acknowledged are lost in a power cut after {len(steps)} steps")
    bench.check(found == sorted(found, key=int), "events are out of order after a cut")
    return len(acked)

"""A damaged outbox: kept aside, and what can be read of it goes on waiting."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import DataError
from edgekit.scanner import Outbox, open_sink, salvage
from edgekit.scanner.events import encode

from .outbox_kit import event, full_disk, ids


def filled(path: Path, count: int = 60) -> bytes:
    """An outbox with events for two sinks, one refused, some dropped -> its file."""
    outbox = Outbox(path)
    rng = random.Random(1)
    for i in range(count):
        outbox.append("s" if i % 3 else "other", f"run-{i}", encode(event(i, rng.randrange(20, 700))))
    outbox.refuse("s", outbox.head("s", 1)[0].position, "no")
    outbox.close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO dropped VALUES ('s', 'most events', 7)")
    return path.read_bytes()


def put_back(path: Path, data: bytes) -> None:
    for each in path.parent.iterdir():
        each.unlink()
    path.write_bytes(data)


def opened_after(path: Path, data: bytes, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str], str]:
    """What waits in an outbox whose file holds ``data``: ids, the names of kept files, what was said. It works on."""
    put_back(path, data)
    with contextlib.closing(Outbox(path)) as outbox:
        found = [ids(outbox, name) for name in ("s", "other")]
        for each in found:
            assert each == sorted(each, key=lambda name: int(name[4:]))
        outbox.append("s", "run-9999", b"{}")
        assert ids(outbox)[-1] == "run-9999"
    kept = sorted(each.name for each in path.parent.glob("*.old-*"))
    if kept:
        assert (path.parent / "o.sqlite.old-1").read_bytes()[: len(data)] == data  # nothing of it was changed
    return [*found[0], *found[1]], kept, capsys.readouterr().err


def test_a_damaged_outbox_is_kept_and_what_can_be_read_of_it_goes_on_waiting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "o" / "o.sqlite"
    data = filled(path)
    rng = random.Random(2)
    saved, kept_files = [], 0
    for attempt in range(24):
        damaged = bytearray(data)
        if attempt % 4 == 0:  # a page of noise, behind the first
            at = rng.randrange(1, len(data) // 4096) * 4096
            damaged[at : at + 4096] = rng.randbytes(4096)
        elif attempt % 4 == 1:  # cut off
            del damaged[len(data) * (attempt + 5) // 30 :]
        else:
            for _ in range(20):
                damaged[rng.randrange(4096, len(data))] ^= 1 << rng.randrange(8)
        found, kept, said = opened_after(path, bytes(damaged), capsys)
        assert bool(kept) == ("cannot be used" in said)
        if kept:
            saved.append(len(found))
            assert f"it is kept as {path}.old-1" in said
        kept_files += bool(kept)
    assert kept_files > 15
    assert max(saved) == 59
    assert sum(saved) > 0.5 * 59 * len(saved)


def test_what_ends_the_process_amid_the_change_of_names_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "o" / "o.sqlite"
    data = bytearray(filled(path))
    data[-4096:] = random.Random(3).randbytes(4096)
    most = len(opened_after(path, bytes(data), capsys)[0])
    assert most > 20
    for dies in range(3):
        put_back(path, bytes(data))
        left = dies

        def rename(a: Any, b: Any, rename: Any = os.rename) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            rename(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(salvage.os, "rename", rename)
            with pytest.raises(KeyboardInterrupt):
                Outbox(path)
        with contextlib.closing(Outbox(path)) as outbox:
            assert len(ids(outbox)) + len(ids(outbox, "other")) == most
        assert (path.parent / "o.sqlite.old-1").read_bytes() == data
        capsys.readouterr()


@pytest.mark.parametrize("kind", ["text", "noise", "header", "read-only", "newer", "names"])
def test_a_file_that_is_no_outbox_any_more_is_kept_and_the_scan_starts(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "o" / "o.sqlite"
    data = filled(path)
    other = {
        "text": b"not a database\n" * 400,
        "noise": random.Random(3).randbytes(9000),
        "header": b"X" + data[1:],
        "read-only": data[:18] + b"\3" + data[19:],
        "newer": data[:60] + (0x65640009).to_bytes(4, "big") + data[64:],
        "names": data.replace(b"outbox_waiting", b"o\xf5tbox_waiting", 1),
    }[kind]
    found, kept, said = opened_after(path, other, capsys)
    assert "o.sqlite.old-1" in kept
    assert len(found) == (59 if kind in ("read-only", "newer") else 0)
    assert "cannot be used" in said
    again = opened_after(path, path.read_bytes(), capsys)[1:]
    assert again == ([], "")


def test_another_database_is_never_taken_for_an_outbox(tmp_path: Path) -> None:
    sink = open_sink(f"sqlite:{tmp_path / 'events.db'}", lambda: pytest.fail("no outbox is needed"))
    sink.send(event(0))
    sink.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "mine.db")) as connection:
        connection.execute("CREATE TABLE mine (x)")
    for name in ("events.db", "mine.db"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(DataError, match="another kind of database") as caught:
            Outbox(tmp_path / name)
        assert caught.value.hint
        assert (tmp_path / name).read_bytes() == before


def test_no_room_for_a_new_outbox_leaves_the_damaged_one_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "o" / "o.sqlite"
    data = filled(path)
    put_back(path, cut := data[: len(data) * 9 // 10])
    with full_disk(0), pytest.raises(OSError, match=r"."):
        Outbox(path)
    assert path.read_bytes() == cut
    with contextlib.closing(Outbox(path)) as outbox:
        assert outbox.count("s") > 5


ODD = {
    "numbers": "UPDATE sqlite_sequence SET seq = 9223372036854775807",
    "reason": "INSERT INTO dropped VALUES ('s', CAST(x'ff' AS TEXT), 1)",
    "sink": "INSERT INTO outbox (sink, id, event) VALUES (CAST(x'ff' AS TEXT), 'a', x'7b7d')",
    "count": "INSERT INTO dropped VALUES ('s', 'most events', 'many')",
    "trigger": "CREATE TRIGGER t AFTER INSERT ON outbox BEGIN DELETE FROM outbox WHERE id = new.id; END",
    "position": "INSERT INTO outbox (position, sink, id, event) VALUES (-5, 's', 'n', x'7b7d')",
    "kind": "UPDATE outbox SET event = CAST(event AS TEXT) WHERE position = 1",
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_sound_for_sqlite_and_no_outbox_is_salvaged(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "o.sqlite"
    with contextlib.closing(Outbox(path)) as outbox:
        for i in range(3):
            outbox.append("s", f"run-{i}", encode(event(i)))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(ODD[kind])
    with contextlib.closing(Outbox(path)) as outbox:
        outbox.append("s", "run-3", encode(event(3)))
        assert outbox.unsaved("s") == 0
        odd = ["n"] if kind == "position" else []  # it gets a place behind the others
        assert ids(outbox) == ["run-0", "run-1", "run-2", *odd, "run-3"]
        outbox.delivered("s", [each.position for each in outbox.head("s", 100)])
        assert outbox.count("s") == 0
    assert (tmp_path / "o.sqlite.old-1").exists()

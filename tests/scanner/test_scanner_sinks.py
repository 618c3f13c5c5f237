"""Sinks against real files and real servers: nothing lost, in order, repeats identifiable."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgekit.bundle import Bundle
from edgekit.errors import DataError, UsageError
from edgekit.scanner import Outbox, open_sink

Cli = Callable[..., Any]


def event(i: int) -> dict[str, Any]:
    return {"schema": 1, "id": f"run-{i}", "source": "étage.png", "seq": i, "time": "2026-01-31T12:00:00.000Z", "label": "7"}


def figures(sink: Any, **others: int) -> dict[str, Any]:
    """A network sink's status, of an outbox that was empty."""
    none = {"sent": 0, "delivered": 0, "waiting": 0, "unsaved": 0, "refused": 0, "dropped": {}}
    return {"sink": sink.name, **none, **others, "before": {"waiting": 0, "refused": 0, "dropped": {}}}


def rows(path: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(path) as connection:
        found = [json.loads(row[0]) for row in connection.execute("SELECT event FROM events ORDER BY position")]
    connection.close()
    return found


def test_jsonl_appends_and_a_torn_line_stays_alone(kit: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    for i in range(2):
        sink = open_sink(f"jsonl:{path}", lambda: pytest.fail("no outbox is needed"))
        sink.send(event(i))
        sink.flush()
        sink.close()
    assert kit.read_events(path) == [event(0), event(1)]
    path.write_bytes(path.read_bytes() + b'{"torn')
    sink = open_sink(f"jsonl:{path}", lambda: pytest.fail("no outbox is needed"))
    sink.send(event(2))
    sink.close()
    lines = path.read_text().splitlines()
    assert lines[2] == '{"torn'
    assert json.loads(lines[3]) == event(2)


@pytest.mark.parametrize(
    "spec",
    [
        "http://me:hunter2@:80/x",
        "http://me:hunter2@host:port/x",
        "http://me:hun/ter2@host/x",
        "https://[me:hunter2@host/x",
        "ftp://me:hunter2@host/x",
        "mqtt://me:hunter2@host",
        "mqtt://me:hunter2@host:port/topic",
        "mqtt://me:hun/ter2@host/topic",
        "mqtt://me:hunter2@host/topic?protocol=6",
        "http:///x?token=hunter2",
        "http://me/hunter2@host/x",
        "http://me:p@ss/hunter2@host/x",
        "mqtt://me/hunter2@host/topic",
        "mqtts://me:hunter2@host",
        "http:/me:hunter2@host/x",
        "http:me:hunter2@host/x",
        "http:\\\\me:hunter2@host/x",
        "mqtt:me:hunter2@host/t",
        "http://me:7777#hunter2@127.0.0.1/x",
        "mqtt://host/t?user=a@b&token=hunter2",
    ],
)
def test_errors_name_no_password(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_sink(spec, lambda: pytest.fail("no outbox is needed"))
    assert not re.search("hun|ter2", caught.value.message + caught.value.hint)


def test_a_sink_named_twice_names_no_password(cli: Cli, tmp_path: Path) -> None:
    spec = "http://me:hunter2@host/x?token=hunter3"
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    outcome = cli("scan", "--codes", "--source", tmp_path, "--sink", spec, "--sink", spec)
    assert outcome.code == 2
    assert "is named twice" in outcome.err
    assert "hunter" not in outcome.err


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://127.0.0.1:9/x", "http://me:hunter2@127.0.0.1:9/x"),
        ("http://127.0.0.1/", "http://127.0.0.1:80"),
        ("jsonl:{0}/e.jsonl", "jsonl:{0}/./e.jsonl"),
    ],
)
def test_two_spellings_of_one_sink_are_refused(cli: Cli, pictures: Path, tmp_path: Path, one: str, other: str) -> None:
    specs = [part for spec in (one, other) for part in ("--sink", spec.format(tmp_path))]
    outcome = cli("scan", "--codes", "--source", pictures, *specs)
    assert outcome.code == 2
    assert "is named twice" in outcome.err
    assert "hunter" not in outcome.err


@pytest.mark.parametrize("kind", ["jsonl", "sqlite"])
def test_no_sink_writes_into_a_bundle(cli: Cli, tiny_bundle: Bundle, pictures: Path, kind: str) -> None:
    for name in ("manifest.json", "events", "bench/events"):
        outcome = cli("scan", "--codes", "--source", pictures, "--sink", f"{kind}:{tiny_bundle.path / name}")
        assert outcome.code == 2
        assert "lies inside the bundle" in outcome.err
    Bundle.open(tiny_bundle.path)


def test_a_path_that_is_no_ascii_is_sent_encoded(kit: Any, cli: Cli, pictures: Path, tmp_path: Path) -> None:
    """It once ended the delivery thread, and nobody was told."""
    port = kit.free_port()
    outcome = cli("scan", "--codes", "--source", pictures, "--sink", f"http://127.0.0.1:{port}/ä b", "--json")
    assert outcome.code == 0
    (sink,) = outcome.json["sinks"]
    assert sink["sink"] == f"http://127.0.0.1:{port}/%C3%A4%20b"
    assert sink["waiting"] == 4


def test_a_token_in_a_query_is_not_shown_and_tells_sinks_apart(outbox: Outbox) -> None:
    forms = ("x?token={}", "x;token={}", "x?mail=a@b.c&token={}")
    sinks = [open_sink(f"http://127.0.0.1:1/{f.format(t)}", lambda: outbox) for f in forms for t in ("one", "two")]
    assert len({sink.name for sink in sinks}) == 6
    assert not any("token" in sink.name or "one" in sink.name for sink in sinks)
    for sink in sinks:
        sink.close()


def test_jsonl_does_not_write_into_a_database(tmp_path: Path) -> None:
    sink = open_sink(f"sqlite:{tmp_path / 'events.db'}", lambda: pytest.fail("no outbox is needed"))
    sink.send(event(0))
    sink.close()
    before = (tmp_path / "events.db").read_bytes()
    with pytest.raises(DataError, match="is an SQLite database"):
        open_sink(f"jsonl:{tmp_path / 'events.db'}", lambda: pytest.fail("no outbox is needed"))
    assert (tmp_path / "events.db").read_bytes() == before


def test_sqlite_keeps_each_event_once(tmp_path: Path) -> None:
    path = tmp_path / "événements.db"
    for _ in range(2):
        sink = open_sink(f"sqlite:{path}", lambda: pytest.fail("no outbox is needed"))
        for i in range(3):
            sink.send(event(i))
        sink.close()
    assert rows(path) == [event(0), event(1), event(2)]
    with pytest.raises(DataError, match="another kind of database"):
        Outbox(path)


def test_sqlite_refuses_a_foreign_database(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE events (a)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(DataError, match="another kind of database"):
        open_sink(f"sqlite:{path}", lambda: pytest.fail("no outbox is needed"))
    assert path.read_bytes() == before


WRITER = """
import sys
from edgekit.scanner import Outbox, open_sink
kind, path = sys.argv[1:]
if kind == "sqlite":
    sink = open_sink(f"sqlite:{path}", None)
    send = sink.send
else:
    outbox = Outbox(path)
    send = lambda event: outbox.append("sink", event["id"], b"{}")
for i in range(10**9):
    send({"id": str(i), "source": "s", "seq": i, "time": "t"})
    print(i, flush=True)
"""


@pytest.mark.parametrize("kind", ["sqlite", "outbox"])
def test_kill_9_loses_nothing_that_was_acknowledged(kind: str, tmp_path: Path) -> None:
    for attempt in range(4):
        path = tmp_path / f"{attempt}.db"
        process = subprocess.Popen([sys.executable, "-c", WRITER, kind, path], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        for _ in range(1 + 17 * attempt):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        acknowledged = [int(line) for line in process.stdout.read().splitlines()]
        process.stdout.close()
        process.wait()
        last = acknowledged[-1] if acknowledged else 17 * attempt
        connection = sqlite3.connect(path)
        table = "events" if kind == "sqlite" else "outbox"
        kept = [int(row[0]) for row in connection.execute(f"SELECT id FROM {table} ORDER BY position")]  # noqa: S608
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        connection.close()
        assert kept == list(range(len(kept)))
        assert kept[-1] in (last, last + 1)  # the next one may have been committed, its line not yet printed


def test_two_scans_do_not_share_an_outbox(tmp_path: Path, outbox: Outbox) -> None:
    with pytest.raises(DataError, match="in use by another scan"):
        Outbox(outbox.path)


def test_http_down_then_up_delivers_all_in_order(kit: Any, outbox: Outbox, receive: Any) -> None:
    port = kit.free_port()
    sink = open_sink(f"http://127.0.0.1:{port}/events", lambda: outbox)
    for i in range(50):
        sink.send(event(i))
    assert sink.status()["waiting"] == 50
    receiver = receive(port)
    sink.flush(20.0)
    assert receiver.events == [event(i) for i in range(50)]
    assert [h["Idempotency-Key"] for h in receiver.headers] == [f"run-{i}" for i in range(50)]
    assert sink.status() == figures(sink, sent=50, delivered=50)
    sink.close()


def test_http_waits_through_errors_and_sets_refused_events_aside(kit: Any, outbox: Outbox, receive: Any) -> None:
    port = kit.free_port()
    receiver = receive(port, 500, 503, 401, 302, 429, 422)  # the first event is tried six times, then refused
    sink = open_sink(f"http://user:p%40ss@127.0.0.1:{port}/events", lambda: outbox)
    for i in range(3):
        sink.send(event(i))
    sink.flush(20.0)
    assert receiver.events == [event(1), event(2)]
    assert set(receiver.methods) == {"POST"}  # no redirect was followed
    assert receiver.headers[0]["Authorization"] == "Basic dXNlcjpwQHNz"
    assert sink.status()["refused"] == 1
    assert "p%40ss" not in sink.name
    sink.close()


def test_events_of_a_failed_run_go_out_with_the_next(
    kit: Any, cli: Cli, pictures: Path, tmp_path: Path, receive: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.scanner.pipeline.FLUSH_S", 0.3)
    port = kit.free_port()
    arguments = ["scan", "--codes", "--source", pictures, "--sink", f"http://127.0.0.1:{port}/", "--json"]
    first = cli(*arguments)
    assert first.code == 0
    assert first.json["sinks"][0]["waiting"] == 4
    assert "is down" in first.err
    assert (tmp_path / "state" / "edgekit" / "outbox.sqlite").exists()
    receiver = receive(port)
    second = cli(*arguments)
    before = first.json["sinks"][0]
    assert "nothing listens" in before.pop("down")
    left = {"waiting": before["waiting"], "refused": 0, "dropped": {}}
    assert second.json["sinks"][0] == {**before, "delivered": 8, "waiting": 0, "before": left}
    assert [e["seq"] for e in receiver.events] == [0, 1, 2, 3] * 2
    assert len({e["id"] for e in receiver.events}) == 8


class Subscriber:
    """Another client of the broker; collects what is published below ``line/``."""

    def __init__(self, port: int, **login: str) -> None:
        import paho.mqtt.client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        self.events: list[dict[str, Any]] = []
        self.ready = False
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2)
        if login:
            self.client.username_pw_set(login["user"], login["password"])
        self.client.on_message = lambda c, d, message: self.events.append(json.loads(message.payload))
        self.client.on_subscribe = lambda *args: setattr(self, "ready", True)
        self.client.connect("127.0.0.1", port)
        self.client.subscribe("line/#", qos=1)
        self.client.loop_start()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.mark.parametrize("protocol", ["", "?protocol=3.1.1"])
def test_mqtt_down_then_up_then_restarted_delivers_all_in_order(kit: Any, outbox: Outbox, broker: Any, protocol: str) -> None:
    port = kit.free_port()
    sink = open_sink(f"mqtt://127.0.0.1:{port}/line/1{protocol}", lambda: outbox)
    for i in range(20):
        sink.send(event(i))
    assert sink.status()["waiting"] == 20
    first = broker(port)
    subscriber = Subscriber(port)
    kit.wait_for(lambda: subscriber.ready)
    sink.flush(20.0)
    kit.wait_for(lambda: len(subscriber.events) >= 20)
    assert subscriber.events == [event(i) for i in range(20)]
    subscriber.close()
    first.close()
    for i in range(20, 30):
        sink.send(event(i))
    broker(port)
    subscriber = Subscriber(port)
    kit.wait_for(lambda: subscriber.ready)
    sink.flush(20.0)
    kit.wait_for(lambda: subscriber.events and subscriber.events[-1] == event(29))
    ids = [e["id"] for e in subscriber.events]
    assert list(dict.fromkeys(ids)) == [f"run-{i}" for i in range(30) if f"run-{i}" in ids]  # in order; repeats allowed
    assert outbox.count(sink.name) == 0
    sink.close()


def test_mqtt_without_permission_keeps_the_events(kit: Any, outbox: Outbox, broker: Any, tmp_path: Path) -> None:
    port = kit.free_port()
    acl = tmp_path / "acl"
    acl.write_text("topic read line/#\n")
    acl.chmod(0o600)
    broker(port, f"allow_anonymous true\nacl_file {acl}")
    sink = open_sink(f"mqtt://127.0.0.1:{port}/line/1", lambda: outbox)
    sink.send(event(0))
    sink.flush(1.5)
    status = sink.status()
    assert "give this user the right to publish" in status.pop("down")
    assert status == figures(sink, sent=1, waiting=1)
    sink.close()


def test_mqtt_wrong_credentials_keep_the_events(
    kit: Any, outbox: Outbox, broker: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    port = kit.free_port()
    broker(port, "allow_anonymous false")
    sink = open_sink(f"mqtt://me:secret@127.0.0.1:{port}/line/1", lambda: outbox)
    sink.send(event(0))
    sink.flush(1.5)
    assert sink.status()["waiting"] == 1
    sink.close()
    said = capfd.readouterr().err
    assert "is down: Not authorized" in said or "is down: Bad user name or password" in said
    assert "secret" not in said


def test_a_folder_to_mqtt_and_a_database_at_once(kit: Any, cli: Cli, pictures: Path, tmp_path: Path, broker: Any) -> None:
    port = kit.free_port()
    broker(port)
    subscriber = Subscriber(port)
    kit.wait_for(lambda: subscriber.ready)
    Image.fromarray(kit.code_picture("ABC-123", "QRCode")).save(pictures / "code.png")
    sinks = ["--sink", f"mqtt://127.0.0.1:{port}/line/1", "--sink", f"sqlite:{tmp_path}/events.db"]
    outcome = cli("scan", "--codes", "--source", pictures, *sinks, "--outbox", tmp_path / "o.sqlite", "--json")
    assert outcome.code == 0, outcome.err
    kit.wait_for(lambda: len(subscriber.events) == 5)
    assert subscriber.events == rows(tmp_path / "events.db")
    assert outcome.json["codes"] == 1
    subscriber.close()
    assert not os.environ.get("STATE_DIRECTORY")

"""A scan that is watched: metrics, health, pictures over HTTP, systemd's socket, a trigger from outside, an incident's file."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bundle import Bundle
from edgekit.runtime.onnxruntime import OnnxRuntimeRunner
from edgekit.scanner import Scanner, Stop
from edgekit.scanner.board import HANG_S, Board
from edgekit.scanner.replay import replay
from edgekit.scanner.systemd import Systemd

PATIENCE_S = 60.0
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    """Every sample of a scrape, as Prometheus's own parser reads it: (name, labels) -> value."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"edgekit_scan_{name}", frozenset(labels.items())]


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        return int(found.getsockname()[1])


@contextmanager
def running(tables: dict[str, Any]) -> Iterator[tuple[Scanner, list[dict[str, Any]], threading.Condition]]:
    """A scan in a thread of its own, and its events as they come."""
    events: list[dict[str, Any]] = []
    news = threading.Condition()

    def hear(event: dict[str, Any]) -> None:
        with news:
            events.append(event)
            news.notify_all()

    scanner = Scanner(tables, on_event=hear)
    thread = threading.Thread(target=scanner.run)
    thread.start()
    try:
        yield scanner, events, news
    finally:
        scanner.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, str, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=PATIENCE_S) as answer:  # noqa: S310
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.headers["Content-Type"], refused.read()


def test_a_running_scan_is_watched_triggered_and_recorded(tmp_path: Path) -> None:
    port = free_port()
    tables = {
        "codes": {"budget_ms": 0},
        "source": [{"address": "pattern:64x48@30", "name": "dock"}],
        "trigger": {"mode": "external", "time_ms": 200, "inputs": [f"tcp://127.0.0.1:{port}"]},
        "incidents": {"folder": str(tmp_path / "incidents"), "on": ["no_read"]},
        "server": {"address": "127.0.0.1:0"},
    }
    with running(tables) as (scanner, events, news):
        with news:
            assert news.wait_for(lambda: any(e.get("event") == "camera" and e["state"] == "up" for e in events), PATIENCE_S)
        with socket.create_connection(("127.0.0.1", port)) as trigger:
            trigger.sendall(b"parcel 7\n")
        with news:
            assert news.wait_for(lambda: any(e.get("event") == "no_read" for e in events), PATIENCE_S)
            missed = next(e for e in events if e.get("event") == "no_read")
            assert (missed["source"], missed["trigger"]["reference"]) == ("dock", "parcel 7")
            assert news.wait_for(lambda: any(e.get("event") == "incident" for e in events), PATIENCE_S)
        assert_answers(scanner.url)
    files = list((tmp_path / "incidents").iterdir())
    assert len(files) == 1
    assert scanner.summary is not None
    assert scanner.summary.captured == scanner.summary.inferred + sum(scanner.summary.dropped.values())


def assert_answers(url: str) -> None:
    """What the server of a running scan says, and what it refuses."""
    code, kind, body = ask(f"{url}metrics")
    assert (code, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = samples(body.decode())
    dropped = sum(count for (name, _), count in found.items() if name == "edgekit_scan_dropped_frames_total")
    captured = value(found, "captured_frames_total")
    assert captured > 0
    assert captured == value(found, "inferred_frames_total") + dropped + value(found, "in_flight_frames")
    assert value(found, "source_up", source="dock") == 1
    assert value(found, "triggers_total") == 1
    assert value(found, "read_rate") == 0
    assert value(found, "latency_seconds_bucket", le="+Inf") == value(found, "inferred_frames_total")
    for path in ("healthz", "readyz"):
        code, _, body = ask(f"{url}{path}")
        assert (code, json.loads(body)) == (200, {"ok": True, "reasons": []})
    assert json.loads(ask(f"{url}status")[2])["state"] == "running"
    code, kind, body = ask(f"{url}preview.jpg")
    assert (code, kind, body[:2]) == (200, "image/jpeg", b"\xff\xd8")
    assert ask(f"{url}preview.jpg?source=dock")[1] == "image/jpeg"
    assert ask(f"{url}preview.jpg?source=quay")[0] == 404
    assert ask(url)[1] == "text/html; charset=utf-8"
    assert ask(f"{url}metrics", "POST")[0] == 405
    for method, code in (("PUT", 405), ("DELETE", 405), ("OPTIONS", 405), ("BREW", 405)):
        assert ask(url, method)[0] == code
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example"):
        assert ask(f"{url}metrics", Host=host)[0] == 421
    for host in ("localhost:1", "127.0.0.1", "[::1]:9110", "10.1.2.3"):
        assert ask(f"{url}healthz", Host=host)[0] == 200
    assert ask(f"{url}preview.jpg?source=../../../etc/passwd")[0] == 404
    assert ask(f"{url}%2e%2e/preview.js")[0] == 404
    assert ask(f"{url}../../../../etc/passwd")[0] == 404
    assert ask(f"{url}metrics?{'x' * 9000}")[0] == 414


def test_a_scrape_has_all_that_the_accounting_has(
    digits_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.scanner.pipeline.FLUSH_S", 0.1)
    dead = free_port()
    tables = {
        "model": {"bundle": str(digits_bundle.path)},
        "codes": {"budget_ms": 0},
        "votes": {},
        "drift": {"every_frames": 1, "window_frames": 50, "learn_frames": 50},
        "selftest": {},
        "shadow": {"candidate": str(tmp_path / "none.edge")},
        "outbox": {"path": str(tmp_path / "outbox.sqlite"), "most_events": 100},
        "sink": [{"address": f"jsonl:{tmp_path / 'a.jsonl'}"}, {"address": f"mqtt://me:geheim@127.0.0.1:{dead}/line"}],
        "server": {"address": "127.0.0.1:0", "preview": False},
    }
    frames = [np.full((28, 28), i % 200, np.uint8) for i in range(119)] + [np.zeros((2, 2, 7), np.uint8)]
    scanner = Scanner(tables, frames=frames)
    for count, _ in enumerate(scanner):
        if count == 110:  # the scan stands still as long as its event is held
            text, status = ask(f"{scanner.url}metrics")[2].decode(), scanner.status()
            found = samples(text)
    assert scanner.summary is not None
    jsonl, mqtt = f"jsonl:{tmp_path / 'a.jsonl'}", f"mqtt://127.0.0.1:{dead}/line"
    (dropped,) = status["sinks"][1]["dropped"].items()
    assert status["captured"] > 90
    for name, expected, labels in [
        ("captured_frames_total", status["captured"], {}),
        ("inferred_frames_total", status["captured"], {}),
        ("source_inferred_frames_total", status["captured"], {"source": "frames"}),
        ("events_total", status["events"], {}),
        ("sink_sent_total", status["sinks"][0]["sent"], {"sink": jsonl}),
        ("sink_waiting", 100, {"sink": mqtt}),
        ("sink_dropped_events_total", dropped[1], {"sink": mqtt, "reason": dropped[0]}),
        ("misreads_total", 0, {"how": "gs1"}),
        ("misreads_total", 0, {"how": "unconfirmed"}),
        ("codes_a_frame", 0, {}),
        ("selftest_healthy", 1, {}),
        ("shadow_state", 1, {"state": "idle"}),
    ]:
        assert value(found, name, **labels) == expected, name
    assert value(found, "source_latency_seconds", source="frames", quantile="0.99") > 0
    assert value(found, "drift_psi", part="brightness") >= 0
    assert "geheim" not in text
    assert scanner.summary.dropped == {"damaged": 1}
    assert "no codes (0 of 119)" in scanner.summary.line()


def test_pings_stop_and_health_says_so_while_inference_hangs(
    digits_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model hangs in the scanning thread; a server, a sign of life elsewhere, must not hide it."""
    hang, go_on = threading.Event(), threading.Event()
    run = OnnxRuntimeRunner.run

    def hangs(self: Any, feeds: Any) -> Any:
        if hang.is_set():
            assert go_on.wait(PATIENCE_S)
        return run(self, feeds)

    monkeypatch.setattr(OnnxRuntimeRunner, "run", hangs)
    monkeypatch.setattr("edgekit.scanner.board.HANG_S", 0.5)
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "150000")
        tables = {"model": {"bundle": str(digits_bundle.path)}, "source": [{"address": "pattern:28x28@50"}]}
        with running({**tables, "server": {"address": "127.0.0.1:0", "preview": False}}) as (scanner, events, news):
            assert notify.recv(4096).startswith(b"READY=1")
            with news:
                assert news.wait_for(lambda: any("label" in event for event in events), PATIENCE_S)
            while notify.recv(4096) != b"WATCHDOG=1":
                pass
            assert ask(f"{scanner.url}healthz")[0] == 200
            hang.set()
            while (answer := ask(f"{scanner.url}healthz"))[0] == 200:
                time.sleep(0.05)
            assert b"has been busy for" in answer[2]
            notify.settimeout(0.4)  # what was sent before it hung is in the socket; nothing follows
            with pytest.raises(TimeoutError):
                all(notify.recv(4096) for _ in range(1000))
            ready, metrics = ask(f"{scanner.url}readyz"), ask(f"{scanner.url}metrics")[2].decode()
            assert (ready[0], json.loads(ready[2])["ok"]) == (503, False)
            assert value(samples(metrics), "silent_seconds") > 0.5
            assert value(samples(metrics), "ready") == 0
            go_on.set()
            notify.settimeout(PATIENCE_S)
            while notify.recv(4096) != b"WATCHDOG=1":
                pass
            assert ask(f"{scanner.url}healthz")[0] == 200


def test_who_asks_a_hanging_loop_does_not_wait_and_who_holds_the_scan_up_hears_of_now() -> None:
    now = [0.0]
    board = Board(lambda: now[0])
    count = iter(range(100))
    board.start(lambda: {"n": next(count)}, lambda figures: [f"n is {figures['n']}"])
    assert board.figures() == {"n": 0}  # of the scanning thread itself: at once
    found: list[Any] = []

    def ask_board() -> None:
        begun = time.monotonic()
        found.append((board.figures(PATIENCE_S), time.monotonic() - begun))

    def asked() -> tuple[dict[str, Any], float]:
        thread = threading.Thread(target=ask_board)
        thread.start()
        thread.join(PATIENCE_S)
        return found[-1]

    with board.resting():
        assert asked()[0] == {"n": 1}
    assert board.readiness(board.figures()) == ["n is 2"]
    now[0] = HANG_S + 1
    figures, took = asked()
    assert figures == {"n": 2}
    assert took < PATIENCE_S / 2
    assert "busy for 11 s" in board.health()[0]
    board.stop()
    assert asked()[0] == {"n": 3}
    assert board.readiness({}) == ["the scan is stopping"]


def test_systemd_hears_of_the_loop_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "notify")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as notify:
        notify.bind(address)
        notify.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("WATCHDOG_USEC", "3000")
        frames = [np.zeros((30, 30), np.uint8)] * 3
        Scanner({"codes": {"budget_ms": 0}}, frames=frames, stop=Stop()).run()
        heard = []
        while True:
            try:
                heard.append(notify.recv(4096).decode())
            except BlockingIOError:
                break
    assert heard[0].startswith("READY=1")
    assert "WATCHDOG=1" in heard
    assert heard[-1] == "STOPPING=1"


@pytest.mark.parametrize(("environment", "every_s"), [({"WATCHDOG_USEC": "30000000"}, 10.0), ({}, float("inf"))])
def test_a_third_of_the_watchdogs_period(environment: dict[str, str], every_s: float) -> None:
    assert Systemd({"NOTIFY_SOCKET": "/nowhere", **environment}).every_s == every_s
    assert Systemd({**environment, "WATCHDOG_PID": "1"}).every_s == float("inf")


def test_a_name_that_is_no_text_ends_neither_scan_nor_scrape(tmp_path: Path) -> None:
    """Half a character, as a file name of another time gives it: in the log, the figures and the file of an incident."""
    name = "caf\udce9"
    tables = {
        "codes": {"budget_ms": 0},
        "source": [{"address": "pattern:64x48@30", "name": name}],
        "trigger": {"mode": "external", "time_ms": 200},
        "incidents": {"folder": str(tmp_path / name), "on": ["no_read"]},
        "log": {"format": "json"},
        "server": {"address": "127.0.0.1:0"},
    }
    with running(tables) as (scanner, events, news):
        with news:
            assert news.wait_for(lambda: any("codes" in e or e.get("state") == "up" for e in events), PATIENCE_S)
        assert scanner.fire(reference="x\udce9")
        with news:
            assert news.wait_for(lambda: any(e.get("event") == "incident" for e in events), PATIENCE_S)
        assert value(samples(ask(f"{scanner.url}metrics")[2].decode()), "source_up", source="caf\\udce9") == 1
        assert json.loads(ask(f"{scanner.url}status")[2])["sources"][0]["source"] == "caf\\udce9"
    (file,) = (tmp_path / name).iterdir()
    assert replay(file).differing == 0


def test_who_holds_the_scan_up_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The application with an event in hand, not a frame; and sinks that are waited for at the end are no hang."""
    monkeypatch.setattr("edgekit.scanner.board.HANG_S", 0.1)
    monkeypatch.setattr("edgekit.scanner.board.WATCH_S", 0.02)
    board = Board()
    board.start(dict, lambda figures: [])
    with board.watched():
        with board.resting():
            time.sleep(0.4)
        board.round(time.monotonic())
        time.sleep(0.08)
        board.finish()
        time.sleep(0.4)
    said = capsys.readouterr().err
    assert "the application holds an event" in said
    assert said.count("has been busy") == 1

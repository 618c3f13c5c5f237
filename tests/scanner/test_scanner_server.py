"""A scan that is watched: metrics, health, pictures over HTTP, systemd's socket, a trigger from outside, an incident's file."""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.scanner import Scanner, Stop
from edgekit.scanner.systemd import Systemd

PATIENCE_S = 60.0


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
    found: Counter[str] = Counter()
    for name, value in re.findall(r"^edgekit_scan_(\w+_frames(?:_total)?)(?:{.*})? (\S+)$", body.decode(), re.M):
        found[name] += int(value)
    frames = [found[name] for name in ("inferred_frames_total", "dropped_frames_total", "in_flight_frames")]
    assert found["captured_frames_total"] > 0
    assert found["captured_frames_total"] == sum(frames)
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
    assert ask(f"{url}metrics", Host="evil.example")[0] == 403
    assert ask(f"{url}../../../../etc/passwd")[0] == 404
    assert ask(f"{url}metrics?{'x' * 9000}")[0] == 431


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

"""HTTP servers of every mood: they ask for patience, know the event already, point elsewhere, hang; nothing is lost."""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from edgekit.scanner import Outbox, open_sink
from edgekit.scanner.sinks import forward, http
from edgekit.scanner.sinks.forward import Undelivered

from .outbox_kit import ids
from .outbox_kit import line_event as event

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def _quick(quick_delivery: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


class Moody:
    """An HTTP server: ``answers`` are ``(status, headers)`` to give, then 200. ``hang``: seconds before an answer's body."""

    def __init__(self, *answers: tuple[int, dict[str, str]], hang: float = 0.0) -> None:
        self.events: list[dict[str, Any]] = []
        self.times: list[float] = []
        waiting, moody = list(answers), self
        self.released = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.headers["Idempotency-Key"] == body["id"]
                moody.times.append(time.monotonic())
                moody.events.append(body)
                status, headers = waiting.pop(0) if waiting else (200, {})
                self.send_response_only(status)
                for name, value in {"Content-Length": "7", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if hang:
                    moody.released.wait(hang)
                self.wfile.write(b"whatever"[:7])

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((HOST, 0), Handler)
        self.server.handle_error = lambda *args: None  # type: ignore[method-assign]  # the client need not wait for a body
        self.url = f"http://{HOST}:{self.server.server_port}/events"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    @property
    def seqs(self) -> list[int]:
        return [each["seq"] for each in self.events]


@pytest.fixture
def moody() -> Iterator[Callable[..., Moody]]:
    running: list[Moody] = []

    def start(*answers: tuple[int, dict[str, str]], **options: Any) -> Moody:
        running.append(Moody(*answers, **options))
        return running[-1]

    yield start
    for each in running:
        each.close()


NOON = datetime.datetime(2020, 1, 1, 12, tzinfo=datetime.timezone.utc)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        # By the server's own clock, which is years behind.
        (
            {"Retry-After": format_datetime(NOON + datetime.timedelta(seconds=9), True), "Date": format_datetime(NOON, True)},
            9.0,
        ),
        ({"Retry-After": format_datetime(NOON, True)}, 0.0),
        ({"Retry-After": "soon"}, 0.0),
        ({"Retry-After": "-3"}, 0.0),
        ({"Retry-After": "9" * 400}, 0.0),
        ({}, 0.0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_read_in_both_forms(moody: Any, status: int, headers: dict[str, str], seconds: float) -> None:
    server = moody((status, headers))
    with pytest.raises(Undelivered, match=f"it answered {status}") as caught:
        http.HttpTransport(server.url).deliver("run-0", json.dumps(event(0)).encode())
    assert caught.value.after_s == seconds


def test_retry_after_is_kept_to_up_to_a_bound_and_at_the_end_too(
    kit: Any, outbox: Outbox, moody: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "LONGEST_ASKED_S", 0.4)
    server = moody((503, {"Retry-After": "86400"}), (429, {"Retry-After": "86400"}))
    sink = open_sink(server.url, lambda: outbox)
    for i in range(3):
        sink.send(event(i))
    sink.flush(20.0)
    assert server.seqs == [0, 0, 0, 1, 2]
    first, second, third, *_ = server.times
    assert min(second - first, third - second) >= 0.4
    sink.close()


def test_409_is_no_proof_that_the_event_is_there(outbox: Outbox, moody: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request with its key may be in work still, and fail: it is asked again, and set aside in the end."""
    monkeypatch.setattr(http, "CONFLICT_S", 0.0)
    monkeypatch.setattr(http, "CONFLICTS", 3)
    busy = (409, {})
    server = moody(busy, busy, (201, {}), busy, busy, busy)
    sink = open_sink(server.url, lambda: outbox)
    for i in range(3):
        sink.send(event(i))
    sink.flush(20.0)
    assert server.seqs == [0, 0, 0, 1, 1, 1, 2]
    figures = sink.status()
    assert (figures["delivered"], figures["refused"], figures["waiting"]) == (2, 1, 0)
    sink.close()


@pytest.mark.parametrize(
    ("status", "headers", "cure"),
    [
        (401, {}, "mend user:password@ in the address"),
        (403, {}, "give this user the right"),
        (404, {}, "mend the path"),
        (301, {"Location": "/elsewhere?token=secret"}, "/elsewhere)"),
        (307, {"Location": "http://me:secret@other.example/x"}, "http:...)"),
        (308, {"Location": "http://127.0.0.1:1/\x1b[2J"}, "%1B"),
        (303, {}, "303"),
    ],
)
def test_answers_that_a_person_has_to_mend_are_told_and_retried(
    kit: Any, outbox: Outbox, moody: Any, status: int, headers: dict[str, str], cure: str
) -> None:
    server = moody((status, headers))
    with pytest.raises(Undelivered) as caught:
        http.HttpTransport(server.url).deliver("run-0", json.dumps(event(0)).encode())
    assert cure in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert server.seqs == [0]  # no redirect was followed


def test_status_tells_what_is_wrong_until_it_is_mended(kit: Any, outbox: Outbox, moody: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(forward, "FIRST_PAUSE_S", 0.3)
    monkeypatch.setattr(forward, "LONGEST_PAUSE_S", 0.3)
    server = moody((401, {}), (403, {}))
    sink = open_sink(server.url, lambda: outbox)
    sink.send(event(0))
    kit.wait_for(lambda: sink.status().get("down", "").startswith("it answered 401"))
    kit.wait_for(lambda: sink.status().get("down", "").startswith("it answered 403"))
    kit.wait_for(lambda: "down" not in sink.status())
    assert sink.status()["delivered"] == 1
    sink.close()


def test_http_servers_that_hang(kit: Any, outbox: Outbox, moody: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One never answers: later. One answers 200 and keeps the body back: the status is the acknowledgement."""
    monkeypatch.setattr(http, "TIMEOUT_S", 0.2)
    with socket.create_server((HOST, 0)) as silent:
        sink = open_sink(f"http://{HOST}:{silent.getsockname()[1]}/x", lambda: outbox)
        sink.send(event(0))
        kit.wait_for(lambda: "no answer in time" in sink.status().get("down", ""))
        assert sink.status()["waiting"] == 1
        sink.close()
    server = moody(hang=60.0)
    sink = open_sink(server.url, lambda: outbox)
    sink.send(event(0))
    sink.send(event(1))
    sink.flush(10.0)
    assert (server.seqs, sink.status()["delivered"]) == ([0, 1], 2)
    sink.close()


def test_what_a_server_says_does_not_reach_the_terminal_as_it_is(
    kit: Any, outbox: Outbox, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server((HOST, 0)) as server:
        sink = open_sink(f"http://{HOST}:{server.getsockname()[1]}/x", lambda: outbox)
        sink.send(event(0))
        with server.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 500 \x1b[2Jgone" + b"!" * 9000 + b"\r\nContent-Length: 0\r\n\r\n")
            kit.wait_for(lambda: "it answered 500 ?[2Jgone" in sink.status().get("down", ""))
    sink.close()
    assert len(said := capfd.readouterr().err) < 2000
    assert "\x1b" not in said


def test_https_where_no_tls_is(kit: Any, outbox: Outbox, moody: Any) -> None:
    sink = open_sink(moody().url.replace("http", "https"), lambda: outbox)
    sink.send(event(0))
    kit.wait_for(lambda: "no TLS is spoken" in sink.status().get("down", ""))
    sink.close()


def test_refusals_are_counted_and_not_said_one_by_one(
    kit: Any, outbox: Outbox, moody: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    sink = open_sink(moody(*[(422, {})] * 50).url, lambda: outbox)
    for i in range(60):
        sink.send(event(i))
    sink.flush(20.0)
    assert (sink.status()["refused"], sink.status()["delivered"]) == (50, 10)
    assert capfd.readouterr().err.count("refuses event") < 4
    sink.close()


def test_a_flush_goes_on_while_single_events_arrive_slowly(kit: Any, outbox: Outbox, moody: Any) -> None:
    """A batch of them takes longer than the flush is patient."""
    server = moody()
    answer = server.server.RequestHandlerClass.do_POST
    server.server.RequestHandlerClass.do_POST = lambda self: (time.sleep(0.1), answer(self))
    sink = open_sink(server.url, lambda: outbox)
    for i in range(20):
        sink.send(event(i))
    begun = len(server.seqs)
    sink.flush(0.2)  # what a scan that has to end gives it: it does not wait for all of them
    assert len(server.seqs) - begun < 20
    sink.flush(1.0)
    assert sink.status()["waiting"] == 0
    sink.close()


def test_an_answer_that_comes_a_byte_at_a_time_is_told(kit: Any, outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.scanner.sinks.forward.SLOW_S", 0.3)
    done = threading.Event()

    def drip(server: socket.socket) -> None:
        client, _ = server.accept()
        with client, contextlib.suppress(OSError):
            client.recv(1 << 16)
            for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000:
                client.send(bytes([byte]))
                if done.wait(0.1):
                    return

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,))
        thread.start()
        sink = open_sink(f"http://127.0.0.1:{server.getsockname()[1]}/x", lambda: outbox)
        sink.send(event(0))
        kit.wait_for(lambda: "no answer for" in sink.status().get("down", ""))
        done.set()
        thread.join()
        sink.close()
    assert ids(outbox, sink.name) == ["run-0"]

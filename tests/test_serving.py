"""The servers of a scan and of a report, as strangers speak to them: over raw sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgekit import serving
from edgekit.reporting.page import policy
from edgekit.reporting.serve import Watched, _Server
from edgekit.scanner.board import Board
from edgekit.scanner.config import ServerOptions
from edgekit.scanner.server import StatusServer
from edgekit.serving import MOST_BYTES, MOST_CONNECTIONS, MOST_HEADERS, MOST_LINE, may_ask

HOST = b"Host: localhost\r\n"
GET = b"GET / HTTP/1.1\r\n"


@contextmanager
def report_server() -> Iterator[int]:
    """`report --serve` of nothing."""
    server = _Server(0, Watched([]))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def scan_server() -> Iterator[int]:
    """A scan's, without preview, that answers to ``edge-7`` too."""
    board = Board()
    board.start(dict, lambda figures: [])
    server = StatusServer(ServerOptions("127.0.0.1:0", preview=False, hosts=("Edge-7",)), board)
    try:
        yield int(server.url.rsplit(":", 1)[1].strip("/"))
    finally:
        server.close()
        board.stop()


SERVERS = {"/": report_server, "/healthz": scan_server}


@pytest.fixture(scope="module", params=SERVERS)
def at(request: pytest.FixtureRequest) -> Iterator[tuple[int, bytes]]:
    """Port, and a path that is answered."""
    with SERVERS[request.param]() as port:
        yield port, request.param.encode()


def heard(peer: socket.socket) -> bytes:
    found = b""
    try:
        while more := peer.recv(65536):
            found += more
    except ConnectionResetError:
        pass
    return found


def say(port: int, *parts: bytes, ends: bool = False) -> bytes:
    """All that is answered until the server closes. ``ends``: the peer says that no more will come."""
    with socket.create_connection(("127.0.0.1", port), 20) as peer:
        for part in parts:
            peer.sendall(part)
        if ends:
            peer.shutdown(socket.SHUT_WR)
        return heard(peer)


def code(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def test_headers_of_an_answer(at: tuple[int, bytes]) -> None:
    port, path = at
    for method, target, expected in (
        (b"GET", path, 200), (b"HEAD", path, 200), (b"GET", b"/none", 404), (b"POST", path, 405), (b"CONNECT", path, 405)
    ):  # fmt: skip
        head, _, body = say(port, method + b" " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n").partition(b"\r\n\r\n")
        assert code(head) == expected
        words = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:])
        assert words["x-content-type-options"] == "nosniff"
        assert words["cache-control"] == "no-store"
        assert words["content-security-policy"].startswith("default-src 'none'; ")
        assert "frame-ancestors 'none'" in words["content-security-policy"]
        assert "access-control-allow-origin" not in words
        assert ("allow" in words) == (expected == 405)
        assert bool(body) == (method != b"HEAD")
        assert method == b"HEAD" or len(body) == int(words["content-length"])


def test_the_page_carries_its_policy_twice() -> None:
    with report_server() as port:
        head, _, page = say(port, GET + HOST + b"\r\n").partition(b"\r\n\r\n")
    assert f"\r\nContent-Security-Policy: {policy(live=True)}; frame-ancestors 'none'\r\n".encode() in head
    assert f'content="{policy(live=True)}"'.encode() in page
    assert "connect-src" not in policy(live=False)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /%b HTTP/1.1\r\n" % (b"x" * MOST_LINE), 414),
        (b"GET /" + b"x" * MOST_BYTES, 414),
        (GET + HOST + b"X: %b\r\n\r\n" % (b"x" * MOST_BYTES), 431),
        (GET + HOST + b"X: 1\r\n" * MOST_HEADERS + b"\r\n", 431),
        (GET + b"X:" + b"\r\n" * 9, 400),
        (GET + b"\r\n", 400),  # no Host
        (GET + HOST + HOST + b"\r\n", 400),
        (GET + HOST + b"host: evil.example\r\n\r\n", 400),
        (GET + b"Host : localhost\r\n\r\n", 400),
        (GET + HOST + b" folded\r\n\r\n", 400),
        (GET + HOST + b"X: a\nY: b\r\n\r\n", 400),
        (GET + HOST + b"X: \0\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/0.9\r\n" + HOST + b"\r\n", 400),
        (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 400),
        (b"get / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),  # a TLS hello
        (b"GET http://localhost/ HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (GET + b"Host: evil.example\r\n\r\n", 421),
        (b"POST / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
    ],
)
def test_what_is_refused(at: tuple[int, bytes], request_: bytes, expected: int) -> None:
    assert code(say(at[0], request_)) == expected


def test_a_refusal_arrives_though_more_is_sent(at: tuple[int, bytes]) -> None:
    body = b"x" * 300_000
    assert code(say(at[0], b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 300000\r\n\r\n", body)) == 405


def test_configured_names_are_known() -> None:
    with scan_server() as port:
        answers = [
            code(say(port, b"GET /healthz HTTP/1.1\r\nHost: " + name + b"\r\n\r\n")) for name in (b"EDGE-7:9110", b"edge-8")
        ]
    assert answers == [200, 421]


@pytest.mark.parametrize(
    ("host", "known"),
    [
        *(
            (name, True)
            for name in ("localhost", "LOCALHOST:80", "127.0.0.1", "10.1.2.3:1", "[::1]", "[::1]:9110", "localhost:")
        ),
        *((name, False) for name in ("", ":80", "localhost.", "localhost:80:80", "a@localhost", "localhost/", "local host")),
        *((name, False) for name in ("::1", "[::1", "[::1]x", "127.0.0.1.evil.example", "1.2.3", "[localhost]", "localhost:x")),
    ],
)
def test_host_names(host: str, known: bool) -> None:
    assert may_ask(host, {"localhost"}) is known


@given(
    st.binary(max_size=300)
    | st.lists(
        st.sampled_from([GET, HOST, b"\r\n", b"\n", b"\r", b" ", b":", b"Host", b"\0", b"\xff", b"HTTP/1.1"]), max_size=9
    ).map(b"".join)
)
@example(GET + HOST + b"\r\n")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_have_an_answer_or_none(at: tuple[int, bytes], data: bytes) -> None:
    """Only what is a request for a known name is served; nothing else does harm."""
    found = code(say(at[0], data, ends=True))
    assert found in (0, 200, 400, 404, 414, 421, 431)
    if found in (200, 404):
        assert data.startswith(GET + HOST)
        assert data.count(b"Host:") == 1 or data.index(b"\r\n\r\n") < data.rindex(b"Host:")
    assert b"\r\n\r\n" in data or not found


def test_slow_and_silent_clients_are_dropped_and_hold_up_nobody(at: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    port, path = at
    monkeypatch.setattr(serving, "REQUEST_S", 0.8)
    begun = time.monotonic()
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 20)) for _ in range(3 * MOST_CONNECTIONS)]
        for peer in slow[::2]:
            peer.sendall(GET)
        for _ in range(5):
            assert code(say(port, b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")) == 200
        assert time.monotonic() - begun < 5
        drip = slow[-2]
        with suppress(OSError):  # a pipe or a reset, as it comes
            while time.monotonic() - begun < 20:
                drip.sendall(b"X: y\r\n")
                time.sleep(0.05)
        assert [heard(peer) for peer in slow if peer is not drip] == [b""] * (len(slow) - 1)
    assert time.monotonic() - begun < 15


def test_who_is_being_answered_does_not_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """All places are taken by requests at work: the next one hears so at once."""
    at_work, go_on = threading.Semaphore(0), threading.Event()

    def slow_answer(watched: Watched) -> str:
        at_work.release()
        return str(go_on.wait(20))

    monkeypatch.setattr(Watched, "version", slow_answer)
    answers: list[bytes] = []
    with report_server() as port:
        ask = b"GET /version HTTP/1.1\r\n" + HOST + b"\r\n"
        peers = [threading.Thread(target=lambda: answers.append(say(port, ask))) for _ in range(MOST_CONNECTIONS)]
        for peer in peers:
            peer.start()
        for _ in peers:
            assert at_work.acquire(timeout=20)
        assert code(say(port, ask)) == 503
        go_on.set()
        for peer in peers:
            peer.join()
        assert [code(answer) for answer in answers] == [200] * MOST_CONNECTIONS
        assert code(say(port, GET + HOST + b"\r\n")) == 200

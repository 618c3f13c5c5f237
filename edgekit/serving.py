"""A small HTTP server for what one machine shows of itself: known routes, GET and HEAD; who asks slowly gives way.

A request's path never meets the disk: a handler compares it with the names that it knows. The grammar is the strict half of
RFC 9112: what is not plainly a request is refused before anything else looks at it. A page on another name that was pointed at
this machine (DNS rebinding) says that name in its Host header, and is refused with 421.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["PageHandler", "PageServer", "may_ask"]

#: Of a request: bytes of its first line, of all of it, and how many headers.
MOST_LINE, MOST_BYTES, MOST_HEADERS = 2 << 10, 8 << 10, 64
#: Seconds for a request to come, and for each part of an answer to be taken.
REQUEST_S = 5.0
MOST_CONNECTIONS = 16
_LEAST_S, _GIVE_WAY_S = 0.1, 0.3
_LINGER_S = 1.0
_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEAD = re.compile(
    rb"[A-Z]{1,20} [!-~]+ HTTP/1\.[01]\r\n"  # a fold, a bare CR or LF and a control character are in no line
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*"
)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/\s]+)(?::[0-9]{0,5})?")


class PageServer(ThreadingHTTPServer):
    """Listens on ``host`` at once. It may be asked by that name, ``localhost``, any IP address, and ``hosts``.

    Raises `OSError` or `OverflowError` where the address cannot be had.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # a connection that finds no place in it is tried again after a second

    def __init__(self, host: str, port: int, handler: type[PageHandler], hosts: Iterable[str] = ()) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.hosts = {name.lower() for name in ("localhost", host, *hosts)}
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._lock = threading.Lock()
        self._silent: dict[Any, float] = {}  # which this server waits for, in the order in which they came
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        """Without http.server's question to the DNS for a name that nobody needs."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room():
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(b"HTTP/1.0 503 Too many connections\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
                request.recv(MOST_BYTES)  # what is unread at the close resets the connection, and the answer is lost
            self.shutdown_request(request)
            return
        self.waits(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be had
            self.heard(request)
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            super().finish_request(request, client_address)
        finally:
            self.heard(request)

    def waits(self, request: Any) -> None:
        """From now on it gives way to who comes, until it is `heard`."""
        with self._lock:
            self._silent[request] = time.monotonic()

    def heard(self, request: Any) -> None:
        with self._lock:
            self._silent.pop(request, None)

    def _room(self) -> bool:
        """Whether one more can be taken; where all places are, who has been waited for longest gives way to who comes."""
        end = time.monotonic() + _GIVE_WAY_S
        while not self._free.acquire(timeout=0.01):
            now = time.monotonic()
            with self._lock:
                oldest, since = next(iter(self._silent.items()), (None, now))
                if oldest is None or now > end:
                    return False
                if now > since + _LEAST_S:
                    del self._silent[oldest]
                    with contextlib.suppress(OSError):
                        oldest.shutdown(socket.SHUT_RDWR)
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: who asks and goes away is no business of the log."""


class PageHandler(BaseHTTPRequestHandler):
    """One request a connection. A server's own handler says in `answer` what it knows."""

    server: PageServer
    server_version, sys_version = "edgekit", ""
    protocol_version = "HTTP/1.0"
    timeout = REQUEST_S
    #: The Content-Security-Policy of answers that state none of their own.
    policy = _NOTHING
    #: What mends a Host header that is not known.
    ask_by = "ask by localhost or an IP address"

    def answer(self, path: str, query: str) -> None:
        """Call `send`, `words` or `begin` for GET and HEAD of a path, both as they came."""
        raise NotImplementedError

    def handle(self) -> None:
        self.close_connection = True
        self.command, self.requestline, self.request_version = "", "", "HTTP/1.0"
        head = self._head()
        self.server.heard(self.connection)
        if head:
            self._hear(head)

    def _hear(self, head: bytes) -> None:
        with contextlib.suppress(OSError):  # it has gone, or takes nothing
            if refused := self._refused(head):
                headers = {"Allow": "GET, HEAD"} if refused[0] == 405 else {}
                self.words(refused[0], refused[1], **headers)
                self._take_the_rest()
                return
            path, _, query = self.requestline.split(" ")[1].partition("?")
            try:
                self.answer(path, query)
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001  one answer that fails is no end of the others
                self.words(500, f"no answer can be made: {type(error).__name__}")

    def _head(self) -> bytes:
        """The request's head if it comes in time, as much of it as may be where it is too large, else nothing."""
        end, head = time.monotonic() + REQUEST_S, b""
        with contextlib.suppress(OSError):
            while b"\r\n\r\n" not in head and len(head) <= MOST_BYTES and len(head.partition(b"\r\n")[0]) <= MOST_LINE:
                self.connection.settimeout(max(end - time.monotonic(), 0.001))
                more = self.connection.recv(4096)
                if not more or time.monotonic() > end:
                    return b""
                head += more
            self.connection.settimeout(REQUEST_S)
            return head
        return b""

    def _refused(self, head: bytes) -> tuple[int, str] | None:
        """Status and words where the request is not to be answered; else its command and line are set."""
        head, end, _ = head.partition(b"\r\n\r\n")
        line, *fields = head.split(b"\r\n")
        if len(line) > MOST_LINE:
            return 414, f"the first line of a request is at most {MOST_LINE} bytes"
        if not end or len(head) > MOST_BYTES:
            return 431, f"a request is at most {MOST_BYTES} bytes"
        if len(fields) > MOST_HEADERS:
            return 431, f"a request has at most {MOST_HEADERS} headers"
        if not _HEAD.fullmatch(head + b"\r\n"):
            return 400, "this is no HTTP request"
        self.requestline = line.decode("ascii")
        self.command = self.requestline.split(" ")[0]
        hosts = [value for name, _, value in (field.partition(b":") for field in fields) if name.lower() == b"host"]
        if len(hosts) != 1:
            return 400, "a request has one Host header"
        if not may_ask(hosts[0].decode("latin-1").strip(" \t"), self.server.hosts):
            return 421, f"this name is not known here: {self.ask_by}"
        if self.command not in ("GET", "HEAD"):
            return 405, "read only: GET and HEAD"
        return None

    def _take_the_rest(self) -> None:
        """Read what still comes, for a moment: closed before, the connection is reset and the answer may be lost."""
        self.server.waits(self.connection)
        self.connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + _LINGER_S
        while (left := end - time.monotonic()) > 0:
            self.connection.settimeout(left)
            if not self.connection.recv(4096):
                return

    def words(self, code: int, words: str, **headers: str) -> None:
        self.send(code, "text/plain; charset=utf-8", f"{words}\n".encode(), **headers)

    def send(self, code: int, kind: str, body: bytes, **headers: str) -> None:
        """A whole answer. ``headers``: others, or other ones than usual, with ``_`` for ``-``."""
        self.begin(code, kind, Content_Length=str(len(body)), **headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, code: int, kind: str, **headers: str) -> None:
        """The head of an answer; the body, but for HEAD, follows on ``wfile``."""
        usual = {
            "Content-Type": kind,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": self.policy,
            "Connection": "close",
        }
        self.send_response(code)
        for name, value in {**usual, **{name.replace("_", "-"): value for name, value in headers.items()}}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name that http.server gives it
        """Nothing: a request every second would hide what else is said."""


def may_ask(host: str, names: set[str]) -> bool:
    """Whether a Host header is one of ``names`` (lower case) or an IP address, with any port.

    A browser that was sent here under a foreign name says that name; an address cannot be pointed elsewhere.
    """
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = found[1].strip("[]").lower()
    if name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

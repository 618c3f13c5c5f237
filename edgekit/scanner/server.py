"""Metrics, health and the preview over HTTP: loopback unless told otherwise, read-only, fixed answers.

| path | what |
|---|---|
| ``/metrics`` | Prometheus, text format 0.0.4 |
| ``/healthz`` | 200 while the scanning thread goes round, 503 where it hangs |
| ``/readyz`` | 200 once models are loaded, every camera is up and the outbox takes events; 503 with the reasons |
| ``/status`` | all figures and the latest events as JSON |
| ``/`` | the preview page |
| ``/preview.jpg``, ``/preview.mjpeg`` | the newest frame with what was read on it, ``?source=NAME`` for one camera |

No path of a request meets the disk. A request is at most 8 KiB and must be there within 5 s, connections are counted, and a
name that was pointed at this machine from elsewhere (DNS rebinding) is refused by its Host header.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import socket
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from edgekit.errors import UsageError

from .board import Board
from .config import ServerOptions
from .events import encode, encode_any, whole
from .metrics import CONTENT_TYPE, metrics_text
from .preview import Preview

__all__ = ["StatusServer"]

ASSETS = Path(__file__).with_name("assets")
PAGES = {
    "/": ("preview.html", "text/html; charset=utf-8"),
    "/preview.css": ("preview.css", "text/css; charset=utf-8"),
    "/preview.js": ("preview.js", "text/javascript; charset=utf-8"),
}
MOST_BYTES = 8 << 10
REQUEST_S = 5.0
MOST_CONNECTIONS = 16
MOST_STREAMS = 8
POLL_S = 0.05
_BOUNDARY = "frame"
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class StatusServer:
    """Answers from a thread of its own as soon as it is made.

    Raises `UsageError` where the address cannot be had, `MissingExtra` where the preview needs Pillow.
    """

    def __init__(self, options: ServerOptions, board: Board, preview: Preview | None = None) -> None:
        host, port = options.place()
        self.board, self.preview = board, preview
        self.hosts = {"localhost", host, *options.hosts}
        try:
            self._server = _Server(host, port, self)
        except (OSError, OverflowError) as error:
            words = getattr(error, "strerror", "") or str(error)
            raise UsageError(f"the address {options.address} cannot be used: {words}", "choose another in [server]") from None
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/"
        self.closing = threading.Event()
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="status server", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(1.0)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, host: str, port: int, owner: StatusServer) -> None:
        self.owner = owner
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.streams = threading.BoundedSemaphore(MOST_STREAMS)
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(b"HTTP/1.1 503 Too many connections\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: who asks and goes away is no business of the scan's log."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "edgekit", ""
    protocol_version = "HTTP/1.0"  # one request a connection
    timeout = REQUEST_S

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BytesIO(self._head())

    def _head(self) -> bytes:
        """The request's head, if it is small and comes in time; what follows it is not read."""
        end, head = time.monotonic() + REQUEST_S, b""
        while b"\r\n\r\n" not in head and len(head) <= MOST_BYTES:
            left = end - time.monotonic()
            if left <= 0:
                return b""
            self.connection.settimeout(left)
            with contextlib.suppress(OSError):
                if more := self.connection.recv(4096):
                    head += more
                    continue
            return head if b"\n\n" in head else b""
        self.connection.settimeout(REQUEST_S)
        return head if len(head) <= MOST_BYTES else b"GET /too-large HTTP/1.0\r\n\r\n"

    def do_GET(self) -> None:
        owner = self.server.owner
        path, _, query = self.path.partition("?")
        if path == "/too-large":
            return self._words(431, f"a request is at most {MOST_BYTES} bytes")
        if not _may_ask(self.headers.get("Host", ""), owner.hosts):
            return self._words(403, "this name is not known here: add it to `hosts` of [server]")
        if path == "/healthz":
            return self._verdict(owner.board.health())
        if path == "/readyz":
            return self._verdict(owner.board.readiness(owner.board.figures()))
        if path in ("/metrics", "/status"):
            return self._figures(path)
        if owner.preview is not None:
            if path in PAGES:
                name, kind = PAGES[path]
                return self._send(200, kind, (ASSETS / name).read_bytes())
            source = urllib.parse.parse_qs(query).get("source", [""])[0]
            if path == "/preview.jpg":
                return self._picture(owner.preview, source)
            if path == "/preview.mjpeg":
                return self._stream(owner.preview, source)
        return self._words(404, "there is: /metrics /healthz /readyz /status" + (" / /preview.jpg" if owner.preview else ""))

    do_HEAD = do_GET  # noqa: N815  http.server's names

    def _refuse(self) -> None:
        self._words(405, "read only: GET and HEAD", Allow="GET, HEAD")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse  # noqa: N815

    def _figures(self, path: str) -> None:
        owner = self.server.owner
        board = owner.board
        figures = board.figures()
        reasons = board.readiness(figures)
        if path == "/metrics":
            text = metrics_text(figures, board.state, board.silent_s(), not reasons)
            return self._send(200, CONTENT_TYPE, whole(text).encode())
        pictures = owner.preview.sources() if owner.preview else []
        answer = {"state": board.state, "ready": not reasons, "reasons": reasons, "pictures": pictures, **figures}
        return self._send(200, "application/json", encode_any(answer))

    def _verdict(self, reasons: list[str]) -> None:
        body = encode({"ok": not reasons, "reasons": reasons})
        self._send(503 if reasons else 200, "application/json", body)

    def _picture(self, preview: Preview, source: str) -> None:
        end = time.monotonic() + 1.0
        while (made := preview.jpeg(source)) is None and time.monotonic() < end and not self.server.owner.closing.is_set():
            time.sleep(POLL_S)
        if made is None:
            return self._words(404, "there is no picture yet")
        return self._send(200, "image/jpeg", made[1])

    def _stream(self, preview: Preview, source: str) -> None:
        """Newest frames only: who reads slowly misses some."""
        if not self.server.streams.acquire(blocking=False):
            return self._words(503, f"{MOST_STREAMS} look already")
        try:
            self._begin(200, f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
            if self.command == "HEAD":
                return None
            number = 0
            self.wfile.write(f"--{_BOUNDARY}\r\n".encode())
            while not self.server.owner.closing.wait(POLL_S):
                if made := preview.jpeg(source, number):
                    number, picture = made
                    head = f"Content-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                    # The boundary follows at once: browsers show a picture when they have seen its end.
                    self.wfile.write(head.encode() + picture + f"\r\n--{_BOUNDARY}\r\n".encode())
        except OSError:  # the viewer has gone, or takes nothing any more
            return None
        finally:
            self.server.streams.release()
        return None

    def _words(self, code: int, words: str, **headers: str) -> None:
        self._send(code, "text/plain; charset=utf-8", f"{words}\n".encode(), **headers)

    def _send(self, code: int, kind: str, body: bytes, **headers: str) -> None:
        with contextlib.suppress(OSError):
            self._begin(code, kind, **headers, **{"Content-Length": str(len(body))})
            if self.command != "HEAD":
                self.wfile.write(body)

    def _begin(self, code: int, kind: str, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, **_HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in the same form."""
        self._words(code, message or "no")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name that http.server gives it
        """Nothing: a scrape every few seconds would hide what the scan says."""


def _may_ask(host: str, names: set[str]) -> bool:
    """A browser that was sent here under a foreign name says that name; an address cannot be pointed elsewhere."""
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    name = name.strip("[]").lower()
    if name in {each.lower() for each in names}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

"""Metrics, health and the preview over HTTP: loopback unless told otherwise, read-only, fixed answers.

| path | what |
|---|---|
| ``/metrics`` | Prometheus, text format 0.0.4 |
| ``/healthz`` | 200 while the scanning thread goes round, 503 where it hangs |
| ``/readyz`` | 200 once models are loaded, every camera is up and the outbox takes events; 503 with the reasons |
| ``/status`` | all figures and the latest events as JSON |
| ``/`` | the preview page |
| ``/preview.jpg``, ``/preview.mjpeg`` | the newest frame with what was read on it, ``?source=NAME`` for one camera |

What a request may be, and who may ask: `edgekit.serving`.
"""

from __future__ import annotations

import threading
import time
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from edgekit.errors import UsageError
from edgekit.serving import PageHandler, PageServer

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
MOST_STREAMS = 8
POLL_S = 0.05
_BOUNDARY = "frame"


class StatusServer:
    """Answers from a thread of its own as soon as it is made.

    Raises `UsageError` where the address cannot be had, `MissingExtra` where the preview needs Pillow.
    """

    def __init__(self, options: ServerOptions, board: Board, preview: Preview | None = None) -> None:
        host, port = options.place()
        self.board, self.preview = board, preview
        try:
            self._server = _Server(host, port, self, options.hosts)
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


class _Server(PageServer):
    def __init__(self, host: str, port: int, owner: StatusServer, hosts: Iterable[str]) -> None:
        self.owner = owner
        self.streams = threading.BoundedSemaphore(MOST_STREAMS)
        super().__init__(host, port, _Handler, hosts)


class _Handler(PageHandler):
    server: _Server
    policy = (
        "default-src 'none'; img-src 'self' data:; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    ask_by = "ask by localhost or an IP address, or add it to `hosts` of [server]"

    def answer(self, path: str, query: str) -> None:
        owner = self.server.owner
        if path == "/healthz":
            return self._verdict(owner.board.health())
        if path == "/readyz":
            return self._verdict(owner.board.readiness(owner.board.figures()))
        if path in ("/metrics", "/status"):
            return self._figures(path)
        if owner.preview is not None:
            if path in PAGES:
                name, kind = PAGES[path]
                return self.send(200, kind, (ASSETS / name).read_bytes())
            source = urllib.parse.parse_qs(query).get("source", [""])[0]
            if path == "/preview.jpg":
                return self._picture(owner.preview, source)
            if path == "/preview.mjpeg":
                return self._stream(owner.preview, source)
        return self.words(404, "there is: /metrics /healthz /readyz /status" + (" / /preview.jpg" if owner.preview else ""))

    def _figures(self, path: str) -> None:
        owner = self.server.owner
        board = owner.board
        figures = board.figures()
        reasons = board.readiness(figures)
        if path == "/metrics":
            text = metrics_text(figures, board.state, board.silent_s(), not reasons)
            return self.send(200, CONTENT_TYPE, whole(text).encode())
        pictures = owner.preview.sources() if owner.preview else []
        answer = {"state": board.state, "ready": not reasons, "reasons": reasons, "pictures": pictures, **figures}
        return self.send(200, "application/json", encode_any(answer))

    def _verdict(self, reasons: list[str]) -> None:
        body = encode({"ok": not reasons, "reasons": reasons})
        self.send(503 if reasons else 200, "application/json", body)

    def _picture(self, preview: Preview, source: str) -> None:
        end = time.monotonic() + 1.0
        while (made := preview.jpeg(source)) is None and time.monotonic() < end and not self.server.owner.closing.is_set():
            time.sleep(POLL_S)
        if made is None:
            return self.words(404, "there is no picture yet")
        return self.send(200, "image/jpeg", made[1])

    def _stream(self, preview: Preview, source: str) -> None:
        """Newest frames only: who reads slowly misses some."""
        if not self.server.streams.acquire(blocking=False):
            return self.words(503, f"{MOST_STREAMS} look already")
        try:
            self.begin(200, f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
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

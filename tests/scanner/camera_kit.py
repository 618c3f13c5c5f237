"""What tests of cameras share: numbered pictures, streams of them, servers that can die and hang, and what must not be left."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import os
import re
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from edgekit.scanner import Cameras, Captured, Notice

WIDTH, HEIGHT, FPS = 96, 64, 40


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> Any:
    """uint8 (H, W, 3): the number in ten fields of light and dark, above a square that moves."""
    frame = np.full((height, width, 3), 120, np.uint8)
    for bit in range(10):
        frame[:32, bit * 8 : (bit + 1) * 8] = 235 if number >> bit & 1 else 16
    left = number * 3 % 80
    frame[40:48, left : left + 16] = (200, 60, 30)
    return frame


def number_in(frame: Any) -> int:
    return sum(int(frame[4:28, bit * 8 + 2 : bit * 8 + 6].mean() > 128) << bit for bit in range(10))


def is_true(frame: Any) -> bool:
    """Whether it is the picture of its number, but for what compression does to it."""
    height, width = frame.shape[:2]
    return float(np.abs(frame.astype(int) - picture(number_in(frame), width, height)).mean()) < 6


def until(cameras: Cameras, done: Callable[[list[Any]], Any], seconds: float = 60.0) -> list[Any]:
    """What comes until ``done(items)``; after each item every frame is accounted for."""
    items: list[Any] = []
    end = time.monotonic() + seconds
    given = {row["source"]: row["given"] for row in cameras.counts()}
    for item in cameras:
        if item is not None:
            items.append(item)
        if isinstance(item, Captured):
            given[item.source] = given.get(item.source, 0) + 1
        for row in cameras.counts():
            assert row["captured"] == row["given"] + sum(row["dropped"].values()) + row["in_flight"]
            assert row["given"] == given.get(row["source"], 0)
        if done(items):
            return items
        assert time.monotonic() < end, f"waited in vain: {[item for item in items if isinstance(item, Notice)]}"
    return items


def until_given(cameras: Cameras, name: str) -> Captured:
    end = time.monotonic() + 30
    for item in cameras:
        if isinstance(item, Captured) and item.source == name:
            return item
        assert time.monotonic() < end
    raise AssertionError("it ended")


def notices(items: list[Any], kind: str, source: str = "", **details: Any) -> list[Notice]:
    found = [item for item in items if isinstance(item, Notice) and item.kind == kind and source in ("", item.source)]
    return [each for each in found if details.items() <= each.details.items()]


def of(items: list[Any], name: str) -> list[Captured]:
    return [item for item in items if isinstance(item, Captured) and item.source == name]


def encoded(codec: str, container: str, count: int = 100, size: tuple[int, int] = (WIDTH, HEIGHT), first: int = 0) -> bytes:
    """Numbered pictures as a stream: a key frame in twelve, no B frames."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        options = {"g": "12", "bf": "0", "b": "2000000"} | ({"preset": "ultrafast"} if codec == "libx264" else {})
        stream = file.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(first, first + count):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), "rgb24").reformat(format=stream.pix_fmt)
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def paced(data: bytes, count: int) -> list[bytes]:
    """Cut for a server that sends one piece a picture."""
    return [data[len(data) * i // count : len(data) * (i + 1) // count] for i in range(count)]


def multipart(count: int) -> list[bytes]:
    """Pictures as a camera's web page has them."""
    from PIL import Image

    parts = []
    for number in range(count):
        out = io.BytesIO()
        Image.fromarray(picture(number)).save(out, "JPEG", quality=90)
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {out.tell()}\r\n\r\n"
        parts.append(head.encode() + out.getvalue() + b"\r\n")
    return parts


def rtp(count: int, codec: str = "mjpeg") -> list[list[bytes]]:
    """The RTP packets of each picture, with JPEG (payload type 26) or H.264 (96) in them."""

    class Writer:
        def __init__(self) -> None:
            self.packets: list[bytes] = []

        def write(self, data: bytes) -> int:
            self.packets.append(bytes(data))
            return len(data)

    # RFC 2435: the standard Huffman tables, and no restart markers, which come with slices.
    options = {"huffman": "default", "slices": "1"}
    if codec == "libx264":
        options = {"g": "12", "bf": "0", "preset": "ultrafast", "crf": "10", "x264-params": "repeat-headers=1:slices=1"}
    writer, pictures = Writer(), []
    with av.open(writer, "w", format="rtp", options={"packetsize": "1200"}, buffer_size=1200) as file:
        stream = file.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number), "rgb24").reformat(format=stream.pix_fmt)
            frame.pts = number
            file.mux(stream.encode(frame))
            pictures.append([each for each in writer.packets if each[1] & 127 in (26, 96)])
            writer.packets.clear()
    return pictures


class Server:
    """Plays ``pieces`` to whoever connects, from the start, `FPS` a second, then keeps silent; ``login`` is USER:PASSWORD,
    ``tls`` a PEM file with key and certificate."""

    def __init__(self, port: int, pieces: list[Any], login: str = "", tls: Path | None = None) -> None:
        self.pieces, self.login, self.port = pieces, login, port
        self.silent, self._closed = threading.Event(), threading.Event()
        self._open: list[socket.socket] = []
        server = self

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if context:
            context.load_cert_chain(str(tls))

        class Handler(socketserver.StreamRequestHandler):
            def setup(self) -> None:
                if context:
                    with contextlib.suppress(OSError):  # a client that does not trust it, and says so
                        self.request = context.wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self) -> None:
                with contextlib.suppress(OSError):
                    super().finish()
                self.request.close()  # the wrapped one is this handler's alone

            def handle(self) -> None:
                server._open.append(self.request)
                with contextlib.suppress(OSError, ValueError):  # the other end, or this server, is gone
                    server.answer(self)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", port), Handler, bind_and_activate=False)
        self._server.daemon_threads = self._server.allow_reuse_address = True
        self._server.server_bind()
        self._server.server_activate()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def answer(self, to: Any) -> None:
        """Plain TCP: no questions."""
        self.play(to.wfile.write)

    def play(self, send: Callable[[Any], Any]) -> None:
        start = time.monotonic()
        for number, piece in enumerate(self.pieces):
            self._closed.wait(max(0.0, start + number / FPS - time.monotonic()))
            while self.silent.is_set() and not self._closed.is_set():
                self._closed.wait(0.02)
            if self._closed.is_set():
                return
            send(piece)
        self._closed.wait()

    def close(self) -> None:
        """As a process that is killed: every connection ends."""
        self._closed.set()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class HttpServer(Server):
    kind = "video/mp2t"

    def answer(self, to: Any) -> None:
        lines = list(iter(lambda: to.rfile.readline().strip(), b""))
        if self.login and not any(line.startswith(b"Authorization: Basic ") for line in lines):
            to.wfile.write(b'HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm="camera"\r\nContent-Length: 0\r\n\r\n')
        elif lines and b" /missing " in lines[0]:
            to.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        elif lines and b" /page " in lines[0]:
            to.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 12\r\n\r\n<html></html")
        else:
            to.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Type: {self.kind}\r\n\r\n".encode())
            self.play(to.wfile.write)


class MjpegServer(HttpServer):
    kind = "multipart/x-mixed-replace; boundary=frame"


class RtspServer(Server):
    """RTSP with digest authentication as cameras speak it, RTP in the same connection; ``pieces`` are those of `rtp`."""

    transport, payload = "TCP", "26"

    def answer(self, to: Any) -> None:
        to.ports = ""
        while line := to.rfile.readline().decode().strip():
            method, headers = line.split()[0], {}
            while (header := to.rfile.readline().decode().strip()) != "":
                name, _, value = header.partition(":")
                headers[name.lower()] = value.strip()
            status, more, body = self._reply(to, method, headers)
            length = f"Content-Length: {len(body)}\r\n" if body else ""
            to.wfile.write(f"RTSP/1.0 {status}\r\nCSeq: {headers['cseq']}\r\n{more}{length}\r\n{body}".encode())
            if method == "PLAY":
                self.send(to, headers)

    def send(self, to: Any, headers: dict[str, str]) -> None:
        self.play(lambda packets: [to.wfile.write(b"$\0" + len(each).to_bytes(2, "big") + each) for each in packets])

    def _reply(self, to: Any, method: str, headers: dict[str, str]) -> tuple[str, str, str]:
        if method == "OPTIONS":
            return "200 OK", "Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n", ""
        if self.login and not self._known(method, headers.get("authorization", "")):
            return "401 Unauthorized", 'WWW-Authenticate: Digest realm="camera", nonce="n1"\r\n', ""
        if method == "DESCRIBE":
            lines = ["v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=camera", "t=0 0", f"m=video 0 RTP/AVP {self.payload}"]
            lines += ["a=rtpmap:96 H264/90000", "a=fmtp:96 packetization-mode=1"] if self.payload == "96" else []
            return "200 OK", "Content-Type: application/sdp\r\n", "".join(f"{each}\r\n" for each in [*lines, "a=control:track"])
        to.ports = to.ports or headers.get("transport", "")
        if method == "SETUP" and ("TCP" in to.ports) != (self.transport == "TCP"):
            return "461 Unsupported Transport", "", ""
        transport = f"Transport: {to.ports};server_port=9-10\r\n" if method == "SETUP" else ""
        return "200 OK", f"Session: 1\r\n{transport}", ""

    def _known(self, method: str, said: str) -> bool:
        fields = dict(re.findall(r'(\w+)="([^"]*)"', said))
        user, _, password = self.login.partition(":")
        one, two = (_md5(each) for each in (f"{user}:camera:{password}", f"{method}:{fields.get('uri')}"))
        return fields.get("username") == user and fields.get("response") == _md5(f"{one}:n1:{two}")


class DatagramRtspServer(RtspServer):
    """H.264, RTP as datagrams."""

    transport, payload = "UDP", "96"

    def send(self, to: Any, headers: dict[str, str]) -> None:
        port = int(re.findall(r"client_port=(\d+)", to.ports)[0])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            self.play(lambda packets: [out.sendto(each, ("127.0.0.1", port)) for each in packets])


def _md5(words: str) -> str:
    return hashlib.md5(words.encode()).hexdigest()  # noqa: S324  RFC 2617


def left_over() -> list[str]:
    """Processes of cameras and places of their pictures that this process still has."""
    if not _left_over():
        return []
    gc.collect()
    return _left_over()


def _left_over() -> list[str]:
    found = [line.strip() for line in Path("/proc/self/maps").read_text().splitlines() if "edgekit frames" in line]
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            about = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            words = Path(f"/proc/{pid}/cmdline").read_bytes() if int(about[1]) == os.getpid() else b""
        except OSError:
            continue
        if int(about[1]) == os.getpid() and (b"edgekit.scanner.sources.child" in words or about[0] == "Z"):
            found.append(f"process {pid}: {about[0]} {words[:80]!r}")
    return found

"""Pictures, codes and real servers for the scanner's tests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import zxingcpp
from PIL import Image

from edgekit.data import load
from edgekit.scanner import Outbox
from edgekit.scanner.sinks import forward


class Kit:
    """What several files of these tests use."""

    @staticmethod
    def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
        """Poll until ``condition()`` is true; fail after ``seconds``."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)
        return value

    @staticmethod
    def free_port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    @staticmethod
    def read_events(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    @staticmethod
    def lines_of(path: Path) -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    @staticmethod
    def code_picture(text: str, kind: str, **options: Any) -> np.ndarray[Any, Any]:
        """A code on white, uint8 (H, W)."""
        code = zxingcpp.create_barcode(text, getattr(zxingcpp.BarcodeFormat, kind), **options)
        return np.pad(np.asarray(code.to_image(scale=3)), 40, constant_values=255)

    @staticmethod
    def start_scan(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        """``edgekit scan`` in a process of its own."""
        command = [sys.executable, "-c", "from edgekit.cli import main; main()", "scan", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(autouse=True)
def _own_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with three digit-like pictures and one damaged file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        picture = Image.new("L", (28 + i, 30))
        picture.paste(255, (13, 6, 16, 24))
        picture.save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    return folder


class Receiver:
    """A real HTTP server that keeps what it is sent; ``answers`` are the status codes to give first."""

    def __init__(self, port: int, answers: tuple[int, ...] = ()) -> None:
        self.events: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.methods: list[str] = []
        codes = list(answers)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.methods.append("POST")
                code = codes.pop(0) if codes else 200
                if code == 200:
                    receiver.events.append(json.loads(body))
                    receiver.headers.append(dict(self.headers))
                self.send_response(code)
                if code in (301, 302):
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                receiver.methods.append("GET")
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def receive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Receiver]]:
    monkeypatch.setenv("no_proxy", "*")
    running: list[Receiver] = []

    def start(port: int, *answers: int) -> Receiver:
        running.append(Receiver(port, answers))
        return running[-1]

    yield start
    for receiver in running:
        receiver.close()


class Broker:
    """A real mosquitto on a port of its own."""

    def __init__(self, program: str, folder: Path, port: int, extra: str = "allow_anonymous true") -> None:
        config = folder / f"mosquitto-{port}.conf"
        config.write_text(f"listener {port} 127.0.0.1\nuser root\n{extra}\n")
        self._process = subprocess.Popen([program, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.port = port
        Kit.wait_for(self._answers)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """Start brokers: ``broker(port, extra_config)``. Needs mosquitto; in CI its absence is a failure."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs mosquitto: apt-get install mosquitto")
        pytest.skip("mosquitto is not installed")
    running: list[Broker] = []

    def start(port: int, *extra: str) -> Broker:
        running.append(Broker(program, tmp_path, port, *extra))
        return running[-1]

    yield start
    for one in running:
        one.close()


@pytest.fixture(scope="module")
def digits() -> list[np.ndarray[Any, Any]]:
    split = load("digits").test
    return [split.read(i) for i in range(len(split))]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    opened = Outbox(tmp_path / "outbox.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def quick_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between attempts at a sink that is down."""
    monkeypatch.setattr(forward, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(forward, "LONGEST_PAUSE_S", 0.05)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A PEM file with a key and a certificate of its own for 127.0.0.1."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - datetime.timedelta(1), now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = tmp_path / "server.pem"
    pem.write_bytes(key.private_bytes(serialization.Encoding.PEM, *form) + made.public_bytes(serialization.Encoding.PEM))
    return pem


@pytest.fixture
def serve(kit: Any) -> Iterator[Callable[..., Any]]:
    """Start a server of `camera_kit`: ``serve("RtspServer", pieces, login, port, tls)``."""
    from . import camera_kit

    running: list[Any] = []

    def start(kind: str, pieces: list[Any], login: str = "", port: int = 0, tls: Path | None = None) -> Any:
        running.append(getattr(camera_kit, kind)(port or kit.free_port(), pieces, login, tls))
        return running[-1]

    yield start
    for server in running:
        server.close()

"""Sinks that take lines against the real thing: a TCP server and a pseudo terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import socket
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.scanner import Outbox, open_sink
from edgekit.scanner.sinks import lines

from .outbox_kit import line_event as event


@pytest.fixture(autouse=True)
def _quick(quick_delivery: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "SETTLE_S", 0.05)


class LineServer:
    """Takes lines and answers each with ``answer(line, number)``: bytes, or None to close. ``once``: one a connection."""

    def __init__(self, port: int, answer: Callable[[bytes, int], bytes | None], once: bool = False) -> None:
        self.lines: list[bytes] = []
        self.connections = 0
        self._answer, self._once = answer, once
        self._open: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", port))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def firsts(self) -> list[dict[str, Any]]:
        """Each event's first arrival."""
        return list({each["id"]: each for each in self.events}.values())

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        try:
            while True:
                connection = self._server.accept()[0]
                self._open.append(connection)
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        except OSError:
            return

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as stream:
                for line in stream:
                    if line.endswith(b"\n"):
                        self.lines.append(line)
                        if (answer := self._answer(line, len(self.lines))) is None:
                            connection.shutdown(socket.SHUT_RDWR)
                            return
                        connection.sendall(answer)
                        if self._once:
                            return
        except OSError:
            pass
        finally:
            connection.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., LineServer]]:
    running: list[LineServer] = []

    def start(port: int, answer: Callable[[bytes, int], bytes | None], **options: Any) -> LineServer:
        running.append(LineServer(port, answer, **options))
        return running[-1]

    yield start
    for one in running:
        with contextlib.suppress(OSError):  # a test has closed it
            one.close()


def own_id(line: bytes, number: int) -> bytes:
    return b"OK " + json.loads(line)["id"].encode() + b"\r\n"


@pytest.mark.parametrize("ack", ["line", "id", "none"])
def test_tcp_down_then_up_then_away_keeps_all_in_order(kit: Any, outbox: Outbox, serve: Any, ack: str) -> None:
    port = kit.free_port()
    sink = open_sink(f"tcp://127.0.0.1:{port}?ack={ack}", lambda: outbox)
    for i in range(40):
        sink.send(event(i))
    kit.wait_for(lambda: "nothing listens" in sink.status().get("down", ""))
    answer = own_id if ack != "none" else lambda line, number: b""
    first = serve(port, answer)
    sink.flush(20.0)
    kit.wait_for(lambda: len(first.lines) >= 40)
    first.close()
    for i in range(40, 60):
        sink.send(event(i))
    kit.wait_for(lambda: "down" in sink.status())
    second = serve(port, answer)
    sink.flush(20.0)
    kit.wait_for(lambda: second.lines and second.events[-1] == event(59))
    assert first.firsts() == [event(i) for i in range(40)]
    assert second.firsts() == [event(i) for i in range(60 - len(second.firsts()), 60)]
    assert len(second.firsts()) == 20
    assert (sink.status()["delivered"], sink.status()["waiting"]) == (60, 0)
    sink.close()


@pytest.mark.parametrize("ack", ["line", "none"])
def test_a_server_that_closes_at_each_line_gets_each_event_once(kit: Any, outbox: Outbox, serve: Any, ack: str) -> None:
    """Its closing is no failure: with ``ack=none`` the event could be sent again for it, without end."""
    server = serve(port := kit.free_port(), lambda line, number: b"OK\n" if ack == "line" else b"", once=True)
    sink = open_sink(f"tcp://127.0.0.1:{port}?ack={ack}", lambda: outbox)
    for i in range(15):
        sink.send(event(i))
        if ack == "none":  # what is in a connection that is closed is lost, by its contract
            sink.flush(10.0)
            kit.wait_for(lambda i=i: len(server.lines) == i + 1)
            time.sleep(0.01)
    sink.flush(10.0)
    assert sink.status()["waiting"] == 0
    assert server.firsts() == [event(i) for i in range(15)]
    assert len(server.lines) == 15 or ack == "line"
    sink.close()


def test_half_answers_silence_and_others_ids_are_no_acknowledgement(
    kit: Any, outbox: Outbox, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "TIMEOUT_S", 0.15)

    def answer(line: bytes, number: int) -> bytes | None:
        # Half a line; nothing; an end of the connection; the id of another event that begins with this one's.
        own = own_id(line, number)
        return {1: own[:4], 2: b"", 3: None, 4: own.replace(b"run-1", b"run-12"), 5: b"\n\nbusy\n"}.get(number, own)

    server = serve(port := kit.free_port(), answer)
    sink = open_sink(f"tcp://127.0.0.1:{port}?ack=id", lambda: outbox)
    for i in range(1, 4):
        sink.send(event(i))
    sink.flush(10.0)
    assert [each["seq"] for each in server.events] == [1, 1, 1, 1, 1, 1, 2, 3]
    assert sink.status()["delivered"] == 3
    sink.close()


def test_a_server_that_never_answers_is_said_with_its_cure(
    kit: Any, outbox: Outbox, serve: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lines, "TIMEOUT_S", 0.05)
    serve(port := kit.free_port(), lambda line, number: b"")
    sink = open_sink(f"tcp://127.0.0.1:{port}", lambda: outbox)
    sink.send(event(0))
    kit.wait_for(lambda: "?ack=none" in sink.status().get("down", ""))
    sink.flush(0.5)
    assert sink.status()["waiting"] == 1
    sink.close()
    assert capfd.readouterr().err.count("is down") == 1


def test_a_server_that_talks_without_end_does_not_hang_the_delivery(kit: Any, outbox: Outbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sink = open_sink(f"tcp://127.0.0.1:{server.getsockname()[1]}", lambda: outbox)
        sink.send(event(0))
        connection = server.accept()[0]
        ended = threading.Event()

        def talk() -> None:
            try:
                while not ended.is_set():
                    connection.sendall(b"x\n" * 20_000)
            except OSError:
                pass

        thread = threading.Thread(target=talk)
        thread.start()
        kit.wait_for(lambda: sink.status()["waiting"] == 0)
        sink.send(event(1))  # what is said before it can only be told from an answer by its id
        kit.wait_for(lambda: sink.status()["waiting"] == 0 or "talks without end" in sink.status().get("down", ""))
        ended.set()
        sink.close()
        connection.close()
        thread.join()


# Serial


class Terminal:
    """The other end of a serial line, behind a name that can be unplugged and plugged in again."""

    def __init__(self, link: Path, answer: Callable[[bytes], bytes]) -> None:
        self.lines: list[bytes] = []
        self._link, self._answer = link, answer
        self._stop = threading.Event()
        self.plug()

    def plug(self) -> None:
        self._master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        self._link.symlink_to(os.ttyname(self._slave))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def unplug(self) -> None:
        self._stop.set()
        self._thread.join()
        self._link.unlink()
        os.close(self._slave)
        os.close(self._master)

    def speed(self) -> int:
        return int(termios.tcgetattr(self._slave)[4])

    def _serve(self) -> None:
        data = b""
        while not self._stop.is_set():
            if not select.select([self._master], [], [], 0.02)[0]:
                continue
            data += os.read(self._master, 4096)
            *whole, data = data.split(b"\n")
            for line in whole:
                self.lines.append(line)
                if line:
                    os.write(self._master, self._answer(line))


@pytest.mark.parametrize("ack", ["line", "id", "none"])
def test_a_serial_line_unplugged_and_back_keeps_all_in_order(kit: Any, outbox: Outbox, tmp_path: Path, ack: str) -> None:
    device = tmp_path / "ttyUSB0"
    answer = (lambda line: b"") if ack == "none" else lambda line: own_id(line, 0)
    terminal = Terminal(device, answer)
    sink = open_sink(f"serial:{device}?baud=115200&ack={ack}", lambda: outbox)
    for i in range(20):
        sink.send(event(i))
    sink.flush(20.0)
    kit.wait_for(lambda: json.dumps(event(19))[:20] and any(b"run-19" in line for line in terminal.lines))
    assert terminal.speed() == termios.B115200
    terminal.unplug()
    for i in range(20, 30):
        sink.send(event(i))
    kit.wait_for(lambda: "plug" in sink.status().get("down", ""))
    terminal.plug()
    sink.flush(20.0)
    kit.wait_for(lambda: any(b"run-29" in line for line in terminal.lines))
    arrived = [json.loads(line) for line in terminal.lines if line]
    assert list({each["id"]: each for each in arrived}.values()) == [event(i) for i in range(30)]
    assert sink.status()["delivered"] == 30
    sink.close()
    terminal.unplug()


def test_what_was_torn_on_a_serial_line_ends_before_the_next_event(kit: Any, outbox: Outbox, tmp_path: Path) -> None:
    """A process that dies in the middle of a line, or a plug pulled there, once spoilt the event that was sent next."""
    terminal = Terminal(tmp_path / "tty", lambda line: b"OK\n")
    torn = os.open(tmp_path / "tty", os.O_RDWR | os.O_NOCTTY)
    os.write(torn, b'{"schema":1,"id":"ru')
    os.close(torn)
    sink = open_sink(f"serial:{tmp_path / 'tty'}", lambda: outbox)
    sink.send(event(0))
    sink.flush(10.0)
    kit.wait_for(lambda: len(terminal.lines) >= 2)
    assert terminal.lines[0] == b'{"schema":1,"id":"ru'
    assert json.loads(terminal.lines[-1]) == event(0)
    sink.close()
    terminal.unplug()


@pytest.mark.parametrize(("device", "words"), [("none", "No such file"), ("file", "Inappropriate ioctl")])
def test_what_is_no_serial_line_is_said_and_waited_for(
    kit: Any, outbox: Outbox, tmp_path: Path, device: str, words: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    sink = open_sink(f"serial:{tmp_path / device}", lambda: outbox)
    sink.send(event(0))
    kit.wait_for(lambda: words in sink.status().get("down", ""))
    sink.close()
    with pytest.raises(UsageError):
        open_sink(f"serial:{tmp_path / device}?baud=fast", lambda: outbox)

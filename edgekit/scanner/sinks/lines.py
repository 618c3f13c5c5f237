"""Sinks that take one JSON a line, UTF-8: ``tcp://HOST:PORT`` and ``serial:DEVICE?baud=9600``.

``?ack=`` says what counts as delivered:

| ack | delivered when | what can be lost |
|---|---|---|
| ``line`` (default) | the other side has answered with a line, whatever it says | nothing, where it answers each event with one line and greets with none |
| ``id`` | that line holds the event's id | nothing, whatever else it says |
| ``none`` | TCP: the other machine's kernel has the bytes. Serial: they left this machine | what the other side had not read yet when it died |

An event that was not acknowledged is sent again, on a new connection. A serial line has no connections: there an empty line
goes ahead of the first event and of each repeat, so that what was torn before ends alone; receivers skip empty lines.
"""  # noqa: E501  a table row is one line

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct
import termios
import time
from collections.abc import Callable
from typing import Any, Protocol

from edgekit.errors import MissingExtra, UsageError
from edgekit.scanner.outbox import Outbox
from edgekit.scanner.sources.address import parsed_url

from . import Sink, without_secrets
from .forward import ForwardSink, Undelivered
from .words import words

__all__ = ["LineTransport", "open_serial", "open_tcp"]

TIMEOUT_S = 5.0
MOST_ANSWER = 1 << 16  # bytes of an answer without a line's end
MOST_CHATTER = 16  # pieces of `MOST_ANSWER` that the other side may have said unasked
SETTLE_S = 0.2  # until a serial line is quiet after its first, empty line
_ENDLESS = "it talks without end; an answer could not be told from that (for a receiver that sends none: ?ack=none)"
ACKS = ("line", "id", "none")
_TCP_FORM = "write tcp://HOST:PORT, or tcp://HOST:PORT?ack=line|id|none"
_SERIAL_FORM = "write serial:/dev/ttyUSB0?baud=9600, and &ack=line|id|none"


class Wire(Protocol):
    """An open connection. Every method raises `OSError` where it is broken."""

    def write(self, data: bytes) -> None: ...

    def read(self, timeout_s: float) -> bytes:
        """What has come, b"" after ``timeout_s`` seconds without anything."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Whether all that was written has left for good within ``timeout_s`` seconds."""
        ...

    def close(self) -> None: ...


def _asked(query: str, form: str, **allowed: Callable[[str], bool]) -> dict[str, str]:
    """The options of an address. Raises `UsageError` for one that is unknown, double or out of range."""
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name in found or name not in allowed or not allowed[name](value):
            raise UsageError(f"the sink has an option that does not fit: {name}=", form)
        found[name] = value
    return found


def open_tcp(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    """Raises `UsageError` for an address without host or port."""
    try:
        url, host, port = parsed_url(spec)
    except ValueError:
        raise UsageError(f"the sink {without_secrets(spec)!r} is no address", _TCP_FORM) from None
    if not host or not port or url.path.strip("/") or "@" in spec or "#" in spec:
        raise UsageError(f"the sink {without_secrets(spec)!r} is no host and port", _TCP_FORM)
    ack = _asked(url.query, _TCP_FORM, ack=ACKS.__contains__).get("ack", "line")
    where = f"[{host}]" if ":" in host else host
    return ForwardSink(f"tcp://{where}:{port}", LineTransport(lambda: _Tcp(host, port), ack), outbox())


def open_serial(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    """Raises `UsageError` for an unknown option, `MissingExtra` without pyserial."""
    device, _, query = spec.partition(":")[2].partition("?")
    asked = _asked(query, _SERIAL_FORM, ack=ACKS.__contains__, baud=lambda value: value.isdecimal() and 50 <= int(value) <= 4e6)
    try:
        import serial
    except ImportError:
        raise MissingExtra("serial", "serial") from None
    baud = int(asked.get("baud", "9600"))
    ack = asked.get("ack", "line")
    transport = LineTransport(lambda: _Serial(serial, device, baud, ack != "none"), ack)
    return ForwardSink(f"serial:{device}", transport, outbox())


class LineTransport:
    def __init__(self, connect: Callable[[], Wire], ack: str) -> None:
        self._connect, self._ack = connect, ack
        self._wire: Wire | None = None

    def deliver(self, event_id: str, event: bytes) -> None:
        try:
            if self._fresh():
                with contextlib.suppress(OSError):  # it was closed at this very moment: what a line on a new one shows
                    return self._send(event_id, event)
                self.close()
                self._fresh()
            self._send(event_id, event)
        except Undelivered:
            self.close()  # an answer that comes late must not count for the next event
            raise
        except OSError as error:
            self.close()
            raise Undelivered(words(error)) from None

    def close(self) -> None:
        wire, self._wire = self._wire, None
        if wire:
            with contextlib.suppress(OSError):
                wire.close()

    def _fresh(self) -> bool:
        """Have a connection without what came before; a new one where the other side has closed it meanwhile.

        Returns whether it was there already.
        """
        if self._wire:
            try:
                for _ in range(MOST_CHATTER):
                    if not self._wire.read(0.0) or self._ack == "none":
                        return True
                raise Undelivered(_ENDLESS)
            except OSError:
                self.close()
        self._wire = self._connect()
        return False

    def _send(self, event_id: str, event: bytes) -> None:
        assert self._wire is not None
        self._wire.write(event + b"\n")
        if self._ack != "none":
            self._wait_for_line(self._wire, event_id)
        elif not self._wire.drain(TIMEOUT_S):
            raise Undelivered(f"the other side took no bytes for {TIMEOUT_S:g} s")

    def _wait_for_line(self, wire: Wire, event_id: str) -> None:
        own = re.compile(rb"(?<![\w-])" + re.escape(event_id.encode()) + rb"(?![\w-])")  # run-1 is not run-12
        end, answer, others = time.monotonic() + TIMEOUT_S, b"", 0
        while (left := end - time.monotonic()) > 0 and len(answer) <= MOST_ANSWER:
            answer += wire.read(left)
            *lines, answer = answer.split(b"\n")
            if any(self._ack == "line" or own.search(line) for line in lines):
                return
            others += len(lines)
        if others:
            raise Undelivered(
                f"of {others} lines in answer none holds the event's id (for a receiver that sends none: ?ack=line)"
            )
        raise Undelivered(f"no acknowledgement line within {TIMEOUT_S:g} s (for a receiver that sends none: ?ack=none)")


class _Tcp:
    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def write(self, data: bytes) -> None:
        self._socket.settimeout(TIMEOUT_S)
        self._socket.sendall(data)

    def read(self, timeout_s: float) -> bytes:
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(MOST_ANSWER)
        except (TimeoutError, BlockingIOError):
            return b""
        if not data:
            raise ConnectionError("the other side closed the connection")
        return data

    def drain(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while True:
            queued = struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
            if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):  # reset: what was queued is gone
                raise OSError(error, os.strerror(error))
            if not queued:
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.001)

    def close(self) -> None:
        self._socket.close()


class _Serial:
    def __init__(self, serial: Any, device: str, baud: int, answers: bool) -> None:
        self._errors = (serial.SerialException, termios.error, ValueError)
        with self._as_os_error():
            self._port = serial.Serial(device, baud, timeout=0, write_timeout=TIMEOUT_S, exclusive=True)
        try:
            self.write(b"\n")
            end = time.monotonic() + 10 * SETTLE_S
            while answers and self.read(SETTLE_S):
                if time.monotonic() > end:
                    raise OSError(0, _ENDLESS)
        except OSError:
            self.close()
            raise

    @contextlib.contextmanager
    def _as_os_error(self) -> Any:
        try:
            yield
        except self._errors as error:
            number = getattr(error, "errno", None)
            raise OSError(number or 0, os.strerror(number) if number else str(error)) from None

    def write(self, data: bytes) -> None:
        with self._as_os_error():
            self._port.write(data)

    def read(self, timeout_s: float) -> bytes:
        with self._as_os_error():
            self._port.timeout = timeout_s
            first: bytes = self._port.read(1)
            return first + self._port.read(self._port.in_waiting) if first else b""

    def drain(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        with self._as_os_error():
            while self._port.out_waiting:
                if time.monotonic() > end:
                    return False
                time.sleep(0.001)
        return True

    def close(self) -> None:
        with self._as_os_error():
            self._port.close()

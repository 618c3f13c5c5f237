"""Sinks that take one JSON a line: ``tcp://HOST:PORT`` and ``serial:DEVICE?baud=9600``.

``?ack=`` says what counts as delivered:

| ack | delivered when | what can be lost |
|---|---|---|
| ``line`` (default) | the other side has answered with a line, whatever it says | nothing |
| ``id`` | that line holds the event's id | nothing |
| ``none`` | TCP: the other machine's kernel has the bytes. Serial: they left this machine | what the other side had not read yet when it died |
"""  # noqa: E501  a table row is one line

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, Protocol

from edgekit.errors import MissingExtra, UsageError
from edgekit.scanner.outbox import Outbox

from . import Sink, without_secrets
from .forward import ForwardSink, Undelivered

__all__ = ["LineTransport", "open_serial", "open_tcp"]

TIMEOUT_S = 5.0
MOST_ANSWER = 1 << 16  # bytes of an answer without a line's end
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
        url = urllib.parse.urlsplit(spec)
        host, port = url.hostname, url.port
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
    transport = LineTransport(lambda: _Serial(serial, device, baud), asked.get("ack", "line"))
    return ForwardSink(f"serial:{device}", transport, outbox())


class LineTransport:
    def __init__(self, connect: Callable[[], Wire], ack: str) -> None:
        self._connect, self._ack = connect, ack
        self._wire: Wire | None = None

    def deliver(self, event_id: str, event: bytes) -> None:
        try:
            wire = self._fresh()
            wire.write(event + b"\n")
            if self._ack != "none":
                self._wait_for_line(wire, event_id)
            elif not wire.drain(TIMEOUT_S):
                raise Undelivered(f"the other side took no bytes for {TIMEOUT_S:g} s")
        except Undelivered:
            self.close()  # an answer that comes late must not count for the next event
            raise
        except OSError as error:
            self.close()
            raise Undelivered(error.strerror or str(error) or type(error).__name__) from None

    def close(self) -> None:
        wire, self._wire = self._wire, None
        if wire:
            with contextlib.suppress(OSError):
                wire.close()

    def _fresh(self) -> Wire:
        """The connection without what came before; a new one where the other side has closed it meanwhile."""
        if self._wire:
            try:
                while self._wire.read(0.0):
                    pass
            except OSError:
                self.close()
        if self._wire is None:
            self._wire = self._connect()
        return self._wire

    def _wait_for_line(self, wire: Wire, event_id: str) -> None:
        end, answer = time.monotonic() + TIMEOUT_S, b""
        while (left := end - time.monotonic()) > 0 and len(answer) <= MOST_ANSWER:
            answer += wire.read(left)
            *lines, answer = answer.split(b"\n")
            if any(self._ack == "line" or event_id.encode() in line for line in lines):
                return
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
        while struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, b"\0\0\0\0"))[0]:
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
        self.read(0.0)  # a connection that was reset has nothing queued either
        if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, "the connection broke")
        return True

    def close(self) -> None:
        self._socket.close()


class _Serial:
    def __init__(self, serial: Any, device: str, baud: int) -> None:
        self._errors = (serial.SerialException, termios.error)
        with self._as_os_error():
            self._port = serial.Serial(device, baud, timeout=0, write_timeout=TIMEOUT_S, exclusive=True)

    @contextlib.contextmanager
    def _as_os_error(self) -> Any:
        try:
            yield
        except self._errors as error:
            raise OSError(getattr(error, "errno", None) or 0, str(error)) from None

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

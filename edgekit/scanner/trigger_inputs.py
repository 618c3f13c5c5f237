"""Triggers from outside: lines over TCP, messages of an MQTT topic. Each line or message is one trigger.

Its text, up to `MOST_BYTES`, comes back in the event as ``reference``. There is no authentication on TCP: it listens on
loopback unless another address is named.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any, Protocol

from edgekit.errors import DataError, MissingExtra, UsageError
from edgekit.progress import say

from .sinks import without_secrets
from .sources.address import parsed_url

__all__ = ["TRIGGER_INPUTS", "TriggerInput", "open_trigger_input"]

TRIGGER_INPUTS = ("tcp", "mqtt")
MOST_BYTES = 256  # of a line or message
MOST_CLIENTS = 64
_STEP_S = 0.2
_FORMS = "write tcp://[HOST]:PORT (without a host: this machine only) or mqtt://[user:password@]HOST[:PORT]/TOPIC"
#: `Trigger.fire`: (source, reference) -> whether it was taken.
Fire = Callable[[str | None, str], bool]


class TriggerInput(Protocol):
    """``name`` holds no password."""

    name: str

    def status(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def open_trigger_input(spec: str, fire: Fire) -> TriggerInput:
    """``tcp://[HOST]:PORT`` or ``mqtt://[user:password@]HOST[:PORT]/TOPIC``.

    Raises `UsageError` for others, `DataError` where the port cannot be listened on, `MissingExtra` without paho-mqtt.
    A broker that is down is waited for.
    """
    try:
        url, host, port = parsed_url(spec)
    except ValueError:  # its words may quote a part of the password
        raise UsageError(f"the trigger input {without_secrets(spec)!r} is no address", _FORMS) from None
    if url.scheme == "tcp" and port is not None and not url.path.strip("/") and "@" not in url.netloc:
        return _TcpInput(host or "127.0.0.1", port, fire)
    topic = urllib.parse.unquote(url.path.removeprefix("/"))
    if url.scheme == "mqtt" and host and topic and not url.query and not url.fragment:
        user, password = (urllib.parse.unquote(part) if part is not None else None for part in (url.username, url.password))
        return _MqttInput(host, port or 1883, topic, user, password, fire)
    raise UsageError(f"there is no trigger input {without_secrets(spec)!r}", _FORMS)


class _TcpInput:
    """One thread for all clients. A line that is too long closes its connection: what follows cannot be told from it."""

    def __init__(self, host: str, port: int, fire: Fire) -> None:
        self._fire, self._stop = fire, threading.Event()
        self._counts = {"triggers": 0, "refused": 0, "too_long": 0, "turned_away": 0}
        self._lines: dict[socket.socket, bytes] = {}  # a client -> what came of its next line
        try:
            self._listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise DataError(
                f"no triggers can be taken at {host}:{port} ({error.strerror or error})", "name a free port of this machine"
            ) from None
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self.name = f"tcp://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._thread = threading.Thread(target=self._run, name="trigger input", daemon=True)
        self._thread.start()

    def status(self) -> dict[str, Any]:
        return {"input": self.name, **self._counts, "clients": len(self._lines)}

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stop.is_set():
                for key, _ in selector.select(_STEP_S):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._lines:  # else it just gave way
                        self._read(key.fileobj, selector)
            for client in [*self._lines, self._listener]:
                client.close()
            self._lines.clear()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # it went away, or there are no handles left
            return
        if len(self._lines) >= MOST_CLIENTS:  # one that was switched off without a word keeps its place: the oldest goes
            self._counts["turned_away"] += 1
            oldest = next(iter(self._lines))
            selector.unregister(oldest)
            del self._lines[oldest]
            oldest.close()
            if self._counts["turned_away"] == 1:
                say(f"{self.name} has {MOST_CLIENTS} clients; the one that is silent for longest gives way", "warning")
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._lines[client] = b""
        selector.register(client, selectors.EVENT_READ)

    def _read(self, client: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            data = client.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, rest = (self._lines.pop(client) + data).split(b"\n")  # put back as the latest
        too_long = len(rest) > MOST_BYTES or any(len(line) > MOST_BYTES for line in lines)
        for line in lines:
            if len(line) > MOST_BYTES:
                break
            taken = self._fire(None, line.rstrip(b"\r").decode("utf-8", "replace"))
            self._counts["triggers" if taken else "refused"] += 1
        self._lines[client] = rest
        self._counts["too_long"] += too_long
        if not data or too_long:  # a last line without its end is none: it may be half of one
            selector.unregister(client)
            del self._lines[client]
            client.close()


class _MqttInput:
    """A retained message is no trigger: nothing happens now. paho connects again by itself, after 1 to 30 s."""

    def __init__(self, host: str, port: int, topic: str, user: str | None, password: str | None, fire: Fire) -> None:
        try:
            import paho.mqtt.client as mqtt
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError:
            raise MissingExtra("scan", "paho.mqtt") from None
        self.name = f"mqtt://{f'[{host}]' if ':' in host else host}:{port}/{urllib.parse.quote(topic)}"
        self._fire, self._topic, self._subscribed = fire, topic, False
        self._counts = {"triggers": 0, "refused": 0, "too_long": 0}
        self._said = ""
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        if user is not None:
            self._client.username_pw_set(user, password)
        self._client.on_connect = self._connected
        self._client.on_connect_fail = lambda *_: self._tell("the broker does not answer")
        self._client.on_disconnect = self._disconnected
        self._client.on_subscribe = self._answered
        self._client.on_message = self._message
        self._client.reconnect_delay_set(1, 30)
        try:
            self._client.connect_async(host, port, keepalive=30)
        except ValueError as error:
            raise UsageError(f"the trigger input {self.name} is no address ({error})", _FORMS) from None
        self._client.loop_start()

    def status(self) -> dict[str, Any]:
        return {"input": self.name, **self._counts, "subscribed": self._subscribed}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._client.disconnect()
        self._client.loop_stop()

    def _connected(self, client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._tell(str(reason))
        else:
            client.subscribe(self._topic, qos=1)

    def _answered(self, _client: Any, _data: Any, _mid: int, reasons: list[Any], _properties: Any) -> None:
        failed = [str(reason) for reason in reasons if reason.is_failure]
        self._subscribed = not failed
        if failed:
            self._tell(failed[0])
        elif self._said:
            self._said = ""
            say(f"triggers come from {self.name} again")

    def _disconnected(self, *_: Any) -> None:
        if self._subscribed:
            self._subscribed = False
            self._tell("the connection ended")

    def _message(self, _client: Any, _data: Any, message: Any) -> None:
        if message.retain:
            return
        if len(message.payload) > MOST_BYTES:
            self._counts["too_long"] += 1
            return
        taken = self._fire(None, message.payload.decode("utf-8", "replace"))
        self._counts["triggers" if taken else "refused"] += 1

    def _tell(self, why: str) -> None:
        if why != self._said:
            say(f"no triggers come from {self.name}: {why}", "warning")
        self._said = why

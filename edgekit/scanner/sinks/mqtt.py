"""``mqtt://[user:password@]host[:port]/topic``: publish with QoS 1; the broker's PUBACK is the acknowledgement.

``mqtts://`` is the same over TLS (port 8883), by the system's certificates or those of ``$SSL_CERT_FILE``. MQTT 5, because
only its PUBACK says when a broker takes a message and may not route it (no permission on the topic); ``?protocol=3.1.1`` for
older brokers. paho's own queue dies with the process and resends on reconnect, so a client lives for one connection and holds
no message that the outbox does not. One event is on its way at a time: that keeps their order through every fault.
"""

from __future__ import annotations

import contextlib
import queue
import ssl
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from edgekit.errors import MissingExtra, UsageError
from edgekit.scanner.outbox import Outbox
from edgekit.scanner.sources.address import parsed_url

from . import Sink, without_secrets
from .forward import ForwardSink, Refused, Undelivered
from .words import words

try:
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
except ImportError:
    raise MissingExtra("scan", "paho.mqtt") from None

__all__ = ["MqttTransport", "open_mqtt"]

TIMEOUT_S = 5.0
KEEPALIVE_S = 30
_PORTS = {"mqtt": 1883, "mqtts": 8883}
_PROTOCOLS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}
_FORM = "write mqtt://HOST:PORT/TOPIC; a topic has no + or #; in user and password, write / @ ? # as %2F %40 %3F %23"
# Reason codes of a PUBACK (MQTT 5, 3.4.2.1) about the message itself; all others may pass.
_NEVER = frozenset({0x90, 0x99})  # topic name invalid, payload format invalid
_CURES = {
    0x01: "an older broker: add ?protocol=3.1.1 to the address",  # an MQTT 3.1.1 broker answers in its own numbers
    0x84: "an older broker: add ?protocol=3.1.1 to the address",
    0x86: "mend user and password in the address",
    0x87: "give this user the right to publish there, or mend user and password in the address",
    0x8A: "the broker has banned this client",
    0x97: "the broker's quota is used up",
}


def open_mqtt(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    """Raises `UsageError` for an address without host or topic."""
    try:
        url, host, port = parsed_url(spec)
    except ValueError:  # its words may quote a part of the password
        raise UsageError(f"the sink {without_secrets(spec)!r} is no address", _FORM) from None
    port, topic = port or _PORTS[url.scheme], urllib.parse.unquote(url.path.removeprefix("/"))
    if not host or not topic or "@" in url.path or "#" in spec or set(topic) & {"+", "#", "\0"}:
        raise UsageError(f"the sink {without_secrets(spec)!r} names no host and topic to publish to", _FORM)
    options = urllib.parse.parse_qs(url.query)
    protocol = options.pop("protocol", ["5"])[0]
    if options or protocol not in _PROTOCOLS:
        raise UsageError(
            f"the sink {without_secrets(spec)!r} has an unknown option", f"there is ?protocol= with {' or '.join(_PROTOCOLS)}"
        )
    user, password = (urllib.parse.unquote(part) if part is not None else None for part in (url.username, url.password))
    where = f"[{host}]" if ":" in host else host
    transport = MqttTransport(host, port, topic, user, password, _PROTOCOLS[protocol], url.scheme == "mqtts")
    return ForwardSink(f"{url.scheme}://{where}:{port}/{urllib.parse.quote(topic)}", transport, outbox())


class MqttTransport:
    def __init__(
        self,
        host: str,
        port: int,
        topic: str,
        user: str | None,
        password: str | None,
        protocol: MQTTProtocolVersion,
        tls: bool = False,
    ) -> None:
        self._host, self._port, self._topic = host, port, topic
        self._user, self._password, self._protocol, self._tls = user, password, protocol, tls
        self._client: mqtt.Client | None = None
        #: What the client's thread hears: ("connected" | "acknowledged" | "lost", message id, reason code).
        self._heard: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()

    def deliver(self, event_id: str, event: bytes) -> None:
        try:
            reason = self._publish(self._fresh(), event)
        except Undelivered:
            self.close()  # with it goes paho's copy: the outbox is the only queue
            raise
        if reason is not None and reason.is_failure:
            if reason.value in _NEVER:
                raise Refused(str(reason))
            raise Undelivered(f"the broker did not take it: {_said(reason)}")

    def close(self) -> None:
        client, self._client = self._client, None
        if client:
            client.disconnect()
            with contextlib.suppress(AttributeError):  # paho's thread may end between its two looks at it
                client.loop_stop()
        self._heard = queue.SimpleQueue()

    def _publish(self, client: mqtt.Client, event: bytes) -> Any:
        """The reason code of the PUBACK."""
        try:
            number = client.publish(self._topic, event, qos=1).mid
        except ValueError as error:  # over the protocol's 256 MB
            raise Refused(str(error)) from None
        except RuntimeError as error:
            raise Undelivered(str(error)) from None
        end = time.monotonic() + TIMEOUT_S
        while True:
            what, which, reason = self._wait(end, f"no acknowledgement within {TIMEOUT_S:g} s")
            if what == "lost":
                raise Undelivered(f"the connection broke: {reason}")
            if what == "acknowledged" and which == number:
                return reason

    def _fresh(self) -> mqtt.Client:
        """The client; a new one where the broker was lost while there was nothing to send."""
        if self._client and any(self._heard.get()[0] == "lost" for _ in range(self._heard.qsize())):
            self.close()
        return self._client or self._connect()

    def _wait(self, end: float, late: str) -> tuple[str, int, Any]:
        try:
            return self._heard.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise Undelivered(late) from None

    def _connect(self) -> mqtt.Client:
        heard = self._heard  # of this client: what an older one still says is not heard
        client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=self._protocol, reconnect_on_failure=False)
        client.connect_timeout = TIMEOUT_S
        if self._tls:
            client.tls_set_context(ssl.create_default_context())
        if self._user is not None:
            client.username_pw_set(self._user, self._password)
        client.on_connect = lambda _client, _data, _flags, reason, _properties: heard.put(("connected", 0, reason))
        client.on_publish = lambda _client, _data, number, reason, _properties: heard.put(("acknowledged", number, reason))
        client.on_disconnect = lambda _client, _data, _flags, reason, _properties: heard.put(("lost", 0, reason))
        try:
            client.connect(self._host, self._port, KEEPALIVE_S)
        except (OSError, ValueError) as error:
            doubt = " (is TLS spoken at this port?)" if self._tls and isinstance(error, ConnectionResetError) else ""
            raise Undelivered(words(error) + doubt) from None
        client.loop_start()
        self._client = client
        what, _, reason = self._wait(time.monotonic() + TIMEOUT_S, f"the broker did not answer within {TIMEOUT_S:g} s")
        if what == "lost":
            raise Undelivered("it closed the connection before it answered (is this the port of MQTT without TLS?)")
        if reason.is_failure:
            raise Undelivered(_said(reason))
        return client


def _said(reason: Any) -> str:
    cure = _CURES.get(reason.value)
    return f"{reason} ({cure})" if cure else str(reason)

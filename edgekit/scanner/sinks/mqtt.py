"""``mqtt://[user:password@]host[:port]/topic``: publish with QoS 1; the broker's PUBACK is the acknowledgement.

MQTT 5, because only its PUBACK says when a broker takes a message and may not route it (no permission on the topic);
``?protocol=3.1.1`` for older brokers. paho's own queue dies with the process and resends on reconnect, so a client
lives for one connection and holds no message that the outbox does not.
"""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

from edgekit.errors import MissingExtra, UsageError
from edgekit.scanner.outbox import Outbox

from . import Sink, without_secrets
from .forward import ForwardSink, Refused, Undelivered

try:
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
except ImportError:
    raise MissingExtra("scan", "paho.mqtt") from None

__all__ = ["MqttTransport", "open_mqtt"]

TIMEOUT_S = 5.0
KEEPALIVE_S = 30
_PROTOCOLS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}
_FORM = "write mqtt://HOST:PORT/TOPIC; a topic has no + or #; in user and password, write / @ ? # as %2F %40 %3F %23"
# Reason codes of a PUBACK (MQTT 5, 3.4.2.1) about the message itself; all others may pass.
_NEVER = frozenset({0x90, 0x99})  # topic name invalid, payload format invalid


def open_mqtt(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    """Raises `UsageError` for an address without host or topic."""
    try:
        url = urllib.parse.urlsplit(spec)
        host, port = url.hostname, url.port or 1883
    except ValueError:  # its words may quote a part of the password
        raise UsageError(f"the sink {without_secrets(spec)!r} is no address", _FORM) from None
    topic = urllib.parse.unquote(url.path.removeprefix("/"))
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
    transport = MqttTransport(host, port, topic, user, password, _PROTOCOLS[protocol])
    return ForwardSink(f"mqtt://{where}:{port}/{urllib.parse.quote(topic)}", transport, outbox())


class MqttTransport:
    def __init__(
        self, host: str, port: int, topic: str, user: str | None, password: str | None, protocol: MQTTProtocolVersion
    ) -> None:
        self._host, self._port, self._topic = host, port, topic
        self._user, self._password, self._protocol = user, password, protocol
        self._client: mqtt.Client | None = None
        self._acknowledged: dict[int, Any] = {}

    def deliver(self, event_id: str, event: bytes) -> None:
        client = self._client or self._connect()
        try:
            info = client.publish(self._topic, event, qos=1)
            info.wait_for_publish(TIMEOUT_S)
        except (ValueError, RuntimeError) as error:
            self.close()
            if isinstance(error, ValueError):  # over the protocol's 256 MB
                raise Refused(str(error)) from None
            raise Undelivered(str(error)) from None
        if not info.is_published():
            self.close()  # with it goes paho's copy: the outbox is the only queue
            raise Undelivered(f"no acknowledgement within {TIMEOUT_S:g} s")
        reason = self._acknowledged.pop(info.mid, None)
        if reason is not None and reason.is_failure:
            if reason.value in _NEVER:
                raise Refused(str(reason))
            raise Undelivered(f"the broker did not take it: {reason}")

    def close(self) -> None:
        client, self._client = self._client, None
        self._acknowledged.clear()
        if client:
            client.disconnect()
            client.loop_stop()

    def _connect(self) -> mqtt.Client:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=self._protocol, reconnect_on_failure=False)
        client.connect_timeout = TIMEOUT_S
        if self._user is not None:
            client.username_pw_set(self._user, self._password)
        answered = threading.Event()
        refusal: list[str] = []

        def on_connect(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
            if reason.is_failure:
                refusal.append(str(reason))
            answered.set()

        def on_publish(_client: Any, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
            self._acknowledged[mid] = reason

        client.on_connect, client.on_publish = on_connect, on_publish
        try:
            client.connect(self._host, self._port, KEEPALIVE_S)
        except (OSError, ValueError) as error:
            raise Undelivered(str(error)) from None
        client.loop_start()
        self._client = client
        if not answered.wait(TIMEOUT_S) or refusal:
            self.close()
            raise Undelivered(refusal[0] if refusal else f"the broker did not answer within {TIMEOUT_S:g} s")
        return client

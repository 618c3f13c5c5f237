"""Triggers from outside, over real sockets and a real broker."""

from __future__ import annotations

import socket
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgekit.errors import DataError, UsageError
from edgekit.scanner.trigger_inputs import MOST_BYTES, open_trigger_input


def test_each_line_of_each_client_is_a_trigger(kit: Any) -> None:
    fired: list[str] = []
    taken = open_trigger_input("tcp://:0", lambda source, reference: fired.append(reference) is None)
    try:
        port = taken.status()["input"].rsplit(":", 1)[1]
        first, second = (socket.create_connection(("127.0.0.1", int(port))) for _ in range(2))
        with first, second:
            first.sendall(b"box")
            second.sendall(b"other\r\n\n")
            kit.wait_for(lambda: len(fired) == 2)
            first.sendall(b" 1\nb\xff\nhalf a li")
            kit.wait_for(lambda: len(fired) == 4)
            second.sendall(b"x" * (MOST_BYTES + 1))
            assert second.recv(1) == b""  # closed
        kit.wait_for(lambda: taken.status()["clients"] == 0)
        assert sorted(fired) == ["", "box 1", "b\ufffd", "other"]
        assert taken.status()["too_long"] == 1
        with pytest.raises(DataError, match="no triggers can be taken"):
            open_trigger_input(f"tcp://127.0.0.1:{port}", lambda source, reference: True)
    finally:
        taken.close()


def test_each_message_of_a_topic_is_a_trigger(kit: Any, broker: Any) -> None:
    port = kit.free_port()
    broker(port)
    fired: list[str] = []
    sender = mqtt.Client(CallbackAPIVersion.VERSION2)
    sender.connect("127.0.0.1", port)
    sender.loop_start()
    sender.publish("line/1", "old", qos=1, retain=True).wait_for_publish(10)
    taken = open_trigger_input(f"mqtt://127.0.0.1:{port}/line/%2B", lambda source, reference: fired.append(reference) is None)
    try:
        kit.wait_for(lambda: taken.status()["subscribed"])
        for text in ("box 1", "", "x" * (MOST_BYTES + 1), "box 2"):
            sender.publish("line/1", text, qos=1).wait_for_publish(10)
        kit.wait_for(lambda: len(fired) == 3)
        assert fired == ["box 1", "", "box 2"]
        assert taken.status()["too_long"] == 1
    finally:
        taken.close()
        sender.disconnect()
        sender.loop_stop()


@pytest.mark.parametrize(
    "spec", ["", "udp://:1", "tcp://host", "tcp://:70000", "mqtt://host", "mqtt://u:geheim@[/t", "tcp://u:geheim@:9"]
)
def test_other_addresses_are_refused_without_their_password(spec: str) -> None:
    with pytest.raises(UsageError) as error:
        open_trigger_input(spec, lambda source, reference: True)
    assert "geheim" not in str(error.value)

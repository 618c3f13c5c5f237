"""Triggers from outside, over real sockets and a real broker."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import numpy as np
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgekit.bundle import Bundle
from edgekit.errors import DataError, UsageError
from edgekit.scanner import Captured, Scanner, trigger_inputs
from edgekit.scanner.assembly import Parts
from edgekit.scanner.steps.triggers import Trigger, TriggerOptions
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


def test_one_trigger_is_one_event_of_each_camera(kit: Any, digits_bundle: Bundle) -> None:
    """By a line and by the application; the cameras have no names, and the first trigger comes before their first frame."""
    port, cameras = kit.free_port(), ["pattern:64x48@20", "pattern:80x48@20"]
    trigger = {"mode": "external", "time_ms": 200, "inputs": [f"tcp://:{port}"]}
    tables = {"model": {"bundle": str(digits_bundle.path)}, "trigger": trigger}
    events: list[dict[str, Any]] = []
    scanner = Scanner({**tables, "source": [{"address": each} for each in cameras]}, on_event=events.append)
    assert scanner.fire() is False  # nothing runs yet
    thread = threading.Thread(target=scanner.run)
    thread.start()
    try:
        kit.wait_for(lambda: _sent(port, b"box 1\n"))
        kit.wait_for(lambda: len(_triggers(events)) == 2)
        assert scanner.fire(cameras[1], "box 2")
        kit.wait_for(lambda: len(_triggers(events)) == 3)
    finally:
        scanner.stop()
        thread.join()
    found = _triggers(events)
    assert sorted(found[:2]) == [(cameras[0], "box 1"), (cameras[1], "box 1")]
    assert found[2:] == [(cameras[1], "box 2")]


def _triggers(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(event["source"], event["trigger"]["reference"]) for event in list(events) if "trigger" in event]


def _sent(port: int, line: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(line)
    except OSError:
        return False
    return True


def test_a_broker_that_is_away_is_told(kit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    taken = open_trigger_input(f"mqtt://127.0.0.1:{kit.free_port()}/t", lambda source, reference: True)
    try:
        said = ""

        def told() -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return "no triggers come from mqtt://127.0.0.1" in said

        kit.wait_for(told)
        assert "the broker does not answer" in said
        rows = [{"step": "trigger", "inputs": [taken.status()]}]
        assert Parts().reasons({"sources": [], "steps": rows}) == [f"no triggers come from {taken.name}"]
    finally:
        taken.close()


def test_the_client_that_is_silent_for_longest_gives_way(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger_inputs, "MOST_CLIENTS", 2)
    fired: list[str] = []
    taken = open_trigger_input("tcp://127.0.0.1:0", lambda source, reference: fired.append(reference) is None)
    try:
        port = int(taken.status()["input"].rsplit(":", 1)[1])
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(2)]
            for number, client in enumerate(clients):
                client.sendall(b"%d\n" % number)
                kit.wait_for(lambda n=number: len(fired) == n + 1)
            late = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            late.sendall(b"late\n")
            kit.wait_for(lambda: fired == ["0", "1", "late"])
            assert clients[0].recv(1) == b""
    finally:
        taken.close()


def test_a_client_that_gives_way_in_the_moment_in_which_it_speaks(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger_inputs, "MOST_CLIENTS", 2)
    fired: list[str] = []
    go_on = threading.Event()

    def fire(source: str | None, reference: str) -> bool:
        fired.append(reference)
        return reference != "slow" or go_on.wait(20)

    with contextlib.closing(open_trigger_input("tcp://127.0.0.1:0", fire)) as taken, contextlib.ExitStack() as stack:
        at = ("127.0.0.1", int(taken.status()["input"].rsplit(":", 1)[1]))
        oldest, slow = (stack.enter_context(socket.create_connection(at)) for _ in range(2))
        kit.wait_for(lambda: taken.status()["clients"] == 2)
        slow.sendall(b"slow\n")
        kit.wait_for(lambda: fired == ["slow"])
        late = stack.enter_context(socket.create_connection(at))
        oldest.sendall(b"too late\n")
        go_on.set()
        late.sendall(b"late\n")
        kit.wait_for(lambda: "late" in fired)


def test_no_more_triggers_wait_than_a_scan_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the scanning thread has placed count too."""
    monkeypatch.setattr("edgekit.scanner.steps.triggers.MOST_FIRES", 10)
    now = 0.0
    trigger = Trigger(TriggerOptions("external", delay_ms=1000), cameras=["a", "b"], clock=lambda: now)
    taken = 0
    for _ in range(5):
        taken += sum(trigger.fire() for _ in range(8))
        trigger.due(now, now)
    assert taken == 10
    now = 5.0
    assert len(trigger.due(now, now)) > 0
    assert trigger.fire()


def test_a_folder_that_tells_something_takes_no_trigger() -> None:
    """Of files a camera is a folder that gave a frame."""
    trigger = Trigger(TriggerOptions("external", time_ms=1000), clock=lambda: 10.0)
    assert trigger.fire(reference="box 1")
    trigger.due(10.0, 10.0)
    notice = Captured(None, "/in/lost+found", -1, 10.1, "camera", 10.1)
    trigger.frame(notice, {"event": "camera", "state": "down", "source": "/in/lost+found"})
    assert trigger.wants(Captured(np.zeros((4, 4), np.uint8), "/in/a.png", 0, 10.2, "", 10.2)) == ""

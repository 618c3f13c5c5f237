"""MQTT through a proxy that cuts, drops and goes silent, with logins and over TLS: nothing lost, order kept."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekit.chaos.network import Proxy
from edgekit.scanner import Outbox, open_sink
from edgekit.scanner.sinks import mqtt

from .outbox_kit import line_event as event

HOST = "127.0.0.1"

pytestmark = pytest.mark.usefixtures("quick_delivery")


@pytest.fixture
def subscribed(kit: Any) -> Iterator[Callable[[int], list[dict[str, Any]]]]:
    """What a subscriber of ``line/#`` at a broker hears."""
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    clients = []

    def start(port: int) -> list[dict[str, Any]]:
        heard: list[dict[str, Any]] = []
        client = paho.Client(CallbackAPIVersion.VERSION2)
        ready = threading.Event()
        client.on_message = lambda c, d, message: heard.append(json.loads(message.payload))
        client.on_subscribe = lambda *args: ready.set()
        client.connect(HOST, port)
        client.subscribe("line/#", qos=1)
        client.loop_start()
        clients.append(client)
        assert ready.wait(20.0)
        return heard

    yield start
    for client in clients:
        client.disconnect()
        client.loop_stop()


@pytest.mark.parametrize(("protocol", "count"), [("5", 250), ("3.1.1", 100)])
def test_mqtt_through_a_line_that_flaps_loses_nothing(
    kit: Any,
    outbox: Outbox,
    broker: Any,
    subscribed: Any,
    protocol: str,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The broker is down at first; then acknowledgements are dropped and connections cut, before and behind a packet."""
    monkeypatch.setattr(mqtt, "TIMEOUT_S", 0.25)
    rng = random.Random(3)
    proxy = Proxy(kit.free_port(), lambda kind: rng.choices(["", "drop", "cut", "cut after"], [94, 1, 3, 2])[0])
    sink = open_sink(f"mqtt://{HOST}:{proxy.port}/line/1?protocol={protocol}", lambda: outbox)
    for i in range(count):
        sink.send(event(i))
    kit.wait_for(lambda: "down" in sink.status())
    assert sink.status()["waiting"] == count
    broker(port := kit.free_port())
    heard = subscribed(port)
    proxy.to = port
    sink.flush(20.0)
    kit.wait_for(lambda: heard and heard[-1]["seq"] == count - 1)
    assert sum(proxy.fates.values()) > 3
    assert list({each["id"]: each for each in heard}.values()) == [event(i) for i in range(count)]
    assert (sink.status()["delivered"], sink.status()["waiting"]) == (count, 0)
    said = capfd.readouterr().err
    assert said.count("is down") < 6  # of some twenty times
    sink.close()
    proxy.close()


def test_mqtt_silence_is_noticed_and_survived(
    kit: Any, outbox: Outbox, broker: Any, subscribed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "TIMEOUT_S", 0.25)
    broker(port := kit.free_port())
    heard = subscribed(port)
    proxy = Proxy(port, lambda kind: "")
    sink = open_sink(f"mqtt://{HOST}:{proxy.port}/line/1", lambda: outbox)
    sink.send(event(0))
    sink.flush(10.0)
    proxy.silent = True
    sink.send(event(1))
    kit.wait_for(lambda: "within 0.25 s" in sink.status().get("down", ""))
    proxy.silent = False
    sink.flush(10.0)
    kit.wait_for(lambda: heard[-1] == event(1))
    assert [each["seq"] for each in {each["id"]: each for each in heard}.values()] == [0, 1]
    sink.close()
    proxy.close()


def password_line(user: str, password: str) -> str:
    """A line of mosquitto's ``password_file``."""
    salt = b"twelve bytes"
    key = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, 101)
    return f"{user}:$7$101${base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}\n"


def test_mqtt_wrong_and_right_credentials(
    kit: Any, outbox: Outbox, broker: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    passwords = tmp_path / "passwords"
    passwords.write_text(password_line("me", "s3same/one"))
    passwords.chmod(0o600)
    broker(port := kit.free_port(), f"allow_anonymous false\npassword_file {passwords}")
    for user in ("me:wr0ng@", "you:wr0ng@", ""):
        sink = open_sink(f"mqtt://{user}{HOST}:{port}/line/1", lambda: outbox)
        sink.send(event(0))
        kit.wait_for(lambda sink=sink: "mend user and password" in sink.status().get("down", ""))
        sink.close()
    sink = open_sink(f"mqtt://me:s3same%2Fone@{HOST}:{port}/line/1", lambda: outbox)
    sink.flush(10.0)
    assert sink.status()["waiting"] == 0
    sink.close()
    said = capfd.readouterr().err
    assert "wr0ng" not in said
    assert "s3same" not in said


@pytest.mark.filterwarnings("ignore:.*unclosed <ssl.SSLSocket.*")  # paho leaves the socket of a failed handshake to Python
def test_mqtt_over_tls_and_where_there_is_none(
    kit: Any, outbox: Outbox, broker: Any, subscribed: Any, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, secure = kit.free_port(), kit.free_port()
    tls = f"listener {secure} {HOST}\ncertfile {certificate}\nkeyfile {certificate}\n"
    broker(plain, f"allow_anonymous true\n{tls}")
    heard = subscribed(plain)
    for address, cure in (
        (f"mqtts://{HOST}:{plain}/line/1", "TLS"),
        (f"mqtt://{HOST}:{secure}/line/1", "without TLS"),
        (f"mqtts://{HOST}:{secure}/line/1", "SSL_CERT_FILE"),
    ):
        sink = open_sink(address, lambda: outbox)
        sink.send(event(0))
        kit.wait_for(lambda sink=sink, cure=cure: cure in sink.status().get("down", ""))
        sink.close()
    assert heard == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    sink = open_sink(f"mqtts://{HOST}:{secure}/line/1", lambda: outbox)
    sink.flush(10.0)
    kit.wait_for(lambda: heard == [event(0)])
    sink.close()


def test_sigterm_while_three_sinks_hang_ends_in_time_and_keeps_all(kit: Any, pictures: Path, tmp_path: Path) -> None:
    """Servers that accept and never answer; the events wait for the next scan."""
    listeners = [socket.create_server((HOST, 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in listeners]
    sinks = [f"tcp://{HOST}:{ports[0]}", f"http://{HOST}:{ports[1]}/x", f"mqtt://{HOST}:{ports[2]}/line/1"]
    options = [part for sink in sinks for part in ("--sink", sink)]
    outbox = tmp_path / "o.sqlite"
    process = kit.start_scan("--codes", "--source", pictures, "--watch", *options, "--outbox", outbox, "--json")
    accepted = [each.accept()[0] for each in listeners]  # all three are in a delivery
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert time.monotonic() - begun < 8.0  # 2 s where the machine has nothing else to do
    figures = {row["sink"]: row for row in json.loads(out)["sinks"]}
    for each in (*accepted, *listeners):
        each.close()
    opened = Outbox(outbox)
    for name in figures:
        assert opened.count(name) == figures[name]["sent"] > 0
    opened.close()

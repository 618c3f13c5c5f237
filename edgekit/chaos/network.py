"""Receivers that are down, flap and lose answers, and a disk that is full: what is not delivered waits, in order."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgekit.errors import MissingExtra
from edgekit.scanner import Outbox, Scanner, open_sink

from .case import Bench, NotHere
from .stage import Receiver, check_arrivals, check_summary, free_port, ids_in, scan_bundle

__all__ = ["Proxy", "broker_flaps", "disk_full", "full_disk", "receiver_down", "receiver_flaps"]

_HOST = "127.0.0.1"
_SOURCE = "pattern:64x48@200"


def _scanner(bench: Bench, bundle: Path, source: str, number: int, address: str) -> tuple[Scanner, Path]:
    """A scan with its own outbox and JSON lines; the lines lie at the path."""
    folder = bench.folder / f"round{number}"
    folder.mkdir()
    lines = folder / "events.jsonl"
    config = {
        "model": {"bundle": str(bundle)},
        "source": [{"address": source, "name": "camera", "queue": "wait"}],  # a slow model is to meet as many faults
        "sink": [{"address": address}, {"address": f"jsonl:{lines}"}],
        "outbox": {"path": str(folder / "outbox.sqlite")},
    }
    return Scanner(config), lines


def _finished(bench: Bench, scanner: Scanner, receiver: Receiver, lines: Path) -> None:
    assert scanner.summary is not None
    check_summary(bench, scanner.summary.figures())
    receiver.close()
    with contextlib.closing(Outbox(lines.parent / "outbox.sqlite")) as outbox:
        wait = [each.id for name in outbox.others(()) for each in outbox.head(name, 10**6) if not receiver.has(each.id)]
    bench.count("still_waiting", len(wait))
    check_arrivals(bench, [*receiver.ids, *wait], ids_in(bench, lines))
    shutil.rmtree(lines.parent)


def receiver_down(bench: Bench) -> None:
    bundle = scan_bundle(bench)
    for number in bench.each():
        port, outage_s = free_port(), 0.6 if bench.quick else 5.0
        scanner, lines = _scanner(bench, bundle, _SOURCE, number, f"http://{_HOST}:{port}/events")
        begun, up, receiver = 0.0, 0.0, None
        for _ in scanner:
            now = time.monotonic()
            begun = begun or now  # opening a model takes its time
            if receiver is None and now - begun > outage_s:
                sink = scanner.status()["sinks"][0]
                bench.check(sink.get("down") or now - begun < outage_s + 30, "the scan does not say that its receiver is down")
                if sink.get("down"):
                    bench.longest("most_waiting", sink["waiting"])
                    receiver, up = Receiver(port), now
            elif receiver is not None and (len(receiver.ids) > 20 and scanner.status()["sinks"][0]["waiting"] < 10):
                bench.longest("recovery_s", now - up)
                break
            bench.check(now - begun < outage_s + 90, "what waits is not delivered within a minute after the receiver is back")
        assert receiver is not None
        _finished(bench, scanner, receiver, lines)


def receiver_flaps(bench: Bench) -> None:
    bundle = scan_bundle(bench)
    faults = ("cut", "lost", "503")
    for number in bench.each():
        receiver = Receiver(fate=lambda i: faults[i // 9 % 3] if i % 9 == 5 else "")
        scanner, lines = _scanner(bench, bundle, f"{_SOURCE},{40 if bench.quick else 150}", number, receiver.address)
        begun = time.monotonic()
        scanner.run()
        _none_waits(bench, scanner)
        bench.longest("seconds_for_all", time.monotonic() - begun)
        for fault in faults:
            bench.check(receiver.fates.get(fault), f"the fault {fault!r} was not met")
            bench.count(f"faults_{fault}", receiver.fates[fault])
        _finished(bench, scanner, receiver, lines)
        bench.check(bench.figures["duplicates"], "an answer was lost, and no event was repeated")


def _none_waits(bench: Bench, scanner: Scanner) -> None:
    """A scan that reaches its source's end brings out what its sinks have, as long as they take something."""
    assert scanner.summary is not None
    waiting = scanner.summary.sinks[0]["waiting"]
    bench.check(not waiting, f"{waiting} events still wait at the end of the scan, though the receiver takes them")


@contextlib.contextmanager
def full_disk(bytes_: int) -> Iterator[None]:
    """No file of this process grows beyond ``bytes_``: writing says EFBIG, as a full disk says ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def disk_full(bench: Bench) -> None:
    """The limit is the size of the JSON lines, so they and the outbox, which is larger, are both on a full disk.

    Few enough events come meanwhile that all of them fit into memory (1,000 do)."""
    bundle = scan_bundle(bench)
    first, last, frames = (20, 80, 120) if bench.quick else (50, 250, 400)
    for number in bench.each():
        receiver = Receiver()
        scanner, lines = _scanner(bench, bundle, f"{_SOURCE},{frames}", number, receiver.address)
        limit = contextlib.ExitStack()
        with limit:
            for i, _ in enumerate(scanner):
                if i == first:
                    limit.enter_context(full_disk(lines.stat().st_size))
                elif i == last:
                    unsaved = sum(sink.get("unsaved", 0) for sink in scanner.status()["sinks"])
                    bench.check(unsaved, "the disk was full, and no event waited in memory: the fault was not met")
                    bench.longest("most_in_memory", unsaved)
                    limit.close()
        assert scanner.summary is not None
        lost = {reason: count for sink in scanner.summary.sinks for reason, count in sink["dropped"].items()}
        bench.check(not lost, f"events were dropped: {lost}")
        _none_waits(bench, scanner)
        _finished(bench, scanner, receiver, lines)


class Proxy:
    """Between a client and the MQTT broker at the port ``to``, 0 while there is none. ``fate(kind)`` says what becomes of a
    packet ("publish" or "ack"): "" passes, "drop", "cut" ends the connection before it, "cut after" behind it. ``silent``:
    nothing passes, and nothing ends."""

    def __init__(self, to: int, fate: Callable[[str], str]) -> None:
        self.to, self._fate = to, fate
        self.silent = False
        self.fates = {"drop": 0, "cut": 0, "cut after": 0}
        self._server = socket.create_server((_HOST, 0))
        self.port = int(self._server.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._server.accept()[0]
                try:
                    broker = socket.create_connection((_HOST, self.to))
                except OSError:
                    client.close()
                    continue
                for pair in ((client, broker, 3, "publish"), (broker, client, 4, "ack")):
                    self._threads.append(threading.Thread(target=self._pass, args=pair, daemon=True))
                    self._threads[-1].start()

    def _pass(self, come: socket.socket, go: socket.socket, kind: int, name: str) -> None:
        with contextlib.suppress(OSError), come.makefile("rb") as stream:
            while packet := _packet(stream):
                fate = self._fate(name) if packet[0] >> 4 == kind and not self.silent else ""
                if fate:
                    self.fates[fate] += 1
                if fate == "cut":
                    break
                if fate != "drop" and not self.silent:
                    go.sendall(packet)
                if fate == "cut after":
                    break
        for each in (come, go):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        come.close()


def _packet(stream: Any) -> bytes:
    """One MQTT packet, b"" at the end."""
    head, length, shift = stream.read(1), 0, 0
    while head and (byte := stream.read(1)):
        head += byte
        length |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            return bytes(head + stream.read(length))
    return b""


@contextlib.contextmanager
def _mosquitto(bench: Bench) -> Iterator[int]:
    """A broker on a loopback port."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        raise NotHere("mosquitto is not installed: apt-get install mosquitto")
    port, config = free_port(), bench.folder / "mosquitto.conf"
    user = "user root\n" if os.geteuid() == 0 else ""
    config.write_text(f"listener {port} {_HOST}\nallow_anonymous true\npersistence false\n{user}")
    process = subprocess.Popen(  # noqa: S603
        [program, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        bench.wait_for(lambda: _answers(port), "mosquitto does not start")
        yield port
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((_HOST, port)) == 0


@contextlib.contextmanager
def _subscribed(port: int) -> Iterator[list[str]]:
    """The ids that a subscriber hears, in order."""
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    heard: list[str] = []
    ready = threading.Event()
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_message = lambda c, d, message: heard.append(str(json.loads(message.payload)["id"]))
    client.on_subscribe = lambda *args: ready.set()
    client.connect(_HOST, port)
    client.subscribe("chaos", qos=1)
    client.loop_start()
    try:
        ready.wait(20.0)
        yield heard
    finally:
        client.disconnect()
        client.loop_stop()


def broker_flaps(bench: Bench) -> None:
    try:
        from edgekit.scanner.sinks import mqtt
    except MissingExtra as error:
        raise NotHere(f"{error.message}: {error.hint}") from None
    mqtt.TIMEOUT_S = 0.5  # 5 s by default: each acknowledgement that is dropped would cost as much
    count = 30 if bench.quick else 150
    for number in bench.each():
        _through_a_line_that_flaps(bench, number, count)


def _through_a_line_that_flaps(bench: Bench, number: int, count: int) -> None:
    fates = iter(["", "drop", "", "cut after", "", "", "cut", *([""] * 20)] * 1000)
    proxy = Proxy(0, lambda kind: next(fates))
    outbox = Outbox(bench.folder / f"outbox{number}.sqlite")
    sink = open_sink(f"mqtt://{_HOST}:{proxy.port}/chaos", lambda: outbox)
    ids = [f"{number}-{i}" for i in range(count)]
    for i, each in enumerate(ids):
        sink.send({"schema": 1, "id": each, "source": "s", "seq": i, "time": "t"})
    bench.wait_for(lambda: sink.status().get("down"), "the sink does not say that its broker is down")
    bench.check(sink.status()["waiting"] == count, "events do not wait for the broker that is down")
    with _mosquitto(bench) as port, _subscribed(port) as heard:
        proxy.to, begun = port, time.monotonic()
        sink.flush(20.0)
        bench.wait_for(lambda: ids[-1] in heard, "the last event does not arrive")
        bench.longest("recovery_s", time.monotonic() - begun)
        check_arrivals(bench, heard, ids)
        status = sink.status()
        bench.check((status["delivered"], status["waiting"]) == (count, 0), f"the sink's count is not exact: {status}")
        for fate, times in proxy.fates.items():
            bench.check(times, f"the fault {fate!r} was not met")
            bench.count(f"faults_{fate.replace(' ', '_')}", times)
        sink.close()
    outbox.close()
    proxy.close()

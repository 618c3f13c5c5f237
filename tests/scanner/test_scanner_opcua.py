"""The OPC UA sink against a real server: down and back, wrong nodes and logins, silence."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from typing import Any

import pytest

from edgekit.scanner import Outbox, open_sink
from edgekit.scanner.sinks import opcua

from .outbox_kit import line_event as event

pytestmark = pytest.mark.usefixtures("quick_delivery")


class Variables:
    """An asyncua server with a String, a number and a constant in namespace 2."""

    def __init__(self, port: int) -> None:
        logging.getLogger("asyncua").addHandler(logging.NullHandler())
        self.values: list[Any] = []
        self.port = port
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda loop, context: None)
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(60.0)

    async def _serve(self) -> None:
        from asyncua import Server, ua
        from asyncua.crypto.permission_rules import User, UserRole

        class Users:
            def get_user(self, iserver: Any, username: Any = None, password: Any = None, certificate: Any = None) -> Any:
                return None if username else User(role=UserRole.User)

        server = Server(user_manager=Users())
        await server.init()
        server.set_endpoint(f"opc.tcp://127.0.0.1:{self.port}/line")
        space = await server.register_namespace("edgekit")
        folder = await server.nodes.objects.add_object(space, "line")
        variable = await folder.add_variable(ua.NodeId("Event", space), "event", "")
        number = await folder.add_variable(ua.NodeId("Number", space), "number", 0)
        await folder.add_variable(ua.NodeId("Constant", space), "constant", "")
        for each in (variable, number):
            await each.set_writable()
        self._stop, self._server = asyncio.Event(), server
        async with server:
            subscription = await server.create_subscription(5, self)
            await subscription.subscribe_data_change(variable, queuesize=1000)
            self._ready.set()
            await self._stop.wait()

    def datachange_notification(self, node: Any, value: Any, data: Any) -> None:
        if value:
            self.values.append(json.loads(value))

    def down(self) -> None:
        """Nothing listens any more, and connections are closed; the address space stays (it takes seconds to make)."""
        asyncio.run_coroutine_threadsafe(self._server.bserver.stop(), self._loop).result()

    def up(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.bserver.start(), self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


def test_opcua_down_then_up_then_restarted_writes_all_in_order(
    kit: Any, outbox: Outbox, capfd: pytest.CaptureFixture[str]
) -> None:
    port = kit.free_port()
    sink = open_sink(f"opc.tcp://127.0.0.1:{port}/line?node=ns=2;s=Event", lambda: outbox)
    for i in range(20):
        sink.send(event(i))
    kit.wait_for(lambda: "nothing listens" in sink.status().get("down", ""))
    server = Variables(port)
    sink.flush(20.0)
    kit.wait_for(lambda: len(server.values) >= 20)
    server.down()
    for i in range(20, 30):
        sink.send(event(i))
    kit.wait_for(lambda: "down" in sink.status())
    server.up()
    sink.flush(20.0)
    kit.wait_for(lambda: server.values[-1] == event(29))
    assert list({each["id"]: each for each in server.values}.values()) == [event(i) for i in range(30)]
    sink.close()
    wrong = {
        "127.0.0.1:{}/line?node=ns=2;s=None": "mend ?node=",
        "127.0.0.1:{}/line?node=ns=2;s=Number": "must be a String",
        "127.0.0.1:{}/line?node=ns=2;s=Constant": "must be writable",
        "me:wrong@127.0.0.1:{}/line?node=ns=2;s=Event": "mend user and password",
    }
    for address, cure in wrong.items():
        sink = open_sink("opc.tcp://" + address.format(port), lambda: outbox)
        sink.send(event(30))
        kit.wait_for(lambda cure=cure, sink=sink: cure in sink.status().get("down", ""))
        assert sink.status()["waiting"] == 1
        assert "wrong" not in sink.name
        sink.close()
    server.close()
    said = capfd.readouterr().err
    assert all(line.startswith("opc.tcp://127.0.0.1") for line in said.splitlines())  # asyncua's log is not shown
    assert "wrong" not in said


def test_an_opcua_server_that_never_answers_leaves_no_connection_behind(
    kit: Any, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opcua, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        sink = open_sink(f"opc.tcp://127.0.0.1:{server.getsockname()[1]}/line?node=ns=2;s=Event", lambda: outbox)
        sink.send(event(0))
        connections = [server.accept()[0] for _ in range(2)]
        kit.wait_for(lambda: "no answer" in sink.status().get("down", ""))
        connections[0].settimeout(10.0)
        while connections[0].recv(4096):
            pass  # closed by the sink
        sink.close()
        for each in connections:
            each.close()

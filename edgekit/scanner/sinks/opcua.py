"""``opc.tcp://[user:password@]host[:port][/path]?node=ns=2;s=Line1.Event``: write each event, as JSON, to a String variable.

The server's good status for the write is the acknowledgement. A variable holds one value: the server has had every event in
order, a client sees each only where it subscribes with a queue or the server keeps history.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import urllib.parse
from collections.abc import Callable
from typing import Any

from edgekit.errors import MissingExtra, UsageError, first_line
from edgekit.scanner.outbox import Outbox
from edgekit.scanner.sources.address import parsed_url

from . import Sink, without_secrets
from .forward import ForwardSink, Undelivered
from .words import words

__all__ = ["OpcUaTransport", "open_opcua"]

TIMEOUT_S = 5.0
#: Status code of a server -> what mends it.
_CURES = {
    "BadNodeIdUnknown": "there is no such node: mend ?node= in the address, for example ns=2;s=Line1.Event",
    "BadNodeIdInvalid": "there is no such node: mend ?node= in the address, for example ns=2;s=Line1.Event",
    "BadTypeMismatch": "the variable must be a String",
    "BadNotWritable": "the variable must be writable",
    "BadUserAccessDenied": "the variable must be writable for this user, or mend user and password in the address",
    "BadIdentityTokenRejected": "mend user and password in the address",
    "BadIdentityTokenInvalid": "mend user and password in the address",
    "BadTcpEndpointUrlInvalid": "mend the path in the address",
    "BadSecurityPolicyRejected": "the server must offer an endpoint without encryption",
    "BadSecurityModeRejected": "the server must offer an endpoint without encryption",
}
_FORM = "write opc.tcp://HOST:4840/PATH?node=ns=2;s=NAME; in user and password, write / @ ? # as %2F %40 %3F %23"


def open_opcua(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    """Raises `UsageError` for an address without host or node, `MissingExtra` without asyncua."""
    try:
        url, host, port = parsed_url(spec)
    except ValueError:  # its words may quote a part of the password
        raise UsageError(f"the sink {without_secrets(spec)!r} is no address", _FORM) from None
    port = port or 4840
    option, _, node = url.query.partition("=")
    if not host or option != "node" or not node or "&" in node or "@" in url.path or "#" in spec:
        raise UsageError(f"the sink {without_secrets(spec)!r} names no host and node to write to", _FORM)
    try:
        import asyncua
        from asyncua import ua
    except ImportError:
        raise MissingExtra("opcua", "asyncua") from None
    logging.getLogger("asyncua").addHandler(logging.NullHandler())  # it would write to stderr what is told here
    node = urllib.parse.unquote(node)
    try:
        node_id = ua.NodeId.from_string(node)
    except Exception:  # noqa: BLE001  whatever asyncua makes of it
        raise UsageError(f"{node!r} is no OPC UA node id", "write for example ns=2;s=Line1.Event or ns=2;i=1001") from None
    user, password = (urllib.parse.unquote(part) if part is not None else None for part in (url.username, url.password))
    where = f"opc.tcp://{f'[{host}]' if ':' in host else host}:{port}{url.path.rstrip('/')}"
    transport = OpcUaTransport(asyncua, where, node_id, user, password)
    return ForwardSink(f"{where}?node={node}", transport, outbox())


class OpcUaTransport:
    def __init__(self, asyncua: Any, address: str, node_id: Any, user: str | None, password: str | None) -> None:
        self._asyncua, self._address, self._node_id = asyncua, address, node_id
        self._user, self._password = user, password
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Any = None

    def deliver(self, event_id: str, event: bytes) -> None:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop.set_exception_handler(lambda loop, context: None)  # of tasks of connections that are gone
        used = self._client is not None
        try:
            self._in_time(self._write(event.decode()))
        except Exception as error:  # noqa: BLE001  asyncua raises a class for each status code, and its own beside
            if self._client is not None and (why := self._about_node(error)):
                raise Undelivered(why) from None
            self._disconnect()
            if not used:
                raise Undelivered(_said(error)) from None
            self.deliver(event_id, event)  # the connection broke while there was nothing to send: a new one shows

    def close(self) -> None:
        if self._loop:
            self._disconnect()
            self._loop.close()
            self._loop = None

    def _in_time(self, work: Any, seconds: float = TIMEOUT_S) -> Any:
        assert self._loop is not None
        return self._loop.run_until_complete(asyncio.wait_for(work, seconds))

    async def _write(self, text: str) -> None:
        ua = self._asyncua.ua
        if self._client is None:
            self._client = await self._connected()
        value = ua.DataValue(ua.Variant(text, ua.VariantType.String))
        await self._client.get_node(self._node_id).write_value(value)

    async def _connected(self) -> Any:
        client = self._asyncua.Client(self._address, timeout=TIMEOUT_S)
        if self._user is not None:
            client.set_user(self._user)
            client.set_password(self._password or "")
        try:
            await client.connect()
        except BaseException:  # cancelled too: it would leave its socket open
            closed = client.disconnect_socket()
            if inspect.isawaitable(closed):
                await closed
            raise
        return client

    def _about_node(self, error: Exception) -> str:
        """What the server has against the node, "" where the connection is at fault.

        A server may say of a node that is not there that this user may not write to it.
        """
        if type(error).__name__ not in _CURES:
            return ""
        try:
            self._in_time(self._client.get_node(self._node_id).read_browse_name())
        except Exception as other:  # noqa: BLE001
            return _said(other) if type(other).__name__ in _CURES else ""
        return _said(error)

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client and self._loop:
            with contextlib.suppress(Exception):
                self._in_time(client.disconnect(), 1.0)


def _said(error: Exception) -> str:
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    cure = _CURES.get(type(error).__name__)
    text = first_line(error) if getattr(error, "code", None) else words(error)
    return f"{text} ({cure})" if cure else text

"""``http://`` and ``https://``: POST one event as JSON; any 2xx answer is the acknowledgement.

400, 413 and 422 refuse that event for good (it is set aside, in the outbox); every other answer, and silence, means
later. Redirects are not followed: urllib would turn the POST into a GET and lose the event.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from edgekit.errors import UsageError
from edgekit.scanner.outbox import Outbox

from . import Sink, without_secrets
from .forward import ForwardSink, Refused, Undelivered

__all__ = ["HttpTransport", "open_http"]

TIMEOUT_S = 5.0
_FORM = "write http://HOST:PORT/PATH; in user and password, write / @ ? # as %2F %40 %3F %23"
_NEVER = frozenset({400, 413, 422})


def open_http(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    """``http(s)://[user:password@]host[:port]/path``; the password is sent as Basic authorization and never shown."""
    try:
        url = urllib.parse.urlsplit(spec)
        host, port = url.hostname, url.port
    except ValueError:  # its words may quote a part of the password
        raise UsageError(f"the sink {without_secrets(spec)!r} is no address", _FORM) from None
    # An @ or # behind the host is the end of a password with a / or # in it.
    if not host or "@" in url.path or "#" in spec:
        raise UsageError(f"the sink {without_secrets(spec)!r} names no host, or has a / @ ? # in its password", _FORM)
    where = f"[{host}]" if ":" in host else host.rstrip(".")
    netloc = where if port in (None, {"http": 80, "https": 443}[url.scheme]) else f"{where}:{port}"
    # A file name's odd bytes arrive as surrogates; they are sent as they are.
    path, asked = (
        urllib.parse.quote(part, safe="/%:@!$&'()*+,;=~?", errors="surrogateescape") for part in (url.path or "/", url.query)
    )
    address = urllib.parse.urlunsplit((url.scheme, netloc, path, asked, ""))
    user, password = urllib.parse.unquote(url.username or ""), urllib.parse.unquote(url.password or "")
    # The outbox knows the sink by its name: what may hold a token counts there but is not shown.
    shown = re.split("[?;]", address)[0]
    hidden = address[len(shown) :]
    name = f"{shown}?{hashlib.sha256(hidden.encode()).hexdigest()[:8]}" if hidden else shown
    return ForwardSink(name, HttpTransport(address, user, password), outbox())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class HttpTransport:
    def __init__(self, address: str, user: str = "", password: str = "") -> None:
        self._address = address
        self._headers = {"Content-Type": "application/json", "User-Agent": "edgekit-scan"}
        if user:
            self._headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def deliver(self, event_id: str, event: bytes) -> None:
        headers = {**self._headers, "Idempotency-Key": event_id}
        request = urllib.request.Request(self._address, event, headers, method="POST")  # noqa: S310  http(s) only
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                answer.read(1 << 16)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in _NEVER:
                    raise Refused(f"{error.code} {error.reason}") from None
                raise Undelivered(f"it answered {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            raise Undelivered(str(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise Undelivered(str(error) or type(error).__name__) from None

    def close(self) -> None:
        pass

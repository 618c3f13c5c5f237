"""``http://`` and ``https://``: POST one event as JSON; any 2xx answer is the acknowledgement.

400, 413 and 422 refuse that event for good (it is set aside, in the outbox); every other answer, and silence, means
later. Redirects are not followed: urllib would turn the POST into a GET and lose the event.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
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
    if not host or "@" in url.path:  # an @ there is the end of a password with a / in it
        raise UsageError(f"the sink {without_secrets(spec)!r} names no host", _FORM)
    where = f"[{host}]" if ":" in host else host
    netloc = f"{where}:{port}" if port else where
    path, asked = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=~?") for part in (url.path, url.query))
    address = urllib.parse.urlunsplit((url.scheme, netloc, path, asked, ""))
    user, password = urllib.parse.unquote(url.username or ""), urllib.parse.unquote(url.password or "")
    # The outbox knows the sink by its name: a query, which may hold a token, counts there but is not shown.
    query = f"?{hashlib.sha256(url.query.encode()).hexdigest()[:8]}" if url.query else ""
    return ForwardSink(without_secrets(address) + query, HttpTransport(address, user, password), outbox())


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

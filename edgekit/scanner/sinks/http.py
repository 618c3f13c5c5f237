"""``http://`` and ``https://``: POST one event as JSON; any 2xx answer is the acknowledgement.

| answer | what becomes of the event |
|---|---|
| 2xx | delivered; what the body says, or that it breaks off, does not matter |
| 409 | later: it says that this id is in work there; set aside once it was answered so 8 times and for a minute |
| 400, 413, 422 | refused for good: set aside, in the outbox |
| 3xx | later, and never followed: urllib would turn the POST into a GET and lose the event, and elsewhere is not who was trusted |
| 401, 403, 404, ... | later, and said with what mends it |
| 429, 503, other 5xx, silence | later; ``Retry-After`` (seconds or a date, by the server's own clock) is kept to, up to 5 minutes |
"""  # noqa: E501  a table row is one line

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from edgekit.errors import UsageError
from edgekit.scanner.outbox import Outbox
from edgekit.scanner.sources.address import parsed_url

from . import Sink, without_secrets
from .forward import ForwardSink, Refused, Undelivered
from .words import words

__all__ = ["HttpTransport", "open_http"]

TIMEOUT_S = 5.0
_FORM = "write http://HOST:PORT/PATH; in user and password, write / @ ? # as %2F %40 %3F %23"
_NEVER = frozenset({400, 413, 422})
_CONFLICT = 409
#: An event that was answered so often and for so long by 409 is set aside.
CONFLICTS, CONFLICT_S = 8, 60.0
_CURES = {
    401: "mend user:password@ in the address",
    403: "give this user the right to post there",
    404: "mend the path in the address",
    405: "mend the path in the address: nothing is posted there",
    409: "it says that this event is in work; one that it has should be answered by 2xx",
    407: "mend the proxy's password in http_proxy",
    415: "the receiver must take application/json",
}


def open_http(spec: str, outbox: Callable[[], Outbox]) -> Sink:
    """``http(s)://[user:password@]host[:port]/path``; the password is sent as Basic authorization and never shown."""
    try:
        url, host, port = parsed_url(spec)
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
        self._conflicts: dict[str, tuple[int, float]] = {}

    def deliver(self, event_id: str, event: bytes) -> None:
        headers = {**self._headers, "Idempotency-Key": event_id}
        request = urllib.request.Request(self._address, event, headers, method="POST")  # noqa: S310  http(s) only
        try:
            with (
                self._opener.open(request, timeout=TIMEOUT_S) as answer,
                contextlib.suppress(OSError, http.client.HTTPException),
            ):
                answer.read1(1 << 16)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in _NEVER or (error.code == _CONFLICT and self._contended(event_id)):
                    raise Refused(f"{error.code} {error.reason}") from None
                raise Undelivered(f"it answered {_said(error)}", _asked(error.headers) or 0.0) from None
        except urllib.error.URLError as error:
            raise Undelivered(words(error.reason) if isinstance(error.reason, BaseException) else str(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise Undelivered(words(error)) from None

    def close(self) -> None:
        pass

    def _contended(self, event_id: str) -> bool:
        """Whether to give up after one more 409. It says that the first request with this key is still in work, which may fail
        (draft-ietf-httpapi-idempotency-key-header, 2.6): no proof that the event is there."""
        count, since = self._conflicts.get(event_id, (0, time.monotonic()))
        self._conflicts = {event_id: (count + 1, since)}
        return count + 1 >= CONFLICTS and time.monotonic() - since >= CONFLICT_S


def _asked(headers: Any) -> float | None:
    """The seconds that ``Retry-After`` asks for, from 0; None without one that can be read."""
    text = str(headers.get("Retry-After", "")).strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        until = email.utils.parsedate_to_datetime(text)
        now = email.utils.parsedate_to_datetime(str(headers.get("Date", "")) or email.utils.formatdate(usegmt=True))
        return max(0.0, (until - now).total_seconds())
    return None


def _said(error: urllib.error.HTTPError) -> str:
    place = str(error.headers.get("Location", ""))
    if 300 <= error.code < 400 and place:
        cure = f"it points elsewhere; if that is right, write {_shown(urllib.parse.urljoin(error.url or '', place))}"
    else:
        cure = _CURES.get(error.code, "")
    return f"{error.code} {error.reason}" + (f" ({cure})" if cure else "")


def _shown(address: str) -> str:
    """Where a redirect points, without what may be secret, and printable."""
    safe = re.split("[?;#]", address)[0]
    safe = without_secrets(safe) if "@" in safe else safe
    return urllib.parse.quote(safe[:200], safe="/%:[]!$&'()*+,=~")

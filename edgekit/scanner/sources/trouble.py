"""Why a camera gives no pictures, in words, without its password."""

from __future__ import annotations

import errno
import socket
import urllib.parse

from .address import safe_words

__all__ = ["Trouble", "trouble_of"]

_BY_TYPE = {
    "HTTPUnauthorizedError": "wrong user or password (401)",
    "HTTPForbiddenError": "this user may not see it (403)",
    "HTTPNotFoundError": "there is no such stream (404)",
    "HTTPTooManyRequestsError": "too many requests (429)",
    "HTTPServerError": "the camera answers with an error of its own (5xx)",
    "InvalidDataError": "it is no video",
    "DecoderNotFoundError": "there is no decoder for its pictures",
    "DemuxerNotFoundError": "this installation of PyAV cannot read its format",
    "ProtocolNotFoundError": "this installation of PyAV does not speak its protocol",
    "EOFError": "the connection was closed",
}
_BY_NUMBER = {
    errno.ECONNREFUSED: "the connection was refused",
    errno.ECONNRESET: "the connection was reset",
    errno.EPIPE: "the connection was closed",
    errno.ETIMEDOUT: "no answer in time",
    errno.EHOSTUNREACH: "the host cannot be reached",
    errno.ENETUNREACH: "the network cannot be reached",
    errno.ENOENT: "it is not there",
    errno.ENODEV: "it is not there any more",
    errno.EACCES: "this user may not read it",
    errno.EBUSY: "another program uses it",
}
#: Another attempt would find the same.
_FINAL = {"InvalidDataError", "DecoderNotFoundError", "DemuxerNotFoundError", "ProtocolNotFoundError"}


class Trouble(Exception):
    """``reason`` in words; ``final`` where another attempt on a file would find the same."""

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.final = reason, final


def trouble_of(error: Exception, spec: str) -> Trouble:
    """What a library raised, in our words where we have some, in its own without the password where not."""
    kind = type(error).__name__
    number = getattr(error, "errno", None) or 0
    if kind in _BY_TYPE:
        return Trouble(_BY_TYPE[kind], kind in _FINAL)
    if number == errno.EIO and (host := _unknown_host(spec)):
        return Trouble(f"unknown host {host}")
    if number in _BY_NUMBER:
        return Trouble(_BY_NUMBER[number])
    if isinstance(error, TimeoutError) or kind == "ExitError":  # PyAV ends a read that took too long
        return Trouble("no answer in time")
    words = getattr(error, "strerror", None) or str(error) or kind
    return Trouble(safe_words(str(words), spec))


def _unknown_host(spec: str) -> str:
    """FFmpeg says input/output error for a name that nobody knows."""
    try:
        host = urllib.parse.urlsplit(spec).hostname or ""
        if host:
            socket.getaddrinfo(host, None)
    except socket.gaierror:
        return host
    except ValueError:
        pass
    return ""

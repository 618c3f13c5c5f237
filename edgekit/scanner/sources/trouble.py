"""Why a camera gives no pictures, in words, without its password."""

from __future__ import annotations

import errno
import socket
import urllib.parse

from .address import safe_words

__all__ = ["Trouble", "trouble_of"]

_BY_TYPE = {
    "HTTPUnauthorizedError": "wrong user or password (401): write USER:PASSWORD@ before the host in its address",
    "HTTPForbiddenError": "this user may not see it (403): allow it in the camera's settings",
    "HTTPNotFoundError": "there is no such stream (404): compare the address with the camera's manual",
    "HTTPTooManyRequestsError": "too many requests (429): fewer programs may look at it at once",
    "HTTPBadRequestError": 'it does not understand the request (400): try transport = "udp", or another address',
    "HTTPServerError": "the camera answers with an error of its own (5xx): start it again, or wait",
    "InvalidDataError": "it is no video: play it with another program to see what it is",
    "DecoderNotFoundError": "there is no decoder for its pictures: have the camera send H.264 or MJPEG",
    "DemuxerNotFoundError": "this installation of PyAV cannot read its format",
    "ProtocolNotFoundError": "this installation of PyAV does not speak its protocol: read it by a pipeline (gst:)",
    "EOFError": "the connection was closed",
}
_BY_NUMBER = {
    errno.ECONNREFUSED: "the connection was refused: is it switched on, and is the port right?",
    errno.ECONNRESET: "the connection was reset: it ended it, or was started again",
    errno.EPIPE: "the connection was closed",
    errno.ETIMEDOUT: "no answer in time: is it switched on, and is the address right?",
    errno.EHOSTUNREACH: "the host cannot be reached: is it switched on, and is the address right?",
    errno.ENETUNREACH: "the network cannot be reached: is the cable in, and is the address right?",
    errno.ENOENT: "it is not there",
    errno.ENODEV: "it is not there any more",
    errno.EACCES: "this user may not read it: give it the right to",
    errno.EBUSY: "another program uses it: end that one",
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
        return Trouble(f"unknown host {host}: is the name right, and the name server there?")
    if number in _BY_NUMBER:
        return Trouble(_BY_NUMBER[number])
    if isinstance(error, TimeoutError) or kind == "ExitError":  # PyAV ends a read that took too long
        return Trouble(_BY_NUMBER[errno.ETIMEDOUT])
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

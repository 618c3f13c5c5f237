"""What went wrong on the way to a sink, in words, with what mends it; never with a password."""

from __future__ import annotations

import errno
import os
import socket
import ssl

__all__ = ["plain", "words"]

_MOST = 400  # letters
_CURES = {
    errno.ECONNREFUSED: "nothing listens at this port: start the receiver, or mend the address",
    errno.EIO: "is it plugged in?",
    errno.ENOENT: "plug it in, or mend the address",
    errno.EACCES: "for a serial line: add this user to the group dialout",
}


def plain(text: str) -> str:
    """What the other side said, as a terminal and a status line may show it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MOST])


def words(error: BaseException) -> str:
    """One line for an error of a socket, of TLS or of a device."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = getattr(error, "verify_message", "") or "it is not trusted"
        return f"its certificate: {why} (name the authority's: SSL_CERT_FILE=ca.pem)"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "it ended the TLS handshake (is TLS spoken at this port?)"
    if isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return "no TLS is spoken at this port (mend the port, or write the address without the s)"
    if isinstance(error, socket.gaierror):
        return f"unknown host: {error.strerror} (mend the name, or the name server)"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    number = (error.errno or 0) if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else 0
    if number in errno.errorcode:
        cure = _CURES.get(number)
        return os.strerror(number) + (f" ({cure})" if cure else "")
    text = str(getattr(error, "strerror", None) or error).strip()
    return (text.splitlines() or [type(error).__name__])[0]

"""Streams over TLS: who answers is checked. FFmpeg by itself takes anybody's certificate, and sends the password there."""

from __future__ import annotations

import os
import socket
import ssl
import urllib.parse
from collections.abc import Iterator

from .trouble import Trouble

__all__ = ["ANY", "SCHEMES", "check_certificate", "tls_options", "tls_trouble"]

#: The ``certificate`` with which nobody is checked.
ANY = "any"
#: Scheme -> its port.
SCHEMES = {"https": 443, "rtsps": 322}
#: Where systems keep those of all authorities in one file; FFmpeg takes no folder.
_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_CURE = 'write certificate = "camera.pem", its own or its authority\'s, or "any" to check nobody'
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
_PATIENCE_S = 2.0


def tls_options(kind: str, certificate: str) -> dict[str, str]:
    """FFmpeg's options for a stream of this ``kind``; ``certificate`` as in `CameraOptions`. Raises `Trouble` for its file."""
    if kind not in SCHEMES:
        return {}
    if certificate == ANY:
        return {"tls_verify": "0"}
    if certificate:
        check_certificate(certificate)
    return {"tls_verify": "1", "ca_file": certificate or next(_authorities(), "")}


def check_certificate(path: str) -> None:
    """Raises `Trouble` where no certificate can be read from a PEM file."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise Trouble(f"there is no certificate in {path}: it wants -----BEGIN CERTIFICATE-----") from None
    except OSError as error:
        raise Trouble(f"the certificate {path}: {error.strerror}") from None


def tls_trouble(spec: str, certificate: str) -> str:
    """What is wrong with the TLS of a stream's server, in words; "" where nothing is, or where it is not TLS that is wrong.

    FFmpeg says input/output error for all of it, so the handshake is made once more.
    """
    try:
        url = urllib.parse.urlsplit(spec)
        host, port = url.hostname or "", url.port or SCHEMES.get(url.scheme.lower(), 0)
    except ValueError:
        return ""
    if url.scheme.lower() not in SCHEMES:
        return ""
    context = ssl.create_default_context(cafile=None if certificate in ("", ANY) else certificate)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED  # FFmpeg speaks to old cameras too; this is but a look
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    if certificate == ANY:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), _PATIENCE_S) as plain, context.wrap_socket(plain, server_hostname=host):
            return ""
    except ssl.SSLCertVerificationError as error:
        return f"its certificate: {error.verify_message} ({_CURE})"
    except ssl.SSLError as error:
        if error.reason in _NO_TLS:
            return "it speaks no TLS at this port: mend the port, or write the address without the s"
        return f"its TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
    except OSError:
        return ""


def _authorities() -> Iterator[str]:
    places = (os.environ.get("SSL_CERT_FILE", ""), ssl.get_default_verify_paths().cafile or "", *_BUNDLES)
    return (place for place in places if os.path.isfile(place))

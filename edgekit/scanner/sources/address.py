"""What a source's address says: its kind, the name that may be shown, and the words for what went wrong with it."""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path

__all__ = ["LIVE", "PATTERN", "VIDEO_SUFFIXES", "kind_of", "parsed_url", "safe_words", "shown"]

_VIDEO = ".mp4 .m4v .avi .mkv .mov .webm .ts .mts .mpg .mpeg .h264 .h265 .mjpeg .mjpg .y4m"
VIDEO_SUFFIXES = frozenset(_VIDEO.split())
#: Schemes of what goes on by itself, beside ``pattern:``.
LIVE = frozenset({"camera", "v4l2", "rtsp", "rtsps", "http", "https", "tcp", "udp", "rtp", "srt", "gst"})
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]+):")
#: ``pattern:WIDTHxHEIGHT@FPS``, with ``,FRAMES`` where it should end.
PATTERN = re.compile(r"^pattern:([1-9]\d{0,4})x([1-9]\d{0,4})@(\d{1,4}(?:\.\d+)?)(?:,(\d{1,9}))?$")
_SECRET = re.compile(
    r"(?i)([?&;][^=&;]*(?:pass|pwd|token|key|secret|auth|sig|code|cred|session)[^=&;]*=)[^&;#\s]+|([?&;][^=&;]*=)[^&;#\s]{20,}"
)
#: The same without a mark before it: in a path, as some cameras want it, and as a property of GStreamer.
_NAMED = re.compile(r"(?i)([\w-]{0,40}(?:-pw|passw(?:or)?d|passphrase|secret|token)\s*=\s*)(\"[^\"]*\"|[^\s!&;]+)")
#: User and password; a password may hold a slash that should have been written %2F.
_USER = re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*://)(?:[^/\s]*@|[^/\s:@]*:(?!\d*(?:[/\s?#]|$))\S*@)")


def kind_of(spec: str) -> str:
    """The scheme in lower case, ``video`` for a video file, "" for any other path."""
    if os.path.exists(spec):  # unlike pathlib's, it is False for a name that is too long: pipelines are
        scheme = ""
    else:
        found = _SCHEME.match(spec)
        scheme = found.group(1).lower() if found else ""
    return "video" if not scheme and Path(spec).suffix.lower() in VIDEO_SUFFIXES and not os.path.isdir(spec) else scheme


def parsed_url(spec: str) -> tuple[urllib.parse.SplitResult, str | None, int | None]:
    """The address, its host and its port. Raises `ValueError` for none, a port out of range, and what no host can be named."""
    url = urllib.parse.urlsplit(spec)
    if host := url.hostname:
        host.encode("idna")  # what connects would raise it later, and no OSError
    return url, host, url.port


def shown(spec: str) -> str:
    """The address without user, password and what looks like a token."""
    return _NAMED.sub(r"\1...", _SECRET.sub(r"\1\2...", _USER.sub(r"\1", spec)))


def safe_words(words: str, spec: str) -> str:
    """A message of a library that may quote the address, in one short line without its password."""
    for secret in _secrets(spec):
        words = words.replace(secret, "...")
    return shown(" ".join(words.split()))[:300]


def _secrets(spec: str) -> list[str]:
    try:
        url = urllib.parse.urlsplit(spec)
        password = url.password or ""
    except ValueError:
        password = ""
    values = [password, urllib.parse.unquote(password), *(each.group(0).split("=", 1)[1] for each in _SECRET.finditer(spec))]
    return sorted({each for each in values if each}, key=len, reverse=True)

"""Where a pack comes from: a file, a folder (a USB stick), an address of one, or of a folder of an HTTP server.

What a server says is not trusted: the signature is, so plain http will do for a signed pack. Limits hold all the same: on
sizes, on silence, on crawling, and redirects stay within http and https. Proxies are those of the environment
(``https_proxy``), certificates are checked by the system's.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any

from edgekit.errors import BundleError, EdgekitError, SignatureError, UsageError, first_line
from edgekit.files import naming
from edgekit.progress import bar, say

from .archive import MAX_PACK_BYTES
from .checks import RESERVE

__all__ = [
    "OtherName",
    "choose",
    "copy_of",
    "fetch",
    "fetch_beside",
    "fetch_end",
    "from_folder",
    "is_url",
    "located",
    "readable",
]

#: Without a byte for so long the connection counts as dead.
STALL_S = 20.0
#: Over so many seconds at least so many bytes a second must come, over however many connections: a server that drips would hold
#: an install for ever. What is small has to be there within that time.
CRAWL_S, CRAWL_BYTES = 60.0, 1024
#: Connections in a row that may end without a byte.
TRIES = 4
PAUSE_S = 1.0
_LISTING_BYTES = 1 << 20
_BLOCK, _COPIED = 1 << 16, 1 << 20
_HINT = "see whether the address opens from this device: curl -I URL"
_NAME = re.compile(r"[^/\\\0]{1,200}\.zip")


class OtherName(BundleError):
    """A pack of another bundle name than what runs."""


def is_url(pack: str | os.PathLike[str]) -> bool:
    """Whether it is an http or https address. Raises `UsageError` for one of another kind, or with a password in it."""
    text = os.fspath(pack)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if not found:
        return False
    if found[1].lower() not in ("http", "https"):
        raise UsageError(f"a pack cannot be fetched by {found[1]}:", "give a path, http://... or https://...")
    try:
        parts = urllib.parse.urlsplit(text)
        secret, host = parts.password or parts.username, parts.hostname
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"this is no address: {first_line(error)}", "give https://HOST/PATH/F.zip") from None
    if secret:
        raise UsageError("the address holds a user or a password, which would stay in logs", "serve signed packs without")
    if not host or re.search(r"[\s\x00-\x1f]", text):
        raise UsageError(f"this is no address: {text}", "give https://HOST/PATH/F.zip")
    return True


def choose(names: Sequence[str]) -> str:
    """The newest of several packs, by name: numbers in it count as numbers, so v10 comes after v9."""
    return _newest_first(names)[0]


def _newest_first(names: Iterable[str]) -> list[str]:
    def key(name: str) -> list[tuple[int, int, str]]:
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in _parts(name)]

    return sorted(names, key=key, reverse=True)


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"([0-9]{1,18})", name.lower().removesuffix(".zip")) if part]


def from_folder(folder: Path, admit: Callable[[Path], int]) -> Path:
    """The newest pack in a folder of those that ``admit`` lets through (it raises `SignatureError` or `BundleError` for the
    others): of the highest number that ``admit`` gives, then by name.

    Raises `BundleError` where there is no pack. Where none is let through, the refusal of the newest by name that is for this
    root, with how many more there are of each cause.
    """
    with readable(folder):
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".zip" and path.is_file())
    if not found:
        raise BundleError(f"there is no packed bundle (*.zip) in {folder}", "make one: edgekit pack B --out F.zip --key K")
    admitted: dict[str, int] = {}
    refused: dict[str, EdgekitError] = {}
    for path in found:
        try:
            admitted[path.name] = admit(path)
        except (BundleError, SignatureError) as error:
            refused[path.name] = error
    if not admitted:
        raise _none_of(folder, refused)
    others = [name for name in _newest_first(refused) if isinstance(refused[name], OtherName)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        say(f"passed over: {others[0]}{more}, {refused[others[0]].message}; --rename would take it")
    return folder / choose([name for name, number in admitted.items() if number == max(admitted.values())])


def _none_of(folder: Path, refused: Mapping[str, EdgekitError]) -> EdgekitError:
    """One error for many: the newest's, other products' last. A cause is told by its cure, which holds no names and numbers."""
    groups: dict[tuple[type, str], list[str]] = {}
    for name in _newest_first(refused):
        groups.setdefault((type(refused[name]), refused[name].hint), []).append(name)
    (_, hint), *others = ordered = sorted(groups, key=lambda group: issubclass(group[0], OtherName))
    names = groups[ordered[0]]
    first = refused[names[0]]
    same = f" ({len(names) - 1} more for the same reason)" if len(names) > 1 else ""
    more = "".join(f"; {len(groups[group])} more: {refused[groups[group][0]].message}" for group in others[:3])
    return type(first)(f"no pack in {folder} can be installed: {names[0]}: {first.message}{same}{more}", hint)


@contextlib.contextmanager
def readable(pack: str | os.PathLike[str]) -> Iterator[None]:
    """In the block only the pack is read: what fails is the stick."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{pack} cannot be read: {error.strerror or error}; nothing was changed",
            "is the stick still in? fetch the pack again, or give another one",
        ) from None


def copy_of(file: IO[bytes], size: int, target: IO[bytes], pack: str | os.PathLike[str]) -> None:
    """Copy a pack that had ``size`` bytes when it was checked: a stick may answer otherwise the second time. Raises what
    `readable` raises, and `BundleError` where more comes; what is short, or other, its signature tells."""
    while True:
        with readable(pack):
            block = file.read(min(size + 1, _COPIED))
        if not block:
            return
        if len(block) > size:
            raise BundleError(f"{pack} has grown since it was checked", "copy it anew, from where it was made")
        target.write(block)
        size -= len(block)


def located(url: str, unsigned: bool = False, name: str = "") -> str:
    """The address of a pack: ``url``, or, where it ends with a slash, the newest that the folder's page names; of those whose
    file name begins with the bundle's ``name``, if there are any.

    Raises `BundleError`, and `SignatureError` for an unsigned pack over http, which anybody on the way could change.
    """
    if unsigned and urllib.parse.urlsplit(url).scheme.lower() == "http":
        raise SignatureError("an unsigned pack over http may be anybody's", "sign it and give --pub, or fetch it by https")
    if not urllib.parse.urlsplit(url).path:
        url += "/"
    return _listed(_opener(), url, name) if url.endswith("/") else url


def fetch(url: str, target: Path, free: int) -> None:
    """Load a pack into the new file ``target``, with at most ``free`` bytes less the reserve.

    A connection that breaks is taken up where it was left, if the server can. Raises `BundleError`.
    """
    _Download(_opener(), url, target, min(MAX_PACK_BYTES, max(0, free - RESERVE))).run()


def fetch_end(url: str, count: int) -> bytes:
    """The last ``count`` bytes of a file; empty where the server gives no parts (RFC 9110, 14.2), or cannot be reached."""
    try:
        with _opened(_opener(), url, {"Range": f"bytes=-{count}"}) as response:
            return _small(response, url, count) if response.status == 206 else b""
    except (BundleError, OSError, http.client.HTTPException):
        return b""


def fetch_beside(url: str, target: Path, most: int) -> None:
    """Load what lies beside a pack, or in its folder, under ``target``'s name, if the server has it: at most ``most`` bytes.

    A server that says no has none. Raises `BundleError` where it does not answer at all.
    """
    address = urllib.parse.urljoin(url, target.name)
    for attempt in range(1, TRIES + 1):
        try:
            with _opened(_opener(), address, {}) as response:
                target.write_bytes(_small(response, address, most))
            return
        except BundleError:
            return
        except (OSError, http.client.HTTPException) as error:
            if attempt == TRIES:
                raise BundleError(f"{address} cannot be fetched: {_reason(error)}", _HINT) from None
            time.sleep(PAUSE_S * attempt)


def _small(response: Any, url: str, most: int) -> bytes:
    """At most ``most`` bytes, which are there within `CRAWL_S`. Raises `BundleError` where they are not."""
    data, end = b"", time.monotonic() + CRAWL_S
    while len(data) < most and (more := response.read1(min(_BLOCK, most - len(data)))):
        data += more
        if time.monotonic() > end:
            raise BundleError(f"{url} has not come within {CRAWL_S:g} s: given up", _HINT)
    return data


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urllib.parse.urlsplit(newurl).scheme.lower()
        if scheme not in ("http", "https") or (scheme == "http" and req.type == "https"):
            raise BundleError(f"the server sends us on to a {scheme}: address, which is not followed", _HINT)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """http and https only: the standard opener would read file: and ftp: as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "edgekit"), ("Accept-Encoding", "identity")]
    return opener


def _opened(opener: urllib.request.OpenerDirector, url: str, headers: dict[str, str]) -> Any:
    """The response. Raises `BundleError` where the server says no, `OSError` where it is not reached."""
    try:
        request = urllib.request.Request(url, headers=headers)  # noqa: S310  the opener knows http and https only
        return opener.open(request, timeout=STALL_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code >= 500:
                raise OSError(f"the server answers {error.code} {error.reason}") from None
            raise BundleError(f"{url}: the server answers {error.code} {error.reason}", _HINT) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise BundleError(
                f"{url}: its certificate is not trusted here ({error.reason.verify_message})",
                "install the CA's certificate (SSL_CERT_FILE names one) or set the clock; signed packs may come by http too",
            ) from None
        if isinstance(error.reason, OSError):
            raise error.reason from None
        raise BundleError(f"{url} cannot be fetched: {error.reason}", _HINT) from None
    except (http.client.InvalidURL, ValueError) as error:
        raise BundleError(f"{url} cannot be fetched: {first_line(error)}", _HINT) from None


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _listed(opener: urllib.request.OpenerDirector, url: str, name: str) -> str:
    """The address of the newest pack that a folder's page (of nginx, Apache, python -m http.server) links to."""
    try:
        with _opened(opener, url, {}) as response:
            page = _small(response, url, _LISTING_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise BundleError(f"{url} cannot be fetched: {_reason(error)}", _HINT) from None
    if len(page) > _LISTING_BYTES:
        raise BundleError(f"the page of {url} is larger than {_LISTING_BYTES >> 20} MiB", "give the address of the pack itself")
    links = _Links()
    with contextlib.suppress(AssertionError):  # html.parser's word for declarations that it does not know
        links.feed(page.decode("utf-8", "replace"))
    names = {}
    for link in links.found:  # the folder's own only: a page may link anywhere
        path = urllib.parse.unquote(urllib.parse.urlsplit(link).path.removeprefix("./"))
        if not urllib.parse.urlsplit(link).netloc and _NAME.fullmatch(path):
            names[path] = urllib.parse.urljoin(url, urllib.parse.quote(path))
    if not names:
        raise BundleError(f"the page of {url} names no pack (*.zip)", "give the address of the pack itself")
    own = [each for each in names if name and each.lower().startswith(name.lower())]
    return names[choose(sorted(own or names))]


class _Download:
    """One file, over as many connections as it takes."""

    def __init__(self, opener: urllib.request.OpenerDirector, url: str, target: Path, most: int) -> None:
        self._opener, self._url, self._target, self._most = opener, url, target, most
        self._validator = ""
        self._have = self._anew = 0
        self._begun, self._got = time.monotonic(), 0  # of all connections, since it was last found fast enough
        self._size: int | None = None
        self._bar = contextlib.ExitStack()
        self._shown: Callable[[int, str], None] | None = None

    def run(self) -> None:
        idle = 0
        with self._target.open("xb") as file, self._bar:
            while True:
                before, begun = self._have, self._anew
                try:
                    if self._piece(file):
                        return
                    reason = f"it ended after {self._have} of {self._size} bytes"
                except (OSError, http.client.HTTPException) as error:
                    if isinstance(error, OSError) and error.filename:  # our own disk
                        raise
                    reason = _reason(error)
                # What begins anew each time comes no nearer to its end.
                idle = 0 if self._have > before and self._anew == begun else idle + 1
                if idle >= TRIES:
                    raise BundleError(f"{self._url} cannot be fetched: {reason}", _HINT)
                self._crawls()
                time.sleep(PAUSE_S * min(idle + 1, TRIES))

    def _piece(self, file: IO[bytes]) -> bool:
        """One connection's bytes; whether all are there."""
        headers = {"Range": f"bytes={self._have}-"} if self._have else {}
        if self._have and self._validator:
            headers["If-Range"] = self._validator
        with _opened(self._opener, self._url, headers) as response:
            self._begin(response, file)
            if self._shown is None:  # the size is known now
                self._shown = self._bar.enter_context(bar(f"fetching {self._url}", self._size or self._most))
            while block := response.read1(_BLOCK):
                self._got += len(block)
                if self._have + len(block) > self._most:
                    raise self._too_large()
                with naming(self._target):
                    file.write(block)
                self._have += len(block)
                self._shown(len(block), f"{self._have / 1e6:.1f} MB")
                self._crawls()
        with naming(self._target):
            file.flush()
        return self._have > 0 and (self._size is None or self._have >= self._size)

    def _crawls(self) -> None:
        """Raise `BundleError` where too little came in the last while."""
        if (elapsed := time.monotonic() - self._begun) > CRAWL_S:
            if self._got < CRAWL_BYTES * elapsed:
                raise BundleError(f"{self._url} comes at {self._got / elapsed:.0f} bytes a second: given up", _HINT)
            self._begun, self._got = time.monotonic(), 0

    def _begin(self, response: Any, file: IO[bytes]) -> None:
        """From the headers: how much will come, and from where on."""
        if response.url.endswith("/"):  # where the server has sent us on to
            raise BundleError(f"{self._url} is a folder's page, no pack", f"give the folder with its slash: {self._url}/")
        said = response.headers.get("Content-Length", "")
        length = int(said) if said.isdecimal() and len(said) < 19 else None
        if self._have and response.status == 206:
            start = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
            if not start or int(start[1]) != self._have:
                raise BundleError(f"{self._url}: the server answers with another part than was asked for", _HINT)
        else:  # from the start: it cannot go on in the middle, or the file has changed
            self._anew += self._have > 0
            self._have = 0
            file.seek(0)
            file.truncate()
            self._size = length
        etag = response.headers.get("ETag", "")
        self._validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        if length is not None and self._have + length > self._most:
            raise self._too_large(self._have + length)

    def _too_large(self, size: int | None = None) -> BundleError:
        what = f"{size >> 20} MiB" if size else "endless"
        return BundleError(
            f"{self._url} is {what}, there is room for {self._most >> 20} MiB; it is not fetched",
            "free some space, or look at the address",
        )


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer for {STALL_S:.0f} s"
    return getattr(error, "strerror", None) or first_line(error)

"""The page of a folder of bundles, live: rebuilt when one changes, on loopback only, read-only."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgekit.bundle import MANIFEST, Bundle
from edgekit.errors import BundleError, EdgekitError, UsageError
from edgekit.progress import say
from edgekit.serving import PageHandler, PageServer

from .collect import BundleView, collect
from .page import Live, numbered, policy, render

__all__ = ["serve"]

HOST = "127.0.0.1"
SUFFIX = ".edge"
WRITING = "is being written"

Stamp = tuple[int, int, int]
Contents = tuple[tuple[str, int, int], ...]


class Watched:
    """Bundles, by name or as what lies in a folder. `page` is built anew only where a manifest is not what it was."""

    def __init__(self, sources: Sequence[Path]) -> None:
        self._sources = sources
        self._lock = threading.Lock()  # two tabs that ask at once build one page
        self._views: dict[Path, tuple[Stamp, BundleView]] = {}
        self._seen: object = None
        self._failed: dict[Path, Contents] = {}  # tried again when any of its files is another: its manifest may come first
        self._live, self._page = Live("", ()), b""

    def version(self) -> str:
        """Changes with the page."""
        self._refresh()
        return self._live.version

    def page(self) -> bytes:
        self._refresh()
        return self._page

    def _refresh(self) -> None:
        with self._lock:
            stamps = [(path, _stamp(path)) for path in self._paths()]
            drafts = sorted(self._drafts())
            if self._seen == (stamps, drafts) and all(_contents(path) == was for path, was in self._failed.items()):
                return
            failed: dict[Path, Contents] = {}
            # Looked at before it is read: what changes meanwhile differs from this the next time.
            views: list[BundleView] = []
            skipped = [(name, WRITING) for name in drafts]
            for path, stamp in stamps:
                contents = _contents(path)
                try:
                    views.append(self._view(path, stamp))
                    if views[-1].damage:
                        failed[path] = contents
                        del self._views[path]  # read again when it is mended, though its manifest stays
                except Exception as error:  # noqa: BLE001  one bundle, however odd, hides none of the others
                    failed[path] = contents
                    known = isinstance(error, EdgekitError | OSError)
                    reason = str(error) if known else f"it cannot be read: {type(error).__name__}"
                    skipped.append((path.name, WRITING if stamp is None else reason))
            self._views = {path: self._views[path] for path, _ in stamps if path in self._views}
            views.sort(key=lambda view: (len(view.chain.split("→")), view.name))
            names = numbered([view.name for view in views])
            views = [dataclasses.replace(view, name=name) for view, name in zip(views, names, strict=True)]
            version = hashlib.sha256(repr((stamps, drafts, failed)).encode()).hexdigest()[:16]
            self._live = Live(version, tuple(skipped))
            self._page = render(views, [], live=self._live).encode()
            self._seen, self._failed = (stamps, drafts), failed

    def _view(self, path: Path, stamp: Stamp | None) -> BundleView:
        if stamp is None:
            raise BundleError(f"there is no {MANIFEST} in {path}")
        known = self._views.get(path)
        if known is None or known[0] != stamp:
            known = (stamp, collect(Bundle.open(path, verify=False), path.name.removesuffix(SUFFIX)))
            self._views[path] = known
        return known[1]

    def _paths(self) -> list[Path]:
        found: dict[str, Path] = {}
        for source in self._sources:
            alone = (source / MANIFEST).exists() or source.name.endswith(SUFFIX)
            for path in [source] if alone else sorted(source.glob(f"[!.]*{SUFFIX}")):
                found.setdefault(os.path.realpath(path), path)
        return list(found.values())

    def _drafts(self) -> Iterator[str]:
        """What a stage is about to make: a bundle is written under ``.NAME.edge.XXXX`` and renamed when it is whole."""
        for source in self._sources:
            for path in source.glob(f".*{SUFFIX}.*"):
                yield path.name[1 : path.name.rindex(SUFFIX)] + SUFFIX


def _stamp(path: Path) -> Stamp | None:
    with contextlib.suppress(OSError):
        status = (path / MANIFEST).stat()
        return status.st_mtime_ns, status.st_size, status.st_ino
    return None


def _contents(path: Path) -> Contents:
    """Name, time and size of every file."""
    found = []
    for folder, _, files in os.walk(path):
        for file in files:
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(folder, file))
                found.append((os.path.join(folder, file), status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))


class _Server(PageServer):
    def __init__(self, port: int, watched: Watched) -> None:
        self.watched = watched
        self.policy = f"{policy(live=True)}; frame-ancestors 'none'"  # the last is for a header only
        super().__init__(HOST, port, _Handler)


class _Handler(PageHandler):
    """Two fixed answers."""

    server: _Server

    def answer(self, path: str, query: str) -> None:
        if query or path not in ("/", "/version"):
            self.words(404, "there is only one page here: /")
        elif path == "/":
            self.send(200, "text/html; charset=utf-8", self.server.watched.page(), Content_Security_Policy=self.server.policy)
        else:
            self.send(200, "text/plain; charset=utf-8", self.server.watched.version().encode())


def serve(
    sources: Sequence[str | os.PathLike[str]], *, port: int = 0, ready: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Show bundles, or all in a folder, as a page that follows them, until Ctrl-C.

    ``port`` 0 takes a free one. ``ready`` gets the address once it answers. Returns ``url``.
    Raises `UsageError` where nothing lies at a source, or the port is taken.
    """
    paths = [Path(source) for source in sources]
    if not paths:
        raise UsageError("no folder and no bundle was named", "edgekit report --serve runs/digits")
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"there is no folder and no bundle at {path}", "name the folder that the pipeline writes to")
    watched = Watched(paths)
    watched.page()  # what cannot work at all fails here, not in a browser
    try:
        server = _Server(port, watched)
    except OSError as error:
        raise UsageError(f"port {port} cannot be used: {error.strerror}", "--serve without a port takes a free one") from None
    url = f"http://{HOST}:{server.server_port}/"
    with server, contextlib.suppress(KeyboardInterrupt):
        say(f"{url}  Ctrl-C ends it")
        if ready is not None:
            ready(url)
        server.serve_forever(poll_interval=0.2)
    return {"url": url}

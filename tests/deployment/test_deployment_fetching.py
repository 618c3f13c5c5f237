"""Packs from a stick and from an HTTP server, good and bad ones."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.deployment import fetching, install, pack, revoke, rollback, status, verify
from edgekit.errors import BundleError, EdgekitError, SignatureError, UsageError


class Unkind(BaseHTTPRequestHandler):
    """Serves one pack in ways that go wrong, by path."""

    pack = b""
    asked: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        if self.path.endswith("/revoked.txt"):
            self.head(404)
            return
        self.asked.append((self.path, wanted))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, "serve_" + re.sub(r"\W", "_", self.path.strip("/")))(wanted)

    def head(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def serve_cut_zip(self, wanted: str | None) -> None:
        """A third of it a connection; goes on where it is asked to."""
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        left = self.pack[start:]
        more = {"Content_Range": f"bytes {start}-{len(self.pack) - 1}/{len(self.pack)}"} if start else {}
        self.head(206 if start else 200, Content_Length=len(left), ETag='"1"', **more)
        self.wfile.write(left[: len(self.pack) // 3 + 1])

    def serve_other_part_zip(self, wanted: str | None) -> None:
        self.head(206 if wanted else 200, Content_Length=len(self.pack), **({"Content_Range": "bytes 7-"} if wanted else {}))
        self.wfile.write(self.pack[:100])

    def serve_short_zip(self, wanted: str | None) -> None:
        self.head(200, Content_Length=len(self.pack) + 1)
        self.wfile.write(self.pack)

    def serve_huge_zip(self, wanted: str | None) -> None:
        self.head(200, Content_Length=10**13)

    def serve_endless_zip(self, wanted: str | None) -> None:
        self.head(200)
        while True:
            self.wfile.write(bytes(1 << 20))

    def serve_stall_zip(self, wanted: str | None) -> None:
        self.head(200, Content_Length=len(self.pack))
        self.wfile.write(self.pack[:100])
        time.sleep(0.6)

    def serve_drip_zip(self, wanted: str | None) -> None:
        self.head(200, Content_Length=len(self.pack))
        for _ in range(40):
            self.wfile.write(b"x")
            time.sleep(0.02)

    def serve_to_file_zip(self, wanted: str | None) -> None:
        self.head(302, Location="file:///etc/passwd")

    def serve_to_ftp_zip(self, wanted: str | None) -> None:
        self.head(302, Location="ftp://127.0.0.1/x.zip")

    def serve_round_zip(self, wanted: str | None) -> None:
        self.head(302, Location="/round.zip")

    def serve_moved_zip(self, wanted: str | None) -> None:
        self.head(301, Location="/whole.zip")

    def serve_whole_zip(self, wanted: str | None) -> None:
        self.head(200, Content_Length=len(self.pack))
        self.wfile.write(self.pack)

    def serve_missing_zip(self, wanted: str | None) -> None:
        self.head(404)

    def serve_busy_zip(self, wanted: str | None) -> None:
        self.head(503)

    def serve_empty_zip(self, wanted: str | None) -> None:
        self.head(200, Content_Length=0)

    def serve_odd(self, wanted: str | None) -> None:
        self.head(200)
        links = ["../up.zip", "http://elsewhere.example/a.zip", "//elsewhere.example/b.zip", "/etc/c.zip", "a%2F..%2Fd.zip"]
        self.wfile.write("".join(f'<a href="{link}">x</a>' for link in links).encode())

    def serve_long(self, wanted: str | None) -> None:
        self.head(200)
        self.wfile.write(b"<a>" * (1 << 20))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def unkind(versions: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(fetching, "STALL_S", 0.3)
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    Unkind.pack, Unkind.asked = versions[0].read_bytes(), []
    with ThreadingHTTPServer(("127.0.0.1", 0), Unkind) as server:
        Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """python -m http.server: an address, and the folder behind it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()


def test_from_a_server(cli: Any, tmp_path: Path, versions: list[Path], keys: Any, served: tuple[str, Path]) -> None:
    url, folder = served
    for name, version in (("p v9.zip", versions[0]), ("p v10.zip", versions[1]), ("notes.txt", versions[2])):
        shutil.copy(version, folder / name)
    done = cli("install", url + "p%20v9.zip", "--root", tmp_path / "root", "--pub", keys.pub, "--json")
    assert (done.code, done.json["name"]) == (0, "v0")
    assert "fetch" in done.json["seconds"]
    with pytest.raises(BundleError, match=r"it holds v1, and .*root runs v0"):  # others choose what lies on a server
        install(url, root=tmp_path / "root", pub=keys.pub)
    newest = install(url, root=tmp_path / "root", pub=keys.pub, rename=True)
    assert (newest["name"], newest["pack"]) == ("v1", url + "p%20v10.zip")
    assert install(url, root=tmp_path / "root", pub=keys.pub)["unchanged"]
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == [
        ".lock",
        "current",
        "slots",
        "state.json",
        "trust.json",
    ]
    with pytest.raises(SignatureError, match="unsigned pack over http"):
        install(url, root=tmp_path / "root", unsigned=True)


def test_a_server_s_list_of_revocations_holds(
    tmp_path: Path, versions: list[Path], keys: Any, served: tuple[str, Path]
) -> None:
    """Of what is fetched, and of the way back for who asks for it."""
    url, folder = served
    root = tmp_path / "root"
    for version in versions:
        shutil.copy(version, folder)
    first = install(url + "v0.zip", root=root, pub=keys.pub)
    install(url + "v1.zip", root=root, pub=keys.pub, rename=True)
    third = verify(versions[2], pub=keys.pub)
    revoke([first["digest"], third["pack_digest"]], out=folder / "revoked.txt", key=keys.key)
    for address in (url + "v2.zip", url):
        with pytest.raises(SignatureError, match="is revoked by its makers"):
            install(address, root=root, pub=keys.pub, rename=True)
    with pytest.raises(BundleError, match="the older bundle cannot run: its makers have revoked it"):
        rollback(root)
    assert status(root)["name"] == "v1"
    assert sorted(path.name for path in root.iterdir()) == [".lock", "current", "slots", "state.json", "trust.json"]
    (root / "trust.json").write_text("{}")  # damaged: nothing can be installed, but nobody is kept from going back
    with pytest.raises(SignatureError, match="damaged"):
        install(versions[2], root=root, pub=keys.pub)
    assert rollback(root)["name"] == "v0"


def test_a_connection_that_breaks_is_taken_up(tmp_path: Path, keys: Any, unkind: str) -> None:
    assert install(f"{unkind}/cut.zip", root=tmp_path / "root", pub=keys.pub)["name"] == "v0"
    third = len(Unkind.pack) // 3 + 1
    assert [wanted for _, wanted in Unkind.asked] == [None, f"bytes={third}-", f"bytes={2 * third}-"]
    assert install(f"{unkind}/moved.zip", root=tmp_path / "other", pub=keys.pub)["name"] == "v0"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("other part.zip", "no address"),
        ("other_part.zip", "another part"),
        ("short.zip", "it ended after"),
        ("huge.zip", "it is not fetched"),
        ("endless.zip", "it is not fetched"),
        ("stall.zip", "no answer for"),
        ("drip.zip", "bytes a second"),
        ("to_file.zip", "file:"),
        ("to_ftp.zip", "ftp: address"),
        ("round.zip", "cannot be fetched|302"),
        ("missing.zip", "404"),
        ("busy.zip", "503"),
        ("empty.zip", "it ended after 0"),
        ("odd/", "names no pack"),
        ("long/", "larger than 1 MiB"),
    ],
)
def test_bad_servers_change_nothing(
    tmp_path: Path, versions: list[Path], keys: Any, unkind: str, path: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    if path == "drip.zip":
        monkeypatch.setattr(fetching, "CRAWL_S", 0.3)
    if path == "endless.zip":
        monkeypatch.setattr(fetching, "MAX_PACK_BYTES", 4 << 20)
    install(versions[1], root=root, pub=keys.pub)
    before = (root / "state.json").read_bytes()
    with pytest.raises(EdgekitError, match=words):
        install(f"{unkind}/{path}", root=root, pub=keys.pub)
    assert (root / "state.json").read_bytes() == before
    assert sorted(each.name for each in root.iterdir()) == [".lock", "current", "slots", "state.json", "trust.json"]
    assert status(root)["healthy"]


def test_addresses_that_are_none(tmp_path: Path, keys: Any) -> None:
    for url in (
        "ftp://h/a.zip",
        "file:///etc/passwd",
        "http://",
        "https://u:secret@h/a.zip",
        "http://h:port/",
        "http://[/a.zip",
    ):
        with pytest.raises(UsageError) as caught:
            install(url, root=tmp_path / "root", pub=keys.pub)
        assert "secret" not in str(caught.value)
    assert not (tmp_path / "root").exists()
    with pytest.raises(BundleError, match="cannot be fetched"):
        fetching.fetch("http://127.0.0.1:1/a/", tmp_path / "x", 1 << 30)


# A stick


def test_a_stick_gives_its_newest_pack(tmp_path: Path, tiny_bundle: Any, versions: list[Path], keys: Any) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    with pytest.raises(BundleError, match="no packed bundle"):
        install(stick, root=tmp_path / "root", pub=keys.pub)
    shutil.copy(versions[0], stick / "model-2.zip")
    shutil.copy(versions[1], stick / "MODEL-10.ZIP")
    pack(tiny_bundle, out=stick / "model-99.zip")  # not signed: passed over
    done = install(stick, root=tmp_path / "root", pub=keys.pub)
    assert (done["name"], Path(done["pack"]).name) == ("v1", "MODEL-10.ZIP")
    shutil.rmtree(stick)
    stick.mkdir()
    pack(tiny_bundle, out=stick / "model-99.zip")
    with pytest.raises(SignatureError, match=r"model-99\.zip: .*not signed"):
        install(stick, root=tmp_path / "root", pub=keys.pub)
    assert status(tmp_path / "root")["name"] == "v1"


def test_a_stick_of_two_products_gives_the_one_that_runs(tmp_path: Path, versions: list[Path], keys: Any) -> None:
    root, stick = tmp_path / "root", tmp_path / "stick"
    stick.mkdir()
    install(versions[0], root=root, pub=keys.pub)
    shutil.copy(versions[0], stick / "p-1.zip")
    shutil.copy(versions[2], stick / "p-9.zip")
    assert install(stick, root=root, pub=keys.pub)["unchanged"]
    (stick / "p-1.zip").unlink()
    with pytest.raises(BundleError, match=r"p-9\.zip: it holds v2, and .*root runs v0") as refused:
        install(stick, root=root, pub=keys.pub)
    assert "--rename" in refused.value.hint
    assert status(root)["name"] == "v0"
    assert install(stick, root=root, pub=keys.pub, rename=True)["name"] == "v2"
    assert install(versions[1], root=root, pub=keys.pub)["name"] == "v1"  # a file that is named is what was meant


def test_a_stick_that_is_pulled(tmp_path: Path, versions: list[Path], keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    whole = versions[1].read_bytes()
    versions[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EdgekitError, match="cut off or damaged"):
        install(versions[1], root=root, pub=keys.pub)
    versions[1].write_bytes(whole)
    genuine = fetching.copy_of

    class Pulled:
        def read(self, size: int) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("edgekit.deployment.installing.copy_of", lambda file, *about: genuine(Pulled(), *about))
    with pytest.raises(BundleError, match="Input/output error; nothing was changed"):
        install(versions[1], root=root, pub=keys.pub)
    assert status(root)["name"] == "v0"
    assert sorted(path.name for path in root.iterdir()) == [".lock", "current", "slots", "state.json", "trust.json"]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True))
def test_numbers_in_names_count_as_numbers(numbers: list[int]) -> None:
    assert fetching.choose([f"model-v{number}.edge.zip" for number in numbers]) == f"model-v{max(numbers)}.edge.zip"


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6))
def test_any_names_have_a_newest(names: list[str]) -> None:
    assert fetching.choose(names) in names


@pytest.mark.parametrize("more", [-5, 0, 1, 3 << 20])
def test_a_stick_that_answers_with_more_the_second_time_fills_no_disk(more: int) -> None:
    size = 2 << 20
    file, copy = io.BytesIO(bytes(size + more)), io.BytesIO()
    with contextlib.nullcontext() if more <= 0 else pytest.raises(BundleError, match="has grown since it was checked"):
        fetching.copy_of(file, size, copy, "p.zip")
    assert copy.tell() <= size

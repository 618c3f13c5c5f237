"""Servers that give parts, drip, send us on, speak TLS: what is asked of them, and what is not followed."""

from __future__ import annotations

import datetime
import shutil
import ssl
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from edgekit.deployment import fetching, install, revoke, rollback, status
from edgekit.deployment.signing import TRAILER_BYTES
from edgekit.errors import BundleError, SignatureError, TurnedDown
from edgekit.installed import starting


class Parts(SimpleHTTPRequestHandler):
    """A folder, in parts where it is asked for them (RFC 9110, 14.2), and what it sent of packs."""

    sent: list[int] = []  # noqa: RUF012
    parts = True
    drips = False

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range") if self.parts else None
        if path.suffix != ".zip" or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        start = 0
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
        part = data[start:]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.drips:
            part = part[:1]
            time.sleep(0.02)
        self.sent.append(len(part))  # before the other side can have it
        self.wfile.write(part)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """The address of an HTTP folder, and where it lies."""
    place = tmp_path / "served"
    place.mkdir()
    monkeypatch.setattr(Parts, "sent", [])
    with _serving(place) as url:
        yield url, place


class _serving:  # noqa: N801
    def __init__(self, place: Path, wrap: ssl.SSLContext | None = None, handler: Any = Parts) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(place)))
        if wrap:
            self._server.socket = wrap.wrap_socket(self._server.socket, server_side=True)
        self._scheme = "https" if wrap else "http"

    def __enter__(self) -> str:
        Thread(target=partial(self._server.serve_forever, 0.02), daemon=True).start()
        return f"{self._scheme}://127.0.0.1:{self._server.server_port}/"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize("parts", [True, False])
def test_what_runs_already_is_not_fetched_again(
    tmp_path: Path, versions: list[Path], keys: Any, folder: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, parts: bool
) -> None:
    """A device that asks every hour loads a pack's last bytes, where the server gives parts."""
    url, place = folder
    monkeypatch.setattr(Parts, "parts", parts)
    shutil.copy(versions[0], place / "p.zip")
    size, root = versions[0].stat().st_size, tmp_path / "root"
    assert install(url, root=root, pub=keys.pub)["unchanged"] is False
    assert Parts.sent == [size]
    done = install(url, root=root, pub=keys.pub)
    assert (done["unchanged"], done["name"], done["pack"]) == (True, "v0", url + "p.zip")
    assert Parts.sent[1:] == ([TRAILER_BYTES] if parts else [size, size])
    shutil.copy(versions[1], place / "p.zip")
    assert install(url, root=root, pub=keys.pub, rename=True)["name"] == "v1"
    assert Parts.sent[-1] == versions[1].stat().st_size


def test_the_end_of_a_pack_is_believed_like_the_whole(
    tmp_path: Path, versions: list[Path], keys: Any, second: Any, folder: tuple[str, Path]
) -> None:
    url, place = folder
    root, served = tmp_path / "root", place / "p.zip"
    shutil.copy(versions[0], served)
    install(url, root=root, pub=keys.pub)
    with pytest.raises(SignatureError, match="trusted is"):  # the right end, and a key that is not trusted
        install(url, root=root, pub=second[1])
    data = bytearray(served.read_bytes())
    data[100] ^= 1  # below the end: what is served there is never loaded, and what runs is whole
    served.write_bytes(data)
    assert install(url, root=root, pub=keys.pub)["unchanged"]
    data[-TRAILER_BYTES + 30] ^= 1
    served.write_bytes(data)
    with pytest.raises(SignatureError):
        install(url, root=root, pub=keys.pub)
    shutil.copy(versions[0], served)
    (root / "slots" / "a" / "model.onnx").write_bytes(b"")  # what runs is not whole any more
    assert install(url, root=root, pub=keys.pub)["unchanged"] is False
    assert status(root)["healthy"]
    revoke([status(root)["digest"]], out=place / "revoked.txt", key=keys.key)
    with pytest.raises(SignatureError, match="revoked"):
        install(url, root=root, pub=keys.pub)


def test_what_was_left_is_not_fetched_every_hour(
    tmp_path: Path, versions: list[Path], keys: Any, folder: tuple[str, Path]
) -> None:
    url, place = folder
    root = tmp_path / "root"
    install(versions[0], root=root, pub=keys.pub)
    shutil.copy(versions[1], place / "p.zip")
    install(url, root=root, pub=keys.pub, rename=True)
    rollback(root)
    Parts.sent.clear()
    with pytest.raises(TurnedDown, match="left by a way back"):
        install(url, root=root, pub=keys.pub, rename=True)
    assert Parts.sent == [TRAILER_BYTES]
    assert install(url, root=root, pub=keys.pub, rename=True, again=True)["name"] == "v1"
    starting(root).confirm()


def test_a_server_that_drips_over_many_connections_is_given_up(
    tmp_path: Path, versions: list[Path], keys: Any, folder: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, place = folder
    shutil.copy(versions[0], place / "p.zip")
    monkeypatch.setattr(Parts, "drips", True)
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    monkeypatch.setattr(fetching, "CRAWL_S", 0.3)
    with pytest.raises(BundleError, match="bytes a second: given up"):  # each connection ends with a byte more
        install(url, root=tmp_path / "root", pub=keys.pub)
    assert len(Parts.sent) < 60
    assert not (tmp_path / "root").exists()


def test_small_files_have_their_time_too(tmp_path: Path, versions: list[Path], keys: Any, monkeypatch: Any) -> None:
    class Dripping(Parts):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b"x")
                time.sleep(0.02)

    monkeypatch.setattr(fetching, "CRAWL_S", 0.2)
    with _serving(tmp_path, handler=Dripping) as url, pytest.raises(BundleError, match=r"within 0\.2 s: given up"):
        install(url, root=tmp_path / "root", pub=keys.pub)


def test_a_folder_without_its_slash(tmp_path: Path, versions: list[Path], keys: Any, folder: tuple[str, Path]) -> None:
    url, place = folder
    (place / "parcel").mkdir()
    shutil.copy(versions[0], place / "parcel" / "p.zip")
    with pytest.raises(BundleError, match=r"/parcel is a folder's page, no pack") as refused:
        install(url + "parcel", root=tmp_path / "root", pub=keys.pub)
    assert f"{url}parcel/" in refused.value.hint
    assert install(url + "parcel/", root=tmp_path / "root", pub=keys.pub)["name"] == "v0"


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's certificate for 127.0.0.1, which this process trusts."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    return context


def test_https_is_not_left_for_http(
    tmp_path: Path, versions: list[Path], keys: Any, folder: tuple[str, Path], certificate: ssl.SSLContext
) -> None:
    """An unsigned pack may come by https: nobody on the way has changed it, unless the server sends us on to http."""
    plain, place = folder
    shutil.copy(versions[0], place / "p.zip")

    class Leading(Parts):
        def do_GET(self) -> None:
            if self.path != "/lead.zip":
                super().do_GET()
                return
            self.send_response(302)
            self.send_header("Location", plain + "p.zip")
            self.end_headers()

    with _serving(place, certificate, Leading) as url:
        with pytest.raises(BundleError, match="sends us on to a http: address"):
            install(url + "lead.zip", root=tmp_path / "root", unsigned=True)
        assert Parts.sent == []
        assert install(url + "p.zip", root=tmp_path / "root", unsigned=True)["name"] == "v0"
    with _serving(place, certificate) as url, pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE")
        with pytest.raises(BundleError, match="certificate is not trusted here"):
            install(url + "p.zip", root=tmp_path / "other", unsigned=True)


def test_a_server_that_begins_anew_each_time_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte more at each connection is no progress where none is taken up where it was left."""
    sent: list[int] = []

    class Anew(Parts):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 20))
            self.end_headers()
            sent.append(1000 + len(sent))
            self.wfile.write(b"x" * sent[-1])

    monkeypatch.setattr(fetching, "PAUSE_S", 0.01)
    with _serving(tmp_path, handler=Anew) as url, pytest.raises(BundleError, match="cannot be fetched"):
        fetching.fetch(f"{url}p.zip", tmp_path / "copy", 1 << 40)
    assert len(sent) == fetching.TRIES + 1

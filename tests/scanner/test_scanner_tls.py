"""Streams over TLS: only from whom the certificate names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edgekit.scanner import CameraOptions, Cameras

from . import camera_kit
from .camera_kit import notices, of, until


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("no_proxy", "*")
    yield
    assert not camera_kit.left_over()


def test_streams_over_tls_come_only_from_whom_the_certificate_names(
    serve: Any, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = serve("MjpegServer", camera_kit.multipart(30), tls=certificate)
    rtsp = serve("RtspServer", camera_kit.rtp(30), "camera:s3cret", tls=certificate)
    plain = serve("Server", camera_kit.multipart(30))
    secure = f"https://127.0.0.1:{page.port}/video"
    names = {
        "page": secure,
        "rtsp": f"rtsps://camera:s3cret@127.0.0.1:{rtsp.port}/live",
        "anybody": secure.replace("127.0.0.1", "localhost"),
        "stranger": secure,
        "elsewhere": f"https://localhost:{page.port}/video",
        "plain": f"https://127.0.0.1:{plain.port}/video",
    }

    def reason(items: list[Any], name: str) -> str:
        words = [str(each.details["reason"]) for each in notices(items, "camera", name, state="down")]
        return words[-1] if words and "still connecting" not in words[-1] else ""

    own = CameraOptions(depth=64, stall_s=10, open_s=20, certificate=str(certificate))
    options = dict.fromkeys(names, own) | {"anybody": replace(own, certificate="any"), "stranger": replace(own, certificate="")}
    well, wrong = ("page", "rtsp", "anybody"), ("stranger", "elsewhere", "plain")
    with Cameras(names, options) as cameras:
        items = until(
            cameras,
            lambda items: all(len(of(items, name)) >= 30 for name in well) and all(reason(items, name) for name in wrong),
        )
    assert not any(of(items, name) for name in wrong)
    assert "self-signed certificate" in reason(items, "stranger")
    assert 'certificate = "camera.pem"' in reason(items, "stranger")
    assert "localhost" in reason(items, "elsewhere")
    assert "no TLS" in reason(items, "plain")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Cameras({"page": secure}, replace(own, certificate="")) as cameras:
        until(cameras, lambda items: len(of(items, "page")) >= 5)

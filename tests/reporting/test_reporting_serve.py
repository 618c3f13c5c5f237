"""`report --serve`: a page that follows a folder, as a process of its own and as a browser sees it."""

from __future__ import annotations

import http.client
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from edgekit.bundle import MANIFEST, Bundle

MEASURED = {"top1": 0.9312}


@pytest.fixture
def folder(digits_bundle: Bundle, tmp_path: Path) -> Path:
    """A pipeline's folder: a bundle, one that lacks its manifest, one being written, and a file of somebody else's."""
    runs = tmp_path / "runs"
    runs.mkdir()
    shutil.copytree(digits_bundle.path, runs / "whole.edge")
    shutil.copytree(digits_bundle.path, runs / "half.edge", ignore=shutil.ignore_patterns(MANIFEST))
    (runs / ".next.edge.a1b2").mkdir()
    (runs / "notes.txt").write_text("a secret")
    return runs


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "edgekit", "report", "--serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("http://127.0.0.1:"), line + process.stderr.read()
        yield process, line.split()[0]
        process.kill()


def get(url: str, path: str = "/", **headers: str) -> tuple[int, str]:
    at = urlsplit(url)
    connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_page_follows_its_folder_and_ctrl_c_ends_it(
    served: tuple[subprocess.Popen[str], str], folder: Path, digits_bundle: Bundle
) -> None:
    process, url = served
    code, page = get(url)
    assert (code, "half.edge (is being written)" in page, "next.edge (is being written)" in page) == (200, True, True)
    assert "93.12" not in page
    version = get(url, "/version")[1]
    assert version in page
    assert get(url, "/version")[1] == version
    whole = Bundle.open(folder / "whole.edge")
    whole.extend({}, whole.entry("eval", {"data": "digits"}, MEASURED))
    assert get(url, "/version")[1] != version
    assert "93.12" in get(url)[1]
    shutil.copy(digits_bundle.path / MANIFEST, folder / "half.edge")
    (folder / ".next.edge.a1b2").rmdir()
    page = get(url)[1]
    assert "2 bundles compared" in page
    assert "Not shown" not in page
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


def test_one_odd_bundle_hides_none_of_the_others(folder: Path, served: tuple[subprocess.Popen[str], str]) -> None:
    shutil.copytree(folder / "whole.edge", folder / "deep.edge")
    (folder / "deep.edge" / MANIFEST).write_text("[" * 100_000)
    shutil.copytree(folder / "whole.edge", folder / "odd.edge")
    odd = Bundle.open(folder / "odd.edge")
    odd.extend(
        {"bench/x.json": b'{"backend": "\\ud800", "latency_ms": {"p50": 1}}'}, odd.entry("eval", {"data": "digits"}, MEASURED)
    )
    page = get(served[1])[1]
    assert "93.12" in page
    assert "whole.edge" in page
    assert "deep.edge (" in page


def test_a_bundle_whose_manifest_comes_first_is_shown_when_it_is_whole(
    folder: Path, served: tuple[subprocess.Popen[str], str]
) -> None:
    (folder / "late.edge").mkdir()
    shutil.copy(folder / "whole.edge" / MANIFEST, folder / "late.edge")
    assert "late.edge (" in get(served[1])[1]
    version = get(served[1], "/version")[1]
    shutil.copytree(folder / "whole.edge", folder / "late.edge", ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
    assert get(served[1], "/version")[1] != version
    assert "2 bundles compared" in get(served[1])[1]


def test_nothing_but_the_page_is_answered(served: tuple[subprocess.Popen[str], str]) -> None:
    url = served[1]
    outside = ("/notes.txt", "/../runs/notes.txt", "/%2e%2e/runs/notes.txt", "//etc/passwd", "/whole.edge/manifest.json")
    for path in (*outside, "/?x"):
        code, body = get(url, path)
        assert (code, "secret" in body) == (404, False), path
    assert get(url, Host="evil.example")[0] == get(url, Host="localhost.evil.example:80")[0] == 421
    assert get(url, Host="localhost")[0] == get(url, Host="127.0.0.1")[0] == 200  # a browser's on port 80
    at = urlsplit(url)
    connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=30)
    connection.request("POST", "/", b"x")
    assert connection.getresponse().status == 405
    connection.close()


def test_what_cannot_be_served_is_said_before_it_starts(cli: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    outcome = cli("report", "--serve", "0", tmp_path / "none")
    assert (outcome.code, "no folder and no bundle" in outcome.err) == (2, True)
    assert cli("report", "--serve", folder, "--out", tmp_path / "r.html").code == 2
    assert cli("report", "--serve", "70000", folder).code == 2
    assert cli("report", folder / "whole.edge", "--serve=none").code == 2


def test_a_taken_port_is_named(served: tuple[subprocess.Popen[str], str], cli: Callable[..., Any], folder: Path) -> None:
    port = urlsplit(served[1]).port
    outcome = cli("report", "--serve", port, folder)
    assert (outcome.code, f"port {port} cannot be used" in outcome.err) == (2, True)


@pytest.mark.slow
def test_a_browser_loads_it_again_and_keeps_its_place(
    browser: Any, served: tuple[subprocess.Popen[str], str], folder: Path
) -> None:
    process, url = served
    browser.open(url)
    assert browser.complaints() == []
    opened = "[...document.querySelectorAll('#provenance details')].at(-1)"
    browser.evaluate(f"{opened}.open = false; document.getElementById('engines').scrollIntoView({{behavior: 'instant'}})")
    top = "document.getElementById('engines').getBoundingClientRect().top"
    before = browser.evaluate(top)
    whole = Bundle.open(folder / "whole.edge")
    matrix = [[int(i == j) for j in range(10)] for i in range(10)]
    whole.extend({}, whole.entry("eval", {"data": "digits"}, {**MEASURED, "confusion": matrix}))
    for _ in range(50):
        time.sleep(0.2)
        if browser.evaluate("document.readyState == 'complete' && document.body.innerText.includes('93.12')"):
            break
    assert "93.12" in browser.evaluate("document.getElementById('summary').innerText")
    assert browser.evaluate(top) == pytest.approx(before, abs=2)  # though a whole matrix is new above it
    assert browser.evaluate(f"{opened}.open") is False
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    browser.evaluate("new Promise((done) => setTimeout(done, 1500))")
    assert browser.evaluate("document.getElementById('live').dataset.state") == "ended"

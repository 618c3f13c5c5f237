"""The preview: what is drawn on the newest frame, its page in a real browser, viewers that are slow, dead or too many."""

from __future__ import annotations

import importlib.util
import io
import itertools
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.scanner import Captured, Code, Region, Scanner
from edgekit.scanner.preview import LEAST_PIXELS, MOST_PIXELS, MOST_SOURCES, Preview
from edgekit.scanner.reading import Answer
from edgekit.scanner.server import MOST_STREAMS

_spec = importlib.util.spec_from_file_location("report_page", Path(__file__).parents[1] / "reporting" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_pages)
browser = _pages.browser  # the fixture of the report's tests

GREEN, RED, BAND = (0, 214, 143), (255, 107, 94), (16, 20, 24)


class Placed:
    """A code as a reader gives it, with its place on the frame."""

    def __init__(self, gs1: dict[str, Any] | None = None) -> None:
        self.text, self.format, self.gs1 = "ABC-123", "Code 128", gs1
        self.position = ((200, 300), (500, 300), (500, 400), (200, 400))

    def figures(self) -> dict[str, Any]:
        return {"text": self.text, "format": self.format}


def shown(frame: Any, codes: list[Any], region: Region | None = None, **fields: Any) -> Any:
    """The preview's picture of a frame, (H, W, 3) int."""
    preview = Preview(region)
    preview.by_source = True
    preview.sources()  # somebody looks
    answer = Answer({**fields, "codes": [code.figures() for code in codes]}, 3.2, codes=codes)
    preview.show(Captured(frame, "dock 3", 0, 0.0, "", 1.0), answer)
    made = preview.jpeg("dock 3")
    assert made is not None
    return np.asarray(Image.open(io.BytesIO(made[1]))).astype(int)


def near(picture: Any, colour: tuple[int, int, int]) -> Any:
    """Where it has about this colour, bool (H, W)."""
    return np.abs(picture - colour).max(axis=2) < 60


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_codes_the_answer_and_the_region_are_marked_on_dark_and_light_frames(grey: int) -> None:
    frame = np.full((720, 1280), grey, np.uint8)
    found = shown(frame, [Placed()], Region(0.1, 0.1, 0.9, 0.9), label="parcel", score=0.97)
    assert found.shape == (720, 1280, 3)
    assert near(found[298:304, 210:490], GREEN).any(axis=0).mean() > 0.9  # its upper side
    assert near(found[310:390, 498:504], GREEN).any(axis=1).mean() > 0.9
    assert near(found[70:76, 140:1100], (255, 190, 60)).any(axis=0).mean() > 0.9  # the region
    for part in (found[0:30, 0:60], found[-30:, 0:200], found[262:298, 202:420]):  # name, answer, the code's text
        assert near(part, BAND).mean() > 0.3
        assert (part.max(axis=2) > 170).mean() > 0.02
    bad = shown(frame, [Placed({"error": "bad check digit"})])
    assert near(bad[298:304, 210:490], RED).any(axis=0).mean() > 0.9


def test_large_frames_shrink_and_small_ones_grow() -> None:
    assert max(shown(np.zeros((3000, 6000, 3), np.uint8), []).shape) == MOST_PIXELS
    assert shown(np.zeros((28, 20), np.uint8), []).shape[0] >= LEAST_PIXELS
    assert shown(np.zeros((1, 20_000), np.uint8), []).shape[1] == MOST_PIXELS
    scaled = shown(np.full((1440, 2560), 255, np.uint8), [Placed()])  # its corners with it
    assert near(scaled[148:154, 106:244], GREEN).any(axis=0).mean() > 0.9


def test_nothing_is_kept_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    preview = Preview()
    captured, answer = Captured(np.zeros((8, 8), np.uint8), "dock", 0, 0.0, "", 1.0), Answer({}, 1.0)
    preview.show(captured, answer)
    assert preview.jpeg() is None
    preview.show(captured, answer)
    assert preview.jpeg() is not None
    now = time.monotonic() + 10
    monkeypatch.setattr(time, "monotonic", lambda: now)
    preview.show(captured, answer)
    assert preview.sources() == []


# A scan that is looked at


def barcode(kit: Any) -> Any:
    code = kit.code_picture("ABC-123", "Code128")
    frame = np.full((480, 640), 230, np.uint8)
    frame[100 : 100 + code.shape[0], 60 : 60 + code.shape[1]] = code
    return frame


@contextmanager
def running(frame: Any, **tables: Any) -> Iterator[Scanner]:
    """A scan of the same frame again and again, until the block is left."""
    ended = threading.Event()

    def frames() -> Iterator[Any]:
        while not ended.wait(0.01):
            yield frame

    config = {"codes": {"budget_ms": 0, "formats": ["Code 128"]}, "server": {"address": "127.0.0.1:0"}, **tables}
    scanner = Scanner(config, frames=frames())
    thread = threading.Thread(target=scanner.run)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not scanner.status().get("inferred"):
            assert time.monotonic() < end
            time.sleep(0.02)
        yield scanner
    finally:
        ended.set()
        thread.join(60)
        assert not thread.is_alive()


def test_the_page_in_a_browser_on_a_desk_and_a_phone(kit: Any, browser: Any) -> None:
    with running(barcode(kit)) as scanner:
        for width, scheme in ((1280, "light"), (390, "dark")):
            browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
            browser.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
            browser.events.clear()
            browser.call("Page.navigate", url=scanner.url)
            ready = "performance.getEntriesByName('drawn').length > 0 && document.querySelectorAll('#events td').length > 3"
            kit.wait_for(lambda ready=ready: browser.evaluate(ready))
            assert browser.complaints() == []
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("document.images[0].naturalWidth") == 640
            text = browser.evaluate("document.body.innerText")
            for words in ("ready", "read rate\n100.0%", "codes a frame\n1", "ABC-123 (Code 128)"):
                assert words in text
            assert browser.evaluate("document.forms.length + document.querySelectorAll('input, button').length") == 0
            assert all(url.startswith(scanner.url) for url in browser.requests())
        browser.call("Page.navigate", url="about:blank")


def test_dead_viewers_slow_nothing_down_and_no_more_than_some_look(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.serving.REQUEST_S", 1.0)
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)  # pictures that fill a socket's buffer
    with running(noise) as scanner, ExitStack() as stack:
        host, port = "127.0.0.1", int(scanner.url.rsplit(":", 1)[1].strip("/"))
        for _ in range(MOST_STREAMS):
            viewer = stack.enter_context(socket.socket())
            viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            viewer.connect((host, port))
            viewer.sendall(b"GET /preview.mjpeg HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert viewer.recv(12) == b"HTTP/1.0 200"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{scanner.url}preview.mjpeg", timeout=30)  # noqa: S310
        with refused.value as answer:
            assert (answer.code, answer.read()) == (503, b"8 look already\n")
        before = scanner.status()["inferred"]
        kit.wait_for(lambda: scanner.status()["inferred"] > before + 50)
        assert scanner.status()["silent_s"] < 5
        kit.wait_for(lambda: _free(scanner.url))  # they are let go, for they take nothing


def _free(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}preview.mjpeg", timeout=30) as stream:  # noqa: S310
            return bool(stream.read(20) == b"--frame\r\nContent-Type"[:20])
    except urllib.error.HTTPError as refused:
        refused.close()
        return False


def test_the_text_of_a_code_that_names_no_place_is_in_the_headline() -> None:
    found = shown(np.zeros((480, 640), np.uint8), [Code("ABC-123", "Code 128", None)])
    words = near(found[-30:], (255, 255, 255)).any(axis=0)
    assert sum(value for value, _ in itertools.groupby(words)) > 15  # letters


def test_cameras_that_went_give_their_place() -> None:
    preview = Preview()
    preview.by_source = True
    preview.sources()
    answer, frame = Answer({}, 1.0), np.zeros((8, 8), np.uint8)
    for number in range(MOST_SOURCES + 1):
        preview.show(Captured(frame, f"{number:02}", 0, 0.0, "", 1.0), answer)
    assert "16" not in preview.sources()
    preview.forget("03")
    preview.show(Captured(frame, "16", 1, 0.0, "", 1.0), answer)
    assert "16" in preview.sources()
    assert "03" not in preview.sources()
    preview._taken["00"] -= 60  # nothing came for a minute
    preview.show(Captured(frame, "17", 0, 0.0, "", 1.0), answer)
    assert {"00", "17"} & set(preview.sources()) == {"17"}

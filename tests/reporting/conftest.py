"""Bundles with every kind of figure, pages read back, and a headless Chromium spoken to over a pipe (Chrome DevTools Protocol),
so that no package and no port is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.bundle import CALIBRATION, FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.manifest import History

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]

CALIBRATED = {
    "tensors": {"r1": {"minimum": 0.0, "maximum": 6.5, "scale": 0.04}, "r2": {"minimum": -1.0, "maximum": 3.0}},
    "layers": [{"name": f"conv{i}", "alone_db": 40.0 - i, "int8": i != 2} for i in range(3)],
}


class Browser:
    """One page. ``events`` holds everything the browser said: console messages, exceptions, requests."""

    def __init__(self, executable: str, profile: Path) -> None:
        child_in, self._out = os.pipe()
        self._in, child_out = os.pipe()

        def pipes() -> None:  # the protocol's file descriptors are 3 and 4
            high = [os.dup(child_in), os.dup(child_out)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=pipes, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(child_in)
        os.close(child_out)
        self._buffer, self._id, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(60)
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError("the browser does not answer")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def open(self, page: Path | str, width: int = 1280, scheme: str = "light") -> None:
        """Load a file or an address, and wait for its load event and the last of its charts."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next(60))
        for _ in range(100):
            if self.evaluate("performance.getEntriesByName('drawn').length > 0"):
                return
            self.evaluate("new Promise((done) => setTimeout(done, 20))")
        raise TimeoutError("the page did not draw its charts")

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Console messages, log entries and uncaught exceptions since `open`."""
        self.evaluate("new Promise((done) => setTimeout(done, 50))")
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event) for event in self.events if event.get("method") in names]

    def requests(self) -> list[str]:
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def close(self) -> None:
        os.close(self._out)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    executable = next((found for name in names if (found := shutil.which(name))), None)
    if executable is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs Chromium for the report's tests: apt-get install chromium")
        pytest.skip("no Chromium here: apt-get install chromium")
    opened = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


class Page(HTMLParser):
    """The text of each section, all start tags, and the data of each chart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.charts: list[tuple[str, dict[str, Any]]] = []
        self._section, self._skip = "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._skip = tag in ("script", "style")
        if tag == "section":
            self._section = found["id"] or ""
        if tag == "canvas":
            self.charts.append((found["data-kind"] or "", json.loads(found["data-chart"] or "")))

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.text[self._section] = self.text.get(self._section, "") + " ".join(data.split()) + " "


def bench_file(p50: float, cpu: str = "Cortex-A78AE", graph: str = FLOAT_GRAPH, **more: Any) -> bytes:
    samples = p50 * (1 + np.random.default_rng(0).gamma(2, 0.05, 400))
    counts, edges = np.histogram(samples, bins=40)
    ranks = {"p50": p50, "p90": float(np.quantile(samples, 0.9)), "p99": float(np.quantile(samples, 0.99))}
    result = {"scenario": "single-stream", "backend": "onnxruntime", "graph": graph, "latency_ms": ranks, "cv": 0.02}
    result |= {"throughput": 1000 / p50, "iterations": 400, "trustworthy": True, "reasons": []}
    result |= {
        "histogram": {"bins": edges.tolist(), "counts": counts.tolist(), "over": 2},
        "device": {"cpu": cpu, "cores": 6},
    }
    return json.dumps({**result, **more}).encode()


def remake(
    source: Bundle, name: str, *, int8: bool = False, calibration: dict[str, Any] = CALIBRATED, **changes: Any
) -> Bundle:
    """A copy of a bundle with another manifest; ``int8`` adds the quantized graph's files."""
    with Bundle.create(source.path.with_name(f"{name}.edge")) as draft:
        for file in source.manifest.files:
            if "/" not in file:
                draft.write(file, source.file(file).read_bytes())
        if int8:
            draft.write(INT8_GRAPH, source.file(FLOAT_GRAPH).read_bytes())
            draft.write(CALIBRATION, json.dumps(calibration).encode())
        draft.manifest = msgspec.structs.replace(source.manifest, name=name, **changes)
    return Bundle.open(source.path.with_name(f"{name}.edge"))


@pytest.fixture
def family(digits_bundle: Bundle) -> list[Bundle]:
    """A trained bundle and its quantized child, with every kind of figure the report knows."""
    points = [{"epoch": i + 1, "loss": 2.0 / (i + 1), "top1": 1 - 0.4 / (i + 1), "lr": 1e-3} for i in range(6)]
    matrix = (np.eye(10, dtype=int) * 98 + np.roll(np.eye(10, dtype=int) * 2, 1, 1)).tolist()
    figures = {"top1": 0.98, "parameters": 38122, "macs": 2_300_000, "curve": points, "confusion": matrix}
    trained = remake(
        digits_bundle, "base", history=(History("train", "2026-01-02T03:04:05Z", "0.1.0", {"lr": 0.003}, None, figures),)
    )
    entry = trained.entry("quantize", {"calib": "digits"}, {"top1": 0.975, "snr_db": 31.5})
    child = remake(trained, "small", history=(*trained.manifest.history, entry), int8=True)
    engines = {
        "engines/rtx-ada.engine": b"e" * 5000,
        "engines/rtx-ada.json": json.dumps(
            {"target": "rtx-ada", "tensorrt": "1.7.0.12", "precision": "int8", "seconds": 1.5}
        ).encode(),
        "engines/jetson-orin-nano.kit.zip": b"k" * 900,
    }
    trained = trained.extend({"bench/onnxruntime-float-single-stream.json": bench_file(0.25)})
    child = child.extend({"bench/onnxruntime-int8-single-stream.json": bench_file(0.15, graph=INT8_GRAPH), **engines})
    return [trained, child]


@pytest.fixture
def pages() -> type[Page]:
    """Reads a page back: ``pages(path)``."""
    return Page


@pytest.fixture
def benched() -> Callable[..., bytes]:
    """`bench_file`."""
    return bench_file


@pytest.fixture
def remade() -> Callable[..., Bundle]:
    """`remake`."""
    return remake

"""What cases stand on: a receiver that keeps count, scans as processes, bundles and packs that differ."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import msgspec
import numpy as np

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.manifest import FORMAT, ImagePreprocessing, Manifest, TensorSpec, Tolerance
from edgekit.runtime.golden import save_golden

from .case import Bench, Broken

__all__ = [
    "SCANNED",
    "Receiver",
    "bundle_of",
    "cameras_of",
    "check_arrivals",
    "check_summary",
    "forked",
    "free_port",
    "ids_in",
    "scan_bundle",
    "start_scan",
]

#: Tasks of bundles that a scan can use.
SCANNED = ("image-classification", "text-recognition")
#: x (n, 3, 8, 8) -> GlobalAveragePool -> Flatten -> y (n, 3), float32. 111 bytes by ``onnx.helper``, opset 13, IR 7, kept so
#: that onnx is not needed.
_AVERAGE = b64decode(
    "CAcSADpjChkKAXgSAXAiEUdsb2JhbEF2ZXJhZ2VQb29sCg8KAXASAXkiB0ZsYXR0ZW4SAXRaHAoBeBIXChUIARIRCgMSAW4KAggDCgIICAoCCAhiFAoB"
    "eRIPCg0IARIJCgMSAW4KAggDQgQKABAN"
)
_RUN = "import sys; sys.path[:] = sys.argv[1:]; sys.argv = ['edgekit', *sys.stdin.read().split(chr(0))]; " + (
    "from edgekit.cli import main; main()"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Receiver:
    """A real HTTP server on a loopback port. ``ids`` of the events it took, in order, repeats too.

    ``fate(number)`` says what becomes of a request: "" taken and answered, "503", "cut" broken off before it is taken, "lost"
    taken and broken off before the answer.
    """

    def __init__(self, port: int = 0, fate: Callable[[int], str] = lambda number: "") -> None:
        self.ids: list[str] = []
        self.fates: dict[str, int] = {}
        self._requests, self._lock = 0, Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                what = receiver.take(body, fate)
                if what in ("cut", "lost"):
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(int(what or 200))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/events"

    def has(self, event_id: str) -> bool:
        return event_id in self.ids

    def take(self, body: bytes, fate: Callable[[int], str]) -> str:
        with self._lock:
            what = fate(self._requests)
            self._requests += 1
            self.fates[what] = self.fates.get(what, 0) + 1
            if what in ("", "lost"):
                self.ids.append(json.loads(body)["id"])
        return what

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def check_arrivals(bench: Bench, received: Iterable[str], acknowledged: Iterable[str] = ()) -> None:
    """Nothing is lost, the order is kept, repeats have the same id. Ids are RUN-NUMBER, numbers from 0 without a hole.

    Fills ``events``, ``events_lost`` and ``duplicates``. Raises `Broken`.
    """
    arrived = list(received)
    first = list(dict.fromkeys(arrived))
    missing = set(acknowledged) - set(first)
    runs: dict[str, list[int]] = {}
    for each in first:
        run, _, number = each.rpartition("-")
        runs.setdefault(run, []).append(int(number))
    for run, numbers in runs.items():
        missing |= {f"{run}-{number}" for number in set(range(max(numbers) + 1)) - set(numbers)}
    bench.count("events", len(first))
    bench.count("events_lost", len(missing))
    bench.count("duplicates", len(arrived) - len(first))
    bench.check(not missing, f"{len(missing)} of {len(first) + len(missing)} events are lost, first {min(missing, default='')}")
    bench.check(first, "no event arrived: the case has shown nothing")
    for run, numbers in runs.items():
        bench.check(numbers == sorted(numbers), f"events of run {run} arrived out of order")


def check_summary(bench: Bench, figures: dict[str, Any]) -> None:
    """captured = inferred + dropped + in flight; and of each network sink: sent + before = delivered + waiting + refused +
    dropped. Raises `Broken`."""
    dropped = sum(figures["dropped"].values())
    seen = (
        f"{figures['captured']} captured, {figures['inferred']} inferred, {dropped} dropped, {figures['in_flight']} in flight"
    )
    bench.check(figures["captured"] == figures["inferred"] + dropped + figures["in_flight"], f"the count is not exact: {seen}")
    bench.check(figures["inferred"] > 0, f"nothing was read, so the case has shown nothing: {seen}")
    for key in ("captured", "inferred"):
        bench.count(key, figures[key])
    bench.count("dropped", dropped)
    for sink in figures["sinks"]:
        if "before" not in sink:
            continue
        left = sink["sent"] + sum(_all(sink["before"]))
        right = sink["delivered"] + sum(_all(sink))
        bench.check(left == right, f"{sink['sink']}: {left} events went in, {right} are accounted for")


def _all(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["waiting"], row["refused"], sum(row["dropped"].values())


def ids_in(bench: Bench, path: Path) -> list[str]:
    """The ids in a file of JSON lines, each once and each line whole. Raises `Broken`."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(str(json.loads(line)["id"]))
        except (ValueError, KeyError):
            raise Broken(f"line {number} of {path.name} is torn") from None
    bench.check(len(found) == len(set(found)), f"{path.name} holds an event twice")
    return found


def start_scan(bundle: Path, source: str, sinks: Iterable[str], outbox: Path) -> subprocess.Popen[bytes]:
    """``edgekit scan`` as a process, its figures on stdout."""
    given = ["scan", str(bundle), "--source", source, "--outbox", str(outbox), "--json"]
    for sink in sinks:
        given += ["--sink", sink]
    process = subprocess.Popen(  # noqa: S603  this Python
        [sys.executable, "-c", _RUN, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    process.stdin.write("\0".join(given).encode())
    process.stdin.close()
    process.stdin = None
    return process


def cameras_of(pid: int) -> list[int]:
    """Processes of cameras that ``pid`` has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if b"edgekit.scanner.sources.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return sorted(found)


@contextlib.contextmanager
def forked(act: Callable[[], object]) -> Iterator[int]:
    """``act`` in a child process; yields its pid. It exits with 0, or 1 where ``act`` raises. Killed at the end, if it runs."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            act()
            code = 0
        except BaseException as error:  # noqa: BLE001  nothing of the parent may run on in the child
            if os.environ.get("EDGEKIT_DEBUG"):
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _built_in(path: Path, name: str) -> Path:
    """An image classifier of three numbers: which colour is brightest."""
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, _AVERAGE)
        draft.write(GOLDEN, save_golden({"x": x}, {"y": x.mean(axis=(2, 3))}))
        draft.manifest = Manifest(
            format=FORMAT,
            name=name,
            task="image-classification",
            inputs=(TensorSpec("x", "float32", ("n", 3, 8, 8)),),
            outputs=(TensorSpec("y", "float32", ("n", 3)),),
            preprocessing=ImagePreprocessing(8, 8, 3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
            labels=("red", "green", "blue"),
            golden={FLOAT_GRAPH: Tolerance("relative", 1e-4)},
        )
    return path


def bundle_of(bench: Bench, name: str, change: Callable[[str, bytes], bytes] | None = None, version: str = "") -> Path:
    """A copy of the user's bundle (or the built-in one) under another name; ``change`` gets each file's name and bytes. A
    ``version`` stands in its history. A digest leaves both out: name and history tell two copies apart, and their packs."""
    path = bench.folder / f"{name}{version}.edge"
    source = bench.bundle
    if source is None:
        source = _built_in(bench.folder / f".{path.name}", name)
    opened = Bundle.open(source)
    keep = [each for each in opened.manifest.files if each not in ("weights.safetensors", "report.html")]
    with Bundle.create(path) as draft:
        for each in keep:
            data = opened.file(each).read_bytes()
            draft.write(each, change(each, data) if change else data)
        history = (*opened.manifest.history, opened.entry("chaos", {"version": version}, {}))
        draft.manifest = msgspec.structs.replace(opened.manifest, name=name, history=history)
    return path


def scan_bundle(bench: Bench) -> Path:
    """The user's bundle where a scan can use it, else the built-in one."""
    if bench.bundle is not None:
        if Bundle.open(bench.bundle).manifest.task in SCANNED:
            bench.figures["model"] = "the bundle"
            return bench.bundle
        bench.figures["model"] = "built-in: the bundle takes no pictures"
    else:
        bench.figures["model"] = "built-in"
    path = bench.folder / "built-in.edge"
    return path if path.exists() else _built_in(path, "built-in")

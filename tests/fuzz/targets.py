"""The targets: each feeds bytes to one reader of foreign files, the way the product does."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from edgekit.bundle import FLOAT_GRAPH, MANIFEST, Bundle
from edgekit.compiler import import_onnx
from edgekit.compiler.faults import check_structure
from edgekit.compiler.reading import check_model, drop_unproven, read_model
from edgekit.data import csv_file, npz
from edgekit.data.watch import _recordings
from edgekit.deployment import archive, revoking, signing, status, trusted
from edgekit.errors import EdgekitError
from edgekit.installed import read_state, starting
from edgekit.manifest import Manifest, TensorSpec, TextPreprocessing, encode_manifest
from edgekit.pipeline.recipe import read_recipe
from edgekit.preprocess import read_image
from edgekit.preprocess.text import TextPreprocessor
from edgekit.quantization.samples import read_npz
from edgekit.runtime import Model
from edgekit.runtime.engines import records
from edgekit.runtime.golden import parse_golden
from edgekit.runtime.onnx_wire import survey
from edgekit.scanner import Outbox
from edgekit.scanner.board import Board
from edgekit.scanner.config import ServerOptions, parse_config, read_config
from edgekit.scanner.replay import replay
from edgekit.scanner.server import StatusServer, _Handler
from edgekit.scanner.trigger_inputs import open_trigger_input
from edgekit.targets import load_targets

from . import seeds
from .harness import folder, target

__all__: list[str] = []


def _file(name: str, data: bytes) -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


def _sealed(data: bytes) -> bytes | None:
    """The manifest with a seal that fits, as its forger would write it; None where it is none."""
    try:
        return encode_manifest(msgspec.json.decode(data, type=Manifest))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


@target(seeds.manifests, "json", words=(b'"shape":', b'"seal":', b'"kind":"series"', b'"files":'))
def manifest(data: bytes) -> None:
    """Read as it is, then as the manifest of a bundle whose seal fits, which runs."""
    path = seeds.write_files(folder() / "tiny.edge")
    for text in (data, _sealed(data)):
        if text is None:
            continue
        (path / MANIFEST).write_bytes(text)
        try:
            bundle = Bundle.open(path)
        except EdgekitError as error:
            failed: EdgekitError | None = error
        else:
            failed = None
            bundle.digest, bundle.form, bundle.graph, bundle.last("import")
            with Model.open(path, "onnxruntime") as model:
                model.bundle.check_model()
        if failed is not None and text is not data:
            raise failed


@target(seeds.packs, "zip", words=(b"PK\x05\x06", b"edgekit-signature ", b"model.onnx"))
def pack(data: bytes) -> None:
    """Unpacked as if a trusted key had signed it; nothing lands beside the folder, and what lands is what the manifest says."""
    out = folder() / "out"
    out.mkdir()
    with archive.open_archive(io.BytesIO(data), "f.zip") as opened:
        opened.check()
        opened.extract(out)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    assert found == {MANIFEST, *opened.manifest.files}
    Bundle.open(out)


@target(seeds.signed, "bytes", words=(b"edgekit-signature ", b"edgekit-pack-1 release=", b"edgekit-revocations-1 number="))
def signature(data: bytes) -> None:
    """What nobody signed is never accepted."""
    keys = seeds.key()[1]
    refused: EdgekitError | None = None
    try:
        signing.check_signature(io.BytesIO(data), keys)
    except EdgekitError as error:
        refused = error
    else:
        assert data in seeds.packs(), "a changed pack was accepted"
    try:
        found = revoking.read_list(_file("revoked.txt", data), keys)
    except EdgekitError:
        pass
    else:
        assert found is None or data in seeds.revocations(), "a changed list was accepted"
    if refused is not None:
        raise refused


_X = (TensorSpec("x", "float32", ("n", 3, 4, 4)),)


@target(seeds.arrays, "npz", words=(b"\x93NUMPY", b"'shape': (", b"'descr': '|O'", b"images.npy"))
def arrays(data: bytes) -> None:
    """Golden outputs, a data set, a sample for calibration."""
    path = _file("a.npz", data)
    errors: list[EdgekitError] = []
    for read in (lambda: parse_golden(data), lambda: npz.load(str(path)), lambda: read_npz(path, _X)):
        try:
            read()
        except EdgekitError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@target(seeds.graphs, "bytes", words=(b"location", b"weights.bin", b"../x", b"\x72\x08", b"com.microsoft", b"EPContext"))
def wire(data: bytes) -> None:
    """The device's look at a graph finds outside weights wherever ONNX's own parser does."""
    try:
        found = bool(survey(data).outside)
    except ValueError:  # which is refused
        found = True
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # noqa: BLE001  protobuf's exception type depends on its backend
        return
    outside = any(
        t.data_location == t.EXTERNAL and any(e.key == "location" for e in t.external_data) for t in model.graph.initializer
    )
    assert found or not outside


@target(seeds.graphs, "bytes", also=(OSError,), words=(b"weights.bin", b"../x", b"Relu", b"Conv", b"Loop", b"com.microsoft"))
def graph(data: bytes) -> None:
    """The half of an import that Python does, in this process."""
    _file("weights.bin", bytes(24))
    source = read_model(_file("m.onnx", data))
    check_structure(source.model)
    check_model(source.model)
    drop_unproven(source.model)


@target(seeds.graphs, "bytes", programs=True, words=(b"Relu", b"Conv", b"Loop", b"com.microsoft"), seconds=60.0)
def imported(data: bytes) -> None:
    """A whole import, its native parsers in their child."""
    _file("weights.bin", bytes(24))
    import_onnx(_file("m.onnx", data), out=folder() / "m.edge", timeout_s=20)


@target(seeds.configs, "toml", words=(b"[[source]]", b"[trigger]", b"inputs = [", b"address = "))
def config(data: bytes) -> None:
    path = _file("scan.toml", data)
    for problem in parse_config(path).problems:
        assert problem.message and problem.where and problem.hint
    read_config(path)


@target(seeds.recipes, "toml", words=(b"[[stage]]", b'run = "train"', b"precision = "))
def recipe(data: bytes) -> None:
    read_recipe(_file("r.toml", data))


@target(seeds.target_files, "toml", words=(b"like = ", b"tensorrt = [", b'kind = "device"'))
def targets(data: bytes) -> None:
    for each in load_targets(_file("t.toml", data)).values():
        each.kernel_us(1e6, 1e6, "fp16") if each.fp16_tflops and each.bandwidth_gbs else each.lacking("fp16")


@target(seeds.images, "bytes", words=(b"IHDR", b"acTL", b"Exif\0\0", b"\xff\xc0", b"\xff\xda", b"VP8L", b"ANMF"))
def images(data: bytes) -> None:
    """As a file of a data set. The scanner's process for stills runs the same function; a crash there passes for a refusal."""
    frame = read_image(_file("a.png", data))
    assert frame.dtype == np.uint8 and frame.size


@target(
    seeds.outboxes,
    "bytes",
    also=(OSError,),
    words=(b"SQLite format 3\0", b"CREATE TRIGGER ", b"CREATE VIEW outbox", b"sqlite_sequence"),
)
def outbox(data: bytes) -> None:
    """A damaged database: the scan starts, events go in and out."""
    path = _file("outbox.db", data)
    box = Outbox(path)
    try:
        for number in range(2):
            box.append("s", f"new-{number}", b'{"id":"new"}')
        assert [each.id for each in box.head("s", 10**6)][-2:] == ["new-0", "new-1"]
        box.delivered("s", [each.position for each in box.head("s", 10)])
        for sink in ("http://a", "mqtt://b"):
            for each in box.head(sink, 10):
                each.event.decode()
            box.figures(sink)
    finally:
        box.close()


@target(seeds.recordings, "zip", also=(OSError,), words=(b'"$frame":', b'"steps":', b'"fires":', b"incident.json"))
def recording(data: bytes) -> None:
    replay(_file("a.edgekit-incident", data))


@target(seeds.tables, "lines", words=(b"series,", b"label", b"split", b"group", b"time"))
def table(data: bytes) -> None:
    path = str(_file("a.csv", data))
    with contextlib.suppress(EdgekitError):
        csv_file.read_series(path)
    csv_file.load(path)


@target(seeds.tokenizers, "json", words=(b'"type":', b'"Replace"', b'"Regex":', b'"vocab":'))
def tokenizer(data: bytes) -> None:
    TextPreprocessor(TextPreprocessing(16), data)("some Words, and numbers 1 2 3 \ud800")


_inputs: list[Any] = []
_taken: list[str] = []


@target(seeds.trigger_lines, "lines")
def trigger(data: bytes) -> None:
    """Lines to a port that stays open; no client ends it for the next."""
    if not _inputs:
        with socket.create_server(("127.0.0.1", 0)) as free:
            number = free.getsockname()[1]
        _inputs.append(open_trigger_input(f"tcp://127.0.0.1:{number}", lambda _, reference: not _taken.append(reference)))
    _taken.clear()
    for content in (data, b"after\n"):
        with socket.create_connection(("127.0.0.1", _inputs[0].port)) as client, contextlib.suppress(OSError):
            client.settimeout(5)  # an error: it was cut off, for a line that is too long
            client.sendall(content)
            client.shutdown(socket.SHUT_WR)
            while client.recv(1):
                pass
    assert _taken[-1] == "after"
    assert all(len(each) <= 256 for each in _taken)


_servers: list[StatusServer] = []


def _server() -> StatusServer:
    if not _servers:
        server = StatusServer(ServerOptions("127.0.0.1:0"), Board())
        server.closing.set()  # a stream of pictures ends at once
        _servers.append(server)
    return _servers[0]


@target(
    seeds.requests, "bytes", words=(b"HTTP/1.1\r\n", b"Host: ", b"Content-Length: ", b"Transfer-Encoding: chunked", b"?source=")
)
def request(data: bytes) -> None:
    """One request over a pair of sockets: one whole answer, or none, and nothing of the disk in it."""
    server = _server()
    here, there = socket.socketpair()
    with here, there:
        there.settimeout(5)
        there.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            there.send(data)
        there.setblocking(True)
        there.shutdown(socket.SHUT_WR)
        _Handler(here, ("127.0.0.1", 1), server._server)
        here.close()
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it did not read all that came
            while more := there.recv(1 << 16):
                answer += more
    assert b"root:" not in answer and b"Traceback" not in answer
    head = answer.partition(b"\r\n\r\n")[0]
    assert head.count(b"HTTP/1.0 ") <= 1


@target(seeds.installs, "json", also=(OSError,), words=(b'"trial":', b'"starts":', b'"sequence":'))
def install(data: bytes) -> None:
    """``state.json`` and ``trust.json`` of a root whose slots hold a bundle each."""
    root = folder() / "root"
    for slot in ("a", "b"):
        seeds.write_files(root / "slots" / slot)
    (root / "current").symlink_to("slots/a")
    for name in ("state.json", "trust.json"):
        (root / name).write_bytes(data)
    starting(root).fail("because")
    assert os.readlink(root / "current") in ("slots/a", "slots/b")
    errors = []
    for read in (read_state, trusted.memory, status):
        try:
            read(root)
        except EdgekitError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@target(seeds.engine_records, "json", words=(b'"golden":', b'"frames":', b'"sources":'))
def engine(data: bytes) -> None:
    """The record of a build, in a bundle whose manifest fits it."""
    path = seeds.write_files(folder() / "tiny.edge")
    bundle = Bundle.open(path).extend({"engines/cpu.json": data})
    for record in records(bundle, "tensorrt"):
        assert record.graph in (FLOAT_GRAPH, "model.int8.onnx")


@target(
    seeds.watch_files,
    "bytes",
    words=(b"cos\nsystem\n", b"cbuiltins\neval\n", b"R.", b"\x80\x02", b"b.", b"numpy.core.multiarray"),
)
def watch(data: bytes) -> None:
    """A pickle of the one data set that is one: whatever it names, nothing is called."""
    _recordings(_file("w.npy", data))

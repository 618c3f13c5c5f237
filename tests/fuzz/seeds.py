"""Sound inputs for every target, small, made by edgekit and the libraries that write the format; nothing of it is stored."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from edgekit.bundle import MANIFEST, Bundle
from edgekit.deployment import install, keygen, pack, revoke
from edgekit.manifest import ImagePreprocessing, Manifest, decode_manifest

from ..conftest import tiny_graph, write_bundle  # noqa: TID252  tests are no package that is installed

CORPUS = Path(__file__).with_name("corpus")


@cache
def place() -> Path:
    """A folder of this process's own; gone with it (`close`)."""
    return Path(tempfile.mkdtemp(prefix="edgekit-fuzz-seeds."))


def close() -> None:
    shutil.rmtree(place(), ignore_errors=True)


def found(target: str) -> list[bytes]:
    """What a reader once did not stand; it does since."""
    return [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))]


@cache
def bundle() -> Bundle:
    inputs = np.random.default_rng(1).normal(size=(1, 3, 32, 32)).astype(np.float32)
    picture = ImagePreprocessing(32, 32, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    labels = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    path = place() / "seed.edge"
    return write_bundle(path, tiny_graph(), inputs, task="image-classification", labels=labels, preprocessing=picture)


@cache
def bundle_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle().path.iterdir() if path.is_file()}


def manifest_without_files() -> Manifest:
    return msgspec.structs.replace(bundle().manifest, files={})


def manifests() -> list[bytes]:
    return [bundle_files()[MANIFEST]]


@cache
def keys() -> Path:
    keygen(place() / "keys")
    return place() / "keys"


@cache
def packs() -> list[bytes]:
    return [pack(bundle(), out=place() / "plain.zip").read_bytes()]


@cache
def signed_packs() -> list[bytes]:
    return [pack(bundle(), out=place() / "signed.zip", key=keys() / "edgekit.key").read_bytes()]


@cache
def revocations() -> list[bytes]:
    revoke(["0f3d9a5be1c27788", "3f1c" * 16], out=place() / "revoked.txt", key=keys() / "edgekit.key")
    return [(place() / "revoked.txt").read_bytes()]


def key_files() -> list[bytes]:
    return [(keys() / "edgekit.pub").read_bytes(), (keys() / "edgekit.key").read_bytes()]


@cache
def npz_files() -> list[bytes]:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.zeros((1, 3, 32, 32), np.float32))
    return [bundle_files()["golden.npz"], buffer.getvalue()]


@cache
def npz_data() -> list[bytes]:
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8), np.uint8)
    np.savez_compressed(buffer, images=images, labels=np.arange(12) % 3, classes=np.array(["a", "b", "c"]))
    return [buffer.getvalue()]


@cache
def graphs() -> list[bytes]:
    import onnx

    branch = """<ir_version: 8, opset_import: ["": 17]> g (float[n,4] x, bool c) => (float[n,4] y)
        { y = If(c) <then_branch = t () => (float[n,4] a) { a = Relu(x) },
                     else_branch = e () => (float[n,4] b) { b = Neg(x) }> }"""
    return [tiny_graph(), onnx.parser.parse_model(branch).SerializeToString()]


def scan_configs() -> list[bytes]:
    from edgekit.scanner.example import example_config

    small = (
        '[[source]]\naddress = "in/"\nwatch = true\n[codes]\n[[sink]]\naddress = "jsonl:e.jsonl"\n[trigger]\nmode = "single"\n'
    )
    return [example_config().encode(), small.encode()]


def recipes() -> list[bytes]:
    from edgekit.pipeline.recipe import built_in_recipes

    return [path.read_bytes() for path in built_in_recipes().values()]


def target_files() -> list[bytes]:
    shipped = (Path(__file__).parents[2] / "edgekit" / "targets.toml").read_bytes()
    return [b'[my-board]\nlike = "jetson-orin-nano"\ndescription = "a board"\n', shipped[:6000].rpartition(b"\n[")[0]]


@cache
def images() -> list[bytes]:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (9, 14, 3), np.uint8))
    grey, deep = colour.convert("L"), Image.fromarray(rng.integers(0, 65536, (9, 14), np.uint16))
    made = [(colour, "JPEG"), (colour, "PNG"), (grey, "PNG"), (deep, "PNG"), (colour.convert("P"), "PNG"), (colour, "BMP")]
    made += [(colour, "WEBP"), (colour, "TIFF"), (colour.convert("P"), "GIF"), (grey, "PPM"), (colour.convert("RGBA"), "PNG")]
    found = []
    for image, kind in made:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        found.append(buffer.getvalue())
    return found


@cache
def outboxes() -> list[bytes]:
    from edgekit.scanner.outbox import Outbox

    path = place() / "seed.sqlite"
    queue = Outbox(path)
    for number in range(30):
        queue.append("mqtt", f"id-{number}", json.dumps({"schema": 1, "id": f"id-{number}", "seq": number}).encode())
    queue.delivered("mqtt", [each.position for each in queue.head("mqtt", 5)])
    queue.close()
    return [path.read_bytes()]


@cache
def recordings() -> list[bytes]:
    from edgekit.scanner.png import encode_png
    from edgekit.scanner.recording import Came, Recording, Round, StepState, write_recording
    from edgekit.version import __version__

    steps = (StepState("trigger", {"mode": "single"}, known=True), StepState("duplicates", {"window_ms": 100}, known=True))
    steps += (StepState("votes", {"formats": ["ITF"]}, known=True),)
    about = Recording(1, __version__, "run", 0, {"why": "no_read"}, codes=0.0, steps=steps, frames=2, seconds=1.0)
    came = [Came("cam", number, 1.0 + number, 2.0 + number, number, answer={"codes": []}) for number in range(2)]
    rounds = [Round((each,), each.monotonic, each.time, 1) for each in came]
    events = [b'{"schema":1,"id":"run-%d","source":"cam","seq":%d}' % (number, number) for number in range(2)]
    frames = [encode_png(np.full((6, 8), 40 * number, np.uint8)) for number in range(2)]
    write_recording(place() / "seed.incident", about, rounds, events, frames)
    return [(place() / "seed.incident").read_bytes()]


def csv_files() -> list[bytes]:
    texts = "text,label\n" + "".join(f'"word{n % 7}, and {n}",{"ab"[n % 2]}\n' for n in range(24))
    series = "series,label,x,y\n" + "".join(f"{n // 8},{'ab'[n // 8 % 2]},{n * 0.5},{-n}\n" for n in range(48))
    return [texts.encode(), series.encode(), b"\xef\xbb\xbf" + texts.replace(",", ";").encode("utf-8")]


@cache
def tokenizers() -> list[bytes]:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "word": 2, "A": 3}, unk_token="[UNK]"))  # noqa: S106  a word for unknown
    made.pre_tokenizer = Whitespace()
    return [made.to_str().encode()]


@cache
def root() -> Path:
    """An installed bundle on trial, and one before it."""
    for name in ("one", "two"):
        shutil.copytree(bundle().path, place() / f"{name}.edge")
        manifest = decode_manifest((place() / f"{name}.edge" / MANIFEST).read_bytes(), name)
        with Bundle.create(place() / f"{name}-named.edge") as draft:
            for file in manifest.files:
                draft.write(file, bundle_files()[file])
            draft.manifest = msgspec.structs.replace(manifest, name=name, files={})
        packed = pack(place() / f"{name}-named.edge", out=place() / f"{name}.zip", key=keys() / "edgekit.key")
        install(packed, root=place() / "root", pub=keys() / "edgekit.pub")
    return place() / "root"


def states() -> list[bytes]:
    return [(root() / name).read_bytes() for name in ("state.json", "trust.json")]


def engine_records() -> list[bytes]:
    record: dict[str, Any] = {
        "target": "rtx-ada", "kind": "engine", "module": "tensorrt_rtx", "tensorrt": "1.7.1", "compute_capability": "8.9",
        "precision": "fp32", "file": "engines/rtx-ada.engine", "key": "0" * 64, "graph_sha256": "1" * 64,
        "sources": {"model.onnx": "2" * 64}, "golden": {"metric": "relative", "limit": 0.01}, "engine_sha256": "3" * 64,
    }  # fmt: skip
    return [json.dumps(record).encode()]


def requests() -> list[bytes]:
    head = b"Host: 127.0.0.1\r\nUser-Agent: x\r\nAccept: */*\r\n\r\n"
    paths = (b"/metrics", b"/healthz", b"/status", b"/preview.jpg?source=a", b"/../../etc/passwd", b"/preview.mjpeg")
    return [b"GET " + path + b" HTTP/1.1\r\n" + head for path in paths] + [b"POST / HTTP/1.0\r\nContent-Length: 5\r\n" + head]


@cache
def server() -> tuple[str, int]:
    from edgekit.scanner.board import Board
    from edgekit.scanner.config import ServerOptions
    from edgekit.scanner.server import StatusServer

    running = StatusServer(ServerOptions("127.0.0.1:0"), Board())
    return "127.0.0.1", int(running.url.rpartition(":")[2].strip("/"))


@cache
def trigger_input() -> tuple[list[str], int]:
    import socket

    from edgekit.scanner.trigger_inputs import open_trigger_input

    taken: list[str] = []

    def fire(source: str | None, reference: str) -> bool:
        taken.append(reference)
        return True

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    open_trigger_input(f"tcp://127.0.0.1:{port}", fire)
    return taken, port

"""Small real inputs for every target, made here by what writes them in earnest."""

from __future__ import annotations

import functools
import io
import json
import pickle
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from PIL import Image

from edgekit import installed
from edgekit.bundle import FLOAT_GRAPH, GOLDEN, MANIFEST, Bundle
from edgekit.deployment import archive, keygen, revoking, signing, trusted
from edgekit.manifest import FORMAT, ImagePreprocessing, Manifest, TensorSpec, TextPreprocessing, Tolerance, history_entry
from edgekit.pipeline.recipe import built_in_recipes
from edgekit.runtime.golden import save_golden
from edgekit.scanner import Outbox
from edgekit.scanner.example import example_config
from edgekit.scanner.png import encode_png
from edgekit.scanner.recording import Came, Recording, Round, StepState, write_recording
from edgekit.targets import TARGETS

__all__ = ["GRAPH", "bundle_files", "key"]

GRAPH = """<ir_version: 8, opset_import: ["": 17]> tiny (float[n,3,4,4] x) => (float[n,2] y)
  <float[2,3] w = {1, 2, 3, 4, 5, 6}, float[2] b = {0.5, -0.5}>
  { g = GlobalAveragePool(x) f = Flatten(g) y = Gemm<transB = 1>(f, w, b) }"""
_BRANCH = """<ir_version: 8, opset_import: ["": 17]> branch (float[4] x, bool c) => (float[4] y)
  { y = If(c) <then_branch = yes () => (float[4] a) { a = Relu(x) }, else_branch = no () => (float[4] d) { d = Neg(x) }> }"""
_FUNCTION = """<ir_version: 8, opset_import: ["": 17, "own": 1]> called (float[4] x) => (float[4] y) { y = own.twice(x) }
  <domain: "own", opset_import: ["": 17]> twice (a) => (b) { b = Add(a, a) }"""
_QUANTIZED = """<ir_version: 8, opset_import: ["": 17]> steps (float[2,4] x) => (float[2,4] y)
  <float s = {0.1}, int8 z = {0}> { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d) }"""


@functools.cache
def graphs() -> list[bytes]:
    models = [onnx.parser.parse_model(text) for text in (GRAPH, _BRANCH, _FUNCTION, _QUANTIZED)]
    outside = onnx.parser.parse_model(GRAPH)
    tensor = outside.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for name, value in (("location", "weights.bin"), ("offset", "0"), ("length", "24")):
        tensor.external_data.add(key=name, value=value)
    return [model.SerializeToString() for model in (*models, outside)]


@functools.cache
def bundle_files() -> dict[str, bytes]:
    """The files of a small bundle with a record of a build."""
    from edgekit.runtime.onnxruntime import session

    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    y = session(graphs()[0], 0).run(None, {"x": x})[0]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "tiny.edge"
        with Bundle.create(path) as draft:
            draft.write(FLOAT_GRAPH, graphs()[0])
            draft.write(GOLDEN, save_golden({"x": x}, {"y": y}))
            draft.write("engines/cpu.json", engine_records()[0])
            draft.manifest = Manifest(
                format=FORMAT,
                name="tiny",
                task="image-classification",
                inputs=(TensorSpec("x", "float32", ("n", 3, 4, 4)),),
                outputs=(TensorSpec("y", "float32", ("n", 2)),),
                preprocessing=ImagePreprocessing(4, 4, 3, (0.5,) * 3, (0.25,) * 3),
                labels=("no", "yes"),
                golden={FLOAT_GRAPH: Tolerance("relative", 1e-4)},
                history=(history_entry("import", {"a": [1]}, {"b": 2.5}),),
            )
        return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def manifests() -> list[bytes]:
    found = bundle_files()[MANIFEST]
    text = msgspec.json.decode(found)
    text["preprocessing"] = msgspec.to_builtins(TextPreprocessing(8))
    return [found, msgspec.json.encode(text)]


@functools.cache
def key() -> tuple[Path, dict[str, Any]]:
    """A private key's file and the public one by its id; they lie there as long as the process does."""
    folder = tempfile.TemporaryDirectory(prefix="edgekit-fuzz-key-")
    _kept.append(folder)
    made = keygen(folder.name)
    return Path(made["key"]), signing.public_keys(made["pub"])


_kept: list[Any] = []


@functools.cache
def packs() -> list[bytes]:
    with tempfile.TemporaryDirectory() as work:
        path = write_files(Path(work) / "tiny.edge")
        bundle = Bundle.open(path)
        out = io.BytesIO()
        archive.write_archive(out, bundle, bundle.manifest, signing.blank_trailer(signing.Statement(7)))
        signing.sign_file(out, key()[0])
        return [out.getvalue()]


def write_files(folder: Path) -> Path:
    for name, data in bundle_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@functools.cache
def revocations() -> list[bytes]:
    with tempfile.TemporaryDirectory() as work:
        revoking.revoke(["0" * 16, "1" * 64], out=Path(work) / "revoked.txt", key=key()[0])
        return [(Path(work) / "revoked.txt").read_bytes()]


def signed() -> list[bytes]:
    return [*packs(), *revocations()]


def arrays() -> list[bytes]:
    out, packed = io.BytesIO(), io.BytesIO()
    np.savez(out, images=np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4), labels=np.array([0, 1] * 3))
    np.savez_compressed(packed, x=np.zeros((4, 3, 3, 1), np.uint8), y=np.array(["a", "b"] * 2), classes=np.array(["a", "b"]))
    one = io.BytesIO()
    np.savez(one, x=np.ones((1, 3, 4, 4), np.float32))
    return [bundle_files()[GOLDEN], out.getvalue(), packed.getvalue(), one.getvalue()]


def configs() -> list[bytes]:
    small = (
        '[model]\nbundle = "m.edge"\n[codes]\nformats = ["EAN-13"]\n[[source]]\naddress = "camera:0"\n'
        'name = "a"\n[trigger]\nmode = "single"\n'
    )
    return [example_config().encode(), small.encode()]


def recipes() -> list[bytes]:
    return [path.read_bytes() for path in built_in_recipes().values()]


def target_files() -> list[bytes]:
    own = '[my-board]\nlike = "cpu"\ntitle = "Mine"\n'
    tables = TARGETS.read_bytes().split(b"\n[")
    return [tables[0] + b"\n[" + b"\n[".join(tables[1:4]), b"[" + tables[-1], own.encode()]


@functools.cache
def images() -> list[bytes]:
    """Every format that is read, small, and the odd forms of some."""
    r = np.random.default_rng(0)
    colour = Image.fromarray(r.integers(0, 255, (9, 7, 3), np.uint8))
    made = [
        *((colour, kind, {}) for kind in ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")),
        (colour.convert("L"), "PNG", {}),
        (colour.convert("RGBA"), "PNG", {}),
        (colour.convert("P"), "PNG", {}),
        (Image.fromarray(r.integers(0, 65535, (5, 6)).astype(np.uint16)), "PNG", {}),
        (Image.fromarray(r.integers(0, 65535, (5, 6)).astype(np.uint16)), "TIFF", {}),
        (colour, "TIFF", {"compression": "tiff_lzw"}),
        (colour, "TIFF", {"compression": "jpeg"}),
        (colour.convert("1"), "TIFF", {"compression": "group4"}),
        (colour, "JPEG", {"progressive": True}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "GIF", {"save_all": True, "append_images": [colour.rotate(90)]}),
        (colour, "WEBP", {"lossless": True}),
    ]
    turned = Image.Exif()
    turned[0x0112] = 6
    made.append((colour, "JPEG", {"exif": turned}))
    found = []
    for image, kind, options in made:
        out = io.BytesIO()
        image.save(out, kind, **options)
        found.append(out.getvalue())
    return found


@functools.cache
def outboxes() -> list[bytes]:
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "outbox.db"
        outbox = Outbox(path)
        for i in range(6):
            outbox.append(
                "http://a" if i % 2 else "mqtt://b", f"run-{i}", json.dumps({"id": f"run-{i}", "text": "x" * 50}).encode()
            )
        outbox.refuse("http://a", outbox.head("http://a", 1)[0].position, "no")
        outbox.close()
        other = sqlite3.connect(Path(work) / "other.db")
        other.execute("CREATE TABLE t (a)")
        other.commit()
        other.close()
        return [path.read_bytes(), (Path(work) / "other.db").read_bytes()]


@functools.cache
def recordings() -> list[bytes]:
    frame = np.random.default_rng(0).integers(0, 255, (12, 10, 3), np.uint8)
    steps = (
        StepState("votes", {"window_ms": 600}, {}, True),
        StepState("duplicates", {"window_ms": 900}, {"last": {"$frame": 0}}, True),
        StepState("trigger", {"mode": "continuous"}),
        StepState("crosscheck"),
    )
    about = Recording(
        1, "0", "run", 0, {"event": "gap"}, codes=0.0, formats=("EAN-13",), region=(0, 0, 1, 1), steps=steps, frames=2
    )
    came = [Came("cam", i, 1.0 + i, 5.0 + i, i, answer={"latency_ms": 2.0, "codes": []}) for i in range(2)]
    rounds = [Round((each,), 5.0 + i, 1.0 + i, 1, ((1, None, "box", 5.0),)) for i, each in enumerate(came)]
    events = [msgspec.json.encode({"id": f"run-{i}", "seq": i, "source": "cam", "codes": []}) for i in range(2)]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "a.edgekit-incident"
        write_recording(path, about, rounds, events, [encode_png(frame), encode_png(frame[:, :, 0])])
        return [path.read_bytes()]


def tables() -> list[bytes]:
    texts = "text,label\n" + "".join(f"word {i} of many,{'ab'[i % 2]}\n" for i in range(12))
    series = "series,label,time,x,y\n" + "".join(f"{i // 4},{'ab'[i // 4 % 2]},{i},{i * 0.5},-1e3\n" for i in range(32))
    return [texts.encode(), series.encode(), b"x,y\n1,2\n3,4\n", b'text;label\n"a;b";x\nc;y\n']


@functools.cache
def tokenizers() -> list[bytes]:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    found = []
    for model, trainer in (
        (
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[PAD]", "[UNK]", "[CLS]"]),
        ),
        (models.BPE(), trainers.BpeTrainer(vocab_size=60, special_tokens=["[PAD]", "[UNK]", "[CLS]"])),
        (models.Unigram(), trainers.UnigramTrainer(vocab_size=40, special_tokens=["[PAD]"])),
    ):
        made = Tokenizer(model)
        made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.train_from_iterator(["a few words of text", "and some more words", "numbers 1 2 3"], trainer)
        if made.token_to_id("[CLS]") is not None:
            made.post_processor = processors.TemplateProcessing(
                "[CLS] $A", special_tokens=[("[CLS]", made.token_to_id("[CLS]"))]
            )
        found.append(made.to_str().encode())
    return found


def trigger_lines() -> list[bytes]:
    return [b"box 1\nbox 2\r\n", "Größe\n".encode(), b"x" * 256 + b"\n" + b"y" * 257 + b"\n", b"\n\n\0\n\xff\n"]


def requests() -> list[bytes]:
    return [
        b"GET /metrics HTTP/1.1\r\nHost: localhost:9110\r\nAccept: */*\r\n\r\n",
        b"HEAD /status HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /preview.jpg?source=a%20b HTTP/1.1\r\nHost: [::1]:9\r\n\r\n",
        b"GET /preview.mjpeg HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: evil.example\r\nExpect: 100-continue\r\n\r\n",
        b"GET /healthz\r\n\r\n",
    ]


def installs() -> list[bytes]:
    """``state.json`` and ``trust.json`` as they are written."""
    bundle_files()  # made here: a target starts no program
    records = {
        "a": installed.Record("tiny", "0" * 64, 1, "2026-01-01T00:00:00Z"),
        "b": installed.Record("tiny", "1" * 64, 2, "x"),
    }
    trial = installed.Trial(2, 3, 1, ("0123456789abcdef", ""))
    state = installed.State(1, 2, records, trial, installed.Return("t", "why", records["b"], 1))
    trust = trusted.State(
        releases={"tiny": {"0" * 16: 7}},
        revoked=revoking.Revoked(1, frozenset({"0" * 16}), frozenset()),
        time="2026-02-01T00:00:00Z",
    )
    older = b'{"sequence": 2, "trial": {"sequence": 2, "starts": [{"pid": 7, "began": 5, "boot": "b"}, {"pid": 0}]}}'
    return [msgspec.json.encode(state), msgspec.json.encode(trust), older]


def engine_records() -> list[bytes]:
    found = {
        "target": "cpu", "kind": "device", "module": "tensorrt", "tensorrt": "10.3.0", "compute_capability": "8.7",
        "precision": "fp16",
        "file": "engines/cpu.engine", "key": "k", "graph_sha256": "0" * 64, "sources": {"a": "b"},
        "golden": {"kind": "relative", "limit": 0.1},
        "options": {"dla": None}, "golden_file": GOLDEN,
    }  # fmt: skip
    return [json.dumps(found).encode()]


def watch_files() -> list[bytes]:
    """The form of the packaged data set of watches: a pickled dict of arrays behind numpy's header."""
    r = np.random.default_rng(0)
    kept = np.empty(3, object)
    for i in range(3):
        kept[i] = r.normal(size=(4, 6))
    found = {"X": kept, "y": np.array([0, 1, 0]), "subject": np.array([1, 2, 3]), "y_labels": ["a", "b"]}
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": ()})
    old = pickle.dumps(np.array(found, object), protocol=2)  # what numpy writes itself
    return [out.getvalue() + old]

"""What reads bytes from elsewhere: for each reader sound inputs, how they are damaged, and the call.

A call may raise `EdgekitError`; all else is a finding, and so is a file outside of its folder, a read that takes longer
than `SECONDS`, or one that takes more than `MEMORY` beside what the process has.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import mutate, seeds

SECONDS = 20
MEMORY = 1 << 30


class Target(NamedTuple):
    """``seeds``: sound inputs. ``read``: gets one input and an empty folder."""

    seeds: Callable[[], list[bytes]]
    mutator: mutate.Mutator
    read: Callable[[bytes, Path], object]


def manifest(data: bytes, folder: Path) -> None:
    from edgekit.bundle import Bundle
    from edgekit.runtime.golden import load_golden

    bundle = folder / "x.edge"
    bundle.mkdir()
    for name, content in seeds.bundle_files().items():
        (bundle / name).write_bytes(content)
    (bundle / "manifest.json").write_bytes(data)
    load_golden(Bundle.open(bundle))


def pack(data: bytes, folder: Path) -> None:
    """As an install without a signature reads it: table, hashes, extraction, and the bundle that came out."""
    from edgekit.bundle import Bundle
    from edgekit.deployment.archive import open_archive

    (folder / "f.zip").write_bytes(data)
    (folder / "out").mkdir()
    with (folder / "f.zip").open("rb") as file, open_archive(file, "f.zip") as archive:
        archive.check()
        archive.extract(folder / "out")
    Bundle.open(folder / "out")


def signature(data: bytes, folder: Path) -> None:
    """Nothing that was changed may be taken: the seed is the only pack that a trusted key has signed."""
    from edgekit.deployment import verify

    (folder / "f.zip").write_bytes(data)
    verify(folder / "f.zip", pub=seeds.keys() / "edgekit.pub")
    assert data in seeds.signed_packs(), "a changed pack was taken for a signed one"


def revocations(data: bytes, folder: Path) -> None:
    from edgekit.deployment.revoking import read_list
    from edgekit.deployment.signing import public_keys

    (folder / "revoked.txt").write_bytes(data)
    read = read_list(folder / "revoked.txt", public_keys(seeds.keys() / "edgekit.pub"))
    assert read is None or data in seeds.revocations(), "a changed list was believed"


def public_key(data: bytes, folder: Path) -> None:
    from edgekit.deployment.signing import private_key, public_keys
    from edgekit.errors import EdgekitError

    (folder / "k.pub").write_bytes(data)
    with contextlib.suppress(EdgekitError):
        public_keys(folder / "k.pub")
    private_key(folder / "k.pub")


def npz(data: bytes, folder: Path) -> None:
    from edgekit.errors import EdgekitError
    from edgekit.manifest import TensorSpec
    from edgekit.quantization.samples import read_npz
    from edgekit.runtime.golden import parse_golden

    (folder / "s.npz").write_bytes(data)
    with contextlib.suppress(EdgekitError):
        read_npz(folder / "s.npz", (TensorSpec("x", "float32", ("n", 3, 32, 32)),))
    parse_golden(data)


def npz_data(data: bytes, folder: Path) -> None:
    from edgekit.data import load

    (folder / "d.npz").write_bytes(data)
    load(f"npz:{folder / 'd.npz'}")


def onnx_wire(data: bytes, folder: Path) -> None:
    from edgekit.runtime.onnx_wire import holds_external_data

    holds_external_data(data)


def onnx_import(data: bytes, folder: Path) -> None:
    """The native parsers run in a child, so this is slow: a few a second."""
    from edgekit import import_onnx

    (folder / "m.onnx").write_bytes(data)
    import_onnx(folder / "m.onnx", out=folder / "m.edge")


def scan_config(data: bytes, folder: Path) -> None:
    from edgekit.scanner.config import parse_config, read_config

    (folder / "scan.toml").write_bytes(data)
    parse_config(folder / "scan.toml")
    read_config(folder / "scan.toml")


def recipe(data: bytes, folder: Path) -> None:
    from edgekit.pipeline.recipe import read_recipe

    (folder / "r.toml").write_bytes(data)
    read_recipe(folder / "r.toml")


def targets_file(data: bytes, folder: Path) -> None:
    from edgekit.targets import load_targets

    (folder / "t.toml").write_bytes(data)
    load_targets(folder / "t.toml")


def image(data: bytes, folder: Path) -> None:
    from edgekit.preprocess import read_image

    (folder / "i.png").write_bytes(data)
    frame = read_image(folder / "i.png", 1 << 20)
    assert frame.size <= 3 << 20


def outbox(data: bytes, folder: Path) -> None:
    """A damaged queue is set aside, what can be read of it goes on, and it takes events."""
    from edgekit.scanner.outbox import Outbox

    (folder / "q.sqlite").write_bytes(data)
    queue = Outbox(folder / "q.sqlite")
    try:
        queue.append("mqtt", "new", b"{}")
        waiting = queue.head("mqtt", 1000)
        assert any(each.id == "new" for each in waiting) or len(waiting) == 1000
        queue.delivered("mqtt", [each.position for each in waiting])
    finally:
        queue.close()


def recording(data: bytes, folder: Path) -> None:
    from edgekit.scanner.replay import replay

    (folder / "i.incident").write_bytes(data)
    replay(folder / "i.incident")


def csv_data(data: bytes, folder: Path) -> None:
    from edgekit.data import load

    (folder / "d.csv").write_bytes(data)
    load(f"csv:{folder / 'd.csv'}")


def tokenizer(data: bytes, folder: Path) -> None:
    from edgekit.manifest import TextPreprocessing
    from edgekit.preprocess.text import TextPreprocessor

    TextPreprocessor(TextPreprocessing(16), data)("A word, and more \u202e words.")


def install_state(data: bytes, folder: Path) -> None:
    """``state.json`` and ``trust.json`` under a root: what is damaged is said, and `starting` starts all the same."""
    from edgekit.deployment import status
    from edgekit.deployment.trusted import memory
    from edgekit.errors import EdgekitError
    from edgekit.installed import starting

    shutil.copytree(seeds.root(), folder / "root", symlinks=True)
    for name in ("state.json", "trust.json"):
        (folder / "root" / name).write_bytes(data)
    starting(folder / "root").confirm()
    with contextlib.suppress(EdgekitError):
        memory(folder / "root")
    status(folder / "root")


def engine_record(data: bytes, folder: Path) -> None:
    from edgekit.bundle import Bundle
    from edgekit.runtime.engines import Record, records

    with Bundle.create(folder / "e.edge") as draft:
        for name, content in seeds.bundle_files().items():
            if name != "manifest.json":
                draft.write(name, content)
        draft.write("engines/rtx-ada.json", data)
        draft.manifest = seeds.manifest_without_files()
    for record in records(Bundle.open(folder / "e.edge"), "tensorrt_rtx"):
        assert isinstance(record, Record)


def http_request(data: bytes, folder: Path) -> None:
    """A request to a running scan's server, by a real connection: it answers or closes, and goes on answering."""
    host, port = seeds.server()
    _ask(host, port, data)
    answer = _ask(host, port, b"GET /metrics HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.0 200"), answer[:100]


def _ask(host: str, port: int, data: bytes) -> bytes:
    with socket.create_connection((host, port), timeout=10) as connection:
        found = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            while block := connection.recv(1 << 16):
                found += block
        return found


def trigger_line(data: bytes, folder: Path) -> None:
    """Lines of a trigger input by TCP: each is one trigger or refused, and the next client is heard."""
    taken, port = seeds.trigger_input()
    _ask("127.0.0.1", port, data)
    before = len(taken)
    _ask("127.0.0.1", port, b"after\n")
    heard = threading.Event()
    for _ in range(200):
        if "after" in taken[before:]:
            heard.set()
            break
        heard.wait(0.01)
    assert heard.is_set()


TARGETS: dict[str, Target] = {
    "manifest": Target(seeds.manifests, mutate.of_manifest, manifest),
    "pack": Target(seeds.packs, mutate.of_zip(mutate.of_manifest), pack),
    "signature": Target(seeds.signed_packs, mutate.of_bytes, signature),
    "revocations": Target(seeds.revocations, mutate.of_text, revocations),
    "public-key": Target(seeds.key_files, mutate.of_text, public_key),
    "npz": Target(seeds.npz_files, mutate.of_zip(mutate.of_bytes), npz),
    "npz-data": Target(seeds.npz_data, mutate.of_zip(mutate.of_bytes), npz_data),
    "onnx-wire": Target(seeds.graphs, mutate.of_bytes, onnx_wire),
    "onnx-import": Target(seeds.graphs, mutate.of_bytes, onnx_import),
    "scan-config": Target(seeds.scan_configs, mutate.of_text, scan_config),
    "recipe": Target(seeds.recipes, mutate.of_text, recipe),
    "targets": Target(seeds.target_files, mutate.of_text, targets_file),
    "image": Target(seeds.images, mutate.of_bytes, image),
    "outbox": Target(seeds.outboxes, mutate.of_bytes, outbox),
    "recording": Target(seeds.recordings, mutate.of_zip(mutate.of_text), recording),
    "csv": Target(seeds.csv_files, mutate.of_text, csv_data),
    "tokenizer": Target(seeds.tokenizers, mutate.of_json, tokenizer),
    "install-state": Target(seeds.states, mutate.of_json, install_state),
    "engine-record": Target(seeds.engine_records, mutate.of_json, engine_record),
    "http-request": Target(seeds.requests, mutate.of_bytes, http_request),
    "trigger-line": Target(lambda: [b"parcel 17\n", b"a\r\nb\nc"], mutate.of_bytes, trigger_line),
}

"""Packs: what checking one costs, and whether a changed one gets past: deployment.py [--rounds N] [--flips N]

1. A bundle of 50 MB: ``verify`` of its pack and ``Bundle.open`` of what it holds (every hash checked), in turns with reading
   the two from the page cache. The figure is the median of paired differences; beside it each part. The peak of memory is the
   kernel's high-water mark of a fresh process, over that of one that only imports what is needed. Target: 0.5 s.
2. Changed packs of a small bundle: each with one byte flipped to another, and cut, lengthened, or with blocks swapped.
   A pack that is refused must be so before a parser sees it: `zipfile.ZipFile`, `msgspec.json.decode` and the manifest's
   decoder are watched. Beside: how many of the same get past hashes alone (the same pack read as unsigned: the zip's checksums
   and the manifest's sha256), and past whoever changes a file and writes the hashes anew, which hashes cannot see.
   Target: all refused, no parser entered.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
from _machine import save

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.deployment import archive as archive_module
from edgekit.deployment import keygen, pack, verify
from edgekit.deployment.packing import open_pack
from edgekit.errors import EdgekitError, SignatureError
from edgekit.manifest import FORMAT, Manifest, history_entry
from edgekit.progress import track

TARGETS = {"seconds": 0.5, "accepted": 0, "parsed": 0}
SIZE = 50_000_000
_PEAK = """
import sys, zipfile, cryptography.hazmat.primitives.asymmetric.ed25519
from edgekit.bundle import Bundle
from edgekit.deployment import verify
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
verify(sys.argv[1], pub=sys.argv[2])
Bundle.open(sys.argv[3])
print(before, peak())
"""


def make(path: Path, size: int) -> Bundle:
    """A bundle with a graph of ``size`` random bytes: nothing here reads it as one."""
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, np.random.default_rng(0).bytes(size))
        draft.write(GOLDEN, np.random.default_rng(1).bytes(size // 100))
        draft.manifest = Manifest(FORMAT, "packed", "tensor", (), (), history=(history_entry("import", {}, {}),))
    return Bundle.open(path)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e9


def read(*paths: Path) -> None:
    for path in paths:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass


def cost(work: Path, rounds: int) -> dict[str, Any]:
    """Seconds of verify and open over reading, a pack of 50 MB, and the peak of memory."""
    keys = keygen(work / "keys")
    bundle = make(work / "large.edge", SIZE)
    packed = pack(bundle, out=work / "large.zip", key=keys["key"])
    files = [bundle.path / name for name in bundle.manifest.files]
    parts: dict[str, Callable[[], Any]] = {
        "read": lambda: read(packed, *files),
        "verify": lambda: verify(packed, pub=keys["pub"]),
        "open": lambda: Bundle.open(bundle.path),
    }
    for call in parts.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in parts}
    for turn in track(range(rounds), "verify and open"):
        for name in sorted(parts, key=lambda name: (hash((turn, name)), name)):
            found[name].append(seconds(parts[name]))
    over = [v + o - r for v, o, r in zip(found["verify"], found["open"], found["read"], strict=True)]
    command = [sys.executable, "-c", _PEAK, str(packed), keys["pub"], str(bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    return {
        "pack_bytes": packed.stat().st_size,
        "rounds": rounds,
        "over_reading_s": round(statistics.median(over), 4),
        **{f"{name}_s": round(statistics.median(values), 4) for name, values in found.items()},
        "peak_rss_mb": round(peak * 1024 / 1e6, 1),
        "peak_over_imports_mb": round((peak - before) * 1024 / 1e6, 1),
    }


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """How often a parser was entered while the block ran."""
    entered: Counter[str] = Counter()

    def counting(name: str, genuine: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            entered[name] += 1
            return genuine(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for place, name in (
            (zipfile, "ZipFile"),
            (archive_module, "decode_manifest"),
            (msgspec.json, "decode"),
            (json, "loads"),
        ):
            stack.enter_context(mock.patch.object(place, name, counting(name, getattr(place, name))))
        yield entered


def changed(data: bytes, kind: str, dice: random.Random) -> bytes:
    """One change of a pack: never the same bytes."""
    size = len(data)
    at = dice.randrange(size)
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ dice.randrange(1, 256)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "left out":
        return data[:at] + data[at + dice.randrange(1, 4096) :]
    if kind == "inserted":
        return data[:at] + dice.randbytes(dice.randrange(1, 4096)) + data[at:]
    length = dice.randrange(16, 4096)
    one, two = sorted(dice.sample(range(0, size - length, length), 2))
    return (
        data[:one] + data[two : two + length] + data[one + length : two] + data[one : one + length] + data[two + length :]
    )  # blocks swapped


def by_hashes(path: Path) -> None:
    """What an unsigned pack is held against: the zip's table and checksums, the manifest's seal and sha256s."""
    with open_pack(path) as file, archive_module.open_archive(file, "pack") as archive:
        archive.check()


def attacked(work: Path, flips: int) -> dict[str, Any]:
    """What becomes of changed packs: flips as many as asked for, of the other changes a tenth each."""
    keys = keygen(work / "keys-2")
    good = pack(make(work / "small.edge", 30_000), out=work / "small.zip", key=keys["key"]).read_bytes()
    dice, path = random.Random(0), work / "changed.zip"
    answers: dict[str, Counter[str]] = {}
    counts = {"flip": flips, **dict.fromkeys(("cut", "left out", "inserted", "swapped"), flips // 10)}
    for kind in track([kind for kind, count in counts.items() for _ in range(count)], "changed packs"):
        tally = answers.setdefault(kind, Counter(packs=0, refused=0, accepted=0, parsed=0, past_hashes=0))
        data = changed(good, kind, dice)
        if data == good:
            continue
        path.write_bytes(data)
        tally["packs"] += 1
        with watched() as entered:
            try:
                verify(path, pub=keys["pub"])
                tally["accepted"] += 1
            except SignatureError:
                tally["refused"] += 1
        tally["parsed"] += bool(entered)
        try:
            by_hashes(path)
            tally["past_hashes"] += 1
        except EdgekitError:
            pass
    return {
        "pack_bytes": len(good),
        **{kind: dict(tally) for kind, tally in answers.items()},
        "rewritten": rewritten(work, keys["pub"], 200),
    }


def rewritten(work: Path, pub: str, count: int) -> dict[str, int]:
    """Somebody changes a byte of the graph and packs it anew, unsigned or with a key of his own: all hashes are right then."""
    stranger, dice = keygen(work / "stranger"), random.Random(1)
    tally = Counter(packs=0, refused=0, accepted=0, parsed=0, past_hashes=0)
    for turn in track(range(count), "packs made anew"):
        with Bundle.create(work / "forged.edge") as draft:
            source = Bundle.open(work / "small.edge")
            graph = bytearray(source.read(FLOAT_GRAPH))
            graph[dice.randrange(len(graph))] ^= dice.randrange(1, 256)
            draft.write(FLOAT_GRAPH, bytes(graph))
            draft.manifest = source.manifest
        forged = pack(work / "forged.edge", out=work / "forged.zip", key=stranger["key"] if turn % 2 else None)
        tally["packs"] += 1
        with watched() as entered:
            try:
                verify(forged, pub=pub)
                tally["accepted"] += 1
            except SignatureError:
                tally["refused"] += 1
        tally["parsed"] += bool(entered)
        by_hashes(forged)
        tally["past_hashes"] += 1
        shutil.rmtree(work / "forged.edge")
        os.unlink(forged)
    return dict(tally)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--flips", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            "targets": TARGETS,
            "cost": cost(Path(folder), options.rounds),
            "attacks": attacked(Path(folder), options.flips),
        }
    kinds = [tally for tally in figures["attacks"].values() if isinstance(tally, dict)]
    figures["met"] = {
        "seconds": figures["cost"]["over_reading_s"] <= TARGETS["seconds"],
        "accepted": sum(tally["accepted"] for tally in kinds) == 0,
        "parsed": sum(tally["parsed"] for tally in kinds) == 0,
    }
    print(json.dumps(figures, indent=1))
    print(f"written: {save('deployment', figures)}")


if __name__ == "__main__":
    main()

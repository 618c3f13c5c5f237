"""What the scan path adds to decoding and the model, a 640x480 frame: scan_path.py [--rounds N]

1. ``path``: `Pipeline.process` (event, accounting, clock) and one sink's `send`, with a model that answers at once, so
   that nothing else is in the figure. One row a sink; ``none`` is the path alone.
2. ``folder``: `Pipeline.run` over PPM files (quick to decode: less noise) with a JSON lines sink, beside a bare loop of
   `read_image` and `Model` over the same files, a frame each in turns; the median of the paired differences.

Target: 0.3 ms beyond decode and model, with the JSON lines sink. SQLite syncs every event to disk: its row says what that
costs on this disk.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any

import numpy as np
from _machine import save
from model_overhead import DIGITS, interleaved, write_bundle
from PIL import Image

from edgekit.bundle import Bundle
from edgekit.preprocess import read_image
from edgekit.progress import track
from edgekit.runtime import Model, Prediction
from edgekit.scanner import Captured, Pipeline, open_sink, open_source

TARGET_MS = 0.3
SHAPE = (480, 640, 3)


def no_outbox() -> Any:
    raise AssertionError("these sinks need no outbox")


class Instant:
    """In the model's place: answers at once."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._prediction = Prediction("7", 0.9, np.zeros(10, np.float32), None, 0.0)

    def __call__(self, frame: Any) -> Prediction:
        return self._prediction


def path_cost(bundle: Bundle, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    frame = np.zeros(SHAPE, np.uint8)
    model: Any = Instant(bundle)
    sinks = {"jsonl": f"jsonl:{folder}/events.jsonl", "sqlite": f"sqlite:{folder}/events.db"}
    opened = {name: open_sink(spec, no_outbox) for name, spec in sinks.items()}
    captured = Captured(frame, "camera.png", 0, 1e9)
    scanners = {name: Pipeline(source=(), model=model) for name in ("none", *opened)}

    def call(name: str) -> Callable[[], None]:
        scanner, sink = scanners[name], opened.get(name, SimpleNamespace(send=lambda event: None))
        return lambda: sink.send(scanner.process(captured))

    taken = interleaved({name: call(name) for name in scanners}, rounds, "scan path")
    for sink in opened.values():
        sink.close()
    return {name: {f"p{q}_ms": round(float(np.percentile(ns, q)) / 1e6, 4) for q in (50, 99)} for name, ns in taken.items()}


def folder_cost(bundle: Bundle, folder: Path, frames: int) -> dict[str, float]:
    """Milliseconds a frame, medians: the bare loop, the scan, and their paired difference."""
    pictures = folder / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    paths = [pictures / f"{i:04d}.ppm" for i in range(frames)]
    for path in paths:
        small = rng.integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(small).resize((640, 480)).save(path)
    bare_ns = np.empty(frames, np.int64)
    marks: list[int] = []
    with Model.open(bundle.path) as bare, Model.open(bundle.path) as model:
        sink = open_sink(f"jsonl:{folder}/folder.jsonl", no_outbox)

        def source() -> Iterator[Captured]:
            """The folder source; between two of its frames the bare loop takes its turn, outside of the scan's time."""
            for i, captured in enumerate(track(open_source(str(pictures)), "folder", length=frames)):
                yield captured
                marks.append(perf_counter_ns())  # the scan's frame ends where it asks for the next
                bare(read_image(paths[i]))
                bare_ns[i] = perf_counter_ns() - marks[-1]
                marks.append(perf_counter_ns())

        start = perf_counter_ns()
        Pipeline(source=source(), model=model, sinks=[sink]).run()
        sink.close()
    begins, ends = np.array([start, *marks[1::2]])[:frames], np.array(marks[::2])
    scan_ns = ends - begins
    kinds = {"bare_ms": bare_ns, "scan_ms": scan_ns, "difference_ms": scan_ns - bare_ns}
    return {name: round(float(np.median(ns[5:])) / 1e6, 4) for name, ns in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4000)
    parser.add_argument("--frames", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = write_bundle(folder / "digits.edge", DIGITS)
        path = path_cost(bundle, folder, options.rounds)
        files = folder_cost(bundle, folder, options.frames)
    met = path["jsonl"]["p50_ms"] <= TARGET_MS and files["difference_ms"] <= TARGET_MS
    figures = {"frame": list(SHAPE), "path": path, "folder": files, "target_ms": TARGET_MS, "met": met}
    for sink, row in path.items():
        print(f"path, sink {sink:7s} p50 {row['p50_ms']:.4f} ms  p99 {row['p99_ms']:.4f} ms")
    costs = "  ".join(f"{name} {value:.4f}" for name, value in files.items())
    print(f"folder: {costs}  target met: {met}")
    rounds = {"rounds": options.rounds, "frames": options.frames}
    print(f"written to {save('scan_path', {**figures, **rounds})}")


if __name__ == "__main__":
    main()

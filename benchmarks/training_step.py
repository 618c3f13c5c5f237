"""What edgekit's training loop costs over a bare PyTorch loop on the same model and batches; whether the loader keeps up.

    python benchmarks/training_step.py [--rounds 7]

Both loops run the same module, the same augmented batches, AdamW and cross-entropy; the bare one has nothing else. They
take turns, a stretch of steps each, and the ratio of medians counts. Target: at most 1.10. Beside it, the share of a step
that augmenting a batch takes; and for JPEG files of 128 px that are decoded on demand (a data set too large for memory), how
many a second the loader reads to 112 px, over how many the model trains on: above 1 training never waits for it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _machine import save
from PIL import Image

from edgekit.data import Split
from edgekit.data.augment import make_augmentation, policy_named
from edgekit.data.tensors import Tensors, batches
from edgekit.manifest import ImagePreprocessing, ModelConfig
from edgekit.models import PRESETS
from edgekit.models.module import create
from edgekit.preprocess import read_image
from edgekit.training.devices import Devices
from edgekit.training.fit import FitConfig, _Run
from edgekit.training.objective import Classification

CASES = {
    "depthwise at 28 px": ("depthwise", "digits", 28, 1, 128, 40),
    "depthwise-m at 112 px": ("depthwise-m", "photos", 112, 3, 64, 8),
}


def case(name: str, policy: str, size: int, channels: int, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    spec = ImagePreprocessing(size, size, 1 if channels == 1 else 3, (0.5,) * channels, (0.25,) * channels)
    preset = PRESETS[name]
    config = ModelConfig(name, {"classes": 10, "channels": channels, "height": size, "width": size, **preset.args})
    augmentation = make_augmentation(policy, spec, resizes=preset.resizes)
    frames = np.random.default_rng(0).integers(0, 256, (batch * steps, size, size, channels), np.uint8)
    frames = frames[..., 0] if channels == 1 else frames
    x = np.concatenate([augmentation.read(frame) for frame in frames])
    data = Tensors(x, np.arange(len(x)) % 10, tuple(map(str, range(len(x)))), ())
    module, bare = create(config), create(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours = _Run(
        module,
        data,
        FitConfig(rounds + 1, 1e-3, batch, augmentation=policy),
        Classification(10, 0.1, policy_named(policy)),
        augmentation,
        None,
        Devices(),
    )
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-3, fused=True)
    targets = torch.from_numpy(data.y)

    def theirs() -> None:
        bare.train()
        for step in range(steps):
            rows = slice(step * batch, (step + 1) * batch)
            inputs = augmentation(torch.from_numpy(x[rows])).to(memory_format=torch.channels_last)
            loss = F.cross_entropy(bare(inputs), targets[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def loading() -> None:
        for step in range(steps):
            augmentation(torch.from_numpy(x[step * batch : (step + 1) * batch]))

    runs = {"edgekit": lambda: ours.epoch(0, lambda *_: None, ""), "bare": theirs, "loading": loading}
    taken: dict[str, list[float]] = {key: [] for key in runs}
    with ours.devices.together():  # as `fit` does; what it sets holds for the bare loop too
        for number in range(rounds + 1):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                if number:  # the first round warms up
                    taken[key].append((time.perf_counter() - start) / steps * 1000)
    medians = {key: statistics.median(values) for key, values in taken.items()}
    return {
        "edgekit_ms": medians["edgekit"],
        "bare_ms": medians["bare"],
        "ratio": medians["edgekit"] / medians["bare"],
        "loading_ms": medians["loading"],
        "loading_share": medians["loading"] / medians["edgekit"],
    }


def decoding(training_ms: float, batch: int = 64, count: int = 512) -> dict[str, float]:
    """Pictures a second from files on disk, decoded anew each time, beside those that training takes."""
    spec = ImagePreprocessing(112, 112, 3, (0.5,) * 3, (0.25,) * 3, "crop")
    augmentation = make_augmentation("photos", spec, resizes=True)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jpg" for i in range(count)]
        for file in files:
            small = Image.fromarray(random.integers(0, 256, (16, 21, 3), np.uint8))
            small.resize((171, 128), Image.Resampling.BICUBIC).save(file, quality=90)
        split = Split(tuple(map(str, range(count))), np.arange(count) % 10, lambda i: read_image(files[i]))
        rows = split.tensors(augmentation.read, keep_bytes=0).x
        start = time.perf_counter()
        for _ in batches(rows, [np.arange(i, i + batch) for i in range(0, count, batch)]):
            pass
        read = count / (time.perf_counter() - start)
    trained = batch / training_ms * 1000
    return {"read_per_second": read, "trained_per_second": trained, "ratio": read / trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    found = {label: case(*arguments, rounds) for label, arguments in CASES.items()}
    for label, row in found.items():
        print(f"{label}: {row['edgekit_ms']:.1f} ms a step, bare {row['bare_ms']:.1f} ms, ratio {row['ratio']:.3f}; "
              f"reading and augmenting {row['loading_share']:.0%} of a step")  # fmt: skip
    loader = decoding(found["depthwise-m at 112 px"]["edgekit_ms"])
    print(f"decoded on demand: {loader['read_per_second']:.0f} pictures a second, {loader['ratio']:.1f} x what training takes")
    met = all(row["ratio"] <= 1.10 for row in found.values()) and loader["ratio"] >= 1
    save("training_step", {"targets_met": met, "cases": found, "loader": loader})


if __name__ == "__main__":
    main()

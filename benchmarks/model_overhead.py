"""What `Model(frame)` costs over the bare `InferenceSession.run`: model_overhead.py [--rounds N]

Both run the same graph in one session's settings, in turns of single calls, so that clocks and neighbours disturb both
alike. The difference of the medians holds preprocessing, checks and decoding. Cases: a 28x28 grey frame (the digits'
size), a 224x224 RGB frame, and, for scale, a 640x480 camera frame that must be resized to 224x224. Target: 0.15 ms
for the first two.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from _machine import save
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.manifest import FORMAT, ImagePreprocessing, Manifest, TensorSpec, Tolerance
from edgekit.progress import track
from edgekit.runtime import Model
from edgekit.runtime.golden import save_golden
from edgekit.runtime.onnxruntime import session

TARGET_MS = 0.15
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DIGITS = ImagePreprocessing(28, 28, 1, mean=(0.1307,), std=(0.3081,))
PHOTOS = ImagePreprocessing(224, 224, 3, **IMAGENET)
#: case -> (frame shape, preprocessing, held to the target)
CASES: dict[str, tuple[tuple[int, ...], ImagePreprocessing, bool]] = {
    "28x28": ((28, 28), DIGITS, True),
    "224x224": ((224, 224, 3), PHOTOS, True),
    "640x480 to 224x224": ((480, 640, 3), PHOTOS, False),
}


def graph(spec: ImagePreprocessing) -> bytes:
    """x (n, C, H, W) -> Conv 8 stride 2 - ReLU - Conv 16 stride 2 - ReLU - GlobalAveragePool - Gemm 10 -> y (n, 10)."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(0, 0.2, (8, spec.channels, 3, 3)),
        "w2": rng.normal(0, 0.1, (16, 8, 3, 3)),
        "w3": rng.normal(0, 0.3, (10, 16)),
        "b3": np.zeros(10),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", spec.channels, spec.height, spec.width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    body = helper.make_graph(nodes, "net", [x], [y], initializers)
    data: bytes = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return data


def write_bundle(path: Path, spec: ImagePreprocessing) -> Bundle:
    net = graph(spec)
    inputs = np.random.default_rng(1).normal(size=(2, spec.channels, spec.height, spec.width)).astype(np.float32)
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, net)
        draft.write(GOLDEN, save_golden({"x": inputs}, {"y": session(net).run(None, {"x": inputs})[0]}))
        draft.manifest = Manifest(
            format=FORMAT,
            name=path.stem,
            task="image-classification",
            inputs=(TensorSpec("x", "float32", ("n", spec.channels, spec.height, spec.width)),),
            outputs=(TensorSpec("y", "float32", ("n", 10)),),
            preprocessing=spec,
            labels=tuple("0123456789"),
            golden={FLOAT_GRAPH: Tolerance("relative", 1e-4)},
        )
    return Bundle.open(path)


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, label: str) -> dict[str, np.ndarray[Any, Any]]:
    """ns of each call, (rounds,), the calls taking turns and the order of turns changing."""
    taken = {name: np.empty(rounds, np.int64) for name in calls}
    names = list(calls)
    for _ in range(50):
        for call in calls.values():
            call()
    gc.collect()
    gc.disable()
    for block in track(range(20), label):
        for i in range(block * rounds // 20, (block + 1) * rounds // 20):
            for name in names if i % 2 else names[::-1]:
                call = calls[name]
                start = perf_counter_ns()
                call()
                taken[name][i] = perf_counter_ns() - start
    gc.enable()
    return taken


def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    shape, spec, held = CASES[name]
    bundle = write_bundle(folder / f"{name.replace(' ', '-')}.edge", spec)
    frame = np.random.default_rng(2).integers(0, 256, shape, np.uint8)
    bare = session(str(bundle.file(FLOAT_GRAPH)))
    with Model.open(bundle.path) as model:
        feeds = {"x": model.preprocess(frame)}
        calls: dict[str, Callable[[], Any]] = {
            "bare": lambda: bare.run(None, feeds),
            "model": lambda: model(frame),
            "preprocess": lambda: model.preprocess(frame),
        }
        taken = interleaved(calls, rounds, name)
    medians = {key: float(np.median(ns)) / 1e6 for key, ns in taken.items()}
    overhead = medians["model"] - medians["bare"]
    quarters = [
        float(np.median(m) - np.median(b)) / 1e6
        for m, b in zip(*(np.array_split(taken[k], 4) for k in ("model", "bare")), strict=True)
    ]
    return {
        "bare_ms": medians["bare"],
        "model_ms": medians["model"],
        "preprocess_ms": medians["preprocess"],
        "overhead_ms": overhead,
        "overhead_ms_by_quarter": quarters,
        "target_ms": TARGET_MS if held else None,
        "met": overhead <= TARGET_MS if held else None,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4000)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: measure(name, Path(folder), rounds) for name in CASES}
    for name, row in cases.items():
        times = f"bare {row['bare_ms']:.4f}  model {row['model_ms']:.4f}  over {row['overhead_ms']:.4f} ms"
        print(f"{name:20s} {times}  met: {row['met']}")
    print(f"written to {save('model_overhead', {'cases': cases, 'threads': 1})}")


if __name__ == "__main__":
    main()

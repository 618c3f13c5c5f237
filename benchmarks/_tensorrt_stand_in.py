"""TensorRT replaced by a copy on the device: what the runner itself costs on a real GPU, where no TensorRT can run.

Memory, stream, uploads, downloads, CUDA graphs and threads are the runner's own, on the CUDA that is installed; the "engine"
is y = x, a device-to-device copy enqueued on the runner's stream.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from onnx import TensorProto, helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.manifest import FORMAT, Manifest, TensorSpec
from edgekit.runtime.cuda import open_cuda
from edgekit.runtime.golden import save_golden
from edgekit.trust import trust_engine

SIMULATED = Path(__file__).parents[1] / "tests/runtime/simulated_tensorrt.py"


def install() -> Any:
    """From here on the process imports the stand-in as ``tensorrt_rtx``; returns the file's module."""
    spec = importlib.util.spec_from_file_location("simulated_tensorrt", SIMULATED)
    assert spec is not None
    assert spec.loader is not None
    simulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulated)
    trt = simulated.make_module(simulated.RTX, SimpleNamespace(sm=open_cuda().device().sm))
    trt.execute = simulated.device_copy(importlib.import_module("cuda.bindings.runtime"))
    del trt.CudaGraphStrategy  # a copy captures nothing by itself: the runner shall
    trt.__version__ = "stand-in"
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt_rtx", None)
    sys.modules["tensorrt_rtx"] = trt
    return SimpleNamespace(trt=trt, plan=simulated.plan)


def bundle(folder: Path, stand_in: Any, size: int, most: int = 8) -> Bundle:
    """x (n, 3, size, size) float32 -> y = x, with a stand-in engine for batches of 1 to ``most``."""
    axes: list[Any] = ["n", 3, size, size]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    x = np.random.default_rng(0).normal(size=(most, 3, size, size)).astype(np.float32)
    path = folder / f"copy-{size}.edge"
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, onnx)
        draft.write(GOLDEN, save_golden({"x": x}, {"y": x}))
        specs = tuple(TensorSpec(name, "float32", tuple(axes)) for name in "xy")
        draft.manifest = Manifest(format=FORMAT, name=path.stem, task="tensor", inputs=specs[:1], outputs=specs[1:])
    made = Bundle.open(path)
    sm = stand_in.trt.cuda.sm
    profiles = {"x": [[count, 3, size, size] for count in (1, most, most)]}
    plan = stand_in.plan(onnx, stand_in.trt, sm=sm, profiles=profiles)
    digest = hashlib.sha256(plan).hexdigest()
    trust_engine(digest)
    record = {
        "target": "stand-in",
        "kind": "rtx",
        "module": "tensorrt_rtx",
        "tensorrt": stand_in.trt.__version__,
        "compute_capability": sm,
        "precision": "fp32",
        "file": "engines/stand-in.engine",
        "key": digest,
        "graph_sha256": made.manifest.files[FLOAT_GRAPH],
        "sources": {FLOAT_GRAPH: made.manifest.files[FLOAT_GRAPH]},
        "golden": {"kind": "relative", "limit": 0.0},
        "engine_sha256": digest,
    }
    return made.extend({"engines/stand-in.engine": plan, "engines/stand-in.json": msgspec.json.encode(record)})

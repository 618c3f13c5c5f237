"""Bundles to build, around graphs made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, INT8_GRAPH, Bundle
from edgekit.manifest import FORMAT, Manifest, TensorSpec, Tolerance
from edgekit.runtime.golden import save_golden
from edgekit.runtime.onnxruntime import session


def write(
    path: Path, graphs: dict[str, onnx.ModelProto], x: np.ndarray[Any, Any], shape: tuple[int | str, ...], **extra: Any
) -> Bundle:
    """A bundle of one input ``x`` and one output ``y``; golden outputs by the first graph."""
    files = {name: made.SerializeToString() for name, made in graphs.items()}
    truth = session(next(iter(files.values()))).run(None, {"x": x})[0]
    with Bundle.create(path) as draft:
        for name, data in files.items():
            draft.write(name, data)
        draft.write(GOLDEN, save_golden({"x": x}, {"y": truth}))
        inputs, outputs = (TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", ("n", truth.shape[1])),)
        draft.manifest = Manifest(FORMAT, path.stem, "tensor", inputs, outputs, **extra)
    return Bundle.open(path)


def linear(weight: np.ndarray[Any, Any], quantized: bool = False, extra: list[Any] | None = None) -> onnx.ModelProto:
    """x (n, k) @ w -> y, in float32 or as explicit symmetric Q/DQ."""
    weights: dict[str, Any] = {"w": weight.astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    if quantized:
        scale = np.abs(weight).max(0) / 127
        weights = {
            "q": np.rint(weight / scale).astype(np.int8),
            "ws": scale.astype(np.float32),
            "wz": np.zeros(len(scale), np.int8),
        }
        weights |= {"xs": np.float32(4 / 127), "xz": np.int8(0)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["q", "ws", "wz"], ["wd"], axis=1),
            helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product"),
        ]
    graph = helper.make_graph(
        extra or nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def quantized(tmp_path: Path) -> Bundle:
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(32, 32)), random.normal(size=(4, 32)).astype(np.float32)
    graphs = {FLOAT_GRAPH: linear(weight), INT8_GRAPH: linear(weight, quantized=True)}
    golden = {FLOAT_GRAPH: Tolerance("relative", 1e-4), INT8_GRAPH: Tolerance("snr_db", 30.0)}
    return write(tmp_path / "q.edge", graphs, x, ("n", 32), golden=golden)


def record(bundle: Bundle, target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Bundle.open(bundle.path).file(f"engines/{target}.json").read_bytes())
    return found

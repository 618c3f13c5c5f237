"""ONNX files to import, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F = TensorProto.FLOAT


def model(
    nodes: list[Any],
    weights: dict[str, Any] | None = None,
    x: list[Any] | None = None,
    y: list[Any] | None = None,
    version: int = 17,
    **extra: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        extra.pop("inputs", None) or [helper.make_tensor_value_info("x", F, ["n", 4] if x is None else x)],
        [helper.make_tensor_value_info("y", extra.pop("y_type", F), y)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], **{"ir_version": 8, **extra})


def saved(path: Path, made: onnx.ModelProto) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def shaped_reshape() -> onnx.ModelProto:
    """x (n, 4) -> reshaped by a computed shape, as PyTorch's old exporter writes view(x.size(0), -1)."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array(0))),
        helper.make_node("Gather", ["s", "zero"], ["n0"]),
        helper.make_node("Unsqueeze", ["n0", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("Mul", ["two", "three"], ["six"]),
        helper.make_node("Mul", ["r", "six"], ["y"]),
    ]
    weights = {"axes": np.array([0]), "rest": np.array([2, 2]), "two": np.float32(2), "three": np.float32(3)}
    return model(nodes, weights, y=["n", 2, 2])


N = helper.make_node


def pooled(**extra: Any) -> onnx.ModelProto:
    """Sums over the axes that an input names."""
    inputs = [helper.make_tensor_value_info("x", F, [2, 3, 4]), helper.make_tensor_value_info("axes", TensorProto.INT64, [1])]
    return model([helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)], inputs=inputs, y=[None, None], **extra)

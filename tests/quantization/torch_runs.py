"""Graphs for PyTorch, made by hand, and their answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekit.quantization.torch_graph import TorchGraph

Array = np.ndarray[Any, Any]


def normal(*shape: int, scale: float = 0.3, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(0, scale, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """``inputs``: names, "_" for one that is left out."""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=f"{op}_{outputs.replace(' ', '_')}", **attributes)


def build(nodes: list[Any], known: dict[str, Array], x: list[Any], y: list[str] | None = None, opset: int = 17) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_empty_tensor_value_info(name) for name in y or ["y"]],
        [numpy_helper.from_array(value, name) for name, value in known.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    data: bytes = onnx.shape_inference.infer_shapes(model).SerializeToString()
    return data


def torch_run(module: TorchGraph, x: Array) -> dict[str, Array]:
    with torch.no_grad():
        return {name: value.numpy() for name, value in module({"x": torch.tensor(x)}).items()}


def contents(model: onnx.ModelProto) -> tuple[Any, ...]:
    """Nodes, and the name, dtype, shape and bytes of every initializer."""
    arrays = [(t.name, numpy_helper.to_array(t)) for t in model.graph.initializer]
    known = [(name, a.dtype, a.shape, a.tobytes()) for name, a in arrays]
    return [node.SerializeToString() for node in model.graph.node], known

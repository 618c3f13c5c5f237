"""How much memory a build will need on a device, so that a small Jetson is warned before its out-of-memory killer is met.

An estimate, from a few measured and some assumed numbers:

- The graph `COPIES` times. TensorRT's documentation ("How TensorRT works", build phase) promises at least two copies of the
  weights and temporary ones; with TensorRT-RTX 1.7 on a CPU, products of 16 to 256 MB peaked at 3.5 to 4.5 graphs beside the
  file itself (5.3 at 16 MB, where fixed costs show). One more is for the GPU, which times each layer with its weights: on a
  Jetson it shares the memory of the CPU.
- The inputs and outputs of the largest layer, at the largest shapes of the profile: what one timing allocates.
- The workspace: its limit; without one assumed to be as much as those tensors, though a kernel may take more.
- `LIBRARIES`, assumed: CUDA, TensorRT and their kernels (NVIDIA's forum names 600 MB).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from edgekit.errors import GraphError

from .cost import graph_cost

__all__ = ["COPIES", "LIBRARIES", "build_memory"]

COPIES = 6
LIBRARIES = 600 << 20  # bytes


def build_memory(graph: bytes, profiles: Mapping[str, Any], workspace_mb: int | None) -> dict[str, int]:
    """Bytes: ``weights``, ``tensors``, ``workspace``, ``libraries``, and ``total``."""
    weights = COPIES * len(graph)
    tensors = _largest_layer(graph, profiles)
    workspace = tensors if workspace_mb is None else workspace_mb << 20
    parts = {"weights": weights, "tensors": tensors, "workspace": workspace, "libraries": LIBRARIES}
    return {**parts, "total": sum(parts.values())}


def _largest_layer(graph: bytes, profiles: Mapping[str, Any]) -> int:
    """Bytes that the largest layer reads and writes; 0 where no shape can be inferred."""
    model = onnx.load_model_from_string(graph)
    for value in model.graph.input:
        if value.name in profiles:
            for axis, size in zip(value.type.tensor_type.shape.dim, profiles[value.name][2], strict=True):
                axis.dim_value = size
    try:
        layers = graph_cost(model).layers
    except GraphError:
        return 0
    return max((sum(tensor.size_bytes for tensor in (*item.reads, *item.writes)) for item in layers), default=0)

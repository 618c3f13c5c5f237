"""Dilated pooling written with what every TensorRT has: it refuses dilations other than 1."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .editing import Array, attribute, element_types, tensor_names

__all__ = ["expand_dilated_pools"]

_FLOATS: dict[int, type[np.floating[Any]]] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
MAX_TAPS = 128  # slices that a window may become


class _Window(NamedTuple):
    """Along each spatial axis: sizes in and out, kernel, stride, dilation, padding in front and behind."""

    size: list[int]
    out: list[int]
    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]


def expand_dilated_pools(model: onnx.ModelProto) -> bool:
    """`MaxPool` and `AveragePool` with dilations become the maximum, or the mean, of strided slices, in place.

    Left alone: integers, outputs of indices, unknown shapes, windows of more than `MAX_TAPS` values, ``SAME`` padding and
    ``ceil_mode``, in which ONNX and ONNX Runtime differ. Returns whether there was any.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    kinds = element_types(model)
    taken, nodes, changed = tensor_names(model.graph), list[onnx.NodeProto](), False
    for node in [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]:
        window, kind = _window(node, shapes), _FLOATS.get(kinds.get(node.input[0], 0) if node.input else 0)
        if window is None or kind is None:
            nodes.append(node)
            continue
        changed = True
        nodes += _expanded(model.graph, node, window, kind, taken)
    if changed:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return changed


def _window(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> _Window | None:
    if node.op_type not in ("MaxPool", "AveragePool") or len([name for name in node.output if name]) != 1:
        return None
    kernel = list(attribute(node, "kernel_shape", []))
    dilations = list(attribute(node, "dilations", [1] * len(kernel)))
    size, out = shapes.get(node.input[0], [])[2:], shapes.get(node.output[0], [])[2:]
    unsure = attribute(node, "auto_pad", b"NOTSET").startswith(b"SAME") or attribute(node, "ceil_mode", 0)
    if unsure or all(d == 1 for d in dilations) or np.prod(kernel) > MAX_TAPS:
        return None
    if len(size) != len(kernel) or len(out) != len(kernel) or not all(size + out):
        return None
    strides = list(attribute(node, "strides", [1] * len(kernel)))
    pads = list(attribute(node, "pads", [0] * 2 * len(kernel)))
    begin, end = pads[: len(kernel)], pads[len(kernel) :]
    return _Window(size, out, kernel, strides, dilations, begin, end)


def _expanded(
    graph: onnx.GraphProto, node: onnx.NodeProto, window: _Window, kind: type[np.floating[Any]], taken: set[str]
) -> list[onnx.NodeProto]:
    prefix = f"{node.name or node.output[0]}/taps"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    taken.add(prefix)
    counted = 0

    def constant(value: Array) -> str:
        nonlocal counted
        counted += 1
        graph.initializer.append(numpy_helper.from_array(value, f"{prefix}/{counted}"))
        return f"{prefix}/{counted}"

    reach = [(o - 1) * s + (k - 1) * d + 1 for o, k, s, d in zip(*window[1:5], strict=True)]
    behind = [max(r - n - b, 0) for r, n, b in zip(reach, window.size, window.begin, strict=True)]
    fill = kind(-np.inf if node.op_type == "MaxPool" else 0)
    pads = constant(np.array([0, 0, *window.begin, 0, 0, *behind], np.int64))
    nodes = [helper.make_node("Pad", [node.input[0], pads, constant(np.asarray(fill))], [f"{prefix}/padded"])]
    axes = constant(np.arange(2, 2 + len(window.size), dtype=np.int64))
    steps = constant(np.array(window.strides, np.int64))
    taps = []
    for index, offsets in enumerate(itertools.product(*map(range, window.kernel))):
        starts = np.array([t * d for t, d in zip(offsets, window.dilations, strict=True)], np.int64)
        ends = starts + [(o - 1) * s + 1 for o, s in zip(window.out, window.strides, strict=True)]
        taps.append(f"{prefix}/tap{index}")
        nodes.append(helper.make_node("Slice", [f"{prefix}/padded", constant(starts), constant(ends), axes, steps], [taps[-1]]))
    if node.op_type == "MaxPool":
        return [*nodes, helper.make_node("Max", taps, list(node.output), name=node.name)]
    share = constant((1 / _counts(window, bool(attribute(node, "count_include_pad", 0)))).astype(kind))
    nodes.append(helper.make_node("Sum", taps, [f"{prefix}/sum"]))
    return [*nodes, helper.make_node("Mul", [f"{prefix}/sum", share], list(node.output), name=node.name)]


def _counts(window: _Window, padded: bool) -> Array:
    """How many values each mean is of, (1, 1, *out): those inside the tensor, or inside its stated padding as well."""
    counts = np.ones([1, 1, *window.out])
    for axis, (size, out, kernel, stride, dilation, begin, end) in enumerate(zip(*window, strict=True)):
        places = np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - begin
        inside = (places >= -begin * padded) & (places < size + end * padded)
        counts = counts * inside.sum(1).reshape([-1 if one == axis else 1 for one in range(-2, len(window.out))])
    return np.maximum(counts, 1)

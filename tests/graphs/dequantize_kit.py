"""Quantized graphs, and what they and their float forms answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler.reading import check_model
from edgekit.errors import BackendError
from edgekit.graphs import exact_reference, to_float
from edgekit.runtime.golden import compare_arrays
from edgekit.runtime.onnxruntime import session

Array = np.ndarray[Any, Any]


def normal(*shape: int, scale: float = 0.2, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(0, scale, shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=f"{op}_{outputs.split()[0]}", **attributes)


def graph(nodes: list[Any], weights: dict[str, Any], x: list[Any] | None, opset: int = 17, **more: Any) -> onnx.ModelProto:
    """A model with input ``x`` and output ``y``, float unless ``x_type`` and ``y_type`` say else."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", more.get("x_type", TensorProto.FLOAT), x)],
        [helper.make_tensor_value_info("y", more.get("y_type", TensorProto.FLOAT), None)],
        [v if isinstance(v, onnx.TensorProto) else numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in more.get("domains", ()))]
    return helper.make_model(made, opset_imports=opsets, ir_version=10 if opset > 20 else 8)


def answers(data: bytes, feeds: dict[str, Array]) -> Array:
    found: Array = session(data).run(None, feeds)[0]
    return found


def truth(made: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    """What the quantized graph computes, on any machine."""
    try:
        return answers(exact_reference(made), feeds)
    except BackendError:  # no kernel for signed inputs and unsigned weights: the one for signed weights is exact then
        return answers(made.SerializeToString(), feeds)


def copied(made: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    return copy


def snr(a: Array, b: Array) -> float:
    return compare_arrays(a, b).snr_db


def brought_back(made: onnx.ModelProto, feeds: dict[str, Array]) -> tuple[onnx.ModelProto, float, float]:
    """The float graph; its SNR to the original in dB, and that of the rewrite with the rounding left in."""
    back, twin = copied(made), copied(made)
    assert to_float(back)[0]
    to_float(twin, rounding=True)
    check_model(back)
    expected = truth(made, feeds)
    return back, snr(expected, answers(back.SerializeToString(), feeds)), snr(expected, answers(exact_reference(twin), feeds))

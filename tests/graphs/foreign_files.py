"""Quantized files as ONNX Runtime's quantizer writes them, made from small float graphs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


def normal(*shape: int, scale: float = 0.2, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(0, scale, shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=f"{op}_{outputs.split()[0]}", **attributes)


def graph(nodes: list[Any], weights: dict[str, Array], x: list[Any], opset: int = 17, **more: Any) -> onnx.ModelProto:
    """A model with input ``x`` (float unless ``x_type`` says else) and output ``y``; ``y_type``, ``domains``."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", more.get("x_type", TensorProto.FLOAT), x)],
        [helper.make_tensor_value_info("y", more.get("y_type", TensorProto.FLOAT), None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in more.get("domains", ()))]
    return helper.make_model(made, opset_imports=opsets, ir_version=10 if opset > 20 else 8)


class Net(NamedTuple):
    model: onnx.ModelProto
    x: list[Any]


def conv_net() -> Net:
    """Conv, ReLU6, depthwise Conv, ReLU, residual Add, MaxPool, Concat, pools, Gemm."""
    nodes = [
        node("Conv", "x w1 b1", "c1", pads=[1] * 4), node("Clip", "c1 zero six", "r1"),
        node("Conv", "r1 w2 b2", "c2", pads=[1] * 4, group=8), node("Relu", "c2", "r2"),
        node("Conv", "r2 w3", "c3"), node("Add", "c3 r1", "s"), node("MaxPool", "s", "m", kernel_shape=[2, 2], strides=[2, 2]),
        node("Sigmoid", "m", "sg"), node("Mul", "m sg", "sw"), node("Concat", "m sw", "k", axis=1),
        node("LeakyRelu", "k", "lr", alpha=0.1), node("AveragePool", "lr", "ap", kernel_shape=[3, 3], strides=[1, 1]),
        node("GlobalAveragePool", "ap", "gp"), node("Flatten", "gp", "f"), node("Gemm", "f w4 b4", "g", transB=1),
        node("Softmax", "g", "y", axis=1),
    ]  # fmt: skip
    weights = {
        "w1": normal(8, 3, 3, 3), "b1": normal(8), "w2": normal(8, 1, 3, 3), "b2": normal(8, seed=1), "w3": normal(8, 8, 1, 1),
        "w4": normal(10, 16, scale=1), "b4": normal(10), "zero": np.float32(0), "six": np.float32(6),
    }  # fmt: skip
    return Net(graph(nodes, weights, ["n", 3, 16, 16]), ["n", 3, 16, 16])


def mlp() -> Net:
    nodes = [
        node("MatMul", "x w1", "a"), node("Add", "a b1", "h"), node("Relu", "h", "r"), node("MatMul", "r w2", "c"),
        node("Add", "c b2", "y"),
    ]  # fmt: skip
    weights = {"w1": normal(32, 64), "b1": normal(64), "w2": normal(64, 10), "b2": normal(10)}
    return Net(graph(nodes, weights, ["n", 32]), ["n", 32])


def lstm() -> Net:
    nodes = [
        node("Transpose", "x", "t", perm=[1, 0, 2]), node("LSTM", "t w r b", "h", hidden_size=24, direction="bidirectional"),
        node("Squeeze", "hh axes", "q"), node("MatMul", "q v", "y"),
    ]  # fmt: skip
    nodes[2] = node("ReduceSum", "h axes", "q", keepdims=0)
    weights = {
        "w": normal(2, 96, 12), "r": normal(2, 96, 24), "b": normal(2, 192), "axes": np.array([1]),
        "v": normal(24, 6, scale=0.5),
    }  # fmt: skip
    return Net(graph(nodes, weights, ["n", 10, 12]), ["n", 10, 12])


NETS = {"conv": conv_net, "mlp": mlp, "lstm": lstm}


def samples(x: list[Any], count: int = 8, batch: int = 4) -> list[dict[str, Array]]:
    size = [batch if isinstance(axis, str) else axis for axis in x]
    return [{"x": np.random.default_rng(i).normal(size=size).astype(np.float32)} for i in range(count)]


def quantized_file(net: str, kind: str, path: Path, **options: Any) -> Path:
    """``kind``: QDQ, QOperator (static) or dynamic. The file's path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, batches: list[dict[str, Array]]) -> None:
            self._batches: Iterator[dict[str, Array]] = iter(batches)

        def get_next(self) -> Any:
            return next(self._batches, None)

    made = NETS[net]()
    source = path.with_name(f"{path.stem}.float.onnx")
    onnx.save(onnx.shape_inference.infer_shapes(made.model), source)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it advises to preprocess
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "dynamic":
                q.quantize_dynamic(source, path, **options)
            else:
                given = {"activation_type": q.QuantType.QUInt8, "weight_type": q.QuantType.QInt8, **options}
                q.quantize_static(source, path, Reader(samples(made.x)), quant_format=q.QuantFormat[kind], **given)
    finally:
        logging.getLogger().setLevel(level)
    return path

"""Quantized graphs from elsewhere, brought back to float: as ONNX Runtime's quantizer writes them."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

import edgekit
from edgekit.graphs import is_explicit, quantized_nodes, to_float
from edgekit.runtime import check_golden

from .dequantize_kit import Array, answers, brought_back, graph, node, normal, snr, truth


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
            given = {k: v for k, v in options.items() if k not in ("weight", "activation")}
            given["weight_type"] = q.QuantType[options.get("weight", "QInt8")]
            if kind == "dynamic":
                q.quantize_dynamic(source, path, **given)
            else:
                given["activation_type"] = q.QuantType[options.get("activation", "QUInt8")]
                q.quantize_static(source, path, Reader(samples(made.x)), quant_format=q.QuantFormat[kind], **given)
    finally:
        logging.getLogger().setLevel(level)
    return path


SYMMETRIC = {"activation": "QInt8", "per_channel": True, "extra_options": {"ActivationSymmetric": True}}

FILES = [
    *((net, kind, options) for net in ("conv", "mlp") for kind in ("QDQ", "QOperator")
      for options in ({}, {"per_channel": True}, {"weight": "QUInt8"}, SYMMETRIC)),
    *((net, "dynamic", options) for net in NETS for options in ({}, {"per_channel": True}, {"weight": "QUInt8"})),
]  # fmt: skip


@pytest.mark.parametrize(("net", "kind", "options"), FILES)
def test_files_of_onnx_runtimes_quantizer(tmp_path: Path, net: str, kind: str, options: dict[str, Any]) -> None:
    made = onnx.load(quantized_file(net, kind, tmp_path / "q.onnx", **options))
    feeds = samples(NETS[net]().x)[3]
    back, plain, emulated = brought_back(made, feeds)
    assert not quantized_nodes(back)
    assert {entry.domain for entry in back.opset_import} <= {"", "ai.onnx"}
    assert emulated > 60
    assert plain > 27
    # What is lost in quantizing is the weights' rounding: nearer to the float model it was made from than the file is.
    original = answers((tmp_path / "q.float.onnx").read_bytes(), feeds)
    assert snr(original, answers(back.SerializeToString(), feeds)) > snr(original, truth(made, feeds)) - 1


def builds(graph: bytes, shape: list[Any]) -> bool:
    """TensorRT-RTX builds it for SM 8.9."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(graph), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *[tuple(n if isinstance(axis, str) else axis for axis in shape) for n in (1, 4, 8)])
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize(
    ("net", "kind", "options"),
    [
        ("conv", "QDQ", {}),
        ("conv", "QOperator", {"per_channel": True}),
        ("conv", "dynamic", {}),
        ("mlp", "QOperator", {"weight": "QUInt8"}),
        ("lstm", "dynamic", {"per_channel": True}),
        ("conv", "QDQ", SYMMETRIC),
    ],
)
def test_import_quantize_build(tmp_path: Path, net: str, kind: str, options: dict[str, Any]) -> None:
    path = quantized_file(net, kind, tmp_path / "q.onnx", **options)
    bundle = edgekit.import_onnx(path, out=tmp_path / "b.edge")
    imported = bundle.read("model.onnx")
    figures, notes = bundle.manifest.history[-1].figures, " ".join(bundle.manifest.history[-1].figures["notes"])
    assert check_golden(bundle).relative <= 1e-4
    kept = options is SYMMETRIC
    assert bool(quantized_nodes(onnx.load_model_from_string(imported))) == kept
    if kept:
        assert "3 int32 biases became float" in notes
    else:
        assert figures["quantized_snr_db"] > 25
        assert figures["emulated_snr_db"] > 60
        assert f"{figures['quantized_snr_db']} dB between them" in notes
    folder = tmp_path / "calib"
    folder.mkdir()
    for i, feeds in enumerate(samples(NETS[net]().x, 16, 1)):
        np.savez(folder / f"{i}.npz", **feeds)
    written = edgekit.quantize(bundle, out=tmp_path / "b8.edge", calib=folder)
    int8 = onnx.load_model_from_string(written.read("model.int8.onnx"))
    assert is_explicit(int8)
    assert snr(answers((tmp_path / "q.float.onnx").read_bytes(), samples(NETS[net]().x)[1]),
               answers(int8.SerializeToString(), samples(NETS[net]().x)[1])) > 20  # fmt: skip
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        assert builds(imported, NETS[net]().x)
        assert builds(int8.SerializeToString(), NETS[net]().x)


def test_float_graphs_stay_as_they_are() -> None:
    for net in NETS.values():
        made = net().model
        before = made.SerializeToString()
        assert to_float(made) == (False, [])
        assert made.SerializeToString() == before

"""What the layers carry: dead channels, saturation, the axis of the channels, and the ranges that calibration saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper

from edgekit.bundle import CALIBRATION, FLOAT_GRAPH, Bundle
from edgekit.data import load
from edgekit.explanation import explain
from edgekit.manifest import ImagePreprocessing


def test_dead_channels_and_saturation_are_counted(tmp_path: Path, digits_bundle: Bundle, digit: Path) -> None:
    """Conv with a silent channel, then Clip at 0.5, then int8 with a scale that cuts a half off."""
    weight = np.zeros((3, 1, 1, 1), np.float32)
    weight[0], weight[1] = 1.0, 0.5
    constants = {
        "w": weight,
        "low": np.float32(0),
        "high": np.float32(0.5),
        "s": np.float32(0.25 / 127),
        "r": np.float32(1 / 48),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Clip", ["c", "low", "high"], ["k"], name="clip"),
        helper.make_node("Mul", ["k", "r"], ["m"], name="mul"),
        helper.make_node("Mul", ["c", "r"], ["e"], name="even"),
        helper.make_node("QuantizeLinear", ["e", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"),
        helper.make_node("Add", ["d", "m"], ["a"], name="add"),
        helper.make_node("GlobalAveragePool", ["a"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["y"], name="flatten"),
    ]
    initializers = [helper.make_tensor(k, 1, v.shape, v.tobytes(), raw=True) for k, v in constants.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 1, 28, 28])],
        [helper.make_tensor_value_info("y", 1, ["n", 3])],
        [*initializers, helper.make_tensor("z", 3, [], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    spec = ImagePreprocessing(28, 28, 1, (0.0,), (1 / 24,))
    with Bundle.create(tmp_path / "dead.edge") as draft:
        draft.write(FLOAT_GRAPH, model.SerializeToString())
        draft.manifest = msgspec.structs.replace(
            digits_bundle.manifest, labels=("a", "b", "c"), golden={}, name="dead", preprocessing=spec
        )
    layers = {
        row["name"]: row for row in explain(tmp_path / "dead.edge", digit, out=tmp_path / "w", method="activations")["layers"]
    }
    x = load("digits").test.read(420) / 255 * 24
    assert layers["conv"]["dead_channels"] == [2]
    assert layers["conv"]["saturated"] is None
    assert layers["clip"]["saturated"] == pytest.approx(((x >= 0.4995).mean() + (x / 2 >= 0.4995).mean()) / 3)
    scaled = np.stack([x, x / 2]) / 48 / (0.25 / 127)
    assert layers["even"]["saturated"] == pytest.approx((scaled > 127.5).sum() / (3 * x.size))  # at 127 nothing is lost
    assert layers["clip"]["high"] == 0.5
    assert layers["pool"]["dead"] is None  # one value a channel: nobody can say


def test_channels_of_tokens_are_the_last_axis_and_attention_has_none(
    tmp_path: Path, digits_bundle: Bundle, digit: Path
) -> None:
    """49 tokens of 16 pixels, to 6 features of which two are dead, to 2 heads of 3."""
    weight = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    weight[:, [1, 4]] = 0
    constants = {"w": weight, "tokens": np.array([0, 49, 16]), "heads": np.array([0, 49, 2, 3]), "two": np.array([0, 2, -1])}
    nodes = [
        helper.make_node("Reshape", ["x", "tokens"], ["t"]),
        helper.make_node("MatMul", ["t", "w"], ["f"], name="features"),
        helper.make_node("Relu", ["f"], ["r"], name="relu"),
        helper.make_node("Reshape", ["r", "heads"], ["h"]),
        helper.make_node("Transpose", ["h"], ["s"], perm=[0, 2, 1, 3]),
        helper.make_node("Neg", ["s"], ["a"], name="heads"),
        helper.make_node("Reshape", ["a", "two"], ["d"]),
        helper.make_node("ReduceMean", ["d"], ["y"], name="mean", axes=[2], keepdims=0),
    ]
    ends = [helper.make_tensor_value_info("x", 1, ["n", 1, 28, 28]), helper.make_tensor_value_info("y", 1, ["n", 2])]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with Bundle.create(tmp_path / "tokens.edge") as draft:
        draft.write(FLOAT_GRAPH, model.SerializeToString())
        draft.manifest = msgspec.structs.replace(digits_bundle.manifest, labels=("a", "b"), golden={}, name="tokens")
    rows = explain(tmp_path / "tokens.edge", digit, out=tmp_path / "w", method="activations")["layers"]
    layers = {row["name"]: row for row in rows}
    for name in ("features", "relu"):
        assert (layers[name]["channels"], layers[name]["dead_channels"]) == (6, [1, 4])
    assert (layers["heads"]["shape"], layers["heads"]["channels"], layers["heads"]["dead"]) == ("2x49x3", None, None)
    assert layers["heads"]["high"] == 0
    assert layers["mean"]["channels"] == 2


def test_values_beyond_the_calibrated_range_are_counted_and_said(
    cli: Callable[..., Any], digits_bundle: Bundle, digits_graph: bytes, digit: Path, tmp_path: Path
) -> None:
    def write(name: str, calibration: str) -> Path:
        with Bundle.create(tmp_path / name) as draft:
            draft.write(FLOAT_GRAPH, digits_graph)
            draft.write(CALIBRATION, calibration.encode())
            draft.manifest = msgspec.structs.replace(digits_bundle.manifest, golden={}, name="calibrated")
        return tmp_path / name

    record = {
        "tensors": {"x": {"minimum": -9, "maximum": 9, "scale": 1}, "r1": {"minimum": 0, "maximum": 0.5, "scale": 1}},
        "groups": {"r1": "r1", "r2": "r1", "c2": "gone"},
    }
    asked = (write("calibrated.edge", json.dumps(record)), digit, "--out", tmp_path / "why", "--method", "activations")
    answer = cli("explain", *asked, "--json")
    assert answer.code == 0, answer.err
    layers = {layer["name"]: layer for layer in answer.json["layers"]}
    assert list(layers) == ["x", "conv1", "relu1", "conv2", "relu2", "gemm"]
    assert (layers["x"]["beyond"], layers["x"]["note"]) == (0, None)
    assert (layers["conv1"]["beyond"], layers["conv2"]["beyond"], layers["gemm"]["note"]) == (None, None, None)
    assert layers["relu1"]["high"] > 0.5
    assert 0 < layers["relu1"]["beyond"] < 1
    assert layers["relu2"]["calibrated_high"] == 0.5  # the range of its group
    assert "calibration saw 0 to 0.5" in layers["relu1"]["note"]
    assert f"relu1: {layers['relu1']['note']}" in cli("explain", *asked).out
    damaged = cli("explain", write("damaged.edge", "[]"), *asked[1:])
    assert (damaged.code, "quantize the bundle again" in damaged.err) == (1, True)

"""PyTorch runs ONNX graphs as ONNX Runtime does."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgekit.models import PRESETS
from edgekit.models.export import export_onnx
from edgekit.quantization.simulate import Simulator
from edgekit.quantization.torch_graph import TorchGraph

from .torch_runs import Array, build, contents, ints, node, normal, torch_run


def assert_same(graph: bytes, x: Array) -> None:
    """PyTorch answers as ONNX Runtime, and the graph that was read is the graph that is written."""
    model = onnx.load_model_from_string(graph)
    module = TorchGraph(model)
    assert contents(module.export()) == contents(model)
    found, expected = torch_run(module, x), Simulator(model)({"x": x})
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(value).max())))


IMAGE = ["n", 4, 9, 8]

SEQUENCE = ["t", "n", 5]


#: name -> nodes, constants, shape of x, opset
SINGLE: dict[str, tuple[list[Any], dict[str, Array], list[Any], int]] = {
    "conv, uneven pads": (
        [node("Conv", "x w b", "y", pads=[0, 1, 1, 2], strides=[2, 1], dilations=[1, 2])],
        {"w": normal(6, 4, 3, 3), "b": normal(6)}, IMAGE, 17,
    ),
    "grouped conv, same upper": (
        [node("Conv", "x w", "y", auto_pad="SAME_UPPER", strides=[2, 2], group=2)], {"w": normal(6, 2, 3, 3)}, IMAGE, 17,
    ),
    "transposed conv": (
        [node("ConvTranspose", "x w b", "y", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1], group=2)],
        {"w": normal(4, 3, 3, 3), "b": normal(6)}, IMAGE, 17,
    ),
    "transposed conv, uneven pads": (
        [node("ConvTranspose", "x w", "y", strides=[2, 2], pads=[0, 1, 1, 0])], {"w": normal(4, 3, 3, 3)}, IMAGE, 17,
    ),
    "batch norm": (
        [node("BatchNormalization", "x g b m v", "y", epsilon=1e-3)],
        {"g": normal(4), "b": normal(4, seed=1), "m": normal(4, seed=2), "v": np.abs(normal(4, seed=3)) + 0.1}, IMAGE, 17,
    ),
    "gemm": (
        [node("Flatten", "x", "f"), node("Gemm", "f w b", "y", transB=1, alpha=0.5, beta=2.0)],
        {"w": normal(7, 4 * 72), "b": normal(7)}, IMAGE, 17,
    ),
    "max pool, ceil": ([node("MaxPool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], {}, IMAGE, 17),
    "max pool, pads": ([node("MaxPool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 1])], {}, IMAGE, 17),
    "average pool, pads": ([node("AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1, 0, 1, 1])], {}, IMAGE, 17),
    "average pool, pads counted": (
        [node("AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)], {}, IMAGE, 17,
    ),
    "global pool": ([node("GlobalAveragePool", "x", "y")], {}, IMAGE, 17),
    "layer norm over two axes": (
        [node("LayerNormalization", "x g b", "y", axis=2)], {"g": normal(9, 8), "b": normal(9, 8, seed=1)}, IMAGE, 17,
    ),
    "activations": (
        [
            node("HardSwish", "x", "a"), node("HardSigmoid", "a", "b", alpha=0.3), node("LeakyRelu", "x", "c", alpha=0.2),
            node("Tanh", "c", "d"), node("Sigmoid", "d", "e"), node("Erf", "e", "f"), node("Clip", "x _ top", "g"),
            node("Max", "b f g", "h"), node("Min", "h x", "i"), node("Softmax", "i", "y", axis=1),
        ],
        {"top": np.float32(0.4)}, IMAGE, 17,
    ),
    "arithmetic": (
        [
            node("Mul", "x x", "a"), node("Add", "a one", "b"), node("Sqrt", "b", "c"), node("Div", "x c", "d"),
            node("Pow", "d two", "e"), node("Exp", "e", "f"), node("Neg", "f", "g"), node("Sub", "g x", "h"),
            node("Equal", "x x", "i"), node("Where", "i h x", "j"), node("Cast", "j", "k", to=6), node("Cast", "k", "y", to=1),
        ],
        {"one": np.float32(1), "two": np.float32(2)}, IMAGE, 17,
    ),
    "gelu": ([node("Gelu", "x", "a"), node("Gelu", "a", "y", approximate="tanh")], {}, IMAGE, 20),
    "reductions": (
        [
            node("ReduceMean", "x", "a", axes=[2]), node("ReduceMax", "x", "b", axes=[-1, 1]),
            node("ReduceSum", "x axes", "c", keepdims=0), node("Mul", "a b", "d"), node("Mul", "d c", "y"),
        ],
        {"axes": ints(1, 2, 3)[:0]}, IMAGE, 17,
    ),
    "slices": (
        [
            node("Slice", "x s e a t", "b"), node("Split", "b parts", "c d", axis=1), node("Concat", "d c", "f", axis=1),
            node("Transpose", "f", "g", perm=[0, 3, 1, 2]), node("Squeeze", "one", "h"), node("Unsqueeze", "h last", "i"),
            node("Mul", "g i", "y"),
        ],
        {
            "s": ints(-1, 1), "e": ints(-100, 1 << 60), "a": ints(3, 2), "t": ints(-2, 3), "parts": ints(1, 3),
            "one": normal(1, 1), "last": ints(0, -1),
        }, IMAGE, 17,
    ),
    "shapes of a dynamic batch": (
        [
            node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Concat", "n rest", "t", axis=0),
            node("Reshape", "x t", "r"), node("ConstantOfShape", "t2", "o", value=numpy_helper.from_array(normal(1))),
            node("Expand", "o s2", "p"), node("Reshape", "x keep", "q"), node("Concat", "r q p", "y", axis=1),
        ],
        {"zero": ints(0), "rest": ints(4, -1), "t2": ints(1, 72), "s2": ints(3, 1, 72), "keep": ints(0, 0, 72)}, IMAGE, 17,
    ),
    "embedding": (
        [node("Cast", "x", "i", to=7), node("Gather", "w i", "y", axis=1)], {"w": normal(3, 5)}, IMAGE, 17,
    ),
    "pad": (
        [node("Pad", "x p v", "a"), node("Pad", "a p", "b", mode="reflect"), node("Pad", "b p", "y", mode="edge")],
        {"p": ints(0, 0, 1, 2, 0, 0, 0, 1), "v": np.float32(0.5)}, IMAGE, 17,
    ),
    "resize": (
        [
            node("Resize", "x _ scales", "a", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
            node("Resize", "a _ _ sizes", "b", mode="nearest"), node("Resize", "b _ scales", "y", mode="linear"),
        ],
        {"scales": np.array([1, 1, 2, 1.5], np.float32), "sizes": ints(3, 4, 7, 30)}, IMAGE, 17,
    ),
    "lstm, both directions": (
        [node("LSTM", "x w r b _ h c", "s p q", hidden_size=6, direction="bidirectional"), node("Transpose", "s", "y")],
        {
            "w": normal(2, 24, 5), "r": normal(2, 24, 6), "b": normal(2, 48),
            "h": np.repeat(normal(2, 1, 6), 3, 1), "c": np.repeat(normal(2, 1, 6, seed=1), 3, 1),
        }, SEQUENCE, 17,
    ),
    "lstm, reverse": (
        [node("LSTM", "x w r", "s y", hidden_size=6, direction="reverse")],
        {"w": normal(1, 24, 5), "r": normal(1, 24, 6)}, SEQUENCE, 17,
    ),
    "gru, reset before": (
        [node("GRU", "x w r b", "y", hidden_size=6, direction="bidirectional")],
        {"w": normal(2, 18, 5), "r": normal(2, 18, 6), "b": normal(2, 36)}, SEQUENCE, 17,
    ),
    "gru, reset after": (
        [node("GRU", "x w r b", "y", hidden_size=6, linear_before_reset=1)],
        {"w": normal(1, 18, 5), "r": normal(1, 18, 6), "b": normal(1, 36)}, SEQUENCE, 17,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_operators_are_those_of_onnx(name: str) -> None:
    nodes, known, x, opset = SINGLE[name]
    size = [3 if isinstance(axis, str) else axis for axis in x]
    assert_same(build(nodes, known, x, opset=opset), normal(*size, scale=1.0, seed=7))


#: preset -> its arguments, shape of x (of integers for text)
SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "depthwise": ({"height": 16, "width": 16, "widths": (8, 16), "depths": (2,)}, (1, 16, 16)),
    "vit": ({"dim": 24, "depth": 1}, (1, 28, 28)),
    "lstm-text": ({"vocabulary": 50, "length": 12, "width": 16}, (12,)),
}


def assert_same_without_weights(made: Any, known: dict[str, Array], x: Array, opset: int = 19) -> None:
    """One node of "x" -> "y"."""
    model = onnx.load_model_from_string(build([made], known, list(x.shape), opset=opset))
    found, expected = torch_run(TorchGraph(model), x)["y"], Simulator(model)({"x": x})["y"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("where", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("mode", ["linear", "floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
def test_resize_is_that_of_onnx_at_uneven_factors(where: str, mode: str) -> None:
    attributes = {"mode": "linear"} if mode == "linear" else {"mode": "nearest", "nearest_mode": mode}
    attributes["coordinate_transformation_mode"] = where
    for shape in ((7,), (10, 5), (3, 4, 5)):
        x = normal(1, 2, *shape)
        for factor in (0.34, 0.7, 1.5, 2.3):
            scales = np.array([1, 1, *[factor] * (len(shape) - 1), 1.4], np.float32)
            assert_same_without_weights(node("Resize", "x _ s", "y", **attributes), {"s": scales}, x)
            sizes = ints(1, 2, *[max(1, round(size * factor)) for size in shape])
            assert_same_without_weights(node("Resize", "x _ _ s", "y", **attributes), {"s": sizes}, x)


@pytest.mark.parametrize("mode", ["round_prefer_floor", "round_prefer_ceil"])
def test_what_lies_in_the_middle_of_two_pixels_is_rounded_as_onnx_runtime_rounds_it(mode: str) -> None:
    """7 / 4 and 28 / 23 are no floats: 3.4999998 and 14.500001 stand for 3.5 and 14.5, and 28.500002 for itself."""
    made = node("Resize", "x _ _ s", "y", nearest_mode=mode, coordinate_transformation_mode="asymmetric")
    for size, target in ((7, 4), (7, 38), (23, 28), (38, 12), (26, 28)):
        assert_same_without_weights(made, {"s": ints(1, 1, target)}, np.arange(size, dtype=np.float32)[None, None])


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1]])
def test_under_ceil_mode_a_window_in_the_padding_is_dropped(op: str, pads: list[int]) -> None:
    for size, kernel, stride in ((5, 2, 2), (6, 2, 2), (5, 2, 3), (6, 3, 3), (7, 3, 2), (8, 3, 4)):
        for more in ({}, {"count_include_pad": 1}) if op == "AveragePool" else ({}, {"dilations": [2, 1]}):
            shape = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": pads, "ceil_mode": 1}
            assert_same_without_weights(node(op, "x", "y", **shape, **more), {}, normal(1, 2, size, size + 1))


@pytest.mark.parametrize("name", SMALL)
def test_presets_run_alike(name: str) -> None:
    args, shape = SMALL[name]
    home, _, preset = PRESETS[name].home.partition(":")
    torch.manual_seed(0)
    module = getattr(importlib.import_module(home), preset)(5, **PRESETS[name].args, **args)
    text = "vocabulary" in args
    x = np.random.default_rng(0).integers(0, 50, (3, *shape)) if text else normal(3, *shape, scale=1.0)
    graph = export_onnx(module, torch.tensor(x[:2]))
    assert_same(graph, x)
    # On another device no node mixes it with the CPU: torch's device without values would raise.
    elsewhere = TorchGraph(onnx.load_model_from_string(graph)).to("meta")({"x": torch.tensor(x, device="meta")})["y"]
    assert elsewhere.shape == (3, 5)

"""A layer as a matrix product: its rows give what ONNX Runtime computes, whatever the geometry."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.quantization.graph import quantized_weight, scaled_weight
from edgekit.quantization.placement import Layer, place
from edgekit.quantization.simulate import Simulator
from edgekit.quantization.unfold import Unfolding, unfolding

Array = np.ndarray[Any, Any]
EVERY = 10**6


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(0, 1, shape).astype(np.float32)


def layer_model(
    op: str, weight: Array, bias: Array | None, rank: int, left: bool = False, **attributes: Any
) -> onnx.ModelProto:
    """One layer from ``x`` to ``y``."""
    names = ["w", "x"] if left else ["x", "w"]
    graph = helper.make_graph(
        [helper.make_node(op, [*names, *(["b"] if bias is not None else [])], ["y"], name="layer", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(v, k) for k, v in (("w", weight), ("b", bias)) if v is not None],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def unfolded(model: onnx.ModelProto) -> tuple[Unfolding | None, Layer]:
    layer = place(model).layers[0]
    return unfolding(layer, model.graph.node[0], tuple(model.graph.initializer[0].dims)), layer


def assert_unfolds(model: onnx.ModelProto, weight: Array, bias: Array | None, x: Array, limit: int = EVERY) -> Unfolding:
    """Rows times matrix plus bias are the operator's outputs; all of them where ``limit`` is high. And the inverses."""
    shape, layer = unfolded(model)
    assert shape is not None
    y = Simulator(model)({"x": x})["y"]
    matrix = shape.matrix(weight)
    assert matrix.dtype == np.float64
    rows, expected = shape.rows(x, y, limit, 3)
    outputs = matrix.shape[2]
    places = y.size // (shape.groups * outputs)
    assert rows.shape == (shape.groups, min(limit, places), shape.inputs)
    assert matrix.shape == (shape.groups, shape.inputs, outputs)
    added = 0.0 if bias is None else shape.output_scales(bias.astype(np.float64))[:, None, :]
    np.testing.assert_allclose(rows.astype(np.float64) @ matrix + added, expected, rtol=1e-4, atol=1e-4)
    if limit >= places:  # no output is missed, none comes twice
        np.testing.assert_array_equal(np.sort(expected, axis=None), np.sort(y, axis=None))
    again = shape.rows(x, y, limit, 3)
    np.testing.assert_array_equal(again[0], rows)
    np.testing.assert_array_equal(shape.weight(matrix), weight)
    assert_scales_agree(shape, layer, weight)
    return shape


def assert_scales_agree(shape: Unfolding, layer: Layer, weight: Array) -> None:
    """Scales by weight channel and factors by data channel are, unfolded, what the Q/DQ graph does with them."""
    channels = weight.shape[layer.axis]
    scales = np.linspace(0.01, 0.05, channels).astype(np.float32)
    wide = shape.output_scales(scales)
    np.testing.assert_array_equal(shape.channel_scales(wide), scales)
    np.testing.assert_allclose(shape.bias(wide.astype(np.float64)), scales, rtol=1e-12)
    q = quantized_weight(weight, scales, layer.axis)
    broadcast = scales.reshape([-1 if i == layer.axis else 1 for i in range(weight.ndim)])
    np.testing.assert_allclose(shape.matrix(q * broadcast), shape.matrix(q) * wide[:, None, :], rtol=1e-6)
    assert shape.weight(shape.matrix(q).astype(np.int8)).dtype == np.int8
    factor = np.linspace(0.5, 2.0, shape.channels).astype(np.float32)
    divided = shape.matrix(scaled_weight(weight, layer, factor))
    np.testing.assert_allclose(divided, shape.matrix(weight) / shape.per_input(factor)[:, :, None], rtol=1e-6)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[onnx.ModelProto, Array, Array | None, Array]:
    space = draw(st.integers(1, 3))
    each = st.integers
    groups, inner, outer = draw(each(1, 3)), draw(each(1, 3)), draw(each(1, 2))
    taps, strides, dilations = ([draw(each(1, most)) for _ in range(space)] for most in (4, 3, 2))
    pads = [draw(each(0, 2)) for _ in range(2 * space)]
    sizes = []
    for i in range(space):
        least = dilations[i] * (taps[i] - 1) + 1 - pads[i] - pads[i + space]
        sizes.append(max(least, 1) + draw(each(0, 4)))
    weight = normal(groups * outer, inner, *taps)
    bias = normal(groups * outer, seed=1) if draw(st.booleans()) else None
    stated = {"strides": strides, "dilations": dilations, "pads": pads}
    dropped = {name for name, usual in (("strides", 1), ("dilations", 1), ("pads", 0)) if set(stated[name]) == {usual}}
    attributes = {name: value for name, value in stated.items() if name not in dropped}
    if "pads" in dropped and draw(st.booleans()):
        attributes["auto_pad"] = "VALID"
    model = layer_model("Conv", weight, bias, space + 2, group=groups, **attributes)
    return model, weight, bias, normal(draw(each(1, 3)), groups * inner, *sizes, seed=2)


@settings(max_examples=120, deadline=None)
@given(convolutions(), st.sampled_from([EVERY, EVERY, 7]))
def test_convolutions(case: tuple[onnx.ModelProto, Array, Array | None, Array], limit: int) -> None:
    model, weight, bias, x = case
    assert_unfolds(model, weight, bias, x, limit)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_transposed_convolutions_whose_taps_do_not_overlap(taps: list[int], inputs: int, outputs: int, biased: bool) -> None:
    weight, bias = normal(inputs, outputs, *taps), normal(outputs, seed=1) if biased else None
    model = layer_model("ConvTranspose", weight, bias, len(taps) + 2, strides=taps)
    assert_unfolds(model, weight, bias, normal(2, inputs, *range(2, 2 + len(taps)), seed=2))
    assert_unfolds(model, weight, bias, normal(2, inputs, *range(2, 2 + len(taps)), seed=2), limit=3)


@pytest.mark.parametrize("across", [0, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_gemm(across: int, biased: bool) -> None:
    weight = normal(5, 7) if across else normal(7, 5)
    bias = normal(5, seed=1) if biased else None
    shape = assert_unfolds(layer_model("Gemm", weight, bias, 2, transB=across), weight, bias, normal(9, 7))
    assert shape.channels == shape.inputs == 7


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (2, 1, 4)])
def test_matmul_with_batch_axes(batch: tuple[int, ...]) -> None:
    weight, x = normal(7, 5), normal(*batch, 7)
    assert_unfolds(layer_model("MatMul", weight, None, x.ndim), weight, None, x)
    if np.prod(batch) > 4:
        assert_unfolds(layer_model("MatMul", weight, None, x.ndim), weight, None, x, limit=4)


def test_rows_are_drawn_by_the_seed_and_none_twice() -> None:
    weight, x = normal(3, 2, 3, 3), np.arange(2 * 2 * 12 * 12, dtype=np.float32).reshape(2, 2, 12, 12)
    model = layer_model("Conv", weight, None, 4)
    shape, _ = unfolded(model)
    assert shape is not None
    y = Simulator(model)({"x": x})["y"]
    drawn = [shape.rows(x, y, 50, seed)[0][0] for seed in range(2)]
    assert all(len(np.unique(rows[:, 0])) == 50 for rows in drawn)
    assert not np.array_equal(*drawn)


def test_channels_of_data_are_those_of_the_rows() -> None:
    weight, x = normal(4, 2, 3, 3), normal(2, 4, 6, 6)  # two groups
    model = layer_model("Conv", weight, None, 4, group=2, strides=[2, 2])
    shape, _ = unfolded(model)
    assert shape is not None
    assert shape.channels == 4
    rows = shape.channel_rows(x)
    assert rows.shape == (72, 4)
    np.testing.assert_array_equal(rows[:, 2], x[:, 2].ravel())
    shift = np.arange(4, dtype=np.float32)
    y = Simulator(model)({"x": x})["y"]
    moved = shape.rows(x - shift[:, None, None], y, EVERY, 0)[0]
    np.testing.assert_array_equal(moved, shape.rows(x, y, EVERY, 0)[0] - shape.per_input(shift)[:, None])


ODD: dict[str, tuple[str, tuple[int, ...], int, dict[str, Any]]] = {
    "overlapping taps": ("ConvTranspose", (2, 3, 3, 3), 4, {"strides": [2, 2]}),
    "taps that leave gaps": ("ConvTranspose", (2, 3, 2, 2), 4, {"strides": [3, 3]}),
    "transposed groups": ("ConvTranspose", (4, 3, 2, 2), 4, {"strides": [2, 2], "group": 2}),
    "transposed pads": ("ConvTranspose", (2, 3, 2, 2), 4, {"strides": [2, 2], "pads": [1, 0, 0, 1]}),
    "transposed dilations": ("ConvTranspose", (2, 3, 2, 2), 4, {"strides": [2, 2], "dilations": [2, 2]}),
    "output padding": ("ConvTranspose", (2, 3, 2, 2), 4, {"strides": [2, 2], "output_padding": [1, 1]}),
    "output shape": ("ConvTranspose", (2, 3, 2, 2), 4, {"strides": [2, 2], "output_shape": [9, 9]}),
    "same padding": ("Conv", (3, 2, 3, 3), 4, {"auto_pad": "SAME_UPPER"}),
    "negative pads": ("Conv", (3, 2, 3, 3), 4, {"pads": [-1, 0, 0, 0]}),
    "transposed data": ("Gemm", (7, 5), 2, {"transA": 1}),
    "left weights": ("MatMul", (7, 5), 3, {"left": True}),
    "batches of weights": ("MatMul", (2, 7, 5), 3, {}),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_only_rounded(name: str) -> None:
    op, dims, rank, attributes = ODD[name]
    shape, layer = unfolded(layer_model(op, normal(*dims), None, rank, **attributes))
    assert layer.op == op
    assert shape is None

"""Quantization-aware training: PyTorch runs ONNX graphs as ONNX Runtime does, and what is trained there is what is written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.errors import GraphError, UsageError
from edgekit.models import PRESETS
from edgekit.models.export import export_onnx
from edgekit.quantization.graph import Parameters, insert
from edgekit.quantization.placement import place, weights_of
from edgekit.quantization.prepare import prepare
from edgekit.quantization.qat import fine_tune, originals
from edgekit.quantization.rounding import weight_scales
from edgekit.quantization.samples import Samples
from edgekit.quantization.simulate import Noise, Simulator, observe
from edgekit.quantization.statistics import METHODS, scale_of
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


def quantized(graph: bytes, batch: list[Array], scale_by: float = 1.0) -> bytes:
    """Everything int8, by the largest values seen; ``scale_by`` spoils the activations' scales."""
    prepared = prepare(graph)
    placement = place(prepared)
    seen = observe(prepared, dict.fromkeys(placement.groups, 1), lambda: [{"x": x} for x in batch], 1 << 20)
    scales = {g: scale_by * scale_of(METHODS["minmax"](seen[g])) for g in dict.fromkeys(placement.groups.values())}
    axes = {layer.name: layer.axis for layer in placement.layers}
    weights = {name: weight_scales(w, axes[name], "minmax") for name, w in weights_of(prepared, placement).items()}
    data: bytes = insert(prepared, placement, Parameters(scales, weights), list(axes)).SerializeToString()
    return data


def small_net() -> bytes:
    """A convolution, a depthwise one with a residual, a shared MatMul and its bias, a classifier: (n, 3, 8, 8) -> (n, 5)."""
    nodes = [
        node("Conv", "x w1 b1", "a", pads=[1] * 4), node("Relu", "a", "r"),
        node("Conv", "r w2", "c", pads=[1] * 4, group=8), node("Add", "c r", "s"),
        node("ReduceMean", "s", "m", axes=[2, 3], keepdims=0), node("MatMul", "m w3", "d"), node("Add", "d b3", "e"),
        node("Relu", "e", "f"), node("MatMul", "f w3", "g"), node("Gemm", "g w4 b4", "y", transB=1),
    ]  # fmt: skip
    known = {
        "w1": normal(8, 3, 3, 3), "b1": normal(8, seed=1), "w2": normal(8, 1, 3, 3), "w3": normal(8, 8), "b3": normal(8),
        "w4": normal(5, 8), "b4": normal(5),
    }  # fmt: skip
    return build(nodes, known, ["n", 3, 8, 8])


def samples_of(x: Array, targets: Array | None = None, batchable: bool = True) -> Samples:
    return Samples(tuple(map(str, range(len(x)))), lambda i: {"x": x[i : i + 1]}, batchable, targets)


X = normal(96, 3, 8, 8, scale=1.0, seed=3)
TRAIN, HELD = samples_of(X[:64]), samples_of(X[64:])


def snr_db(graph: bytes, reference: bytes) -> float:
    noise = Noise()
    noise.add(*(Simulator(onnx.load_model_from_string(g))({"x": X[64:]}) for g in (reference, graph)))
    return noise.snr_db()


def test_training_begins_at_the_graph_it_is_given() -> None:
    """Whatever chose the levels: here they are not the nearest to the float weights."""
    graph = small_net()
    model = onnx.load_model_from_string(quantized(graph, [X]))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1:
            levels = numpy_helper.to_array(tensor)
            moved = np.clip(levels + np.random.default_rng(0).integers(-1, 2, levels.shape), -127, 127).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    masters = originals(model, onnx.load_model_from_string(graph))
    assert len(masters) == 4  # w3 is one
    module = TorchGraph(model, masters)
    assert contents(module.export()) == contents(model)
    assert len(module.weights) == 4
    assert len(module.floats) == 3  # b1, b3, b4


def test_training_mends_bad_scales_and_the_graph_written_is_the_one_trained() -> None:
    graph = small_net()
    start = quantized(graph, [X], scale_by=16.0)
    result = fine_tune(start, graph, TRAIN, HELD, epochs=10, seed=1)
    before, after = snr_db(start, graph), snr_db(result.graph, graph)
    assert after > before + 0.8
    assert result.figures["snr_db"] == {"before": round(before, 2), "after": round(after, 2)}
    assert result.figures["loss"][-1] < result.figures["loss"][0]
    assert len(result.figures["loss"]) == result.figures["epochs"] == 10
    assert 1 <= result.figures["best_epoch"] <= 10
    trained, given = (onnx.load_model_from_string(g) for g in (result.graph, start))
    assert list(trained.graph.node) == list(given.graph.node)
    shapes = [(t.name, t.data_type, list(t.dims)) for t in trained.graph.initializer]
    assert shapes == [(t.name, t.data_type, list(t.dims)) for t in given.graph.initializer]
    assert min(numpy_helper.to_array(t).min() for t in trained.graph.initializer if t.data_type == TensorProto.INT8) >= -127
    noise = Noise()
    noise.add(Simulator(trained)({"x": X}), torch_run(TorchGraph(trained), X))
    assert noise.snr_db() > 55


def test_the_module_in_training_answers_as_what_it_exports() -> None:
    graph = small_net()
    model = onnx.load_model_from_string(quantized(graph, [X]))
    module = TorchGraph(model, originals(model, onnx.load_model_from_string(graph)))
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(torch.tensor(normal(*parameter.shape, scale=0.05, seed=i)))
    exported = module.export()
    assert contents(exported) != contents(model)
    noise = Noise()
    noise.add(Simulator(exported)({"x": X}), torch_run(module, X))
    assert noise.snr_db() > 55


def test_a_shift_and_a_factor_in_front_of_the_pair_stay() -> None:
    """Sub, Mul and Pad before QuantizeLinear give a channel its share of int8; the weights know nothing of them."""
    weight = normal(6, 3, 3, 3)
    graph = build([node("Conv", "x w b", "y", pads=[1] * 4)], {"w": weight, "b": normal(6)}, ["n", 3, 8, 8])
    factor, shift = np.array([0.5, 1, 4], np.float32), np.array([0.5, 0, -1], np.float32)
    known = {
        "shift": shift.reshape(3, 1, 1), "factor": factor.reshape(3, 1, 1), "pads": ints(0, 0, 1, 1, 0, 0, 1, 1),
        "s": np.float32(0.1), "z": np.int8(0), "zw": np.zeros(6, np.int8),
        "b": normal(6) + (weight * shift[:, None, None]).sum((1, 2, 3)),
        "ws": np.abs(weight / factor[:, None, None]).max((1, 2, 3)) / 127,
    }  # fmt: skip
    scaled = weight / factor[:, None, None] / known["ws"][:, None, None, None]
    known["q"] = np.rint(scaled).astype(np.int8)
    nodes = [
        node("Pad", "x pads", "p"), node("Sub", "p shift", "c"), node("Mul", "c factor", "m"),
        node("QuantizeLinear", "m s z", "i"), node("DequantizeLinear", "i s z", "d"),
        node("DequantizeLinear", "q ws zw", "w", axis=0), node("Conv", "d w b", "y"),
    ]  # fmt: skip
    start = build(nodes, known, ["n", 3, 8, 8])
    result = fine_tune(start, graph, TRAIN, HELD, epochs=3, seed=0)
    trained = onnx.load_model_from_string(result.graph)
    found = {t.name: numpy_helper.to_array(t) for t in trained.graph.initializer}
    assert result.figures["best_epoch"] > 0
    for name in ("shift", "factor", "pads", "z", "zw"):
        np.testing.assert_array_equal(found[name], known[name])
    assert (found["b"] != known["b"]).any()
    noise = Noise()
    noise.add(Simulator(trained)({"x": X}), torch_run(TorchGraph(trained), X))
    assert noise.snr_db() > 55


def test_gradients_are_those_of_learned_step_size_quantization() -> None:
    """y = fq(x w): inside the range d y / d step is round(v) - v, outside it is the limit (Esser et al., equation 3)."""
    nodes = [node("Relu", "x", "r"), node("MatMul", "r w", "y")]
    graph = build(nodes, {"w": np.eye(2, dtype=np.float32)}, ["n", 2])
    model = onnx.load_model_from_string(quantized(graph, [np.array([[1.27, 1.0]], np.float32)]))
    module = TorchGraph(model)
    x = torch.tensor([[0.123, 5.0]], requires_grad=True)
    module({"x": x})["y"].sum().backward()  # type: ignore[no-untyped-call]
    step = module.steps[0]
    scale = step.scale().item()
    assert scale == pytest.approx(0.01)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), [[1.0, 0.0]], rtol=1e-5)  # the second is beyond 1.27
    expected = ((12 - 12.3) + 127) * scale / np.sqrt(2 * 127)  # of the ratio: scale times that of the step
    assert step.ratio.grad.item() == pytest.approx(expected, rel=1e-4)


def test_labels_choose_by_top1() -> None:
    graph = small_net()
    labels = Simulator(onnx.load_model_from_string(graph))({"x": X})["y"].argmax(1)
    start = quantized(graph, [X], scale_by=30.0)
    train, held = samples_of(X[:64], labels[:64]), samples_of(X[64:], labels[64:])
    result = fine_tune(start, graph, train, held, epochs=10, seed=0)
    found = Simulator(onnx.load_model_from_string(result.graph))({"x": X[64:]})["y"].argmax(1)
    assert result.figures["top1"]["after"] == (found == labels[64:]).mean()
    assert result.figures["top1"]["after"] > result.figures["top1"]["before"]


def test_what_is_not_better_is_not_returned(capfd: pytest.CaptureFixture[str]) -> None:
    """Weights and inputs that int8 holds exactly: nothing can be gained."""
    levels = np.random.default_rng(0).integers(-127, 128, (8, 4)).astype(np.float32)
    levels[0] = 127
    graph = build([node("MatMul", "x w", "y")], {"w": levels / 128}, ["n", 8])
    x = np.random.default_rng(1).integers(-127, 128, (40, 8)).astype(np.float32) / 128
    x[0] = 127 / 128
    start = quantized(graph, [x])
    result = fine_tune(start, graph, samples_of(x[:32]), samples_of(x[32:]), epochs=2, seed=0)
    assert result.graph == start
    assert result.figures["best_epoch"] == 0
    assert result.figures["snr_db"]["before"] == result.figures["snr_db"]["after"] > 100
    assert "that one is kept" in capfd.readouterr().err


def test_the_same_seed_gives_the_same_bytes() -> None:
    graph = small_net()
    start = quantized(graph, [X], scale_by=4.0)
    first, again, other = (fine_tune(start, graph, TRAIN, HELD, epochs=1, seed=seed).graph for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_fixed_batch_and_several_outputs_train_too() -> None:
    nodes = [node("MatMul", "x w1", "y"), node("Relu", "y", "r"), node("MatMul", "r w2", "z"), node("Shape", "z", "i")]
    # The integer output teaches nothing.
    graph = build(nodes, {"w1": normal(8, 8), "w2": normal(8, 4)}, [1, 3, 8], ["y", "z", "i"])
    x = normal(40, 3, 8, scale=1.0)
    start = quantized(graph, [x[i : i + 1] for i in range(40)], scale_by=16.0)
    result = fine_tune(start, graph, samples_of(x[:32], batchable=False), samples_of(x[32:], batchable=False), epochs=4, seed=0)
    assert result.figures["snr_db"]["after"] > result.figures["snr_db"]["before"]


def test_samples_of_several_lengths_train_together() -> None:
    graph = build([node("MatMul", "x w", "y")], {"w": normal(8, 8)}, ["n", "t", 8])
    x = [normal(1, 2 + i % 3, 8, scale=1.0, seed=i) for i in range(40)]
    every = Samples(tuple(map(str, range(40))), lambda i: {"x": x[i]}, True)
    start = quantized(graph, x, scale_by=16.0)
    result = fine_tune(start, graph, every.take(range(32)), every.take(range(32, 40)), epochs=3, seed=0)
    assert result.figures["snr_db"]["after"] > result.figures["snr_db"]["before"]


def test_tensors_that_share_a_scale_go_on_sharing_it() -> None:
    nodes = [
        node("Conv", "x w1", "a"), node("Relu", "a", "r"), node("Conv", "r w2", "c"), node("Relu", "c", "d"),
        node("Concat", "r d", "k", axis=1), node("Conv", "k w3", "y"),
    ]  # fmt: skip
    known = {"w1": normal(8, 3, 1, 1), "w2": normal(8, 8, 1, 1), "w3": normal(4, 16, 1, 1)}
    graph = build(nodes, known, ["n", 3, 8, 8])
    result = fine_tune(quantized(graph, [X], scale_by=16.0), graph, TRAIN, HELD, epochs=3, seed=0)
    known = {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(result.graph).graph.initializer}
    assert known["r/scale"] == known["k/scale"] != known["x/scale"]
    assert result.figures["best_epoch"] > 0


def test_what_cannot_be_trained_is_named() -> None:
    nodes = [node("MatMul", "x w", "m"), node("Einsum", "m", "y", equation="ij->ji")]
    graph = build(nodes, {"w": normal(8, 8)}, ["n", 8])
    x = normal(40, 8)
    with pytest.raises(GraphError, match="'Einsum_y' is Einsum: quantization-aware training is not available"):
        fine_tune(quantized(graph, [x]), graph, samples_of(x[:32]), samples_of(x[32:]), epochs=1, seed=0)
    peephole = {"w": normal(1, 24, 5), "r": normal(1, 24, 6), "p": normal(1, 18)}
    model = onnx.load_model_from_string(build([node("LSTM", "x w r _ _ _ _ p", "y", hidden_size=6)], peephole, ["t", "n", 5]))
    with pytest.raises(GraphError, match="'LSTM_y' is LSTM with peepholes"):
        torch_run(TorchGraph(model), normal(4, 2, 5))


def test_what_cannot_be_trained_is_refused_before_the_work(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Einsum", "m", "y", equation="ij->ji")]
    (tmp_path / "model.onnx").write_bytes(build(nodes, {"w": normal(8, 8)}, [1, 8]))
    bundle = edgekit.import_onnx(tmp_path / "model.onnx", out=tmp_path / "float.edge")
    (tmp_path / "samples").mkdir()
    for i, row in enumerate(normal(10, 1, 8)):
        np.savez(tmp_path / "samples" / f"{i}.npz", x=row)
    with pytest.raises(GraphError, match="Einsum"):
        edgekit.quantize(bundle, out=tmp_path / "int8.edge", calib=tmp_path / "samples", qat=True)
    assert not list(tmp_path.glob("int8*"))  # no checkpoint of a calibration for nothing


@pytest.mark.parametrize(
    ("scale", "zero", "reader", "match"),
    [
        (np.float32(0.1), np.int8(3), "DequantizeLinear", "zero point other than int8 0"),
        (np.float32(0.1), np.uint8(0), "DequantizeLinear", "zero point other than int8 0"),
        (np.full(4, 0.1, np.float32), np.zeros(4, np.int8), "DequantizeLinear", "a scale a channel"),
        (np.float32(0.1), np.int8(0), "Cast", "without a DequantizeLinear"),
    ],
)
def test_other_quantization_is_refused(scale: Array, zero: Array, reader: str, match: str) -> None:
    last = node("Cast", "q", "y", to=1) if reader == "Cast" else node("DequantizeLinear", "q s z", "y")
    model = onnx.load_model_from_string(
        build([node("QuantizeLinear", "x s z", "q"), last], {"s": np.array(scale), "z": np.array(zero)}, ["n", 4])
    )
    with pytest.raises(GraphError, match=match):
        TorchGraph(model)


def test_nothing_to_learn_from_is_wrong_usage() -> None:
    graph = small_net()
    start = quantized(graph, [X])
    with pytest.raises(UsageError, match="0 held out"):
        fine_tune(start, graph, TRAIN, HELD.take([]), epochs=1, seed=0)
    with pytest.raises(UsageError, match="0 epochs"):
        fine_tune(start, graph, TRAIN, HELD, epochs=0, seed=0)

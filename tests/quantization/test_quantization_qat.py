"""Quantization-aware training: what is trained in PyTorch is what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

import edgekit
from edgekit.errors import GraphError, UsageError
from edgekit.quantization.graph import Parameters, insert
from edgekit.quantization.placement import place, weights_of
from edgekit.quantization.prepare import prepare
from edgekit.quantization.qat import fine_tune, originals
from edgekit.quantization.rounding import weight_scales
from edgekit.quantization.samples import Samples
from edgekit.quantization.simulate import Noise, Simulator, observe
from edgekit.quantization.statistics import METHODS, scale_of
from edgekit.quantization.torch_graph import TorchGraph

from .torch_runs import Array, build, contents, ints, node, normal, torch_run


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

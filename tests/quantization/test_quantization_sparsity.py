"""2:4 weights through quantization: every form keeps each zero of the pattern, and TensorRT is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgekit
from edgekit.bundle import FLOAT_GRAPH, GOLDEN, INT8_GRAPH, Bundle
from edgekit.graphs.sparsity import dense_layers
from edgekit.quantization import rebuild
from edgekit.quantization.record import decode
from edgekit.runtime import check_golden
from edgekit.runtime.golden import load_golden, save_golden
from edgekit.runtime.onnxruntime import session

Array = np.ndarray[Any, Any]


def pruned(weight: Array, axis: int) -> Array:
    """The two largest of every four along ``axis``."""
    fours = np.ascontiguousarray(np.moveaxis(weight, axis, -1)).reshape(-1, 4)
    np.put_along_axis(fours, np.abs(fours).argsort(1)[:, :2], 0, axis=1)
    last = fours.reshape(np.moveaxis(weight, axis, -1).shape)
    return np.ascontiguousarray(np.moveaxis(last, -1, axis))


@pytest.fixture
def sparse_digits(digits_bundle: Bundle, tmp_path: Path) -> Bundle:
    """The digit classifier with its second convolution and its Gemm, of 2352 inputs, 2:4."""
    model = onnx.load_model(str(digits_bundle.file(FLOAT_GRAPH)))
    for tensor in model.graph.initializer:
        if tensor.name in ("w2", "w3"):
            weight = pruned(numpy_helper.to_array(tensor), 1 if tensor.name == "w2" else 0)
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    graph = model.SerializeToString()
    inputs, _ = load_golden(digits_bundle)
    with Bundle.create(tmp_path / "sparse.edge") as draft:
        draft.write(FLOAT_GRAPH, graph)
        draft.write(GOLDEN, save_golden(inputs, {"y": session(graph).run(None, inputs)[0]}))
        draft.manifest = digits_bundle.manifest
    return Bundle.open(tmp_path / "sparse.edge")


def pattern(bundle: Bundle, graph: str = INT8_GRAPH) -> dict[str, bool]:
    return {layer.name: layer.sparse for layer in dense_layers(onnx.load_model(str(bundle.file(graph))))}


def weights(bundle: Bundle, graph: str) -> dict[str, Array]:
    """By layer, as they are stored."""
    model = onnx.load_model(str(bundle.file(graph)))
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    return {layer.name: numpy_helper.to_array(known[layer.weight]) for layer in dense_layers(model)}


SPARSE = {"conv1": False, "conv2": True, "gemm": True}


def assert_zeros_stay(made: Bundle, source: Bundle) -> None:
    assert pattern(made) == SPARSE
    before, after = weights(source, FLOAT_GRAPH), weights(made, INT8_GRAPH)
    for name in ("conv2", "gemm"):
        assert not (after[name][before[name] == 0] != 0).any()
        assert (after[name] != 0).mean() > 0.4
    check_golden(made, INT8_GRAPH)


def test_the_default_method_keeps_every_zero(sparse_digits: Bundle, digits_bundle: Bundle, tmp_path: Path) -> None:
    assert pattern(sparse_digits, FLOAT_GRAPH) == SPARSE
    made = edgekit.quantize(sparse_digits, out=tmp_path / "q.edge", samples=64)
    assert_zeros_stay(made, sparse_digits)
    figures = made.manifest.history[-1].figures
    assert figures["recovery"] != "none"
    nearest = edgekit.quantize(sparse_digits, out=tmp_path / "m.edge", samples=64, method="mse")
    assert_zeros_stay(nearest, sparse_digits)
    assert figures["snr_db"] > max(25.0, nearest.manifest.history[-1].figures["snr_db"] + 1)
    dense = edgekit.quantize(digits_bundle, out=tmp_path / "d.edge", samples=64)
    assert pattern(dense) == dict.fromkeys(SPARSE, False)
    assert figures["snr_db"] > dense.manifest.history[-1].figures["snr_db"] - 4
    record = decode(made.file("calibration.json"))
    assert rebuild(made.read(FLOAT_GRAPH), record) == made.read(INT8_GRAPH)


def test_training_the_int8_graph_keeps_every_zero(sparse_digits: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    options = {"samples": 64, "method": "mse", "keep_float": "conv2", "qat": True, "qat_epochs": 2}
    made = edgekit.quantize(sparse_digits, out=tmp_path / "q.edge", **options)
    assert made.manifest.history[-1].figures["qat"]["best_epoch"] > 0
    assert_zeros_stay(made, sparse_digits)
    stored = weights(made, INT8_GRAPH)
    assert (stored["conv2"].dtype, stored["gemm"].dtype) == (np.float32, np.int8)
    assert not np.array_equal(stored["conv2"], weights(sparse_digits, FLOAT_GRAPH)["conv2"])  # both were trained


def test_no_gradient_fills_a_zero(sparse_digits: Bundle, tmp_path: Path) -> None:
    """One step, larger than any training takes."""
    torch = pytest.importorskip("torch")
    from edgekit.quantization.torch_graph import TorchGraph

    made = edgekit.quantize(sparse_digits, out=tmp_path / "q.edge", samples=32, method="minmax")
    module = TorchGraph(onnx.load_model(str(made.file(INT8_GRAPH))))
    inputs, _ = load_golden(made)
    module({"x": torch.tensor(inputs["x"])})["y"].square().sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= 5 * parameter.grad.sign()
    trained = dense_layers(module.export())
    assert {layer.name: layer.sparse for layer in trained} == SPARSE
    assert all(layer.zeros < 0.7 for layer in trained)


@pytest.mark.parametrize("form", ["weights8", "weights4", "fp8"])
def test_other_forms_keep_every_zero(sparse_digits: Bundle, tmp_path: Path, form: str) -> None:
    made = edgekit.quantize(sparse_digits, out=tmp_path / "q.edge", samples=32, format=form)
    assert pattern(made) == SPARSE


@pytest.mark.parametrize("target", ["rtx-ampere", "jetson-orin-nx"])
def test_tensorrt_is_told_of_sparse_int8(sparse_digits: Bundle, tmp_path: Path, target: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = edgekit.quantize(sparse_digits, out=tmp_path / "q.edge", samples=32)
    built = edgekit.build(made, target=target)
    assert (built.precision, built.sparse_layers) == ("int8", 2)
    record = json.loads((made.path / f"engines/{target}.json").read_text())
    assert record["flags"] == ["SPARSE_WEIGHTS"]
    assert "2 of 3 layers are 2:4" in built.note

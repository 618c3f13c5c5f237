"""Embedding tables and recurrent weights beside the int8 layers, and what a journal and a record survive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.bundle import CALIBRATION, INT8_GRAPH, Bundle
from edgekit.quantization import layer_table, read_calibration, record
from edgekit.quantization.journal import Journal

HIDDEN, WORDS = 80, 300


def text_model(mask: bool = False, op: str = "LSTM") -> onnx.ModelProto:
    """Two tables, an LSTM or GRU between them in the graph's order, and a MatMul of heavy-tailed inputs, poor in int8."""
    rng = np.random.default_rng(0)
    gates = 4 if op == "LSTM" else 3
    weights: dict[str, Any] = {
        "table": rng.normal(size=(WORDS, HIDDEN)), "W": rng.normal(size=(1, gates * HIDDEN, HIDDEN)) * 0.2,
        "R": rng.normal(size=(1, gates * HIDDEN, HIDDEN)) * 0.2, "other": rng.normal(size=(WORDS, HIDDEN)),
        "product": rng.normal(size=(16, HIDDEN)),
    }  # fmt: skip
    weights = {name: array.astype(np.float32) for name, array in weights.items()} | {"axis": np.array([0])}
    nodes = [
        helper.make_node("Gather", ["table", "words"], ["embedded"]),
        helper.make_node("Transpose", ["embedded"], ["series"], perm=[1, 0, 2]),
        helper.make_node(op, ["series", "W", "R"], ["", "last"], hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["last", "axis"], ["state"]),
        helper.make_node("Gather", ["other", "word"], ["second"]),
        helper.make_node("Add", ["state", "second"], ["sum"]),
        helper.make_node("MatMul", ["x", "product"], ["projected"]),
        helper.make_node("Add", ["sum", "projected"], ["y" if not mask else "unmasked"]),
    ]
    if mask:  # causal masks are tables with -inf
        weights["mask"] = np.where(np.arange(HIDDEN) < 32, 0, -np.inf).astype(np.float32)[None].repeat(WORDS, 0)
        nodes += [
            helper.make_node("Gather", ["mask", "word"], ["masked"]),
            helper.make_node("Exp", ["masked"], ["open"]),
            helper.make_node("Mul", ["unmasked", "open"], ["y"]),
        ]
    inputs = [
        helper.make_tensor_value_info("words", TensorProto.INT64, ["N", 5]),
        helper.make_tensor_value_info("word", TensorProto.INT64, ["N"]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", HIDDEN])
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "text", inputs, [output], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def imported(model: onnx.ModelProto, folder: Path, heavy: bool = True) -> tuple[Bundle, Path]:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    samples = folder / "samples"
    samples.mkdir()
    rng = np.random.default_rng(1)
    for i in range(20):
        x = rng.standard_t(2.2, (4, 16)) if heavy else rng.uniform(-1, 1, (4, 16))
        words, word = rng.integers(0, WORDS, (4, 5)), rng.integers(0, WORDS, 4)
        np.savez(samples / f"{i:03}.npz", words=words, word=word, x=x.astype(np.float32))
    return edgekit.import_onnx(folder / "model.onnx", out=folder / "float.edge"), samples


@pytest.mark.parametrize(
    ("mask", "op", "method"), [(False, "LSTM", "auto"), (True, "LSTM", "auto"), (False, "LSTM", "mse"), (False, "GRU", "auto")]
)
def test_tables_and_recurrent_weights_are_stored_small(tmp_path: Path, mask: bool, op: str, method: str) -> None:
    bundle, samples = imported(text_model(mask, op), tmp_path)
    made = edgekit.quantize(bundle, out=tmp_path / "int8.edge", calib=samples, method=method)
    stored = read_calibration(made.file(CALIBRATION)).stored
    assert set(stored) == {"table", "other", "W", "R"}
    graph = onnx.load_model_from_string(made.read(INT8_GRAPH)).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert not [name for name in stored if kinds.get(name) == TensorProto.FLOAT]
    assert len(made.read(INT8_GRAPH)) < 0.45 * len(made.read("model.onnx")) + 4 * mask * HIDDEN * WORDS
    again = edgekit.quantize(bundle, out=tmp_path / "again.edge", calib=made.file(CALIBRATION))
    assert again.read(INT8_GRAPH) == made.read(INT8_GRAPH)


def test_nothing_is_stored_where_the_output_is_as_good_as_the_weights(tmp_path: Path) -> None:
    bundle, samples = imported(text_model(), tmp_path, heavy=False)
    made = edgekit.quantize(bundle, out=tmp_path / "int8.edge", calib=samples)
    entry = made.last("quantize")
    assert entry is not None
    assert entry.figures["snr_db"] > 40
    assert read_calibration(made.file(CALIBRATION)).stored == ()


def test_a_calibration_of_before_is_still_read(digits_bundle: Bundle, tmp_path: Path) -> None:
    made = edgekit.quantize(digits_bundle, out=tmp_path / "new.edge", samples=16, method="minmax")
    data = msgspec.json.decode(made.file(CALIBRATION).read_bytes())
    del data["stored"]
    for layer in data["layers"]:
        layer["gain_db"] = 1.5
        del layer["layer_db"], layer["drop"]
    old = tmp_path / "old.json"
    old.write_bytes(msgspec.json.encode(data))
    again = edgekit.quantize(digits_bundle, out=tmp_path / "again.edge", calib=old)
    assert again.read(INT8_GRAPH) == made.read(INT8_GRAPH)
    assert layer_table(again)
    assert b"gain_db" not in record.encode(read_calibration(made.file(CALIBRATION)))


def test_methods_of_the_books_show_the_worst_layer_first(digits_bundle: Bundle, tmp_path: Path) -> None:
    rows = layer_table(edgekit.quantize(digits_bundle, out=tmp_path / "a.edge", samples=16, method="mse"))
    found = [row["layer_db"] for row in rows]
    assert len(found) > 1
    assert found == sorted(found)


@pytest.mark.parametrize("tail", [bytes(4096), b"\x01\x00\x00\x00\x8d\xef\x02\xd2\x00"], ids=["zeros", "no record"])
def test_a_journal_survives_a_wrong_tail(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "work"
    Journal(path, "key").recall("first", lambda: {"x": np.ones(3)})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert Journal(path, "key").recall("first", dict)["x"].tolist() == [1, 1, 1]
    assert path.read_bytes() == whole


def test_work_goes_on_without_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path / ("n" * 300), "key")
    assert journal.recall("first", lambda: {"x": np.ones(1)})["x"] == 1
    assert "cannot be resumed" in capsys.readouterr().err


def test_a_scalar_input_is_no_batch(tmp_path: Path) -> None:
    """Ranges are chosen with as many held-out samples as the study has: samples, not rows of the first input."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Mul", ["x", "gain"], ["scaled"]), helper.make_node("MatMul", ["scaled", "w"], ["y"])]
    inputs = [
        helper.make_tensor_value_info("gain", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])
    weight = numpy_helper.from_array(rng.normal(size=(16, 8)).astype(np.float32), "w")
    graph = helper.make_graph(nodes, "scaled", inputs, [output], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "samples").mkdir()
    for i in range(10):
        x = rng.normal(size=(1, 16)).astype(np.float32)
        np.savez(tmp_path / "samples" / f"{i}.npz", gain=np.float32(1.5), x=x)
    bundle = edgekit.import_onnx(tmp_path / "model.onnx", out=tmp_path / "float.edge")
    entry = edgekit.quantize(bundle, out=tmp_path / "int8.edge", calib=tmp_path / "samples").last("quantize")
    assert entry is not None
    assert entry.figures["snr_db"] > 30

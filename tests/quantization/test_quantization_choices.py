"""Integer outputs of quantized graphs: indices and labels are choices, which are not held to an SNR beside floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.bundle import INT8_GRAPH, Bundle
from edgekit.errors import GraphError
from edgekit.quantization.prepare import prepare
from edgekit.runtime import check_golden

F, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
RNG = np.random.default_rng(0)
SCORES = [
    helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
    helper.make_node("Conv", ["a", "v"], ["c"], pads=[1] * 4),
]
#: More nodes behind the scores c (1, 8, 8, 8), and the integer outputs that they make.
CHOICES: dict[str, tuple[list[Any], dict[str, int]]] = {
    "nonzero": (
        [helper.make_node("Greater", ["c", "least"], ["g"]), helper.make_node("NonZero", ["g"], ["z"])],
        {"z": I64},
    ),
    "nms": (
        [
            helper.make_node("Reshape", ["c", "boxes"], ["b"]),
            helper.make_node("Reshape", ["c", "classes"], ["s"]),
            helper.make_node("NonMaxSuppression", ["b", "s", "most", "overlap", "least"], ["z"]),
        ],
        {"z": I64},
    ),
    "argmax": ([helper.make_node("ArgMax", ["c"], ["z"], axis=1, keepdims=0)], {"z": I64}),
    "mask": ([helper.make_node("Greater", ["c", "least"], ["z"])], {"z": BOOL}),
}


def model(name: str, floats: bool) -> bytes:
    nodes, outputs = CHOICES[name]
    weights = {
        "w": RNG.normal(0, 0.3, (16, 3, 3, 3)).astype(np.float32),
        "v": RNG.normal(0, 0.3, (8, 16, 3, 3)).astype(np.float32),
        "least": np.array(0.5, np.float32),
        "boxes": np.array([1, 128, 4]),
        "classes": np.array([1, 4, 128]),
        "most": np.array(20),
        "overlap": np.array(0.5, np.float32),
    }
    values = {**outputs, **({"c": F} if floats else {})}
    graph = helper.make_graph(
        [*SCORES, *nodes],
        "g",
        [helper.make_tensor_value_info("x", F, [1, 3, 8, 8])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in values.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return data


def quantized(name: str, floats: bool, folder: Path, **options: Any) -> Bundle:
    (folder / "m.onnx").write_bytes(model(name, floats))
    (folder / "calib").mkdir()
    for i in range(10):
        np.savez(folder / "calib" / f"{i}.npz", x=np.random.default_rng(i).normal(size=(1, 3, 8, 8)).astype(np.float32))
    given = edgekit.import_onnx(folder / "m.onnx", out=folder / "m.edge")
    return edgekit.quantize(given, out=folder / "q.edge", calib=folder / "calib", **{"method": "minmax", **options})


@pytest.mark.parametrize("name", CHOICES)
def test_choices_beside_floats_are_not_held(cli: Callable[..., Any], name: str, tmp_path: Path) -> None:
    made = quantized(name, True, tmp_path)
    figures = made.manifest.history[-1].figures
    assert 20 < figures["golden_snr_db"] < 60
    assert check_golden(made).snr_db == pytest.approx(figures["golden_snr_db"], abs=0.01)
    found = cli("compare", made.path, "--json")
    assert found.code == 0
    rows = {(row["graph"], row["output"]): row for row in found.json["outputs"]}
    assert rows[INT8_GRAPH, "c"]["within_tolerance"]
    assert rows[INT8_GRAPH, "z"]["within_tolerance"] is None
    assert rows["model.onnx", "z"]["within_tolerance"]


@pytest.mark.parametrize("name", ["argmax", "mask"])
def test_where_all_are_choices_decibels_count_those_that_differ(cli: Callable[..., Any], name: str, tmp_path: Path) -> None:
    made = quantized(name, False, tmp_path)
    golden_db = made.manifest.history[-1].figures["golden_snr_db"]
    found = cli("compare", made.path, "--json")
    assert found.code == 0
    row = next(row for row in found.json["outputs"] if row["graph"] == INT8_GRAPH)
    assert 0.9 < row["agree"] <= 1
    assert row["within_tolerance"]
    wrong = 1 - row["agree"]
    assert golden_db == pytest.approx(-10 * np.log10(wrong) if wrong else 200.0, abs=0.01)


@pytest.mark.parametrize(("name", "near"), [("nonzero", "NonZero"), ("nms", "'b' and 's'")])
@pytest.mark.parametrize("form", ["int8", "weights8"])
def test_choices_alone_of_an_open_number_are_refused_before_any_work(name: str, near: str, form: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="all outputs are integers") as refused:
        quantized(name, False, tmp_path, format=form, method="auto")
    assert near in refused.value.hint


def test_nonzero_of_a_shape_chooses_nothing() -> None:
    """Exporters write NonZero of ones for the indices of all: it depends on the shape alone."""
    nodes = [
        *SCORES,
        helper.make_node("Shape", ["c"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=numpy_helper.from_array(np.ones(1, np.int64))),
        helper.make_node("NonZero", ["ones"], ["n"]),
        helper.make_node("ArgMax", ["c"], ["m"], axis=1),
        helper.make_node("ReduceMax", ["n"], ["k"]),
        helper.make_node("Add", ["m", "k"], ["z"]),
    ]
    made = onnx.load_model_from_string(model("argmax", False))
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    assert "NonZero" in {node.op_type for node in prepare(made.SerializeToString()).graph.node}

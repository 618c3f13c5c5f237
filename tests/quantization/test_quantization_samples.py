"""Samples that fit the model one by one and still are not what it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.bundle import Bundle
from edgekit.errors import DataError
from edgekit.quantization.samples import gather
from edgekit.runtime.golden import load_golden


@pytest.fixture
def two_inputs(tmp_path: Path) -> Bundle:
    """x (N, 16) and meta (N, 4), joined before a product; points (M, 4) are only summed: M is nobody's batch."""
    r = np.random.default_rng(0)
    shapes = {"x": ["N", 16], "meta": ["N", 4], "points": ["M", 4]}
    nodes = [
        helper.make_node("Concat", ["x", "meta"], ["j"], axis=1),
        helper.make_node("MatMul", ["j", "w"], ["p"]),
        helper.make_node("ReduceMean", ["points"], ["s"], keepdims=0),
        helper.make_node("Add", ["p", "s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(r.normal(size=(20, 8)).astype(np.float32), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "two.onnx")
    return edgekit.import_onnx(tmp_path / "two.onnx", out=tmp_path / "two.edge")


def write(folder: Path, meta: int = 1, fill: float | None = None) -> Path:
    """Six samples; the fourth has ``meta`` rows of meta; all x are ``fill``, where that is given."""
    folder.mkdir()
    for i in range(6):
        r = np.random.default_rng(i)
        x = r.normal(size=(1, 16)) if fill is None else np.full((1, 16), fill)
        arrays = {"x": x, "meta": r.normal(size=(meta if i == 3 else 1, 4)), "points": r.normal(size=(i + 1, 4))}
        np.savez(folder / f"{i}.npz", **{name: array.astype(np.float32) for name, array in arrays.items()})
    return folder


def imported(folder: Path, nodes: list[onnx.NodeProto], shape: list[str | int], weights: dict[str, np.ndarray]) -> Bundle:
    """A graph from x of this shape to y."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "m.onnx")
    return edgekit.import_onnx(folder / "m.onnx", out=folder / "m.edge")


def drawn(folder: Path, shape: tuple[int, ...], spike: float = 0.0) -> Path:
    """Eight normal samples; ``spike`` is added to one column of each."""
    folder.mkdir()
    for i in range(8):
        x = np.random.default_rng(i).normal(size=shape).astype(np.float32)
        x[..., i % shape[-1]] += spike
        np.savez(folder / f"{i}.npz", x=x)
    return folder


def test_two_sizes_of_one_axis_are_named(two_inputs: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3\.npz: N must be one size.*x \(1, 16\), meta \(2, 4\)") as caught:
        gather(two_inputs, write(tmp_path / "s", meta=2), 6, 0)
    assert "meta (N, 4)" in caught.value.hint


def test_axes_of_other_names_may_differ(two_inputs: Bundle, tmp_path: Path) -> None:
    pool = gather(two_inputs, write(tmp_path / "s"), 6, 0)
    assert len(pool.calibration) + len(pool.held_out) == 6


def test_what_the_graph_takes_is_taken(tmp_path: Path) -> None:
    """The importer calls every nameless first axis `batch`; these two never meet."""
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["p"]),
        helper.make_node("ReduceMean", ["b"], ["s"], keepdims=0),
        helper.make_node("Add", ["p", "s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 16]) for name in "ab"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 16])],
        [numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    bundle = edgekit.import_onnx(tmp_path / "m.onnx", out=tmp_path / "m.edge")
    folder = tmp_path / "s"
    folder.mkdir()
    for i in range(5):
        np.savez(folder / f"{i}.npz", a=np.ones((1, 16), np.float32) * i, b=np.ones((3, 16), np.float32) / (i + 1))
    assert len(gather(bundle, folder, 5, 0).calibration) == 4


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_constant_inputs_are_said(two_inputs: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str], value: float) -> None:
    gather(two_inputs, write(tmp_path / "s", fill=value), 6, 0)
    said = [line for line in capfd.readouterr().err.splitlines() if "mean little" in line]
    assert len(said) == 1
    assert said[0].startswith(f"x is {value} everywhere in all 5 calibration samples")


def test_inputs_that_vary_are_not(two_inputs: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gather(two_inputs, write(tmp_path / "s"), 6, 0)
    assert "mean little" not in capfd.readouterr().err


RESHAPED = [helper.make_node("Reshape", ["x", "one"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
BROADCAST = [helper.make_node("MatMul", ["x", "w3"], ["y"])]


@pytest.mark.parametrize("nodes", [RESHAPED, BROADCAST])
def test_a_batch_of_one_that_is_baked_in_is_quantized_sample_by_sample(tmp_path: Path, nodes: list[onnx.NodeProto]) -> None:
    r = np.random.default_rng(0)
    weights = {"w": r.normal(size=(48, 5)), "w3": r.normal(size=(3, 12, 5))}
    weights = {name: array.astype(np.float32) for name, array in weights.items()} | {"one": np.array([1, 48])}
    bundle = imported(tmp_path, nodes, ["n", 4, 12], weights)
    made = edgekit.quantize(bundle, out=tmp_path / "q.edge", calib=drawn(tmp_path / "s", (1, 4, 12)), method="minmax")
    assert made.manifest.history[-1].figures["snr_db"] > 25


MASKS = [
    helper.make_node("MatMul", ["x", "w"], ["p"]),
    helper.make_node("Greater", ["x", "limit"], ["g"]),
    helper.make_node("Where", ["g", "minus", "p"], ["m"]),
]
MASK = {"limit": np.array(8, np.float32), "minus": np.array(-np.inf, np.float32)}


def test_masks_of_infinity_at_the_output_are_right(tmp_path: Path) -> None:
    weights = {"w": np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32), **MASK}
    bundle = imported(tmp_path, [*MASKS, helper.make_node("Identity", ["m"], ["y"])], ["n", 16], weights)
    made = edgekit.quantize(bundle, out=tmp_path / "q.edge", calib=drawn(tmp_path / "s", (1, 16), 12.0))
    assert made.manifest.history[-1].figures["snr_db"] > 30
    rows = edgekit.compare(made)["outputs"]
    assert [(row["within_tolerance"], row["note"]) for row in rows] == [(True, None), (True, None)]
    assert np.isinf(load_golden(made)[1]["y"]).any()


@pytest.mark.parametrize("mixes", [False, True])
def test_masks_of_infinity_do_not_hide_that_samples_mix(tmp_path: Path, mixes: bool) -> None:
    last = [helper.make_node("ReduceMean", ["x"], ["u"], axes=[0]), helper.make_node("Sub", ["m", "u"], ["y"])]
    weights = {"w": np.eye(16, dtype=np.float32), **MASK}
    bundle = imported(
        tmp_path, [*MASKS, *(last if mixes else [helper.make_node("Identity", ["m"], ["y"])])], ["n", 16], weights
    )
    assert gather(bundle, drawn(tmp_path / "s", (1, 16), 12.0), 8, 0).calibration.batchable is not mixes


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e30])
def test_tensors_of_any_size_are_quantized(tmp_path: Path, size: float) -> None:
    r = np.random.default_rng(0)
    half = float(np.sqrt(size))
    weights = {"w": r.normal(size=(16, 16)) * half, "u": r.normal(size=(16, 4)) * half}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["c"]), helper.make_node("MatMul", ["c", "u"], ["y"])]
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    bundle = imported(tmp_path, nodes, ["n", 16], weights)
    made = edgekit.quantize(bundle, out=tmp_path / "q.edge", calib=drawn(tmp_path / "s", (1, 16)))
    assert made.manifest.history[-1].figures["snr_db"] > 30

"""What the TensorRT runner is fed, on a simulated GPU: shapes, batches and types that an engine takes, or does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.errors import BackendError, InputError
from edgekit.manifest import FORMAT, ImagePreprocessing, Manifest, TensorSpec, history_entry
from edgekit.runtime import Model, check_golden, open_runner
from edgekit.runtime.golden import save_golden
from edgekit.runtime.onnxruntime import session

from .tensorrt_runs import nothing_left, samples, truth


def write(path: Path, nodes: list[Any], x: Any, y: tuple[int, list[Any]], axes: list[Any], **manifest: Any) -> Bundle:
    """A bundle around a graph from ``x`` (shape ``axes``) to ``y``; golden outputs by ONNX Runtime."""
    inputs = [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), axes)]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", *y)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    golden = session(data).run(None, {"x": x})[0]
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, data)
        draft.write(GOLDEN, save_golden({"x": x}, {"y": golden}))
        draft.manifest = Manifest(
            format=FORMAT,
            name=path.stem,
            inputs=(TensorSpec("x", str(x.dtype), tuple(axes)),),
            outputs=(TensorSpec("y", str(golden.dtype), tuple(y[1])),),
            history=(history_entry("import", {}, {}),),
            **{"task": "tensor", **manifest},
        )
    return Bundle.open(path)


# Inputs that do not fit


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({"x": samples(5)}, "x has shape 5x3x32x32, the engine takes 1x3x32x32 to 4x3x32x32"),
        ({"x": samples(0)}, "x has shape 0x3x32x32"),
        ({"x": samples(1).astype(np.float16)}, "x is float16, the model takes float32"),
        ({"x": samples(1)[0]}, "x has shape 3x32x32"),
        ({"z": samples(1)}, r"inputs \['z'\] arrived, \['x'\] were expected"),
    ],
)
def test_an_input_that_does_not_fit_is_named(simulation: Any, tiny_bundle: Bundle, feeds: Any, words: str) -> None:
    with open_runner(simulation.engine(tiny_bundle), simulation.backend) as runner:
        runner.run({"x": samples(1)})
        with pytest.raises(InputError, match=words):
            runner.run(feeds)
        x = samples(1, 9)
        np.testing.assert_allclose(runner.run({"x": x})["y"], truth(tiny_bundle, x), rtol=1e-6)
    with pytest.raises(BackendError, match="not open"):
        runner.run({"x": samples(1)})


def test_a_batch_larger_than_the_engine_takes_goes_in_parts(simulate: Any, digits_bundle: Bundle) -> None:
    simulation = simulate()
    bundle = simulation.engine(digits_bundle)
    frames = [np.random.default_rng(i).integers(0, 256, (28, 28), np.uint8) for i in range(11)]
    with Model.open(bundle.path, simulation.backend) as gpu, Model.open(bundle.path, "onnxruntime") as cpu:
        found, expected = gpu.predict_batch(frames), cpu.predict_batch(frames)
    assert [p.label for p in found] == [p.label for p in expected]
    np.testing.assert_allclose([p.scores for p in found], [p.scores for p in expected], atol=1e-5)


def test_an_engine_of_at_least_some_samples_gets_the_last_one_again(simulate: Any, tiny_bundle: Bundle) -> None:
    simulation = simulate()
    profile = {"x": [[3, 3, 32, 32], [3, 3, 32, 32], [3, 3, 32, 32]]}
    bundle = simulation.engine(tiny_bundle, plan={"profiles": profile})
    assert check_golden(bundle, backend=simulation.backend).snr_db > 100  # 4 golden samples: 3, and 1 with 2 to fill up


def test_int64_of_an_engine_before_tensorrt_10(simulate: Any, tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    x = np.array([[3, -4, 5]], np.int64)
    bundle = write(tmp_path / "ids.edge", nodes, x, (TensorProto.INT64, ["n", 3]), ["n", 3])
    simulation = simulate("8.6.1")
    with open_runner(simulation.engine(bundle), "tensorrt") as runner:
        assert runner.inputs[0].dtype == "int64"
        found = runner.run({"x": x})["y"]
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, 2 * x)
        with pytest.raises(InputError, match="holds -4 to 4294967296, which this engine's int32 cannot"):
            runner.run({"x": np.array([[1 << 32, -4, 5]], np.int64)})


def test_float64_is_float32_on_the_gpu(simulation: Any, tmp_path: Path) -> None:
    """Every parser makes FLOAT of DOUBLE; the model's own type is what goes in and comes out."""
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    x = np.array([[0.1, -4, np.inf]])
    bundle = write(tmp_path / "double.edge", nodes, x, (TensorProto.DOUBLE, ["n", 3]), ["n", 3])
    bundle = simulation.engine(bundle)
    with open_runner(bundle, simulation.backend) as runner:
        assert [spec.dtype for spec in (*runner.inputs, *runner.outputs)] == ["float64", "float64"]
        for feed in (x, np.full_like(x, np.nan)):
            found = runner.run({"x": feed})["y"]
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, 2 * feed, rtol=1e-7)
        with pytest.raises(InputError, match=r"holds -1e\+300 to inf, which this engine's float32 cannot"):
            runner.run({"x": np.array([[0.1, -1e300, np.inf]])})
        with pytest.raises(InputError, match="x is float32, the model takes float64"):
            runner.run({"x": x.astype(np.float32)})
    assert check_golden(bundle, backend=simulation.backend).snr_db > 100


def test_a_graph_that_takes_bytes_is_given_the_frame(simulate: Any, tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), helper.make_node("GlobalAveragePool", ["f"], ["p"])]
    nodes.append(helper.make_node("Flatten", ["p"], ["y"]))
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), np.uint8)
    spec = ImagePreprocessing(8, 8, 3, mean=(0.5,) * 3, std=(0.1,) * 3)
    kinds: dict[str, Any] = {"task": "image-classification", "labels": tuple("rgb"), "preprocessing": spec}
    bundle = write(tmp_path / "bytes.edge", nodes, x, (TensorProto.FLOAT, ["n", 3]), ["n", 3, 8, 8], **kinds)
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[:, :, 1] = 9
    simulation = simulate()
    bundle = simulation.engine(bundle)
    for backend in (simulation.backend, "onnxruntime"):
        with Model.open(bundle.path, backend) as model:
            assert model.preprocess(frame).dtype == np.uint8
            assert model(frame).label == "g"
            assert model(np.repeat(np.repeat(frame, 2, 0), 2, 1)).label == "g"


@pytest.mark.parametrize(
    ("inside", "words"), [({"host": ["x"]}, "x decides shapes"), ({"dtypes": {"y": "BF16"}}, "y has type BF16")]
)
def test_what_it_cannot_feed_is_named(simulate: Any, tiny_bundle: Bundle, inside: dict[str, Any], words: str) -> None:
    simulation = simulate()
    runner = open_runner(simulation.engine(tiny_bundle, plan=inside), simulation.backend)
    with pytest.raises(BackendError, match=words):
        runner.__enter__()
    nothing_left(simulation)


def test_an_output_whose_size_depends_on_the_data_is_named(simulate: Any, tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["y"])]
    bundle = write(tmp_path / "nz.edge", nodes, np.ones((1, 3), np.float32), (TensorProto.INT64, [2, "found"]), ["n", 3])
    simulation = simulate()
    runner = open_runner(simulation.engine(bundle), simulation.backend)
    with runner, pytest.raises(BackendError, match=r"output y depends on the data \(2x-1\)"):
        runner.run({"x": np.ones((1, 3), np.float32)})

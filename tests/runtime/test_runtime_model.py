"""`Model`: predictions, batches, raw tensors, and what it says to wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, MANIFEST, Bundle
from edgekit.data import load
from edgekit.errors import BackendError, BundleError, GoldenError, InputError, UsageError
from edgekit.manifest import TensorSpec, Tolerance
from edgekit.runtime import Model, check_golden, compare_arrays, open_runner
from edgekit.runtime.golden import compare_outputs, load_golden, parse_golden, run_samples, save_golden


def perturbed(graph: bytes, weight: str, by: float) -> bytes:
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        if tensor.name == weight:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(by), weight))
    data: bytes = model.SerializeToString()
    return data


def fixed_batch(graph: bytes, batch: int) -> bytes:
    model = onnx.load_from_string(graph)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    data: bytes = model.SerializeToString()
    return data


def test_a_frame_gets_a_label_a_score_and_a_latency(digits_bundle: Bundle) -> None:
    test = load("digits").test.take(range(0, 1000, 20))
    with Model.open(digits_bundle.path) as model:
        predictions = [model(test.read(i)) for i in range(len(test))]
    right = [int(p.label or -1) == target for p, target in zip(predictions, test.targets, strict=True)]
    assert np.mean(right) > 0.8
    for p in predictions:
        assert p.label == "0123456789"[int(p.scores.argmax())]
        assert p.score == p.scores.max()
        assert p.scores.dtype == np.float32
        assert p.scores.sum() == pytest.approx(1, abs=1e-5)
        assert p.text is None
        assert p.latency_ms > 0


def test_a_batch_answers_as_its_frames_do(digits_bundle: Bundle) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, shape, np.uint8) for shape in [(28, 28), (40, 31, 3), (9, 200), (28, 28, 4)]]
    with Model.open(digits_bundle.path) as model:
        assert model.predict_batch([]) == []
        together = model.predict_batch(frames)
        for frame, p in zip(frames, together, strict=True):
            alone = model(frame)
            assert alone.label == p.label
            np.testing.assert_allclose(alone.scores, p.scores, atol=1e-5)


def test_a_batch_runs_on_a_graph_of_fixed_batch_one(digits_bundle: Bundle, rewrite: object) -> None:
    graph = fixed_batch(digits_bundle.file(FLOAT_GRAPH).read_bytes(), 1)
    bundle = rewrite(digits_bundle, "one.edge", graph)  # type: ignore[operator]
    frames = [load("digits").test.read(i) for i in range(3)]
    with Model.open(bundle.path) as one, Model.open(digits_bundle.path) as many:
        assert one.inputs[0].shape == (1, 1, 28, 28)
        assert [p.label for p in one.predict_batch(frames)] == [p.label for p in many.predict_batch(frames)]
    check_golden(bundle)  # eight golden samples through a graph that takes one


def test_golden_arrays_are_read_from_bytes_too() -> None:
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 1), np.float32)
    data = save_golden({"x": x, "output/x": y}, {"y": y})
    inputs, outputs = parse_golden(data)
    assert (set(inputs), set(outputs)) == ({"x", "output/x"}, {"y"})
    np.testing.assert_array_equal(inputs["x"], x)
    np.testing.assert_array_equal(outputs["y"], y)
    with pytest.raises(BundleError, match=r"golden\.npz cannot be read"):
        parse_golden(data[:-30])


def test_run_is_the_graph_itself(tiny_bundle: Bundle) -> None:
    inputs, outputs = load_golden(tiny_bundle)
    with Model.open(tiny_bundle.path) as model:
        assert model.inputs == (TensorSpec("x", "float32", ("n", 3, 32, 32)),)
        assert [spec.name for spec in model.outputs] == ["y"]
        np.testing.assert_allclose(model.run(inputs)["y"], outputs["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({}, "were expected"),
        ({"z": np.zeros((1, 3, 32, 32), np.float32)}, r"\['z'\] arrived, \['x'\]"),
        ({"x": np.zeros((1, 3, 32, 32))}, "float64, the model takes float32 nx3x32x32"),
        ({"x": np.zeros((1, 3, 32, 31), np.float32)}, "shape 1x3x32x31, the model takes"),
        ({"x": np.zeros((3, 32, 32), np.float32)}, "shape 3x32x32, the model takes"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tiny_bundle: Bundle, feeds: dict[str, object], said: str) -> None:
    with Model.open(tiny_bundle.path) as model, pytest.raises(InputError, match=said) as caught:
        model.run(feeds)  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((28, 28), np.float32),
        np.zeros((28, 28, 2), np.uint8),
        np.zeros((0, 28), np.uint8),
        np.zeros(28, np.uint8),
        np.zeros((1, 28, 28, 3), np.uint8),
        np.zeros((28, 28), bool),
        [[1, 2], [3, 4]],
        None,
        "frame.png",
    ],
)
def test_what_is_no_frame_is_refused(digits_bundle: Bundle, frame: object) -> None:
    with Model.open(digits_bundle.path) as model:
        with pytest.raises(InputError) as caught:
            model(frame)  # type: ignore[arg-type]
        assert caught.value.hint
        assert model(np.zeros((28, 28), np.uint8)).label  # and it still works


def test_a_raw_graph_takes_no_frames(tiny_bundle: Bundle) -> None:
    with Model.open(tiny_bundle.path) as model, pytest.raises(InputError, match="raw tensors"):
        model(np.zeros((32, 32, 3), np.uint8))


def test_names_that_do_not_exist(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no backend 'abacus'"):
        Model.open(tiny_bundle.path, "abacus")
    with pytest.raises(UsageError, match="no precision 'int3'"):
        Model.open(tiny_bundle.path, precision="int3")  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="there is no bundle"):
        Model.open(tmp_path / "nothing.edge")
    with pytest.raises(BundleError, match=r"no model\.int8\.onnx"), Model.open(tiny_bundle.path, precision="int8"):
        pass


def test_it_answers_only_while_open(tiny_bundle: Bundle, digits_bundle: Bundle) -> None:
    model = Model.open(digits_bundle.path)
    with pytest.raises(BackendError, match="not open"):
        model(np.zeros((28, 28), np.uint8))
    with model:
        assert model(np.zeros((28, 28), np.uint8)).label
    with pytest.raises(BackendError, match="not open"):
        model(np.zeros((28, 28), np.uint8))
    with pytest.raises(BackendError, match="not open"):
        model.predict_batch([np.zeros((28, 28), np.uint8)])


def test_a_damaged_graph_is_not_loaded(tiny_bundle: Bundle, rewrite: object) -> None:
    file = tiny_bundle.file(FLOAT_GRAPH)
    data = bytearray(file.read_bytes())
    noise = rewrite(tiny_bundle, "noise.edge", b"\x08\x07 no graph")  # type: ignore[operator]
    with pytest.raises(BundleError, match="no whole ONNX file"), Model.open(noise.path):
        pass
    no_graph = rewrite(tiny_bundle, "no.edge", b"\x08\x07")  # type: ignore[operator]
    with pytest.raises(BackendError, match="cannot load the graph"), Model.open(no_graph.path):
        pass
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="damaged"), Model.open(tiny_bundle.path):
        pass


def test_the_golden_check_passes_the_graph_and_fails_a_touched_one(tiny_bundle: Bundle, rewrite: object) -> None:
    graph = tiny_bundle.file(FLOAT_GRAPH).read_bytes()
    result = check_golden(tiny_bundle)
    assert result.relative <= 1e-6
    assert result.snr_db > 100
    touched = rewrite(tiny_bundle, "touched.edge", perturbed(graph, "w2", 1e-2))  # type: ignore[operator]
    with pytest.raises(GoldenError, match="misses the golden outputs") as caught:
        check_golden(touched)
    assert caught.value.hint
    strict = {FLOAT_GRAPH: Tolerance("snr_db", 60.0)}
    with pytest.raises(GoldenError, match="dB"):
        check_golden(rewrite(touched, "strict.edge", golden=strict))  # type: ignore[operator]
    not_a_number = rewrite(tiny_bundle, "nan.edge", perturbed(graph, "b", float("nan")))  # type: ignore[operator]
    with pytest.raises(GoldenError):
        check_golden(not_a_number)


def test_golden_samples_run_in_the_batch_that_the_graph_takes(tiny_bundle: Bundle, rewrite: object) -> None:
    graph = tiny_bundle.file(FLOAT_GRAPH).read_bytes()
    inputs, outputs = load_golden(tiny_bundle)  # four samples
    for batch in (1, 2, 4):
        bundle = rewrite(tiny_bundle, f"{batch}.edge", fixed_batch(graph, batch))  # type: ignore[operator]
        with open_runner(bundle) as runner:
            np.testing.assert_allclose(run_samples(runner, inputs)["y"], outputs["y"], rtol=1e-4, atol=1e-5)
    three = rewrite(tiny_bundle, "3.edge", fixed_batch(graph, 3))  # type: ignore[operator]
    with open_runner(three) as runner, pytest.raises(InputError):
        run_samples(runner, inputs)


def test_golden_samples_are_cut_along_the_batch_wherever_it_is(simulate: Any, odd_bundle: Bundle, cli: Any) -> None:
    """An engine for one sample; the golden file has four. What has no batch has a golden file of the engine's sizes."""
    simulation, inputs = simulate(), odd_bundle.manifest.inputs
    profiles = {s.name: [[1 if isinstance(axis, str) else axis for axis in s.shape]] * 3 for s in inputs}
    name, files = "engines/rtx-ampere.golden.npz", {}
    if made := odd_bundle.manifest.name in ("steps", "points", "anchors"):
        feeds = {k: array[:1] for k, array in load_golden(odd_bundle)[0].items()}
        with open_runner(odd_bundle, "onnxruntime") as runner:
            files[name] = save_golden(feeds, runner.run(feeds))
    bundle = simulation.engine(odd_bundle, plan={"profiles": profiles}, golden_file=name if made else None)
    bundle = bundle.extend(files)
    assert check_golden(bundle, backend="tensorrt-rtx").snr_db > 120
    rows = cli("compare", bundle.path, "--backends", "onnxruntime,tensorrt-rtx", "--json").json["outputs"]
    assert [row["within_tolerance"] for row in rows] == [True, True]


def test_a_golden_file_without_outputs_proves_nothing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    inputs, _ = load_golden(tiny_bundle)
    with Bundle.create(tmp_path / "empty.edge") as draft:
        draft.write(FLOAT_GRAPH, tiny_bundle.read(FLOAT_GRAPH))
        draft.write(GOLDEN, save_golden(inputs, {}))
        draft.manifest = tiny_bundle.manifest
    with pytest.raises(BundleError, match="no golden outputs"):
        check_golden(Bundle.open(tmp_path / "empty.edge"))


@pytest.mark.parametrize("name", [FLOAT_GRAPH, GOLDEN, MANIFEST])
def test_a_damaged_model_is_not_opened(tiny_bundle: Bundle, name: str) -> None:
    data = bytearray((tiny_bundle.path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tiny_bundle.path / name).write_bytes(data)
    with pytest.raises(BundleError), Model.open(tiny_bundle.path):
        pass


def test_choices_of_a_quantized_graph_are_not_held_beside_floats() -> None:
    floats, ids = np.array([3.0, -4.0]), np.array([7, 900, 12, 5])
    golden = {"y": floats, "ids": ids}
    found = {"y": floats + np.array([0.0, 0.5]), "ids": ids[:3]}
    assert compare_outputs(golden, found, quantized=True).snr_db == pytest.approx(20.0)
    assert compare_outputs(golden, found, quantized=False) == (float("inf"), float("-inf"))
    wrong = {"y": floats[:1], "ids": ids}
    assert compare_outputs(golden, wrong, quantized=True).snr_db == float("-inf")


def test_a_quantized_graph_of_choices_owes_those() -> None:
    ids = np.arange(100)
    other = np.where(ids == 70, 10**9, ids)  # how far off one is means nothing
    result = compare_outputs({"ids": ids}, {"ids": other}, quantized=True)
    assert result == (pytest.approx(0.01), pytest.approx(20.0))
    assert compare_outputs({"ids": ids}, {"ids": other}, quantized=False).snr_db < 0
    assert compare_outputs({"ids": ids}, {"ids": ids}, quantized=True) == (0.0, 200.0)
    assert compare_outputs({"ids": ids}, {"ids": ids[:9]}, quantized=True).snr_db == float("-inf")
    yes = np.array([True, False])
    assert compare_outputs({"yes": yes}, {"yes": ~yes}, quantized=True) == (1.0, 0.0)


def test_errors_are_measured_as_defined() -> None:
    golden = np.array([3.0, -4.0])
    assert compare_arrays(golden, golden) == (0.0, 200.0)
    result = compare_arrays(golden, golden + np.array([0.0, 0.5]))
    assert result.relative == pytest.approx(0.125)
    assert result.snr_db == pytest.approx(20.0)
    for wrong in (np.array([3.0, np.nan]), np.array([[3.0, -4.0]]), np.array([3.0])):
        assert compare_arrays(golden, wrong) == (float("inf"), float("-inf"))
        assert compare_arrays(wrong, golden) == (float("inf"), float("-inf"))
    masked = np.array([3.0, -np.inf])
    assert compare_arrays(masked, masked) == (0.0, 200.0)
    for wrong in (-masked, np.array([3.0, -9.0]), np.array([np.nan, -np.inf])):
        assert compare_arrays(masked, wrong).relative == float("inf")
    assert compare_arrays(np.array([250], np.uint8), np.array([5], np.uint8)).relative == pytest.approx(0.98)


@pytest.mark.parametrize("size", [1e-35, 1e-12, 1.0, 1e30])
def test_errors_are_measured_alike_at_any_size(size: float) -> None:
    golden = size * np.array([3.0, -4.0], np.float32)
    assert compare_arrays(golden, np.zeros(2, np.float32)) == (1.0, pytest.approx(0.0))
    assert compare_arrays(golden, golden * np.float32(0.9)) == (pytest.approx(0.1, rel=1e-5), pytest.approx(20.0, abs=1e-4))


@pytest.mark.parametrize("zero", [0.0, 1e-40])  # which a GPU flushes
def test_an_output_of_zeros_is_held_to_the_last_digits_of_float32(zero: float) -> None:
    golden = np.full(4, zero, np.float32)
    near, far = (compare_arrays(golden, np.array([0, found, 0, 0], np.float32)) for found in (1e-12, 1e-3))
    assert near.within(Tolerance("relative", 1e-4))
    assert near.within(Tolerance("snr_db", 60.0))
    assert not far.within(Tolerance("relative", 1e-4))
    assert far.snr_db == pytest.approx(-60.0)
    assert compare_arrays(golden, np.zeros(4, np.float32)).within(Tolerance("relative", 1e-4))

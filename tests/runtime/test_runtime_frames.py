"""Engines that take frames of bytes and normalise by themselves: the same answers, a quarter of the bytes.

On the simulated TensorRT: what ONNX Runtime answers to the graph that an engine would be compiled from.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.compiler import build
from edgekit.compiler.frames import with_normalisation
from edgekit.data import load
from edgekit.errors import BackendError, InputError
from edgekit.manifest import ImagePreprocessing
from edgekit.preprocess import Preprocessor, denormalised
from edgekit.runtime import Model, check_golden
from edgekit.trust import local_builds

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def digits() -> list[Any]:
    """Sixty digits that the model was not fitted to, uint8 (28, 28)."""
    held_out = load("digits").test
    return [held_out.read(i) for i in range(0, 960, 16)]


def takes_frames(simulation: Any, bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with an engine of the simulated TensorRT whose input is uint8 (n, H, W, C)."""
    spec = bundle.manifest.preprocessing
    assert isinstance(spec, ImagePreprocessing)
    shape = [spec.height, spec.width, spec.channels]
    inside = {"profiles": {"x": [[1, *shape], [4, *shape], [4, *shape]]}}
    changes = {"onnx": with_normalisation(bundle.read(FLOAT_GRAPH), spec), "frames": msgspec.to_builtins(spec), **changes}
    made: Bundle = simulation.engine(bundle, plan=inside, **changes)
    return made


def nothing_left(simulation: Any) -> None:
    gc.collect()
    assert simulation.cuda.left == {}
    assert simulation.trt.alive == 0


# The same answers


def test_every_release_answers_bytes_as_it_answers_floats(simulation: Any, digits_bundle: Bundle, digits: list[Any]) -> None:
    with Model.open(simulation.engine(digits_bundle).path, simulation.backend) as model:
        assert model.preprocess(digits[0]).shape == (1, 1, 28, 28)
        truth = [model(frame) for frame in digits]
    with Model.open(takes_frames(simulation, digits_bundle).path, simulation.backend) as model:
        assert [(s.name, s.dtype, s.shape) for s in model.inputs] == [("x", "uint8", ("n", 28, 28, 1))]
        assert model.runner.describe()["uint8_input"] is True
        found = [model(frame) for frame in digits]
        batch = model.predict_batch(digits[:11])  # 4, 4 and 3
    for one, other in zip(truth, found, strict=True):
        assert one.label == other.label
        np.testing.assert_array_equal(one.scores, other.scores)
    assert [one.label for one in batch] == [one.label for one in truth[:11]]
    assert len({one.label for one in truth}) > 5
    nothing_left(simulation)


def test_the_frame_goes_up_as_it_is_in_a_quarter_of_the_bytes(simulate: Any, digits_bundle: Bundle, digits: list[Any]) -> None:
    simulation, sizes, held = simulate(), [], []
    for engine in (simulation.engine, functools.partial(takes_frames, simulation)):
        with Model.open(engine(digits_bundle).path, simulation.backend) as model:
            model(digits[3])
            sizes.append(max(map(len, simulation.cuda.memory.values())))
            held += [memory for memory in simulation.cuda.memory.values() if len(memory) == 28 * 28]
    assert sizes == [4 * 28 * 28, 28 * 28]
    (uploaded,) = held
    np.testing.assert_array_equal(uploaded.reshape(28, 28), digits[3])


def test_colours_keep_their_channels_and_resized_frames_lose_a_rounding(
    simulate: Any, pictures_bundle: Bundle, coloured_digits: list[Any]
) -> None:
    simulation = simulate()
    native = [np.kron(frame[2:26:3, 2:26:3], np.ones((4, 4, 1), np.uint8)) for frame in coloured_digits]  # 32x32
    with Model.open(simulation.engine(pictures_bundle).path, simulation.backend) as model:
        exact = [model(frame) for frame in native]
        near = [model(frame) for frame in coloured_digits]  # 28x28: resized
    with Model.open(takes_frames(simulation, pictures_bundle).path, simulation.backend) as model:
        np.testing.assert_array_equal(model.preprocess(native[0])[0], native[0])
        for frame, truth in zip(native, exact, strict=True):
            np.testing.assert_array_equal(model(frame).scores, truth.scores)
        for frame, truth in zip(coloured_digits, near, strict=True):
            np.testing.assert_allclose(model(frame).scores, truth.scores, atol=2e-3)
        grey = coloured_digits[0][:, :, 0]
        np.testing.assert_array_equal(model(grey).scores, model(np.stack([grey] * 3, 2)).scores)
        with model.share() as second:
            np.testing.assert_array_equal(second(native[1]).scores, exact[1].scores)
    nothing_left(simulation)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_kit_of_any_precision_answers_bytes_as_floats(
    simulate: Any, digits_bundle: Bundle, digits: list[Any], precision: str, tmp_path: Path
) -> None:
    """What `build` writes for a device, compiled there by the simulated TensorRT, found by the record in the manifest."""
    bundle = digits_bundle
    if precision == "int8":
        from edgekit.quantization import quantize

        bundle = quantize(digits_bundle, out=tmp_path / "q.edge", calib="digits", method="minmax", samples=16)
    simulation = simulate("10.3", sm="8.7", integrated=True)
    graph = INT8_GRAPH if precision == "int8" else FLOAT_GRAPH
    answers = []
    for uint8_input in (False, True):
        made = build(bundle, target="jetson-orin-nano", precision=precision, batch="1..4", uint8_input=uint8_input)
        compile_kit(simulation, made.bundle)
        with Model.open(bundle.path, "tensorrt") as model:
            assert model.inputs[0].dtype == ("uint8" if uint8_input else "float32")
            answers.append(np.concatenate([one.scores for one in model.predict_batch(digits)]))
        assert check_golden(Bundle.open(bundle.path), graph, "tensorrt").snr_db > (15 if precision == "int8" else 50)
    np.testing.assert_array_equal(*answers)


def compile_kit(simulation: Any, bundle: Bundle) -> None:
    """What a kit's script leaves on a device, where the runtime looks for it."""
    record = json.loads(bundle.read("engines/jetson-orin-nano.json"))
    with zipfile.ZipFile(io.BytesIO(bundle.read(record["file"]))) as archive:
        onnx = archive.read("graph.onnx")
    plan = simulation.plan(onnx, simulation.trt, "8.7", record["profiles"])
    digest = hashlib.sha256(plan).hexdigest()
    about = {"tensorrt": simulation.trt.__version__, "module": "tensorrt", "engine_sha256": digest}
    about |= {"graph_sha256": record["graph_sha256"], "key": record["key"], "target": "jetson-orin-nano"}
    folder = local_builds(record["key"])[0]
    folder.mkdir(parents=True)
    (folder / "jetson-orin-nano.engine").write_bytes(plan)
    (folder / "jetson-orin-nano.json").write_text(json.dumps(about))


def test_bytes_undo_the_normalisation(coloured_digits: list[Any]) -> None:
    spec = ImagePreprocessing(28, 28, 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    frames = np.stack(coloured_digits)
    tensors = np.concatenate([Preprocessor(spec)(frame) for frame in frames])
    np.testing.assert_array_equal(denormalised(spec, tensors), frames)
    np.testing.assert_array_equal(denormalised(spec, tensors * 100)[0].max(), 255)


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox", "line"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_bytes_of_a_frame_are_its_tensor_rounded(fit: Any, channels: Any) -> None:
    """However a frame is resized, and grey or colour: frames from the host and golden inputs are made alike."""
    spec = ImagePreprocessing(40, 24, channels, mean=(0.4,) * channels, std=(0.2,) * channels, fit=fit)
    read = Preprocessor(spec)
    for shape in [(24, 40), (24, 40, 3), (50, 60), (17, 90, 3), (48, 80, 4), (100, 30, 1)]:
        frame = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        found = read.resized(frame)
        assert (found.dtype, found.shape) == (np.uint8, (1, 24, 40, channels))
        wanted = denormalised(spec, read(frame))
        assert np.abs(found.astype(int) - wanted).max() <= 1  # what lies in the middle of two bytes: one in 64 at half the size
        assert (found != wanted).mean() < 0.02


# Everything that feeds a model


def test_golden_compare_eval_and_bench_feed_bytes(simulate: Any, digits_bundle: Bundle, cli: Cli, tmp_path: Path) -> None:
    simulation = simulate()
    bundle = takes_frames(simulation, digits_bundle)
    assert check_golden(bundle, backend="tensorrt-rtx").snr_db > 100  # the golden digits were never resized
    rows = cli("compare", bundle.path, "--backends", "onnxruntime,tensorrt-rtx", "--json").json["outputs"]
    assert [row["within_tolerance"] for row in rows] == [True, True]
    truth = cli("eval", digits_bundle.path, "--data", "digits", "--backend", "onnxruntime", "--no-save", "--json").json
    found = cli("eval", bundle.path, "--data", "digits", "--backend", "tensorrt-rtx", "--no-save", "--json").json
    assert found["confusion"] == truth["confusion"]
    options = ["--backend", "tensorrt-rtx", "--seconds", "0.02", "--json"]
    measured = cli("bench", bundle.path, *options).json
    assert measured["uint8_input"] is True
    assert measured["inputs"] == {"x": ["uint8", 1, 28, 28, 1]}
    assert measured["end_to_end"]["frame"] == [28, 28]
    assert cli("bench", bundle.path, "--scenario", "offline", *options).code == 0
    other = shutil.copytree(bundle.path, tmp_path / "other.edge")
    assert cli("bench", bundle.path, other, *options).code == 0
    nothing_left(simulation)


def test_explanations_ask_an_engine_of_bytes(simulate: Any, digits_bundle: Bundle, digits: list[Any], tmp_path: Path) -> None:
    from PIL import Image

    from edgekit.explanation import explain

    Image.fromarray(digits[0]).save(tmp_path / "digit.png")
    truth = explain(digits_bundle, [tmp_path / "digit.png"], out=tmp_path / "float", method="occlusion")["images"][0]
    takes_frames(simulate(), digits_bundle)
    found = explain(digits_bundle.path, [tmp_path / "digit.png"], out=tmp_path / "bytes", method="occlusion")
    assert found["backend"] == "tensorrt-rtx"
    row = found["images"][0]
    assert (row["label"], row["score"]) == (truth["label"], pytest.approx(truth["score"]))
    assert row["deletion_auc"] == pytest.approx(truth["deletion_auc"], abs=0.02)


def test_auto_feeds_whatever_it_came_to(simulate: Any, digits_bundle: Bundle, digits: list[Any]) -> None:
    with Model.open(digits_bundle.path) as cpu:
        truth = [cpu(frame) for frame in digits[:3]]
    simulation = simulate()
    bundle = takes_frames(simulation, digits_bundle)
    with Model.open(bundle.path) as model:
        assert (model.runner.name, model.inputs[0].dtype) == ("tensorrt-rtx", "uint8")
        for frame, one in zip(digits, truth, strict=False):
            np.testing.assert_array_equal(model(frame).scores, one.scores)
    simulation.trt.__version__ = "9.9"  # refuses the engine: the graph runs on the CPU, on floats
    with Model.open(bundle.path) as model:
        assert (model.runner.name, model.inputs[0].dtype) == ("onnxruntime", "float32")
        assert model(digits[0]).label == truth[0].label


def test_an_installed_pack_scans_by_bytes(
    simulate: Any, digits_bundle: Bundle, digits: list[Any], tmp_path: Path, cli: Cli
) -> None:
    """`install` holds the engine to its golden outputs; `scan` gives it frames of any size."""
    from PIL import Image

    with Model.open(digits_bundle.path) as cpu:
        truth = cpu(digits[5]).label
    bundle = takes_frames(simulate(), digits_bundle)
    assert cli("pack", bundle.path, "--out", tmp_path / "f.zip").code == 0
    assert cli("install", tmp_path / "f.zip", "--root", tmp_path / "root", "--unsigned").code == 0
    (manifest,) = (tmp_path / "root").rglob("manifest.json")
    with Model.open(manifest.parent) as model:
        assert (model.runner.name, model.inputs[0].dtype) == ("tensorrt-rtx", "uint8")
        assert model(digits[5]).label == truth
    Image.fromarray(digits[5]).resize((84, 84)).save(tmp_path / "digit.png")
    done = cli("scan", manifest.parent, "--source", tmp_path / "digit.png", "--sink", f"jsonl:{tmp_path / 'events.jsonl'}")
    assert done.code == 0
    assert json.loads((tmp_path / "events.jsonl").read_text())["label"] == truth


# What is refused


def test_raw_floats_are_refused_with_the_cure(simulate: Any, digits_bundle: Bundle, digits: list[Any]) -> None:
    bundle = takes_frames(simulate(), digits_bundle)
    with Model.open(bundle.path, "tensorrt-rtx") as model:
        raw = model.run({"x": np.stack(digits[:2])[:, :, :, None]})["y"]
        assert raw.argmax(1).tolist() == [int(model(frame).label or -1) for frame in digits[:2]]
        with pytest.raises(InputError, match=r"x is float32, this engine normalises .* bytes: uint8 nx28x28x1") as caught:
            model.run({"x": np.zeros((1, 1, 28, 28), np.float32)})
        assert "model.preprocess(frame)" in caught.value.hint
        assert "--uint8-input" in caught.value.hint
        with pytest.raises(InputError, match=r"x has shape 1x1x28x28, the model takes uint8 nx28x28x1"):
            model.run({"x": np.zeros((1, 1, 28, 28), np.uint8)})


def test_an_engine_that_normalises_otherwise_than_the_bundle_is_refused(simulate: Any, digits_bundle: Bundle) -> None:
    simulation = simulate()
    spec = digits_bundle.manifest.preprocessing
    assert isinstance(spec, ImagePreprocessing)
    other = msgspec.to_builtins(msgspec.structs.replace(spec, mean=(0.25,)))
    bundle = takes_frames(simulation, digits_bundle, frames=other)
    with pytest.raises(BackendError, match="normalises frames otherwise than") as caught:
        Model.open(bundle.path, simulation.backend).__enter__()
    assert caught.value.hint.endswith("--target rtx-ampere --uint8-input")
    nothing_left(simulation)

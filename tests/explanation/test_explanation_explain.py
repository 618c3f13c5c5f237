"""Explanations through the command and the function: the right region, in every method, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper
from PIL import Image

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.data import load
from edgekit.errors import BundleError, DataError, OutputExists, UsageError
from edgekit.explanation import METHODS, explain
from edgekit.explanation.faithfulness import faithfulness
from edgekit.explanation.images import ImageQuestion
from edgekit.explanation.lime import attribute as lime
from edgekit.explanation.occlusion import attribute as occlusion
from edgekit.explanation.picture import onto_frame
from edgekit.explanation.superpixels import superpixels
from edgekit.manifest import ImagePreprocessing
from edgekit.runtime import Model


def corner_bundle(tmp_path: Path, digits_bundle: Bundle, batch: int | str = "n") -> Bundle:
    """Class 1 is the brightness of the upper left 8 x 8 pixels, class 0 that of the lower right; the rest is ignored."""
    weight = np.zeros((2, 28, 28), np.float32)
    weight[1, :8, :8] = weight[0, 20:, 20:] = 1 / 64
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w"], ["y"], name="gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [batch, 1, 28, 28])],
        [helper.make_tensor_value_info("y", 1, [batch, 2])],
        [helper.make_tensor("w", 1, [2, 784], weight.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with Bundle.create(tmp_path / f"corner-{batch}.edge") as draft:
        draft.write(FLOAT_GRAPH, model.SerializeToString())
        draft.manifest = msgspec.structs.replace(digits_bundle.manifest, labels=("lower", "upper"), golden={}, name="corner")
    return Bundle.open(tmp_path / f"corner-{batch}.edge")


def corner_frame() -> np.ndarray[Any, Any]:
    """Bright squares in all four corners of a dark frame."""
    frame = np.zeros((28, 28), np.uint8)
    for rows in (slice(1, 7), slice(21, 27)):
        for columns in (slice(1, 7), slice(21, 27)):
            frame[rows, columns] = 220
    return frame


@pytest.mark.parametrize("attribute", [occlusion, lime])
@pytest.mark.parametrize("batch", ["n", 1])
def test_the_map_finds_what_the_model_uses(tmp_path: Path, digits_bundle: Bundle, attribute: Any, batch: int | str) -> None:
    with Model.open(corner_bundle(tmp_path, digits_bundle, batch).path) as model:
        heat = attribute(ImageQuestion(model, model.preprocess(corner_frame()), 1)).heat
    assert heat.shape == (28, 28)
    upper, lower = heat[1:7, 1:7].mean(), heat[21:27, 21:27].mean()
    ignored = [abs(heat[1:7, 21:27].mean()), abs(heat[21:27, 1:7].mean())]
    assert upper > 5 * max(ignored)
    assert lower < -5 * max(ignored)


def test_lime_says_how_well_its_linear_model_fits(tmp_path: Path, digits_bundle: Bundle) -> None:
    with Model.open(corner_bundle(tmp_path, digits_bundle).path) as model:
        question = ImageQuestion(model, model.preprocess(corner_frame()), 1)
        first, again = lime(question, samples=300), lime(question, samples=300)
    assert first.figures["r2"] > 0.95  # the model is linear but for the ridge
    assert np.array_equal(first.heat, again.heat)


class Noise:
    """A question whose answers depend on nothing."""

    def parts(self) -> Any:
        return np.arange(250)

    def hide(self, masks: Any) -> list[Any]:
        return [np.random.default_rng(1).normal(size=len(list(masks)))]

    def log_odds(self, logits: Any) -> Any:
        return logits


@pytest.mark.parametrize("samples", [300, 1000])
def test_a_fit_to_noise_is_no_fit(samples: int) -> None:
    """In sample it explains a quarter of 1,000 runs, and most of 300."""
    found: Any = lime(Noise(), samples=samples)  # type: ignore[arg-type]
    assert found.figures["r2"] < 0.05


def test_lime_is_a_weighted_ridge_regression(digits_bundle: Bundle) -> None:
    """As in the authors' `lime_image` and `lime_base`: kernel sqrt(exp(-d^2 / 0.25^2)), ridge 1, a free intercept."""
    with Model.open(digits_bundle.path) as model:
        question = ImageQuestion(model, model.preprocess(load("digits").test.read(420)), 4)
        found = lime(question, samples=200)
        segments = question.parts()
        count = int(segments.max()) + 1
        shown = np.random.default_rng(0).random((200, count)) < 0.5
        shown[0] = True
        y = np.concatenate([question.log_odds(logits) for logits in question.hide(~row[segments] for row in shown)])
    z = np.c_[shown, np.ones(200)].astype(np.float64)
    cosine = shown.sum(1) / np.sqrt(shown.sum(1) * count)
    root = np.sqrt(np.sqrt(np.exp(-((1 - cosine) ** 2) / 0.25**2)))  # of the weight, on each row of the equations
    penalty = np.c_[np.eye(count), np.zeros(count)]  # none on the intercept
    by_hand = np.linalg.lstsq(np.r_[z * root[:, None], penalty], np.r_[y * root, np.zeros(count)], rcond=None)[0]
    assert found.heat == pytest.approx(by_hand[:-1][segments], abs=1e-4)


def test_deletion_and_insertion_prefer_the_right_map(tmp_path: Path, digits_bundle: Bundle) -> None:
    with Model.open(corner_bundle(tmp_path, digits_bundle).path) as model:
        question = ImageQuestion(model, model.preprocess(corner_frame()), 1)
        right, wrong = np.zeros((2, 28, 28), np.float32)
        right[:8, :8] = wrong[20:, 20:] = 1
        good, bad = faithfulness(question, right), faithfulness(question, wrong)
    assert good.deletion.auc < good.deletion.misplaced < bad.deletion.auc
    assert good.insertion.auc > good.insertion.misplaced > bad.insertion.auc
    assert len(good.deletion.values) == len(good.insertion.values) == 21
    assert good.insertion.values[-1] == pytest.approx(good.deletion.values[0])  # all of it is shown


@pytest.mark.parametrize("method", ["activations", "lime", "occlusion"])
def test_each_method_writes_a_picture_an_image(
    cli: Callable[..., Any], digits_bundle: Bundle, digit: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "why"
    answer = cli("explain", digits_bundle.path, digit, "--out", out, "--method", method, "--samples", 200, "--json")
    assert answer.code == 0
    row = answer.json["images"][0]
    assert (answer.json["out"], answer.json["method"], answer.json["graph"]) == (str(out), method, FLOAT_GRAPH)
    assert (row["source"], row["label"], row["overlay"]) == (str(digit), "4", f"four.{method}.png")
    assert 0.5 < row["score"] <= 1
    with Image.open(out / row["overlay"]) as picture:
        assert picture.width > picture.height > 300
    assert {"out": str(out), **json.loads((out / "explanation.json").read_text())} == answer.json
    if method == "activations":
        assert [layer["name"] for layer in answer.json["layers"]] == ["conv1", "relu1", "conv2", "relu2", "gemm"]
    else:
        assert row["deletion_auc"] < row["misplaced_auc"]
        assert row["insertion_auc"] > row["misplaced_insertion_auc"]


def test_people_get_a_table(cli: Callable[..., Any], digits_bundle: Bundle, digit: Path, tmp_path: Path) -> None:
    for method in ("activations", "occlusion"):
        answer = cli("explain", digits_bundle.path, digit, "--out", tmp_path / "why", "--method", method)
        assert answer.code == 0
        assert "four" in answer.out
        assert "explanation.json" in answer.out


def test_another_class_can_be_asked_for(digits_bundle: Bundle, digit: Path, tmp_path: Path) -> None:
    row = explain(digits_bundle, digit, out=tmp_path / "why", label="9")["images"][0]
    assert (row["label"], row["explained"]) == ("4", "9")


def test_damaged_images_are_named_and_skipped(digits_bundle: Bundle, digit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(digit.read_bytes())
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (folder / "notes.txt").write_text("no image")
    (folder / "other").mkdir()
    (folder / "other" / "a.png").write_bytes(digit.read_bytes())
    result = explain(digits_bundle, [folder, folder / "other"], out=folder)
    assert [row["overlay"] for row in result["images"]] == ["a.occlusion.png", "a-2.occlusion.png"]
    assert result["skipped"] == [str(folder / "b.png")]
    assert (folder / "a.png").read_bytes() == digit.read_bytes()
    with pytest.raises(DataError, match="none of 1 images"):
        explain(digits_bundle, folder / "b.png", out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("method", ["activations", "lime", "occlusion"])
def test_a_model_that_answers_nan_is_named(
    cli: Callable[..., Any], digits_bundle: Bundle, digits_graph: bytes, digit: Path, tmp_path: Path, method: str
) -> None:
    model = onnx.load_from_string(digits_graph)
    weight = next(weight for weight in model.graph.initializer if weight.name == "w3")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "w3"))
    with Bundle.create(tmp_path / "nan.edge") as draft:
        draft.write(FLOAT_GRAPH, model.SerializeToString())
        draft.manifest = msgspec.structs.replace(digits_bundle.manifest, golden={}, name="nan")
    answer = cli("explain", tmp_path / "nan.edge", digit, "--out", tmp_path / "why", "--method", method)
    assert (answer.code, "the model answers NaN or Inf for this sample" in answer.err) == (1, True)
    assert f"error: none of 1 images can be explained; {digit}: the model answers NaN or Inf" in answer.err
    assert not (tmp_path / "why").exists()


def test_a_name_of_any_length_has_its_picture(digits_bundle: Bundle, digit: Path, tmp_path: Path) -> None:
    for letter in ("a", "ł"):
        (tmp_path / f"{letter * (245 // len(letter.encode()))}.png").write_bytes(digit.read_bytes())
    digit.unlink()
    result = explain(digits_bundle, tmp_path, out=tmp_path / "why")
    assert [row["overlay"] for row in result["images"]] == [f"{'a' * 150}.occlusion.png", f"{'ł' * 75}.occlusion.png"]


def test_a_source_is_never_overwritten(digits_bundle: Bundle, digit: Path, tmp_path: Path) -> None:
    (tmp_path / "four.occlusion.png").write_bytes(digit.read_bytes())
    result = explain(digits_bundle, [digit, tmp_path / "four.occlusion.png"], out=tmp_path)
    assert (tmp_path / "four.occlusion.png").read_bytes() == digit.read_bytes()
    assert result["images"][0]["overlay"] == "four-2.occlusion.png"


def test_only_pictures_of_an_earlier_explanation_are_replaced(digits_bundle: Bundle, digit: Path, tmp_path: Path) -> None:
    out = tmp_path / "why"
    out.mkdir()
    (out / "four.occlusion.png").write_bytes(b"mine")
    first = explain(digits_bundle, digit, out=out)
    assert first["images"][0]["overlay"] == "four-2.occlusion.png"
    again = explain(digits_bundle, digit, out=out, label="9")
    assert again["images"][0]["overlay"] == "four-2.occlusion.png"
    assert (out / "four.occlusion.png").read_bytes() == b"mine"
    assert len(list(out.iterdir())) == 3
    (out / "explanation.json").write_text('{"mine": true}')
    with pytest.raises(OutputExists):
        explain(digits_bundle, digit, out=out)
    assert (out / "explanation.json").read_text() == '{"mine": true}'


def test_pictures_beside_their_explanations_are_explained_once(digits_bundle: Bundle, digit: Path) -> None:
    folder = digit.parent / "both"
    folder.mkdir()
    digit.rename(folder / digit.name)
    for _ in range(2):
        assert len(explain(digits_bundle, folder, out=folder)["images"]) == 1
    with pytest.raises(UsageError, match="lies inside the bundle"):
        explain(digits_bundle, folder, out=digits_bundle.path / "why")


def test_a_name_that_is_no_utf8_is_shown_and_skipped(cli: Callable[..., Any], digits_bundle: Bundle, digit: Path) -> None:
    folder = digit.parent / "odd"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_bytes(digit.read_bytes())
    Path(os.fsdecode(os.fsencode(folder) + b"/\xfe.png")).write_bytes(b"broken")
    outcome = cli("explain", digits_bundle.path, folder, "--out", folder / "why", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["images"][0]["source"].endswith("\\xff.png")
    assert outcome.json["skipped"][0].endswith("\\xfe.png")


def test_what_cannot_be_explained_is_refused(
    cli: Callable[..., Any], digits_bundle: Bundle, tiny_bundle: Bundle, digit: Path, tmp_path: Path
) -> None:
    out = tmp_path / "why"
    raw = cli("explain", tiny_bundle.path, digit, "--out", out)
    assert raw.code == 2
    assert "raw tensors" in raw.err
    assert "edgekit train" in raw.err
    assert cli("explain", digits_bundle.path, tmp_path / "none.png", "--out", out).code == 1
    assert cli("explain", digits_bundle.path, "--out", out).code == 2
    assert cli("explain", digits_bundle.path, digit, "--out", out, "--method", "magic").code == 2
    assert cli("explain", digits_bundle.path, digit, "--out", out, "--label", "ten").code == 2
    gradcam = cli("explain", digits_bundle.path, digit, "--out", out, "--method", "gradcam")
    assert gradcam.code == 2
    assert "--method occlusion" in gradcam.err
    assert not out.exists()
    with pytest.raises(BundleError, match=INT8_GRAPH):
        explain(digits_bundle, digit, out=out, precision="int8")
    with pytest.raises(UsageError, match="no method"):
        explain(digits_bundle, digit, out=out, method="magic")
    with pytest.raises(OutputExists):
        explain(digits_bundle, digit, out=digit)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        explain(digits_bundle, tmp_path / "empty", out=out)


@pytest.mark.parametrize("method", ["lime", "occlusion"])
def test_a_graph_that_takes_bytes_is_asked_with_bytes(
    digits_bundle: Bundle, digits_graph: bytes, digit: Path, tmp_path: Path, method: str
) -> None:
    model = onnx.load_from_string(digits_graph)
    spec = digits_bundle.manifest.preprocessing
    assert isinstance(spec, ImagePreprocessing)
    for node in model.graph.node:
        node.input[:] = ["normal" if name == "x" else name for name in node.input]
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    scale, shift = 1 / (255 * spec.std[0]), -spec.mean[0] / spec.std[0]
    model.graph.initializer.extend(
        helper.make_tensor(name, 1, [], [value]) for name, value in (("scale", scale), ("shift", shift))
    )
    for node in (
        helper.make_node("Add", ["scaled", "shift"], ["normal"]),
        helper.make_node("Mul", ["cast", "scale"], ["scaled"]),
        helper.make_node("Cast", ["x"], ["cast"], to=1),
    ):
        model.graph.node.insert(0, node)
    inputs = tuple(msgspec.structs.replace(entry, dtype="uint8") for entry in digits_bundle.manifest.inputs)
    with Bundle.create(tmp_path / "bytes.edge") as draft:
        draft.write(FLOAT_GRAPH, model.SerializeToString())
        draft.manifest = msgspec.structs.replace(digits_bundle.manifest, golden={}, name="bytes", inputs=inputs)
    row = explain(tmp_path / "bytes.edge", digit, out=tmp_path / "why", method=method, samples=100)["images"][0]
    assert row["label"] == "4"
    assert row["deletion_auc"] < row["misplaced_auc"]


@given(
    arrays(
        np.float32,
        st.tuples(st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40)),
        elements=st.floats(-3, 3, width=32),
    )
)
def test_superpixels_cover_the_image_without_gaps(image: np.ndarray[Any, Any]) -> None:
    segments = superpixels(image)
    assert segments.shape == image.shape[1:]
    assert set(np.unique(segments)) == set(range(segments.max() + 1))


@given(
    st.sampled_from(["stretch", "crop", "letterbox"]),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_maps_of_any_shape_land_on_the_frame(
    fit: Any, frame: tuple[int, int], model: tuple[int, int], shown: tuple[int, int]
) -> None:
    spec = ImagePreprocessing(model[1], model[0], 1, (0.0,), (1.0,), fit)
    placed = onto_frame(np.ones(model, np.float32), spec, frame, shown)
    assert placed.shape == shown
    assert np.allclose(placed[np.isfinite(placed)], 1, atol=1e-5)
    assert np.isfinite(placed).any()
    assert fit == "crop" or np.isfinite(placed).all()


def test_a_cropped_map_lands_where_the_model_looked() -> None:
    spec = ImagePreprocessing(10, 10, 1, (0.0,), (1.0,), "crop")
    placed = onto_frame(np.ones((10, 10), np.float32), spec, (20, 40), (20, 40))
    assert np.isfinite(placed[:, 10:30]).all()
    assert np.isnan(placed[:, :10]).all()
    boxed = onto_frame(
        np.eye(10, dtype=np.float32), ImagePreprocessing(10, 10, 1, (0.0,), (1.0,), "letterbox"), (20, 40), (5, 10)
    )
    assert boxed[:, 0].sum() == pytest.approx(0)  # rows 2..6 of the input hold the frame
    assert boxed[0, 2] == pytest.approx(1)


def test_only_gradcam_and_rollout_need_torch() -> None:
    rooms = ", ".join(f"edgekit.explanation.{n}" for n in ("lime", "activations", "text_picture", "series_picture", "picture"))
    code = f"import sys, {rooms}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(METHODS) == {"activations", "gradcam", "lime", "occlusion", "rollout"}

"""`edgekit build --uint8-input`: an engine that takes the frame's bytes and normalises them, compiled by TensorRT-RTX."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.bundle import FLOAT_GRAPH, GOLDEN, TOKENIZER, Bundle
from edgekit.compiler import build_engine, check_engine
from edgekit.compiler.changes import changes
from edgekit.compiler.frames import with_normalisation
from edgekit.errors import GoldenError, UsageError
from edgekit.manifest import ImagePreprocessing, SeriesPreprocessing, TensorSpec, TextPreprocessing
from edgekit.preprocess import Preprocessor
from edgekit.runtime.golden import load_golden, parse_golden
from edgekit.runtime.onnxruntime import session

Cli = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("in_process")


def record(bundle: Bundle, target: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Bundle.open(bundle.path).file(f"engines/{target}.json").read_bytes())
    return found


def in_kit(kit: Path | str | None, name: str) -> bytes:
    assert kit is not None
    with zipfile.ZipFile(kit) as archive:
        return archive.read(name)


def changed(bundle: Bundle, path: Path, **manifest: Any) -> Bundle:
    """A copy of a bundle with other fields in its manifest."""
    with Bundle.create(path) as draft:
        for name in (FLOAT_GRAPH, GOLDEN):
            draft.write(name, bundle.read(name))
        if isinstance(manifest.get("preprocessing"), TextPreprocessing):
            draft.write(TOKENIZER, b"{}")
        draft.manifest = msgspec.structs.replace(bundle.manifest, files={}, **manifest)
    return Bundle.open(path)


# Engines


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_of_bytes_is_compiled_and_described(cli: Cli, pictures_bundle: Bundle, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = ("build", pictures_bundle.path, "--target", "rtx-ada", "--precision", precision, "--batch", "1..4", "--json")
    plain = cli(*command).json
    before = record(pictures_bundle, "rtx-ada")
    made = cli(*command, "--uint8-input", "--verbose").json
    assert (plain["cached"], made["cached"], made["precision"]) == (False, False, precision)
    assert "--uint8-input none -> True" in made["changed"]
    assert "takes frames of bytes (uint8, 32x32x3) and normalises them" in made["note"]
    found = record(pictures_bundle, "rtx-ada")
    assert found["options"] == {"uint8_input": True}
    assert found["frames"]["mean"] == [0.485, 0.456, 0.406]
    assert found["profiles"] == {"x": [[1, 32, 32, 3], [4, 32, 32, 3], [4, 32, 32, 3]]}
    assert found["key"] != before["key"]
    assert found["golden"] == {"kind": "snr_db", "limit": 40.0}  # not loosened: the rounding costs less
    assert 43 < found["golden_snr_db"] < 100  # the golden inputs were resized: as bytes they are not exact
    layers = json.loads(Bundle.open(pictures_bundle.path).read("engines/rtx-ada.layers.json"))["layers"]
    assert (layers[0]["type"], layers[0]["precision"], layers[0]["inputs"]) == ("CAST", "float", [[-1, 32, 32, 3]])
    assert layers[1]["outputs"] == [[-1, 3, 32, 32]]
    assert cli(*command, "--uint8-input").json["cached"] is True
    assert "--uint8-input True -> none" in cli(*command).json["changed"]
    assert "frames" not in record(pictures_bundle, "rtx-ada")


def test_int8_keeps_its_stored_weights_behind_the_normalisation(digits_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from edgekit.quantization import quantize

    bundle = quantize(digits_bundle, out=tmp_path / "q.edge", calib="digits", method="minmax", samples=16)
    plain = edgekit.build(bundle, target="jetson-orin-nano")
    graphs = [onnx.load_model_from_string(in_kit(plain.kit, name)) for name in ("graph.onnx", "untyped.onnx")]
    made = edgekit.build(bundle, target="jetson-orin-nano", uint8_input=True)
    assert made.precision == "int8"
    for name, before in zip(("graph.onnx", "untyped.onnx"), graphs, strict=True):
        after = onnx.load_model_from_string(in_kit(made.kit, name))
        onnx.checker.check_model(after, full_check=True)
        assert [node.op_type for node in after.graph.node[:4]] == ["Cast", "Transpose", "Mul", "Add"]
        assert len(after.graph.node) == len(before.graph.node) + 4
        assert {i.name: i.raw_data for i in before.graph.initializer}.items() <= {
            i.name: i.raw_data for i in after.graph.initializer
        }.items()
    assert record(bundle, "jetson-orin-nano")["golden"]["kind"] == "snr_db"
    engine = edgekit.build(bundle, target="rtx-ada", uint8_input=True)
    assert engine.engine is not None
    assert engine.precision == "int8"


def test_what_no_float16_can_do_is_tried_in_float32_with_the_same_input(
    digits_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from edgekit.quantization import quantize

    graphs = []

    def refuse(trt: Any, graph: bytes, *rest: Any) -> build_engine.Built:
        if b"fp16" in graph:
            raise build_engine.BuildError("no float16 here")
        graphs.append(onnx.load_model_from_string(graph))
        return build_engine.Built(b"plan")

    bundle = quantize(digits_bundle, out=tmp_path / "q.edge", calib="digits", method="minmax", samples=16)
    monkeypatch.setattr(build_engine, "build", refuse)
    made = edgekit.build(bundle, target="rtx-ada", uint8_input=True)
    assert "no float16 here" in made.note
    assert "takes frames of bytes" in made.note
    (graph,) = graphs
    assert graph.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    found = record(bundle, "rtx-ada")
    assert found["golden"]["limit"] <= found["golden_snr_db"] - 2.9


# The graph


def test_the_bytes_are_read_by_one_cast_in_subgraphs_too() -> None:
    """TensorRT takes bytes into a cast only."""
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["x"], [f"{op}_out"])], op, [], [helper.make_empty_tensor_value_info(f"{op}_out")]
        )
        for op in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("If", ["flag"], ["a"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Add", ["a", "x"], ["x/frame/scale"]),  # a name that the normalisation would take
        helper.make_node("Identity", ["x/frame/scale"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", 3, 4, 5])],
        [value("y", TensorProto.FLOAT, ["n", 3, 4, 5])],
        [numpy_helper.from_array(np.array(False), "flag")],
    )
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    spec = ImagePreprocessing(5, 4, 3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    made = onnx.load_model_from_string(with_normalisation(data, spec))
    onnx.checker.check_model(made, full_check=True)
    readers = [node.op_type for node in made.graph.node if "x" in node.input]
    assert readers == ["Cast"]
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    x = np.concatenate([Preprocessor(spec)(frame) for frame in frames])
    np.testing.assert_array_equal(
        session(made.SerializeToString()).run(None, {"x": frames})[0], session(data).run(None, {"x": x})[0]
    )


def test_every_tensorrt_takes_the_bytes(release: str, simulated_builder: Callable[..., Any], pictures_bundle: Bundle) -> None:
    spec = pictures_bundle.manifest.preprocessing
    assert isinstance(spec, ImagePreprocessing)
    framed = with_normalisation(pictures_bundle.read(FLOAT_GRAPH), spec)
    wanted: dict[str, Any] = {"precision": "fp32", "profiles": {}, "flags": [], "options": {"uint8_input": True}}
    assert build_engine.build(simulated_builder(release).module, framed, wanted).plan.endswith(framed)
    early = onnx.load_model_from_string(framed)
    early.graph.node[0].op_type = "Transpose"
    del early.graph.node[0].attribute[:]
    with pytest.raises(build_engine.BuildError):
        build_engine.build(simulated_builder(release).module, early.SerializeToString(), wanted)


# Kits


def test_a_kit_carries_the_input_and_its_frames(cli: Cli, pictures_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = ("build", pictures_bundle.path, "--precision", "fp16", "--batch", "1..8", "--uint8-input", "--json", "--target")
    made = cli(*command, "jetson-orin-nano").json
    spec = json.loads(in_kit(made["kit"], "build.json"))
    assert spec["options"] == {"uint8_input": True}
    assert spec["profiles"]["x"][2] == [8, 32, 32, 3]
    readme = in_kit(made["kit"], "README.txt").decode()
    assert "takes frames of bytes, uint8 (n, H, W, C)" in readme
    assert "--maxShapes=x:8x32x32x3" in readme
    frames, outputs = parse_golden(in_kit(made["kit"], "golden.npz"))
    assert (frames["x"].dtype, frames["x"].shape) == (np.uint8, (4, 32, 32, 3))
    np.testing.assert_array_equal(outputs["y"], load_golden(pictures_bundle)[1]["y"])
    found = session(in_kit(made["kit"], "graph.onnx")).run(None, frames)[0]
    np.testing.assert_allclose(found, outputs["y"], atol=0.02 * np.abs(outputs["y"]).max())

    zipfile.ZipFile(made["kit"]).extractall(tmp_path / "kit")
    script = [sys.executable, tmp_path / "kit/build_engine.py", "--module", "tensorrt_rtx", "--compute-capability", "8.9"]
    done = subprocess.run([*script, "--no-check"], capture_output=True, text=True, check=True)
    cli(*command, "rtx-ada")
    assert json.loads(done.stdout)["graph_sha256"] == record(pictures_bundle, "rtx-ada")["graph_sha256"]
    compiled = (tmp_path / "kit/jetson-orin-nano.engine").read_bytes()
    assert compiled == Bundle.open(pictures_bundle.path).read("engines/rtx-ada.engine")


def test_the_check_on_the_device_feeds_the_frames(
    pictures_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kit's own check, with ONNX Runtime for the engine that it runs."""
    pytest.importorskip("tensorrt_rtx")
    kit = edgekit.build(pictures_bundle, target="jetson-orin-nano", batch="1..4", uint8_input=True).kit
    spec = json.loads(in_kit(kit, "build.json"))
    (tmp_path / "golden.npz").write_bytes(in_kit(kit, "golden.npz"))
    graph = session(in_kit(kit, "graph.onnx"))
    engine = type("Engine", (), {"get_tensor_profile_shape": lambda self, name, profile: spec["profiles"][name]})()
    monkeypatch.setattr(build_engine.asked, "load", lambda *_: engine)
    monkeypatch.setattr(build_engine.asked, "make_logger", lambda *_: None)
    monkeypatch.setattr(check_engine, "_run", lambda trt, engine, feeds, *_: {"y": graph.run(None, feeds)[0]})
    answer = build_engine.check(None, b"", tmp_path / "golden.npz", spec["golden"], spec["batch_axes"], cuda=object())
    assert answer["snr_db"] >= spec["golden"]["limit"]
    monkeypatch.setattr(
        check_engine, "_run", lambda trt, engine, feeds, *_: {"y": graph.run(None, {"x": feeds["x"][:, :, ::-1]})[0] * 0.9}
    )
    with pytest.raises(build_engine.BuildError, match="misses the golden outputs"):
        build_engine.check(None, b"", tmp_path / "golden.npz", spec["golden"], spec["batch_axes"], cuda=object())


# Another normalisation, the golden outputs, and what is refused


def test_another_normalisation_is_another_engine(pictures_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    keys, records = set(), []
    for mean in (0.485, 0.5):
        spec = msgspec.structs.replace(pictures_bundle.manifest.preprocessing, mean=(mean, 0.456, 0.406))
        other = changed(pictures_bundle, tmp_path / f"{mean}.edge", preprocessing=spec)
        edgekit.build(other, target="jetson-thor", precision="fp32", uint8_input=True)
        records.append(record(other, "jetson-thor"))
        keys.add(records[-1]["key"])
    assert len(keys) == 2
    assert changes(records[0]["decided_by"], records[1]["decided_by"]) == ["the normalisation inside changed"]
    again = edgekit.build(other.path, target="jetson-thor", precision="fp16", uint8_input=True)
    assert again.changed == ["--precision fp32 -> fp16"]


def test_golden_inputs_that_are_no_pictures_are_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    spec = ImagePreprocessing(32, 32, 3, mean=(0.5,) * 3, std=(4.0,) * 3)  # -0.125 to 0.125; the inputs are normal noise
    bundle = changed(tiny_bundle, tmp_path / "noise.edge", task="image-classification", preprocessing=spec)
    with pytest.raises(GoldenError, match=r"the golden inputs answer at .* dB as bytes, at .* dB as float tensors") as caught:
        edgekit.build(bundle, target="jetson-thor", precision="fp32", uint8_input=True)
    assert "leave --uint8-input out" in caught.value.hint


@pytest.mark.parametrize(
    ("task", "preprocessing", "words"),
    [
        ("tensor", None, "takes raw tensors, with no preprocessing to compile into the graph"),
        ("text-classification", TextPreprocessing(16), "takes texts"),
        ("series-classification", SeriesPreprocessing(8, 2, (0.0,) * 2, (1.0,) * 2), "takes series of floats"),
    ],
)
def test_what_is_no_picture_is_refused(
    cli: Cli, tiny_bundle: Bundle, tmp_path: Path, task: Any, preprocessing: Any, words: str
) -> None:
    bundle = changed(tiny_bundle, tmp_path / "other.edge", task=task, preprocessing=preprocessing)
    done = cli("build", bundle.path, "--target", "jetson-thor", "--uint8-input", "--json")
    assert done.code == UsageError.exit_code == 2
    assert done.json["error"].startswith(f"--uint8-input is for frames of pictures; {bundle.path} {words}")
    assert done.json["hint"].startswith("leave it out")
    assert Bundle.open(bundle.path).last("build") is None


def test_a_graph_that_does_not_take_the_preprocessings_shape_is_refused(pictures_bundle: Bundle, tmp_path: Path) -> None:
    inputs = (TensorSpec("x", "float32", ("n", 3, 32, "w")),)
    bundle = changed(pictures_bundle, tmp_path / "wide.edge", inputs=inputs)
    with pytest.raises(UsageError, match=r"needs a graph with one input, float32 nx3x32x32 .* takes x float32 nx3x32xw"):
        edgekit.build(bundle, target="jetson-thor", uint8_input=True)

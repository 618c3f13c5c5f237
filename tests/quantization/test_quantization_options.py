"""Options of ``quantize``, through the verb and the command: shifts, formats, training, speed, pictures, golden arrays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest

import edgekit
from edgekit.bundle import CALIBRATION, INT8_GRAPH, Bundle
from edgekit.errors import DataError
from edgekit.quantization import layer_table, read_calibration
from edgekit.runtime import Model, check_golden
from edgekit.runtime.golden import load_golden

Cli = Callable[..., Any]
IN_FRONT = {"Sub", "Mul", "Pad"}
MODULE = "edgekit.quantization.quantize"


def int8_graph(bundle: Bundle | Path) -> onnx.ModelProto:
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    model = onnx.load_model_from_string(opened.file(INT8_GRAPH).read_bytes())
    onnx.checker.check_model(model, full_check=True)
    return model


def in_front_of_q(model: onnx.ModelProto) -> list[str]:
    """Operators of `IN_FRONT` whose output is quantized, directly or through each other."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        maker = makers.get(node.input[0])
        while maker is not None and maker.op_type in IN_FRONT:
            found.append(maker.op_type)
            maker = makers.get(maker.input[0])
    return found


def figures(bundle: Bundle) -> dict[str, Any]:
    entry = bundle.last("quantize")
    assert entry is not None
    return dict(entry.figures)


@pytest.fixture
def positive_folder(tmp_path: Path) -> Path:
    """Samples for `tiny_bundle`, 0.1 to 0.3: one-sided, and far from its golden inputs, which are about 1 and of both signs."""
    folder = tmp_path / "positive"
    folder.mkdir()
    for i in range(20):
        x = np.random.default_rng(i).uniform(0.1, 0.3, (1, 3, 32, 32)).astype(np.float32)
        np.savez(folder / f"{i:02d}.npz", x=x)
    return folder


def test_no_shift_leaves_plain_quantizers(cli: Cli, tiny_bundle: Bundle, positive_folder: Path, tmp_path: Path) -> None:
    answers = {}
    for option in ("--shift", "--no-shift"):
        out = tmp_path / f"t{option}.edge"
        outcome = cli("quantize", tiny_bundle.path, "--out", out, "--calib", positive_folder, option, "--json")
        assert outcome.code == 0
        record = read_calibration(out / CALIBRATION)
        answers[option] = (outcome.json, in_front_of_q(int8_graph(out)), record)
    shifted, plain = answers["--shift"], answers["--no-shift"]
    assert shifted[0]["recovery"] == "shifted"
    assert shifted[0]["shifted_inputs"] == len(shifted[2].quantizers) >= 1
    assert {"Pad", "Sub"} <= set(shifted[1])
    assert plain[0]["shifted_inputs"] == 0
    assert "shifted" not in plain[0]["recoveries_db"]
    assert not plain[1]
    assert not plain[2].quantizers
    assert shifted[0]["snr_db"] > plain[0]["snr_db"]
    entry = Bundle.open(tmp_path / "t--no-shift.edge").last("quantize")
    assert entry is not None
    assert entry.config["shift"] is False


def test_a_stated_method_fits_nothing(tiny_bundle: Bundle, positive_folder: Path, tmp_path: Path) -> None:
    written = edgekit.quantize(tiny_bundle, out=tmp_path / "m.edge", calib=positive_folder, method="minmax")
    record = read_calibration(written.file(CALIBRATION))
    assert record.recovery == figures(written)["recovery"] == "none"
    assert not record.quantizers
    assert all(layer.integers is None and layer.bias is None for layer in record.layers)
    assert not in_front_of_q(int8_graph(written))
    fitted = edgekit.quantize(tiny_bundle, out=tmp_path / "f.edge", calib=positive_folder)
    assert any(layer.integers for layer in read_calibration(fitted.file(CALIBRATION)).layers)
    assert figures(fitted)["snr_db"] > figures(written)["snr_db"]


def test_same_inputs_same_bytes_and_frozen_again(tiny_bundle: Bundle, positive_folder: Path, tmp_path: Path) -> None:
    one, two = (edgekit.quantize(tiny_bundle, out=tmp_path / f"{i}.edge", calib=positive_folder) for i in range(2))
    assert figures(one)["recovery"] == "shifted"
    frozen = edgekit.quantize(tiny_bundle, out=tmp_path / "frozen.edge", calib=one.file(CALIBRATION))
    for other in (two, frozen):
        for name in (INT8_GRAPH, CALIBRATION):
            assert other.file(name).read_bytes() == one.file(name).read_bytes()


def test_a_fitted_graph_without_shifts_is_frozen_too(tiny_bundle: Bundle, positive_folder: Path, tmp_path: Path) -> None:
    """And one of which a part was left float."""
    options: list[dict[str, Any]] = [{"shift": False}, {"share": 0.5}]
    for i, option in enumerate(options):
        made = edgekit.quantize(tiny_bundle, out=tmp_path / f"{i}.edge", calib=positive_folder, **option)
        assert figures(made)["recovery"] != "none"
        again = edgekit.quantize(tiny_bundle, out=tmp_path / f"{i}again.edge", calib=made.file(CALIBRATION))
        assert again.file(INT8_GRAPH).read_bytes() == made.file(INT8_GRAPH).read_bytes()


@pytest.mark.parametrize("damage", ["integers", "shift", "factor", "empty factor", "quantizers"])
def test_damaged_fits_are_refused(tiny_bundle: Bundle, positive_folder: Path, tmp_path: Path, damage: str) -> None:
    made = edgekit.quantize(tiny_bundle, out=tmp_path / "made.edge", calib=positive_folder)
    content = json.loads(made.file(CALIBRATION).read_bytes())
    (site, quantizer), *_ = content["quantizers"].items()
    if damage == "integers":
        content["layers"][0]["integers"] = "AAAA" + content["layers"][0]["integers"][4:]
    elif damage == "quantizers":
        content["quantizers"]["nowhere"] = content["quantizers"].pop(site)
    else:
        size = 0 if damage == "empty factor" else 1 + len(quantizer["shift"] or quantizer["factor"])
        quantizer[damage.split()[-1]] = [1.0] * size
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(edgekit.EdgekitError):
        edgekit.quantize(tiny_bundle, out=tmp_path / "x.edge", calib=tmp_path / "bad.json")
    assert not (tmp_path / "x.edge").exists()


@pytest.mark.parametrize("form", ["weights8", "weights4", "fp8"])
def test_formats(cli: Cli, digits_bundle: Bundle, few_digits: str, tmp_path: Path, form: str) -> None:
    out = tmp_path / "f.edge"
    outcome = cli(
        "quantize", digits_bundle.path, "--out", out, "--calib", few_digits, "--samples", 16, "--format", form, "--json"
    )
    assert outcome.code == 0
    assert outcome.json["format"] == form
    assert outcome.json["snr_db"] > 15
    share = outcome.json["share"]
    assert 0.5 < share <= 1.0 if form == "fp8" else share == 0.0
    assert outcome.json["layers"][form] > 0
    written = Bundle.open(out)
    int8_graph(written)
    assert not written.has(CALIBRATION)
    with Model.open(out) as model:
        assert model(np.zeros((28, 28, 3), np.uint8)).label in written.manifest.labels
    assert check_golden(written, INT8_GRAPH).within(written.manifest.golden[INT8_GRAPH])
    if form != "fp8":
        assert outcome.json["size_bytes"] < 0.5 * written.file("model.onnx").stat().st_size
        assert abs(outcome.json["top1"] - outcome.json["top1_float"]) <= 0.05


WRONG: dict[str, tuple[list[Any], str]] = {
    "format and budget": (["--format", "weights8", "--min-snr", 20], "--format weights8 takes no"),
    "format and share": (["--format", "fp8", "--share", 0.5], "--format fp8 takes no"),
    "format and method": (["--format", "fp8", "--method", "minmax"], "--format fp8 takes no"),
    "format and qat": (["--format", "weights4", "--qat"], "--format weights4 takes no"),
    "format and speed": (["--format", "weights4", "--faster-on", "onnxruntime"], "--format weights4 takes no"),
    "unknown format": (["--format", "fp4"], "no format 'fp4'"),
    "unknown backend": (["--faster-on", "tensorrt"], "no backend 'tensorrt'"),
    "speed and budget": (["--faster-on", "onnxruntime", "--share", 0.5], "a budget of its own"),
    "speed and qat": (["--faster-on", "onnxruntime", "--qat"], "a budget of its own"),
    "format and layers": (["--format", "fp8", "--keep-float", "Conv"], "--format fp8 takes no"),
    "no such layer": (["--keep-float", "conv9"], "'conv9' names no layer"),
    "no epochs": (["--qat", "--qat-epochs", 0], "--qat-epochs 0"),
    "another picture": (["--plot", "layers.png"], "not as '.png'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_combinations(cli: Cli, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path, name: str) -> None:
    options, says = WRONG[name]
    out = tmp_path / "out.edge"
    outcome = cli("quantize", tiny_bundle.path, "--out", out, "--calib", calibration_folder, *options)
    assert outcome.code == 2
    error, hint = outcome.err.strip().splitlines()
    assert error.startswith("error: ")
    assert says in error
    assert hint.startswith("hint: ")
    assert not out.exists()


@pytest.mark.parametrize(("named", "left"), [(["conv*"], ["gemm"]), (["Gemm", "conv1"], ["conv2"]), (["Conv", "Gemm"], [])])
def test_named_layers_stay_float(
    cli: Cli, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path, named: list[str], left: list[str]
) -> None:
    out, options = tmp_path / "out.edge", [part for name in named for part in ("--keep-float", name)]
    outcome = cli("quantize", tiny_bundle.path, "--out", out, "--calib", calibration_folder, *options, "--json")
    if not left:
        assert outcome.code == 1
        assert "kept float, as stated" in outcome.err
        return
    assert outcome.code == 0
    table = {row["layer"]: row for row in json.loads(outcome.out)["layer_table"]}
    assert [name for name, row in table.items() if row["type"] == "int8"] == left
    assert table["conv1"]["why"] == "kept float, as stated"
    again = edgekit.quantize(tiny_bundle, out=tmp_path / "again.edge", calib=out / CALIBRATION)
    assert again.read(INT8_GRAPH) == Bundle.open(out).read(INT8_GRAPH)


def test_a_budget_that_only_a_small_layer_keeps_is_kept(tmp_path: Path) -> None:
    """The large layer makes less noise for its size, so it is the last of the order; alone, it is too much."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(64, 512)) / 8, "v": rng.normal(size=(512, 4)) / 20}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"], name="large"),
        onnx.helper.make_node("Tanh", ["h"], ["t"]),
        onnx.helper.make_node("MatMul", ["t", "v"], ["y"], name="small"),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1, size]) for name, size in (("x", 64), ("y", 4))]
    known = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], known)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx"
    )
    bundle = edgekit.import_onnx(tmp_path / "m.onnx", out=tmp_path / "float.edge")
    (tmp_path / "samples").mkdir()
    for i in range(20):
        np.savez(tmp_path / "samples" / f"{i}.npz", x=rng.standard_t(5, (1, 64)).astype(np.float32))
    settings: dict[str, Any] = {"calib": tmp_path / "samples", "method": "minmax"}
    whole = edgekit.quantize(bundle, out=tmp_path / "whole.edge", share=1.0, **settings)
    alone = {row["layer"]: row["alone_db"] for row in layer_table(whole)}
    assert alone["small"] - 12 < alone["large"] < alone["small"] - 3  # 16 times the MACs are 12 dB
    least = (alone["small"] + alone["large"]) / 2
    made = edgekit.quantize(bundle, out=tmp_path / "made.edge", min_snr=least, **settings)
    assert {row["layer"]: row["type"] for row in layer_table(made)} == {"large": "float", "small": "int8"}


def test_frozen_ranges_take_no_other_option(cli: Cli, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path) -> None:
    made = edgekit.quantize(tiny_bundle, out=tmp_path / "made.edge", calib=calibration_folder, method="minmax")
    wrong = (
        ["--keep-float", "gemm"],
        ["--no-shift"],
        ["--qat"],
        ["--format", "fp8"],
        ["--faster-on", "onnxruntime"],
        ["--min-snr", 20],
    )
    for options in wrong:
        outcome = cli("quantize", tiny_bundle.path, "--out", tmp_path / "x.edge", "--calib", made.file(CALIBRATION), *options)
        assert outcome.code == 2
        assert len(outcome.err.strip().splitlines()) == 2
    assert not (tmp_path / "x.edge").exists()


def test_training_keeps_or_betters_the_snr(cli: Cli, digits_bundle: Bundle, few_digits: str, tmp_path: Path) -> None:
    plain = edgekit.quantize(digits_bundle, out=tmp_path / "plain.edge", calib=few_digits, method="minmax")
    options = ["--calib", few_digits, "--method", "minmax", "--qat", "--qat-epochs", 2]
    outcome = cli("quantize", digits_bundle.path, "--out", tmp_path / "qat.edge", *options)
    assert outcome.code == 0
    made = Bundle.open(tmp_path / "qat.edge")
    found = figures(made)
    assert found["snr_db"] >= figures(plain)["snr_db"]
    assert found["qat"]["snr_db"]["after"] >= found["qat"]["snr_db"]["before"]
    assert found["qat"]["top1"]["after"] >= found["qat"]["top1"]["before"]
    assert found["qat"]["best_epoch"] >= 1  # weights that were only rounded: an epoch mends some of that
    int8_graph(made)
    assert f"QAT: {found['qat']['snr_db']['before']:.1f} -> {found['qat']['snr_db']['after']:.1f} dB, top-1 " in outcome.out
    assert f"epoch {found['qat']['best_epoch']} of 2" in outcome.out
    assert read_calibration(made.file(CALIBRATION)).recovery.endswith("qat")
    with pytest.raises(DataError, match="--qat") as caught:
        edgekit.quantize(digits_bundle, out=tmp_path / "again.edge", calib=made.file(CALIBRATION))
    assert "calibrate again" in caught.value.hint
    with Model.open(made.path) as model:
        assert model(np.zeros((28, 28, 3), np.uint8)).label in made.manifest.labels


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What int8 takes, one measurement after the other, where float takes 1 ms."""
    times: list[float] = []
    monkeypatch.setattr(sys.modules[MODULE], "latencies", lambda graphs, feeds: [1.0, times.pop(0)])
    return times  # type: ignore[return-value]


def test_layers_stay_float_until_int8_is_faster(
    clock: list[float], tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path
) -> None:
    clock += [2.0, 0.9, 0.1]
    made = edgekit.quantize(
        tiny_bundle, out=tmp_path / "t.edge", calib=calibration_folder, method="minmax", faster_on="onnxruntime"
    )
    found = figures(made)
    assert found["latency_ms"] == {"backend": "onnxruntime", "float": 1.0, "int8": 0.9}
    assert found["layers"]["float"] >= 1
    assert clock == [0.1]  # the first that is faster is taken


def test_the_fastest_is_written_where_none_is_faster(
    cli: Cli, clock: list[float], tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path
) -> None:
    clock += [2.0, 1.2, 1.5, 1.4]
    options = ["--calib", calibration_folder, "--method", "minmax", "--faster-on", "onnxruntime"]
    outcome = cli("quantize", tiny_bundle.path, "--out", tmp_path / "t.edge", *options, "--json")
    assert outcome.code == 3
    assert "1.200 ms" in outcome.json["error"]
    assert clock == [1.5, 1.4]  # smaller shares of so few layers are the same graph, which is not timed again
    assert outcome.json["latency_ms"]["int8"] == 1.2
    assert Bundle.open(tmp_path / "t.edge").has(INT8_GRAPH)


def test_faster_is_more_than_noise(
    cli: Cli, clock: list[float], tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path
) -> None:
    clock += [0.99, 0.98, 0.99, 1.0]
    options = ["--calib", calibration_folder, "--method", "minmax", "--faster-on", "onnxruntime"]
    outcome = cli("quantize", tiny_bundle.path, "--out", tmp_path / "t.edge", *options, "--json")
    assert outcome.code == 3
    assert "less than 3% faster" in outcome.json["error"]
    assert outcome.json["latency_ms"]["int8"] == 0.98


def test_plot(cli: Cli, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "layers.svg"
    options = ["--calib", calibration_folder, "--method", "minmax", "--plot", path]
    assert cli("quantize", tiny_bundle.path, "--out", tmp_path / "a.edge", *options).code == 0
    root = ElementTree.parse(path).getroot()  # noqa: S314  written a moment ago
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = path.read_text(encoding="utf-8")
    assert all(layer in text for layer in ("conv1", "conv2", "gemm"))
    path.unlink()
    assert cli("quantize", tiny_bundle.path, "--out", tmp_path / "b.edge", *options, "--min-snr", 150).code == 3
    assert path.is_file()  # also of the best where the budget is missed
    path.write_text("mine")
    assert cli("quantize", tiny_bundle.path, "--out", tmp_path / "c.edge", *options).code == 2
    assert path.read_text() == "mine"


def test_a_picture_may_lie_in_a_new_folder(cli: Cli, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path) -> None:
    """As --out may. It once failed after all the work, on the last line."""
    path = tmp_path / "new" / "folder" / "layers.svg"
    options = ["--calib", calibration_folder, "--method", "minmax", "--plot", path]
    assert cli("quantize", tiny_bundle.path, "--out", tmp_path / "a.edge", *options).code == 0
    assert path.is_file()


def test_golden_arrays_of_imported_bundles_come_from_samples(
    tiny_bundle: Bundle, positive_folder: Path, tmp_path: Path
) -> None:
    """Golden inputs far outside of what is calibrated would be clipped: they would say nothing about the graph."""
    made = edgekit.quantize(tiny_bundle, out=tmp_path / "t8.edge", calib=positive_folder, method="minmax")
    inputs, outputs = load_golden(made)
    samples = [np.load(file)["x"] for file in sorted(positive_folder.glob("*.npz"))]
    assert all(any(np.array_equal(row, x[0]) for x in samples) for row in inputs["x"])
    assert np.abs(load_golden(tiny_bundle)[0]["x"]).max() > 3
    with Model.open(made.path, precision="float") as model:
        np.testing.assert_allclose(model.run(inputs)["y"], outputs["y"], rtol=1e-4, atol=1e-5)
    found = figures(made)
    assert found["golden_snr_db"] == pytest.approx(found["snr_db"], abs=3)
    for graph, tolerance in made.manifest.golden.items():
        assert check_golden(made, graph).within(tolerance)


def test_a_rebuilt_import_is_judged_on_the_samples_of_the_first(
    tiny_bundle: Bundle, positive_folder: Path, tmp_path: Path
) -> None:
    made = edgekit.quantize(tiny_bundle, out=tmp_path / "t8.edge", calib=positive_folder)
    again = edgekit.quantize(tiny_bundle, out=tmp_path / "again.edge", calib=made.file("calibration.json"))
    third = edgekit.quantize(tiny_bundle, out=tmp_path / "third.edge", calib=again.file("calibration.json"))
    for rebuilt in (again, third):
        assert rebuilt.file("model.int8.onnx").read_bytes() == made.file("model.int8.onnx").read_bytes()
        assert rebuilt.read("golden.npz") == made.read("golden.npz")
        assert rebuilt.manifest.golden == made.manifest.golden
        assert figures(rebuilt)["golden_limit_db"] == figures(made)["golden_limit_db"]
        assert figures(rebuilt)["measured_on"] == "golden inputs"


def test_random_golden_inputs_judge_no_rebuilt_graph(
    cli: Cli, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "faint"  # the golden inputs of the import are a thousand times these
    folder.mkdir()
    for file in calibration_folder.glob("*.npz"):
        np.savez(folder / file.name, x=np.load(file)["x"] / np.float32(1000))
    made = edgekit.quantize(tiny_bundle, out=tmp_path / "t8.edge", calib=folder, method="minmax")
    (tmp_path / "calibration.json").write_bytes(made.read("calibration.json"))
    outcome = cli("quantize", tiny_bundle.path, "--out", tmp_path / "a.edge", "--calib", tmp_path / "calibration.json")
    assert outcome.code == 0
    assert "dB on random golden inputs" in outcome.out
    assert "judge nothing" in outcome.err
    assert "least that is usable" not in outcome.err
    # nor do they pass for samples in a calibration that lies in that bundle
    again = edgekit.quantize(tiny_bundle, out=tmp_path / "b.edge", calib=tmp_path / "a.edge" / "calibration.json")
    assert figures(again)["measured_on"] == "random golden inputs"


def test_golden_arrays_of_trained_bundles_stay(digits_bundle: Bundle, few_digits: str, tmp_path: Path) -> None:
    made = edgekit.quantize(digits_bundle, out=tmp_path / "d8.edge", calib=few_digits, samples=16, method="minmax")
    assert made.read("golden.npz") == digits_bundle.read("golden.npz")


PEAK = """
import sys
from pathlib import Path
import edgekit
edgekit.quantize(sys.argv[1], out=sys.argv[2], calib=sys.argv[3], samples=1000)
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="VmHWM is Linux's")
def test_memory_does_not_grow_with_the_samples(tiny_onnx: Path, tmp_path: Path) -> None:
    """128 and 384 samples of a convolutional net, in processes of their own; 256 are 28 MB, and have 430 MB of activations.

    Fewer than 128 fill what is bounded by bytes: samples that stay in memory, batches, the study.
    """
    model = onnx.load(tiny_onnx)
    for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.dim_value = 96
    onnx.save(model, tiny_onnx)
    bundle = edgekit.import_onnx(tiny_onnx, out=tmp_path / "tiny.edge", shape="x:1x3x96x96")
    peaks = []
    for count in (128, 384):
        folder = tmp_path / f"calib{count}"
        folder.mkdir()
        for i in range(count):
            x = np.random.default_rng(i).normal(size=(1, 3, 96, 96)).astype(np.float32)
            np.savez(folder / f"{i:03d}.npz", x=x)
        arguments = [sys.executable, "-c", PEAK, str(bundle.path), str(tmp_path / f"{count}.edge"), str(folder)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=300)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    samples = 256 * 3 * 96 * 96 * 4 / 2**20  # which may stay in memory
    assert peaks[1] - peaks[0] - samples < 40

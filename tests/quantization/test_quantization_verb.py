"""``quantize`` end to end: what it writes, what it refuses, and that TensorRT takes it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgekit
from edgekit.bundle import CALIBRATION, FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BudgetNotMet, BundleError, DataError, GraphError, OutputExists, UsageError
from edgekit.quantization import layer_table, read_calibration, rebuild
from edgekit.quantization.bench import make_bench
from edgekit.quantization.journal import Journal
from edgekit.quantization.samples import gather
from edgekit.quantization.simulate import Simulator
from edgekit.runtime import Model, check_golden

Cli = Callable[..., Any]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_explicit(graph: bytes) -> onnx.ModelProto:
    """Signed symmetric Q/DQ only: int8 zero points of 0, weights as int8 initializers, no integer operators."""
    model = onnx.load_model_from_string(graph)
    onnx.checker.check_model(model, full_check=True)
    known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero = known[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (known[node.input[1]] > 0).all()
        # Activations per tensor (a scalar scale), weights per channel (a vector as long as their axis).
        scale = known[node.input[1]]
        stored = known.get(node.input[0])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        assert scale.shape == zero.shape == (() if stored is None else (stored.shape[axis],))
        assert stored is None or stored.dtype == np.int8
    assert not {node.op_type for node in model.graph.node} & {"QLinearConv", "ConvInteger", "MatMulInteger", "QGemm"}
    return model


def test_digits_keep_their_accuracy(digits_bundle: Bundle, tmp_path: Path) -> None:
    before = digests(digits_bundle.path)
    written = edgekit.quantize(digits_bundle, out=tmp_path / "d8.edge")
    assert digests(digits_bundle.path) == before
    entry = written.last("quantize")
    assert entry is not None
    assert entry.parent == digits_bundle.digest
    assert entry.figures["share"] == 1.0
    assert entry.figures["layers"] == {"int8": 3, "float": 0}
    assert entry.figures["top1_float"] - entry.figures["top1"] <= 0.005
    assert entry.figures["snr_db"] > 25
    assert entry.figures["culprit"]["why"]
    assert entry.figures["size_bytes"] == len(written.file(INT8_GRAPH).read_bytes())
    assert_explicit(written.file(INT8_GRAPH).read_bytes())
    assert check_golden(written).within(written.manifest.golden[INT8_GRAPH])
    with Model.open(written.path) as model:
        assert model(np.zeros((40, 31, 3), np.uint8)).label in written.manifest.labels


def test_the_same_inputs_give_the_same_bytes(digits_bundle: Bundle, tmp_path: Path) -> None:
    one, two = (edgekit.quantize(digits_bundle, out=tmp_path / f"{i}.edge", samples=64) for i in range(2))
    for name in (INT8_GRAPH, CALIBRATION):
        assert one.file(name).read_bytes() == two.file(name).read_bytes()


def test_calibration_samples_come_from_train_balanced(digits_bundle: Bundle, tmp_path: Path) -> None:
    from edgekit.data import load

    written = edgekit.quantize(digits_bundle, out=tmp_path / "d8.edge", samples=50)
    calibration = read_calibration(written.file(CALIBRATION))
    dataset = load("digits")
    drawn = calibration.samples
    assert len(drawn.ids) == len(set(drawn.ids)) == len(drawn.digests) == 50
    assert set(drawn.ids) <= set(dataset.train.ids)
    assert not set(drawn.ids) & set(dataset.test.ids)
    where = {name: i for i, name in enumerate(dataset.train.ids)}
    assert (np.bincount(dataset.train.targets[[where[name] for name in drawn.ids]]) == 5).all()
    assert calibration.preprocessing == written.manifest.preprocessing


def test_frozen_ranges_need_no_data(digits_bundle: Bundle, tmp_path: Path) -> None:
    first = edgekit.quantize(digits_bundle, out=tmp_path / "first.edge")
    again = edgekit.quantize(digits_bundle, out=tmp_path / "again.edge", calib=first.file(CALIBRATION))
    assert again.file(INT8_GRAPH).read_bytes() == first.file(INT8_GRAPH).read_bytes()
    assert again.file(CALIBRATION).read_bytes() == first.file(CALIBRATION).read_bytes()
    entry = again.last("quantize")
    assert entry is not None
    assert entry.figures["measured_on"] == "golden inputs"


def test_npz_and_share_through_the_command(cli: Cli, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path) -> None:
    outcome = cli(
        "quantize", tiny_bundle.path, "--out", tmp_path / "t8.edge", "--calib", calibration_folder, "--share", 1.0, "--json",
        "--no-shift",
    )  # fmt: skip
    assert outcome.code == 0
    assert outcome.json["share"] == 1.0
    assert outcome.json["snr_db"] > 35
    assert outcome.json["bundle"] == str(tmp_path / "t8.edge")
    model = assert_explicit((tmp_path / "t8.edge" / INT8_GRAPH).read_bytes())
    # The residual branch of the Add is the Q/DQ pair that the second Conv reads too.
    by_name = {node.name: node for node in model.graph.node}
    assert set(by_name["add"].input) & set(by_name["conv2"].input)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_share_is_reached_with_the_least_sensitive(
    tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path, share: float
) -> None:
    written = edgekit.quantize(tiny_bundle, out=tmp_path / "t8.edge", calib=calibration_folder, share=share)
    entry = written.last("quantize")
    assert entry is not None
    assert 1.0 > entry.figures["share"] >= share
    rows = layer_table(written)
    floats, int8 = ([row for row in rows if row["type"] == kind] for kind in ("float", "int8"))
    assert floats
    assert all("left float by the budget" in row["why"] for row in floats)
    assert "gemm" in {row["layer"] for row in floats}  # most of the noise for next to no work

    def harm(row: dict[str, Any]) -> float:
        """The share of the noise that it makes, for its share of the work."""
        return float(10 ** (-row["alone_db"] / 10) / row["macs"])

    reached = entry.figures["share"]
    for row in int8:
        rest = reached - row["macs"]
        assert rest < share  # each is needed
        assert not [other for other in floats if harm(other) < harm(row) and rest + other["macs"] >= share]


def test_min_snr_leaves_as_little_float_as_it_takes(digits_bundle: Bundle, tmp_path: Path) -> None:
    everything = edgekit.quantize(digits_bundle, out=tmp_path / "all.edge").last("quantize")
    assert everything is not None
    wanted = everything.figures["snr_db"] + 1.0
    entry = edgekit.quantize(digits_bundle, out=tmp_path / "some.edge", min_snr=wanted).last("quantize")
    assert entry is not None
    assert entry.figures["snr_db"] >= wanted
    assert entry.figures["layers"] == {"int8": 2, "float": 1}  # and with none it is 1 dB less


def test_a_budget_out_of_reach_writes_the_best(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BudgetNotMet) as caught:
        edgekit.quantize(digits_bundle, out=tmp_path / "a.edge", min_snr=150)
    assert caught.value.result["snr_db"] < 150
    assert Bundle.open(tmp_path / "a.edge").has(INT8_GRAPH)
    outcome = cli("quantize", digits_bundle.path, "--out", tmp_path / "b.edge", "--min-snr", 150, "--json")
    assert outcome.code == 3
    assert {"bundle", "snr_db", "share", "error", "hint"} <= set(outcome.json)


def test_the_best_is_shown_where_the_budget_is_missed(
    cli: Cli, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path
) -> None:
    """As after success: path, dB, share, layers; then the error."""
    options = ["--calib", calibration_folder, "--method", "minmax", "--min-snr", 150]
    missed = cli("quantize", tiny_bundle.path, "--out", tmp_path / "a.edge", *options)
    assert missed.code == 3
    assert missed.out.startswith(f"{tmp_path / 'a.edge'}: ")
    assert " dB on " in missed.out
    assert "of the MACs" in missed.out
    assert all(layer in missed.out for layer in ("conv1", "conv2", "gemm"))
    assert "error: the best SNR is" in missed.err
    as_json = cli("quantize", tiny_bundle.path, "--out", tmp_path / "b.edge", *options, "--json")
    assert as_json.code == 3
    assert {"error", "hint", "bundle"} <= set(as_json.json)  # one object, and nothing else


def test_max_drop_is_measured_on_labelled_train_samples(digits_bundle: Bundle, tmp_path: Path) -> None:
    entry = edgekit.quantize(digits_bundle, out=tmp_path / "d8.edge", calib="digits", max_drop=0.5).last("quantize")
    assert entry is not None
    assert entry.figures["drop"] <= 0.5
    assert entry.config["max_drop"] == 0.5


def test_the_float_graph_is_judged_once_for_all_candidates(
    digits_bundle: Bundle, few_digits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = digits_bundle.file(FLOAT_GRAPH).read_bytes()
    bench = make_bench(graph, gather(digits_bundle, few_digits, 32, 0), Journal(None, ""))
    run = list[onnx.ModelProto]()
    room = sys.modules["edgekit.quantization.bench"]
    monkeypatch.setattr(room, "Simulator", lambda model: run.append(model) or Simulator(model))
    dumb = onnx.load_model_from_string(graph)
    for tensor in dumb.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))
    assert [bench.drop(bench.original), bench.drop(bench.original)] == [0.0, 0.0]
    assert bench.drop(dumb) > 50
    assert len(run) == 4


@pytest.mark.parametrize("method", ["mse", "entropy", "percentile", "minmax"])
def test_methods(tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path, method: str) -> None:
    entry = edgekit.quantize(tiny_bundle, out=tmp_path / "t8.edge", calib=calibration_folder, method=method).last("quantize")
    assert entry is not None
    assert entry.figures["method"] == method
    assert entry.figures["snr_db"] > 20


def test_text_names_the_worst_layers(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    outcome = cli("quantize", digits_bundle.path, "--out", tmp_path / "d8.edge")
    assert outcome.code == 0
    assert "conv2" in outcome.out
    assert "costs most" in outcome.out or "cost most" in outcome.out
    assert "top-1" in outcome.out


def test_usage_errors(digits_bundle: Bundle, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.edge"
    wrong: list[dict[str, Any]] = [
        {"method": "magic"},
        {"samples": 0},
        {"share": 0.5, "min_snr": 20},
        {"share": 1.5},
        {"min_snr": float("nan")},
        {"min_snr": -201.0},
        {"calib": "cifar"},
        {"calib": "folder:"},
        {"calib": 123},
        {"calib": b"digits"},
        {"calib": tmp_path},  # a folder without .npz
    ]
    for options in wrong:
        with pytest.raises(UsageError):
            edgekit.quantize(digits_bundle, out=out, **options)
    with pytest.raises(UsageError, match="no calibration data"):
        edgekit.quantize(tiny_bundle, out=out)
    with pytest.raises(UsageError, match="no preprocessing"):
        edgekit.quantize(tiny_bundle, out=out, calib="digits")
    with pytest.raises(UsageError, match="labelled"):
        edgekit.quantize(tiny_bundle, out=out, calib=calibration_folder, max_drop=1)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(OutputExists):
        edgekit.quantize(digits_bundle, out=out)
    with pytest.raises(BundleError):
        edgekit.quantize(tmp_path / "nothing.edge", out=tmp_path / "x.edge")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"z": np.zeros((1, 3, 32, 32), np.float32)}, "holds the arrays z"),
        ({"x": np.zeros((1, 3, 32, 31), np.float32)}, "32, 31"),
        ({"x": np.zeros((3, 32, 32), np.float32)}, r"\(3, 32, 32\)"),
        ({"x": np.zeros((1, 3, 32, 32))}, "float64"),
        ({"x": np.full((1, 3, 32, 32), np.nan, np.float32)}, "NaN"),
        ({"x": np.full((1, 3, 32, 32), np.inf, np.float32)}, "NaN"),
        ({"x": np.zeros((0, 3, 32, 32), np.float32)}, r"\(0, 3"),
    ],
)
def test_a_wrong_sample_is_named(
    tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path, arrays: dict[str, Any], says: str
) -> None:
    np.savez(calibration_folder / "007.npz", **arrays)
    with pytest.raises(DataError, match=f"007.npz.*{says}"):
        edgekit.quantize(tiny_bundle, out=tmp_path / "t8.edge", calib=calibration_folder)
    assert not (tmp_path / "t8.edge").exists()


def test_a_damaged_sample_is_named(cli: Cli, tiny_bundle: Bundle, calibration_folder: Path, tmp_path: Path) -> None:
    (calibration_folder / "003.npz").write_bytes(b"PK\x03\x04 not a zip")
    outcome = cli("quantize", tiny_bundle.path, "--out", tmp_path / "t8.edge", "--calib", calibration_folder, "--json")
    assert outcome.code == 1
    assert "003.npz" in outcome.json["error"]


def test_one_sample_is_enough_and_constants_do_no_harm(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    np.savez(folder / "zeros.npz", x=np.zeros((1, 3, 32, 32), np.float32))
    entry = edgekit.quantize(tiny_bundle, out=tmp_path / "t8.edge", calib=folder, min_snr=0).last("quantize")
    assert entry is not None
    assert entry.figures["measured_on"] == "the first calibration sample"


@pytest.fixture
def frozen(digits_bundle: Bundle, tmp_path: Path) -> Path:
    written = edgekit.quantize(digits_bundle, out=tmp_path / "frozen.edge", samples=16, method="minmax")
    return Path(written.file(CALIBRATION))


def test_frozen_ranges_of_another_model(frozen: Path, tiny_bundle: Bundle, digits_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="other preprocessing"):
        edgekit.quantize(tiny_bundle, out=tmp_path / "x.edge", calib=frozen)
    with pytest.raises(DataError, match="was made for"):
        rebuild(tiny_bundle.file(FLOAT_GRAPH).read_bytes(), read_calibration(frozen))
    with pytest.raises(UsageError, match="already says"):
        edgekit.quantize(digits_bundle, out=tmp_path / "x.edge", calib=frozen, share=0.5)
    with pytest.raises(DataError, match="no calibration at"):
        edgekit.quantize(digits_bundle, out=tmp_path / "x.edge", calib=tmp_path / "none.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=3),
        lambda d: d.update(surprise=1),
        lambda d: d.pop("tensors"),
        lambda d: d.update(graph="abc"),
        lambda d: d["tensors"]["x"].update(scale=-1.0),
        lambda d: d["tensors"]["x"].update(scale=1e-60),
        lambda d: d["tensors"].pop("x"),
        lambda d: d["groups"].update(x="y"),
        lambda d: d["layers"][0].update(name="other"),
        lambda d: d["layers"][0]["weights"].pop(),
    ],
)
def test_a_damaged_calibration_is_refused(
    frozen: Path, digits_bundle: Bundle, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    content = json.loads(frozen.read_bytes())
    change(content)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(DataError):
        edgekit.quantize(digits_bundle, out=tmp_path / "x.edge", calib=tmp_path / "bad.json")


def test_a_changed_scale_is_noticed(frozen: Path, digits_bundle: Bundle, tmp_path: Path) -> None:
    content = json.loads(frozen.read_bytes())
    content["tensors"]["x"]["scale"] *= 1.01
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(edgekit.EdgekitError, match="differs from the recorded"):
        edgekit.quantize(digits_bundle, out=tmp_path / "x.edge", calib=tmp_path / "bad.json")


def test_a_poor_graph_is_written_and_said_to_be_poor(cli: Cli, tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "faint"
    folder.mkdir()
    for i in range(5):  # the fifth, which judges, is a hundred times the others: their ranges clip everything
        x = np.random.default_rng(i).normal(0, 0.1 if i == 4 else 1e-3, (1, 3, 32, 32))
        np.savez(folder / f"{i}.npz", x=x.astype(np.float32))
    outcome = cli("quantize", tiny_bundle.path, "--out", tmp_path / "t8.edge", "--calib", folder, "--json")
    assert outcome.code == 3
    assert outcome.json["golden_snr_db"] < 10
    assert "least that is usable" in outcome.json["error"]
    assert Bundle.open(tmp_path / "t8.edge").has(INT8_GRAPH)
    edgekit.quantize(tiny_bundle, out=tmp_path / "accepted.edge", calib=folder, min_snr=-3)
    again = edgekit.quantize(tiny_bundle, out=tmp_path / "again.edge", calib=tmp_path / "t8.edge" / CALIBRATION)
    assert again.has(INT8_GRAPH)  # frozen ranges were judged when they were made


def test_max_drop_holds_on_the_test_split(digits_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(bundle: Bundle, data: str, precision: str = "auto") -> dict[str, float]:
        return {"top1": 0.97 if precision == "float" else 0.95}

    monkeypatch.setattr(sys.modules["edgekit.quantization.quantize"], "evaluate", evaluated)
    edgekit.quantize(digits_bundle, out=tmp_path / "two.edge", calib="digits", max_drop=2.0)
    with pytest.raises(BudgetNotMet, match=r"drops by 2\.00 points on the test split, 1 were allowed") as caught:
        edgekit.quantize(digits_bundle, out=tmp_path / "one.edge", calib="digits", max_drop=1.0)
    assert "a smaller --max-drop" in caught.value.hint
    assert Bundle.open(tmp_path / "one.edge").has(INT8_GRAPH)
    room = sys.modules["edgekit.quantization.quantize"]
    made = room.calibrate  # whatever is left float: it is met on the train samples
    monkeypatch.setattr(room, "calibrate", lambda *a, **k: made(*a, **k)._replace(missed=""))
    with pytest.raises(BudgetNotMet, match=r"drops by 2\.00 points on the test split, 0 were allowed") as caught:
        edgekit.quantize(digits_bundle, out=tmp_path / "none.edge", calib="digits", max_drop=0.0)
    assert "smaller" not in caught.value.hint
    assert "--share" in caught.value.hint
    assert "--qat" in caught.value.hint


def test_both_graphs_are_judged_on_the_same_samples(digits_bundle: Bundle, few_digits: str, tmp_path: Path) -> None:
    """With other calibration data than the training's, the float graph was once judged on all of it, the int8 on a part."""
    made = edgekit.quantize(digits_bundle, out=tmp_path / "q.edge", calib=few_digits, samples=32)
    figures = made.manifest.history[-1].figures
    for precision, key in (("float", "top1_float"), ("int8", "top1")):
        judged = edgekit.evaluate(made, few_digits, precision=precision)
        assert judged["samples"] == 80
        assert judged["top1"] == figures[key]
    again = edgekit.quantize(made, out=tmp_path / "again.edge", calib=few_digits, samples=32)
    assert again.manifest.history[-1].figures["top1_float"] == figures["top1_float"]


def test_an_evaluation_does_not_change_what_calibrates(digits_bundle: Bundle, few_digits: str, tmp_path: Path) -> None:
    edgekit.evaluate(digits_bundle, few_digits, save=True)
    made = edgekit.quantize(Bundle.open(digits_bundle.path), out=tmp_path / "q.edge", samples=16)
    assert read_calibration(made.file(CALIBRATION)).samples.source == "digits"


@pytest.mark.parametrize("count", [16, 1000])
def test_labelled_samples_are_read_only_when_asked_for(digits_bundle: Bundle, count: int) -> None:
    many, few = (gather(digits_bundle, "digits", count, 0, labelled=labelled) for labelled in (True, False))
    assert (few.calibration.ids, few.held_out.ids) == (many.calibration.ids, many.held_out.ids)
    assert len(few.calibration) + len(few.labelled) < len(many.calibration) + len(many.labelled)


def test_an_error_without_words_is_still_named(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def mute(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("onnxruntime.InferenceSession", mute)
    with pytest.raises(GraphError, match="RuntimeError"):
        Simulator(onnx.load_model_from_string(tiny_bundle.file(FLOAT_GRAPH).read_bytes()))


@pytest.mark.parametrize(("overflows", "way"), [(True, "float"), (False, "kernels")])
def test_bench_says_how_int8_was_computed(
    cli: Cli,
    tiny_bundle: Bundle,
    calibration_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overflows: bool,
    way: str,
) -> None:
    edgekit.quantize(tiny_bundle, out=tmp_path / "t8.edge", calib=calibration_folder, method="minmax", min_snr=0)
    monkeypatch.setattr("edgekit.runtime.onnxruntime._saturates", lambda: overflows)
    found = edgekit.bench(tmp_path / "t8.edge", seconds=0.2)
    assert found["int8"] == way
    assert "int8" not in edgekit.bench(tmp_path / "t8.edge", seconds=0.2, precision="float")
    edgekit.quantize(tiny_bundle, out=tmp_path / "f8.edge", calib=calibration_folder, format="fp8")
    assert "int8" not in edgekit.bench(tmp_path / "f8.edge", seconds=0.2)

"""`compare --layers`: which layer of a graph departs from the float graph."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import edgekit
from edgekit.benchmarking import layers as module
from edgekit.bundle import FLOAT_GRAPH, GOLDEN, INT8_GRAPH, Bundle
from edgekit.errors import BudgetNotMet, BundleError, GraphError, OutputExists, UsageError
from edgekit.manifest import Tolerance
from edgekit.runtime.golden import load_golden

Edit = Callable[[onnx.ModelProto], None]


def remade(bundle: Bundle, path: Path, edit: Edit, source: str = INT8_GRAPH, limit: float = -200.0) -> Bundle:
    """A copy whose int8 graph is ``source`` after ``edit``, with a tolerance of ``limit`` dB."""
    model = onnx.load_from_string(bundle.read(source))
    edit(model)
    with Bundle.create(path) as draft:
        for name in (FLOAT_GRAPH, GOLDEN):
            draft.write(name, bundle.read(name))
        draft.write(INT8_GRAPH, model.SerializeToString())
        golden = {**bundle.manifest.golden, INT8_GRAPH: Tolerance("snr_db", limit)}
        draft.manifest = msgspec.structs.replace(bundle.manifest, files={}, golden=golden)
    return Bundle.open(path)


def times(*parts: tuple[str, float | np.ndarray[Any, Any]]) -> Edit:
    """Multiply initializers."""

    def edit(model: onnx.ModelProto) -> None:
        left = dict(parts)
        for tensor in model.graph.initializer:
            if (factor := left.pop(tensor.name, None)) is not None:
                value = (numpy_helper.to_array(tensor) * factor).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        assert not left

    return edit


def row_of(result: dict[str, Any], layer: str) -> dict[str, Any]:
    (row,) = [row for row in result["layers"] if row["layer"] == layer]
    return dict(row)


@pytest.fixture
def scaled(digits_bundle: Bundle, tmp_path: Path) -> Bundle:
    """conv1's channels times 2 to 9 and conv2's weights divided by them, which ReLU lets through; the head is rounded."""
    factors = np.linspace(2, 9, 16, dtype=np.float32)
    edit = times(("w1", factors[:, None, None, None]), ("b1", factors), ("w2", 1 / factors[:, None, None]), ("w3", 1.01))
    return remade(digits_bundle, tmp_path / "scaled.edge", edit, FLOAT_GRAPH)


def test_every_layer_has_a_row_in_graph_order(int8: Bundle) -> None:
    result = edgekit.compare(int8, layers=True)
    rows = result["layers"]
    assert [(row["layer"], row["op"], row["tensor"], row["type"]) for row in rows] == [
        ("conv1", "Conv", "a", "int8"),
        ("relu1", "Relu", "r", "float"),
        ("conv2", "Conv", "c", "int8"),
        ("add", "Add", "s", "int8"),  # its residual branch is quantized, as TensorRT fuses it
        ("pool", "GlobalAveragePool", "g", "float"),
        ("gemm", "Gemm", "y", "int8"),
    ]
    assert all(25 < row["snr_db"] < 80 and 0.99 < row["cosine"] < 1 for row in rows)
    output = result["outputs"][1]
    assert rows[-1]["snr_db"] == pytest.approx(output["snr_db"], abs=1.0)  # of int8 kernels, where the CPU has them
    assert result["first_diverging"] is None
    assert result["unmatched"] == 0


@pytest.mark.parametrize("named", [True, False])
def test_a_layer_that_got_a_bias_is_itself(tmp_path: Path, named: bool) -> None:
    """x -> fc1 - relu - fc2, without biases: quantization adds an Add behind both, and a Sub in front of what it reads."""
    rng = np.random.default_rng(0)
    nodes = [("MatMul", ["x", "w"], "a", "fc1"), ("Relu", ["a"], "r", "relu"), ("MatMul", ["r", "v"], "y", "fc2")]
    weights = {name: rng.normal(0, 0.2, (16, 16)).astype(np.float32) for name in "wv"}
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], name=name if named else "") for op, inputs, output, name in nodes],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    folder = tmp_path / "samples"
    folder.mkdir()
    for i in range(40):
        np.savez(folder / f"{i:02}.npz", x=np.abs(rng.normal(0, 1, (8, 16))).astype(np.float32))
    bundle = edgekit.import_onnx(tmp_path / "m.onnx", out=tmp_path / "float.edge")
    result = edgekit.compare(edgekit.quantize(bundle, out=tmp_path / "int8.edge", calib=folder, share=1.0), layers=True)
    rows = result["layers"]
    assert [(row["op"], row["tensor"], row["type"]) for row in rows] == [
        ("MatMul", "a", "int8"),
        ("Relu", "r", "float"),
        ("MatMul", "y", "int8"),
    ]
    names = {row["layer"] for row in rows}
    assert names == {"fc1", "relu", "fc2"} if named else not any("add_bias" in name for name in names)
    assert result["largest_fall"]["layer"] in names
    assert result["unmatched"] == 0


def test_the_reference_is_walked_once_whatever_its_depth(int8: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[int] = []
    computed = module._computed

    def counted(graph: onnx.GraphProto) -> set[str]:
        walks.append(len(graph.node))
        return computed(graph)

    monkeypatch.setattr(module, "_computed", counted)
    result = module.compare_layers((int8, FLOAT_GRAPH), (int8, INT8_GRAPH), load_golden(int8)[0])
    assert len(walks) < len(result["layers"])


def convolved(x: np.ndarray[Any, Any], kernel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(N, C, H, W) with (K, C, 3, 3), padded by one, in float64 -> (N, K, H, W)."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.einsum("nchwij,kcij->nkhw", windows, kernel.astype(np.float64))


def stored(bundle: Bundle, graph: str) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(bundle.read(graph)).graph.initializer}


def test_figures_equal_their_definitions(int8: Bundle) -> None:
    x, numbers = load_golden(int8)[0]["x"], stored(int8, INT8_GRAPH)
    expected = convolved(x, stored(int8, FLOAT_GRAPH)["w1"])
    steps = np.clip(np.rint(x / numbers["x/scale"]), -128, 127)
    kernel = numbers["conv1/weight/int8"] * numbers["conv1/weight/scale"][:, None, None, None]
    found = convolved(steps * numbers["x/scale"], kernel) + numbers.get("conv1/bias", np.zeros(16))[:, None, None]
    error = found - expected
    row = row_of(edgekit.compare(int8, layers=True), "conv1")
    assert row["snr_db"] == pytest.approx(10 * np.log10((expected**2).sum() / (error**2).sum()), abs=0.01)
    assert row["max_abs"] == pytest.approx(np.abs(error).max(), rel=1e-3)
    assert row["relative"] == pytest.approx(np.abs(error).max() / np.abs(expected).max(), rel=1e-3)
    cosine = (expected * found).sum() / np.sqrt((expected**2).sum() * (found**2).sum())
    assert row["cosine"] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize(
    ("tensor", "factor", "layer"),
    [
        ("conv1/weight/scale", 1.6, "conv1"),  # its input is exact
        ("conv2/weight/scale", np.linspace(0.2, 1.8, 16), "conv2"),
        ("r/scale", 0.05, "conv2"),  # saturates what conv2 reads; what ReLU wrote is whole
        ("gemm/weight/scale", 0.3, "gemm"),
    ],
)
def test_a_damaged_layer_is_named(
    cli: Callable[..., Any], int8: Bundle, tmp_path: Path, tensor: str, factor: Any, layer: str
) -> None:
    damaged = remade(int8, tmp_path / "damaged.edge", times((tensor, factor)))
    done = cli("compare", damaged.path, "--layers", "--json")
    assert done.code == 0
    first, fall = done.json["first_diverging"], done.json["largest_fall"]
    assert (first["layer"], fall["layer"]) == (layer, layer)
    assert first["snr_db"] == fall["to_db"] < 20
    assert fall["from_db"] > 30
    text = cli("compare", damaged.path, "--layers").out
    op = "Gemm" if layer == "gemm" else "Conv"
    assert f"first below 20 dB: {layer} ({op}), {first['snr_db']:.1f} dB" in text
    before = "exact" if layer == "conv1" else f"{fall['from_db']:.1f}"
    assert f"largest fall: {layer} ({op}), from {before} to {fall['to_db']:.1f} dB" in text


def test_the_limit_is_the_callers(cli: Callable[..., Any], int8: Bundle) -> None:
    rows = edgekit.compare(int8, layers=True)["layers"]
    below = cli("compare", int8.path, "--layers", "--diverge", rows[0]["snr_db"] + 0.1, "--json").json
    assert below["first_diverging"]["layer"] == "conv1"
    assert "no layer falls below 20 dB" in cli("compare", int8.path, "--layers").out
    for wrong in ("nan", "1000"):
        assert cli("compare", int8.path, "--layers", "--diverge", wrong).code == 2


def test_a_rescaled_layer_is_noted_and_not_named(scaled: Bundle) -> None:
    result = edgekit.compare(scaled, layers=True)
    for layer in ("conv1", "relu1"):
        row = row_of(result, layer)
        assert row["note"] == "rescaled"
        assert row["snr_db"] < 0 < 100 < row["fitted_db"]
    assert row_of(result, "conv2")["snr_db"] > 100
    assert result["first_diverging"] is None
    assert result["largest_fall"]["layer"] == "gemm"  # by 1%, 40 dB


def test_a_scale_that_nothing_takes_back_is_no_rescaling(digits_bundle: Bundle, tmp_path: Path) -> None:
    """A fit explains it as well, but what follows stays wrong."""
    edit = times(("w1", np.linspace(2, 9, 16)[:, None, None, None]))
    wrong = remade(digits_bundle, tmp_path / "wrong.edge", edit, FLOAT_GRAPH)
    result = edgekit.compare(wrong, layers=True)
    assert result["first_diverging"]["layer"] == result["largest_fall"]["layer"] == "conv1"
    assert {row["note"] for row in result["layers"]} == {None}


def test_what_is_not_finite_diverges(tiny_bundle: Bundle, tmp_path: Path) -> None:
    broken = remade(tiny_bundle, tmp_path / "nan.edge", times(("w2", np.nan)), FLOAT_GRAPH)
    with pytest.raises(BudgetNotMet) as caught:
        edgekit.compare(broken, layers=True, plot=tmp_path / "nan.svg")
    result = caught.value.result
    row = row_of(result, "conv2")
    assert (row["note"], row["snr_db"]) == ("not finite", None)
    assert result["first_diverging"] == {"layer": "conv2", "op": "Conv", "tensor": "c", "snr_db": None}
    assert "not finite" in (tmp_path / "nan.svg").read_text()


def test_layers_are_shown_where_a_tolerance_is_missed(cli: Callable[..., Any], int8: Bundle, tmp_path: Path) -> None:
    bad = remade(int8, tmp_path / "bad.edge", times(("conv2/weight/scale", 3.0)), limit=30.0)
    done = cli("compare", bad.path, "--layers")
    assert done.code == 3
    assert "first below 20 dB: conv2 (Conv)" in done.out
    as_json = cli("compare", bad.path, "--layers", "--json")
    assert as_json.code == 3
    assert as_json.json["first_diverging"]["layer"] == "conv2"
    assert "dB" in as_json.json["error"]


def test_a_folded_batchnorm_is_the_convolution_that_took_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    def normalise(model: onnx.ModelProto) -> None:
        graph = model.graph
        graph.node[0].output[0] = "before"
        parts = {"gamma": np.full(16, 3), "beta": np.zeros(16), "mean": np.zeros(16), "variance": np.full(16, 9 - 1e-5)}
        graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in parts.items())
        graph.node.insert(1, helper.make_node("BatchNormalization", ["before", *parts], ["a"], name="norm"))

    graph = onnx.load_from_string(tiny_bundle.read(FLOAT_GRAPH))
    normalise(graph)
    with Bundle.create(tmp_path / "norm.edge") as draft:
        draft.write(FLOAT_GRAPH, graph.SerializeToString())
        draft.write(INT8_GRAPH, tiny_bundle.read(FLOAT_GRAPH))
        draft.write(GOLDEN, tiny_bundle.read(GOLDEN))
        draft.manifest = msgspec.structs.replace(tiny_bundle.manifest, files={})
    result = edgekit.compare(tmp_path / "norm.edge", layers=True)
    assert [row["tensor"] for row in result["layers"]] == ["a", "r", "c", "s", "g", "y"]
    assert (result["layers"][0]["layer"], result["layers"][0]["op"]) == ("conv1", "Conv")
    assert result["layers"][0]["snr_db"] > 100
    assert result["first_diverging"] is result["largest_fall"] is None


def test_tensors_of_another_name_or_shape_are_counted(int8: Bundle, tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["r2" if name == "r" else name for name in names]

    result = edgekit.compare(remade(int8, tmp_path / "renamed.edge", rename), layers=True)
    assert result["unmatched"] == 1
    assert "relu1" not in [row["layer"] for row in result["layers"]]
    assert result["largest_fall"]["input"] in (None, "conv1")  # through the layer without its like


def test_a_second_bundle_is_held_against_the_first(
    cli: Callable[..., Any], tiny_bundle: Bundle, int8: Bundle, digits_bundle: Bundle
) -> None:
    done = cli("compare", tiny_bundle.path, "--with", int8.path, "--layers", "--json").json
    alone = edgekit.compare(int8, layers=True)
    same = ("layer", "op", "tensor", "type")  # the figures differ: each bundle has golden inputs of its own
    assert [[row[key] for key in same] for row in done["layers"]] == [[row[key] for key in same] for row in alone["layers"]]
    assert (done["bundle"], done["other"]) == (str(tiny_bundle.path), str(int8.path))
    assert {row["tolerance"] for row in done["outputs"]} == {None}
    floats = edgekit.compare(tiny_bundle, other=tiny_bundle, layers=True)
    assert {(row["snr_db"], row["type"]) for row in floats["layers"]} == {(200.0, "float")}
    other = cli("compare", tiny_bundle.path, "--with", digits_bundle.path)
    assert other.code == 1
    assert f"{digits_bundle.path} does not take the inputs of {tiny_bundle.path}: input x has shape" in other.err


def test_bundles_without_a_common_tensor(tiny_bundle: Bundle, tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [name if name in ("x", "w1", "w2", "w3", "b") else f"{name}_" for name in names]
        model.graph.output[0].name = "y_"

    other = remade(tiny_bundle, tmp_path / "other.edge", rename, FLOAT_GRAPH)
    with pytest.raises(GraphError, match="no tensor in common"):
        edgekit.compare(tiny_bundle, other=other, layers=True)


def test_layers_need_an_int8_graph_and_onnxruntime(
    cli: Callable[..., Any], tiny_bundle: Bundle, int8: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match=r"no model\.int8\.onnx") as caught:
        edgekit.compare(tiny_bundle, layers=True)
    assert "quantize" in caught.value.hint
    done = cli("compare", int8.path, "--layers", "--backends", "onnxruntime,abaci")
    assert done.code == 2
    assert "'abaci'" in done.err
    assert "onnxruntime" in done.err
    from edgekit.runtime import BACKENDS

    monkeypatch.setitem(BACKENDS, "abacus", BACKENDS["onnxruntime"])
    with pytest.raises(UsageError, match="onnxruntime only"):
        edgekit.compare(int8, backends="abacus", layers=True)
    both = edgekit.compare(int8, backends="onnxruntime,abacus", layers=True)
    assert (len(both["outputs"]), len(both["layers"])) == (4, 6)


def drawn(path: Path) -> ElementTree.Element:
    return ElementTree.parse(path).getroot()  # noqa: S314  written a moment ago


def bars(path: Path) -> list[ElementTree.Element]:
    found = drawn(path).iter("{http://www.w3.org/2000/svg}rect")
    return [rect for rect in found if rect.get("class", "").startswith("bar ")]


def test_the_chart_has_a_bar_for_every_layer(cli: Callable[..., Any], int8: Bundle, tmp_path: Path) -> None:
    damaged = remade(int8, tmp_path / "a<b>&c.edge", times(("conv2/weight/scale", np.linspace(0.2, 1.8, 16))))
    path = tmp_path / "layers.svg"
    done = cli("compare", damaged.path, "--plot", path)
    assert done.code == 0
    assert str(path) in done.out
    assert [rect.get("class") for rect in bars(path)] == [
        "bar int8",
        "bar float",
        *["bar diverging"] * sum(row["snr_db"] < 20 for row in edgekit.compare(damaged, layers=True)["layers"]),
    ]
    first = float(bars(path)[0].get("height") or 0)
    assert first > float(bars(path)[2].get("height") or 0) > 0
    text = "".join(drawn(path).itertext())
    assert "first below 20 dB: conv2" in text
    assert "a<b>&c.edge/model.int8.onnx against model.onnx" in text


def test_a_chart_replaces_its_like_alone(int8: Bundle, scaled: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "layers.svg"
    edgekit.compare(int8, plot=path)
    assert len(bars(path)) == 6
    assert edgekit.compare(scaled, plot=path)["plot"] == str(path)
    assert len(bars(path)) == 5
    assert "rescaled" in path.read_text()
    path.write_text("<svg/>")
    with pytest.raises(OutputExists):
        edgekit.compare(int8, plot=path)
    assert path.read_text() == "<svg/>"
    with pytest.raises(UsageError, match="SVG"):
        edgekit.compare(int8, plot=tmp_path / "layers.png")
    with pytest.raises(UsageError, match="inside the bundle"):
        edgekit.compare(int8, plot=int8.path / "layers.svg")


def test_the_outputs_alone_need_no_onnx_library(int8: Bundle) -> None:
    code = "import sys, json, edgekit; rows = edgekit.compare(sys.argv[1])['outputs']; "
    code += "print(json.dumps([len(rows), 'onnx' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code, str(int8.path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [2, False]

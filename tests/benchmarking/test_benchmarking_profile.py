"""The time of every layer, as table and picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.benchmarking.profile import SHOWN, layer_times, times_chart
from edgekit.bundle import Bundle


def test_every_layer_that_runs_has_a_time(cli: Any, digits_bundle: Bundle, tmp_path: Path) -> None:
    picture = tmp_path / "layers.svg"
    outcome = cli("bench", digits_bundle.path, "--seconds", "0.1", "--no-save", "--plot", picture, "--json")
    assert outcome.code == 0
    profile = outcome.json["profile"]
    rows = profile["layers"]
    assert {"Conv", "Gemm"} <= {row["op"].removeprefix("Fused") for row in rows}
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["us"] for row in rows] == sorted((row["us"] for row in rows), reverse=True)
    assert profile["runs"] >= 20
    assert profile["run_us"] >= profile["between_us"] >= 0
    assert "<title>" in picture.read_text()
    assert rows[0]["layer"] in picture.read_text()


def test_a_run_without_layers_keeps_those_of_the_same_graph(tiny_bundle: Bundle) -> None:
    timed = edgekit.bench(tiny_bundle, seconds=0.05, layers=True)
    assert edgekit.bench(tiny_bundle, seconds=0.05)["profile"] == timed["profile"]
    assert "profile" not in edgekit.bench(tiny_bundle, seconds=0.05, threads=2)


def test_the_largest_product_takes_longest(tmp_path: Path) -> None:
    """600 times the arithmetic of the others: no neighbour makes up for it."""
    shapes = [(8, 8), (8, 2048), (2048, 2048), (2048, 8), (8, 8)]
    names = ["x", "a", "b", "c", "d", "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"m{i}") for i in range(5)]
    weights = [numpy_helper.from_array(np.full(shape, 0.01, np.float32), f"w{i}") for i, shape in enumerate(shapes)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    bundle = edgekit.import_onnx(tmp_path / "m.onnx", out=tmp_path / "m.edge")
    found = edgekit.bench(bundle, seconds=0.1, layers=True, save=False)["profile"]["layers"]
    assert found[0]["layer"] == "m2"


def test_a_loop_counts_what_its_body_takes_once(tmp_path: Path) -> None:
    """A body of one large product, run eight times: its time is the loop's, and no second one beside it."""
    width = 256
    body = helper.make_graph(
        [helper.make_node("MatMul", ["s", "w"], ["t"], name="inner"), helper.make_node("Identity", ["c"], ["d"], name="on")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [64, width]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, [64, width]),
        ],
    )
    constants = {"n": np.array(8), "go": np.array(True), "w": np.eye(width, dtype=np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="outer"),
        helper.make_node("Loop", ["n", "go", "a"], ["y"], name="loop", body=body),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, width]) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[1:], [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "loop.onnx")
    files = SimpleNamespace(files={"loop.onnx": "of a loop"})
    # an import would unroll it
    bundle: Any = SimpleNamespace(path=tmp_path, manifest=files, read=lambda name: (tmp_path / name).read_bytes())
    found = layer_times(bundle, "loop.onnx", 1, {"x": np.ones((64, width), np.float32)}, 0.1)
    rows = {row["layer"]: row for row in found["layers"]}
    assert (rows["inner"]["inside"], rows["loop"]["inside"], rows["outer"]["inside"]) == ("loop", None, None)
    assert rows["inner"]["us"] > 3 * rows["outer"]["us"]  # eight products beside one
    assert rows["inner"]["us"] <= 1.05 * rows["loop"]["us"]
    assert sum(row["share"] for row in found["layers"] if row["inside"] is None) == pytest.approx(1)
    assert found["run_us"] >= 0.9 * sum(row["us"] for row in found["layers"] if row["inside"] is None)


def test_a_deep_net_is_drawn_with_the_rest_as_one_bar() -> None:
    rows = [{"layer": f"<{i}>", "op": "Conv", "us": 100.0 - i, "share": 0.01, "output": "1x8"} for i in range(SHOWN + 10)]
    chart = times_chart({"layers": rows, "run_us": 5e3, "runs": 20}, "a & b")
    assert chart.count('class="bar"') == SHOWN
    assert "10 others" in chart
    assert "&lt;0&gt;" in chart
    assert "<0>" not in chart


def test_what_cannot_be_drawn_or_timed(cli: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    outcome = cli("bench", tiny_bundle.path, "--seconds", "0.05", "--plot", tmp_path / "a.png")
    assert outcome.code == 2
    assert "FILE.svg" in outcome.err
    (tmp_path / "mine.svg").write_text("<svg>years of work</svg>")
    assert cli("bench", tiny_bundle.path, "--seconds", "0.05", "--plot", tmp_path / "mine.svg").code != 0
    assert "years of work" in (tmp_path / "mine.svg").read_text()

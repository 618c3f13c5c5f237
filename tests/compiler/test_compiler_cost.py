"""Costs counted by hand against `graph_cost`; the roofline's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.compiler import estimate, import_onnx
from edgekit.compiler.cost import graph_cost
from edgekit.compiler.roofline import fuse, work_of
from edgekit.errors import UsageError
from edgekit.quantization import quantize
from edgekit.targets import LAUNCH_US, PEAK_SHARE

N = helper.make_node


def graph(nodes: list[Any], weights: dict[str, Any], x: list[Any], y: str = "y") -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("nodes", "weights", "x", "macs", "parameters"),
    [
        ([N("Conv", ["x", "w", "b"], ["y"], strides=[2, 2], pads=[1] * 4)], {"w": zeros(8, 3, 3, 3), "b": zeros(8)},
         ["n", 3, 8, 8], 8 * 16 * 27, 224),
        ([N("Conv", ["x", "w"], ["y"], group=4)], {"w": zeros(4, 1, 3, 3)}, [2, 4, 5, 5], 2 * 4 * 9 * 9, 36),
        ([N("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])], {"w": zeros(3, 5, 2, 2)}, [1, 3, 4, 4], 3 * 16 * 5 * 4, 60),
        ([N("Gemm", ["x", "w"], ["y"], transA=1)], {"w": zeros(6, 7)}, [6, 2], 2 * 6 * 7, 42),
        ([N("MatMul", ["x", "w"], ["y"])], {"w": zeros(5, 7)}, [2, 3, 5], 2 * 3 * 5 * 7, 35),
        ([N("LSTM", ["x", "w", "r"], ["y"], hidden_size=4)], {"w": zeros(1, 16, 3), "r": zeros(1, 16, 4)},
         [9, 2, 3], 18 * (48 + 64), 112),
        ([N("Relu", ["x"], ["y"])], {}, [1, 3], 0, 0),
    ],
)  # fmt: skip
def test_macs_and_parameters(nodes: list[Any], weights: dict[str, Any], x: list[Any], macs: int, parameters: int) -> None:
    cost = graph_cost(graph(nodes, weights, x))
    assert (cost.macs, cost.parameters, cost.unknown) == (macs, parameters, ())


def test_a_symbol_takes_the_stated_size() -> None:
    made = graph([N("MatMul", ["x", "w"], ["y"])], {"w": zeros(5, 7)}, ["n", 5])
    assert graph_cost(made).macs == 35
    assert graph_cost(made, {"n": 8}).macs == 280


def test_shared_weights_are_counted_once() -> None:
    nodes = [N("MatMul", ["x", "w"], ["a"]), N("MatMul", ["a", "w"], ["y"])]
    assert graph_cost(graph(nodes, {"w": zeros(4, 4)}, [1, 4])).parameters == 16


def test_the_weights_of_branches_are_parameters() -> None:
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 7])
    kept, stated = numpy_helper.from_array(zeros(5, 7), "w"), numpy_helper.from_array(zeros(5, 7), "v")
    yes = helper.make_graph([N("MatMul", ["x", "w"], ["z"])], "yes", [], [value], [kept])
    no = helper.make_graph([N("Constant", [], ["v"], value=stated), N("MatMul", ["x", "v"], ["z"])], "no", [], [value])
    made = graph([N("If", ["c"], ["y"], then_branch=yes, else_branch=no)], {"c": np.array(True)}, [1, 5])
    assert graph_cost(made).parameters == 1 + 35 + 35


def quantized() -> onnx.ModelProto:
    """x -> Q/DQ -> Conv(int8 weights) -> Relu -> Q/DQ -> Conv(int8 weights)."""
    weights: dict[str, Any] = {"s": np.float32(0.1), "z": np.int8(0), "w": np.zeros((16, 16, 1, 1), np.int8)}
    nodes = [
        N("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        N("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        N("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        N("Conv", ["xd", "wd"], ["c"], name="first"),
        N("Relu", ["c"], ["r"]),
        N("QuantizeLinear", ["r", "s", "z"], ["rq"]),
        N("DequantizeLinear", ["rq", "s", "z"], ["rd"]),
        N("DequantizeLinear", ["w", "s", "z"], ["wd2"]),
        N("Conv", ["rd", "wd2"], ["y"], name="second"),
    ]
    return graph(nodes, weights, [1, 16, 8, 8])


def test_a_quantized_graph_moves_bytes_not_floats() -> None:
    cost = graph_cost(quantized())
    assert cost.parameters == 256
    kernels = fuse(cost, {"y"})
    assert [[layer.op for layer in k.layers] for k in kernels] == [
        ["QuantizeLinear"],
        ["Conv", "Relu", "QuantizeLinear"],
        ["Conv"],
    ]
    assert [k.layers[0].int8 for k in kernels[1:]] == [True, True]
    first = kernels[1]
    assert [t.size_bytes for t in first.reads.values()] == [16 * 64]
    assert [t.size_bytes for t in first.writes.values()] == [16 * 64]
    assert [t.size_bytes for t in kernels[2].writes.values()] == [4 * 16 * 64]


def test_a_residual_is_read_from_memory(tiny_bundle: Bundle) -> None:
    model = onnx.load(tiny_bundle.path / FLOAT_GRAPH)
    kernels = fuse(graph_cost(model), {"y"})
    assert [[layer.name for layer in k.layers] for k in kernels] == [["conv1", "relu1"], ["conv2", "add"], ["pool"], ["gemm"]]
    assert set(kernels[1].reads) == {"r"}
    assert set(kernels[1].writes) == {"s"}


def test_the_prediction_is_the_sum_of_its_kernels(tiny_bundle: Bundle) -> None:
    found = estimate(tiny_bundle, target="jetson-orin-nano", precision="fp16")
    assert found["prediction"] is True
    assert found["latency_ms"] == pytest.approx(sum(row["us"] for row in found["top_layers"]) / 1e3, abs=1e-4)
    conv2 = next(row for row in found["top_layers"] if row["layer"].startswith("conv2"))
    moved = 2 * (16 * 1024 + 16 * 144 + 16 * 1024)  # reads r, its weights, writes s, in float16
    assert conv2["bytes"] == moved
    assert conv2["us"] == pytest.approx(
        max(2 * conv2["macs"] / 17e6, moved / 102e3) / PEAK_SHARE.value + LAUNCH_US.value, abs=2e-3
    )
    assert found["bound_ms"] < found["latency_ms"] - 4 * LAUNCH_US.value / 1e3
    assert not any("unconfirmed" in caveat for caveat in found["caveats"])
    assert any(
        "8.5 unconfirmed" in caveat for caveat in estimate(tiny_bundle, target="jetson-orin-nano", precision="fp32")["caveats"]
    )


def test_more_work_or_less_machine_takes_longer(tiny_bundle: Bundle) -> None:
    def ms(**options: Any) -> float:
        return float(estimate(tiny_bundle, **{"target": "jetson-orin-nano", **options})["latency_ms"])

    assert ms(batch=64) > ms(batch=1)
    assert ms(precision="fp32", batch=64) > ms(precision="fp16", batch=64)
    assert ms(target="jetson-agx-orin", batch=64) < ms(batch=64) < ms(target="jetson-xavier-nx", batch=64)


def test_a_card_that_is_no_device_is_not_guessed(tiny_bundle: Bundle, cli: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="x86-cpu"):
        estimate(tiny_bundle, target="x86-cpu")
    assert cli("estimate", tiny_bundle.path, "--target", "jetson-orin-nano", "--precision", "fp4").code == 2
    done = cli("estimate", tiny_bundle.path, "--target", "jetson-orin-nano", "--json")
    assert done.json["prediction"] is True


def test_a_float_bundle_is_estimated_in_int8_as_if_quantized(
    tiny_bundle: Bundle, tmp_path: Path, calibration_folder: Path
) -> None:
    imagined = estimate(tiny_bundle, target="jetson-orin-nano", precision="int8", batch=64)
    assert imagined["as_if_quantized"]
    assert any("as if quantized" in caveat for caveat in imagined["caveats"])
    made = estimate(
        quantize(tiny_bundle, out=tmp_path / "q.edge", calib=calibration_folder, samples=8, method="minmax"),
        target="jetson-orin-nano",
        batch=64,
    )
    assert not made["as_if_quantized"]
    assert made["precision"] == "int8"
    assert made["latency_ms"] == pytest.approx(imagined["latency_ms"], rel=0.2)
    assert imagined["latency_ms"] < estimate(tiny_bundle, target="jetson-orin-nano", precision="fp16", batch=64)["latency_ms"]


def test_int8_passes_through_what_only_moves_it() -> None:
    nodes = [
        N("Conv", ["x", "w"], ["a"], name="first"),
        N("Relu", ["a"], ["b"]),
        N("Concat", ["b", "b"], ["c"], axis=1),
        N("Conv", ["c", "v"], ["d"], name="second"),
        N("Sigmoid", ["d"], ["s"]),
        N("Mul", ["d", "s"], ["y"], name="silu"),
    ]
    made = graph(nodes, {"w": zeros(16, 16, 1, 1), "v": zeros(16, 32, 1, 1)}, [1, 16, 8, 8])
    works, cost = work_of(made, "int8")
    assert [(work.op, work.precision, work.size_bytes) for work in works] == [
        ("Conv", "int8", 1024 + 256 + 1024),  # reads and writes int8
        ("Concat", "fp16", 1024 + 2048),
        ("Conv", "int8", 2048 + 512 + 2 * 1024),  # SiLU reads float16
        ("Sigmoid", "fp16", 2 * 2 * 1024),
    ]
    assert [layer.channels for layer in cost.layers if layer.macs] == [(16, 16), (32, 16)]
    assert {work.precision for work in work_of(made, "int8", rest="fp32")[0]} == {"int8", "fp32"}


def test_odd_channels_are_named(tiny_bundle: Bundle) -> None:
    def named(precision: str) -> list[str]:
        caveats = estimate(tiny_bundle, target="jetson-orin-nano", precision=precision)["caveats"]
        return [caveat for caveat in caveats if "no multiple of" in caveat]

    assert named("int8") == ["3 int8 layers with channels that are no multiple of 32: expect these slower"]
    assert named("fp16") == ["2 fp16 layers with channels that are no multiple of 8: expect these slower"]  # 3 and 10


def test_a_fit_made_on_orin_says_so_elsewhere(tiny_bundle: Bundle) -> None:
    assert any("fitted on Orin" in c for c in estimate(tiny_bundle, target="l4")["caveats"])
    assert not any("fitted on Orin" in c for c in estimate(tiny_bundle, target="jetson-orin-nx")["caveats"])


def test_an_estimate_takes_the_fewest_samples_that_a_graph_takes(tmp_path: Path, cli: Callable[..., Any]) -> None:
    onnx.save(graph([N("MatMul", ["x", "w"], ["y"])], {"w": np.ones((5, 7), np.float32)}, ["n", 5]), tmp_path / "m.onnx")
    import_onnx(tmp_path / "m.onnx", out=tmp_path / "b.edge", dynamic="x:2..8x5")
    words = ("estimate", tmp_path / "b.edge", "--target", "jetson-orin-nano", "--json")
    assert cli(*words).json["batch"] == 2
    assert cli(*words, "--batch", 8).json["batch"] == 8

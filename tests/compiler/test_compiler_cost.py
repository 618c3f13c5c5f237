"""Costs counted by hand against `graph_cost`; the roofline's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.compiler import estimate
from edgekit.compiler.cost import graph_cost
from edgekit.compiler.roofline import fuse
from edgekit.errors import UsageError

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
    assert conv2["us"] == pytest.approx(max(2 * conv2["macs"] / 17e6, moved / 102e3) + 5, abs=2e-3)
    assert any("5 unconfirmed" in caveat for caveat in found["caveats"])


def test_more_work_or_less_machine_takes_longer(tiny_bundle: Bundle) -> None:
    def ms(**options: Any) -> float:
        return float(estimate(tiny_bundle, **{"target": "jetson-orin-nano", **options})["latency_ms"])

    assert ms(batch=64) > ms(batch=1)
    assert ms(precision="fp32", batch=64) > ms(precision="fp16", batch=64)
    assert ms(target="jetson-agx-orin", batch=64) < ms(batch=64) < ms(target="jetson-xavier-nx", batch=64)


def test_a_card_that_is_no_device_is_not_guessed(tiny_bundle: Bundle, cli: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="rtx-ada"):
        estimate(tiny_bundle, target="rtx-ada")
    assert cli("estimate", tiny_bundle.path, "--target", "jetson-orin-nano", "--precision", "fp4").code == 2
    done = cli("estimate", tiny_bundle.path, "--target", "jetson-orin-nano", "--json")
    assert done.json["prediction"] is True

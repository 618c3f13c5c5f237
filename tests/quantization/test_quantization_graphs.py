"""Graphs of every shape that the placement table knows: right in ONNX Runtime, and built by TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import GraphError
from edgekit.graphs.editing import exposed
from edgekit.quantization.graph import Parameters, check, insert
from edgekit.quantization.placement import Placement, Unquantized, place, weights_of
from edgekit.quantization.prepare import prepare
from edgekit.quantization.reconstruct import reconstruct
from edgekit.quantization.rounding import weight_scales
from edgekit.quantization.simulate import Noise, Simulator, observe, signal_to_noise, with_reference
from edgekit.quantization.statistics import METHODS, scale_of
from edgekit.runtime.golden import MAX_DB
from edgekit.runtime.onnxruntime import session

Array = np.ndarray[Any, Any]
ROOM = "edgekit.quantization.reconstruct"
RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 0.2) -> Array:
    return RNG.normal(0, scale, shape).astype(np.float32)


class Case(NamedTuple):
    """Nodes from ``x`` to ``y``, their weights, the shape of x; how many layers must be int8."""

    nodes: list[Any]
    weights: dict[str, Array]
    x: list[Any]
    int8: int
    opset: int = 17


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"{op}_{outputs.replace(' ', '_')}", **attributes)


def build(case: Case) -> bytes:
    graph = helper.make_graph(
        case.nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, case.x)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(value, name) for name, value in case.weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=8)
    data: bytes = onnx.shape_inference.infer_shapes(model).SerializeToString()
    return data


BN = {"g": np.abs(normal(8)) + 0.5, "be": normal(8), "m": normal(8), "v": np.abs(normal(8)) + 0.5}

CASES = {
    "conv without bias": Case([node("Conv", "x w", "y", pads=[1] * 4)], {"w": normal(8, 4, 3, 3)}, ["n", 4, 9, 9], 1),
    "conv, batchnorm, relu": Case(
        [node("Conv", "x w b", "c", pads=[1] * 4), node("BatchNormalization", "c g be m v", "n"), node("Relu", "n", "y")],
        {"w": normal(8, 4, 3, 3), "b": normal(8), **BN}, ["n", 4, 9, 9], 1,
    ),
    "depthwise": Case(
        [node("Conv", "x w", "c", group=8, pads=[1] * 4), node("Relu", "c", "r"), node("Conv", "r p", "y")],
        {"w": normal(8, 1, 3, 3), "p": normal(16, 8, 1, 1)}, ["n", 8, 9, 9], 2,
    ),
    "conv 1d": Case([node("Conv", "x w", "y")], {"w": normal(8, 4, 3)}, ["n", 4, 32], 1),
    "transposed conv": Case(
        [node("ConvTranspose", "x w b", "y", strides=[2, 2])], {"w": normal(4, 8, 2, 2), "b": normal(8)}, ["n", 4, 6, 6], 1
    ),
    "transposed conv, batchnorm": Case(
        [node("ConvTranspose", "x w", "c", strides=[2, 2]), node("BatchNormalization", "c g be m v", "y")],
        {"w": normal(4, 8, 2, 2), **BN}, ["n", 4, 6, 6], 1,
    ),
    "grouped transposed conv, batchnorm": Case(
        [node("ConvTranspose", "x w", "c", strides=[2, 2], group=2), node("BatchNormalization", "c g be m v", "y")],
        {"w": normal(4, 4, 2, 2), **BN}, ["n", 4, 6, 6], 1,
    ),
    "gemm transB": Case([node("Gemm", "x w b", "y", transB=1)], {"w": normal(10, 16), "b": normal(10)}, ["n", 16], 1),
    "gemm": Case([node("Gemm", "x w", "y")], {"w": normal(16, 10)}, ["n", 16], 1),
    "gemm alpha beta": Case(
        [node("Gemm", "x w b", "y", alpha=0.5, beta=2.0)], {"w": normal(16, 10), "b": normal(10)}, ["n", 16], 1
    ),
    "matmul and bias": Case(
        [node("MatMul", "x w", "m"), node("Add", "b m", "y")], {"w": normal(16, 24), "b": normal(24)}, ["n", 5, 16], 1
    ),
    "constant left matmul": Case([node("MatMul", "w x", "y")], {"w": normal(10, 16)}, ["n", 16, 5], 1),
    "shared weights": Case(
        [node("MatMul", "x w", "a"), node("Relu", "a", "r"), node("MatMul", "r w", "y")], {"w": normal(16, 16)}, ["n", 16], 2
    ),
    "residual": Case(
        [
            node("Conv", "x w1", "a", pads=[1] * 4), node("Relu", "a", "r"), node("Conv", "r w2", "c", pads=[1] * 4),
            node("Add", "c r", "s"), node("Relu", "s", "t"), node("Conv", "t w1", "y"),
        ],
        {"w1": normal(8, 8, 3, 3), "w2": normal(8, 8, 3, 3)}, ["n", 8, 9, 9], 3,
    ),
    "projected residual": Case(
        [node("Conv", "x w1", "a"), node("Conv", "x w2", "c"), node("Add", "a c", "s"), node("Relu", "s", "y")],
        {"w1": normal(8, 8, 1, 1), "w2": normal(8, 8, 1, 1)}, ["n", 8, 9, 9], 2,
    ),
    "concat": Case(
        [
            node("Conv", "x w1", "a"), node("Relu", "a", "r"), node("Conv", "r w2", "c"), node("Relu", "c", "d"),
            node("Concat", "r d", "k", axis=1), node("Conv", "k w3", "y"),
        ],
        {"w1": normal(8, 4, 1, 1), "w2": normal(8, 8, 1, 1), "w3": normal(8, 16, 1, 1)}, ["n", 4, 9, 9], 3,
    ),
    "attention": Case(
        [
            node("MatMul", "x q", "a"), node("MatMul", "x k", "b"), node("Transpose", "b", "t", perm=[0, 2, 1]),
            node("MatMul", "a t", "s"), node("Softmax", "s", "p"), node("MatMul", "p x", "o"), node("MatMul", "o w", "y"),
        ],
        {"q": normal(16, 16), "k": normal(16, 16), "w": normal(16, 16)}, ["n", 6, 16], 3,
    ),
    "opset 11": Case(
        [node("Conv", "x w b", "c"), node("Relu", "c", "y")], {"w": normal(8, 4, 3, 3), "b": normal(8)}, ["n", 4, 9, 9], 1, 11
    ),
    "zero channel": Case(
        [node("Conv", "x w", "y")], {"w": normal(8, 4, 3, 3) * (np.arange(8) > 0)[:, None, None, None].astype(np.float32)},
        ["n", 4, 9, 9], 1,
    ),
    "weight from a Constant node": Case(
        [
            helper.make_node("Constant", [], ["w"], name="k", value=numpy_helper.from_array(normal(8, 4, 3, 3))),
            node("Identity", "w", "v"), node("Conv", "x v", "y"),
        ],
        {}, ["n", 4, 9, 9], 1,
    ),
    "one-sided, wide and narrow channels": Case(
        [node("Conv", "x w1 b1", "a"), node("Relu", "a", "r"), node("Conv", "r w2 b2", "y", pads=[2, 1, 0, 1], strides=[2, 1])],
        {
            "w1": normal(16, 4, 1, 1) * np.geomspace(0.02, 20, 16).astype(np.float32)[:, None, None, None],
            "b1": np.geomspace(0.01, 10, 16).astype(np.float32), "w2": normal(8, 16, 3, 3), "b2": normal(8),
        },
        ["n", 4, 9, 9], 2,
    ),
    "unrolled recurrence": Case(
        [
            node("Split", "x", "x0 x1 x2", axis=1),
            *(node("Reshape", f"x{i} flat", f"f{i}") for i in range(3)),
            *(node("MatMul", f"f{i} wi", f"i{i}") for i in range(3)),
            node("Tanh", "i0", "h0"),
            *(n for i in (1, 2) for n in (
                node("MatMul", f"h{i - 1} wh", f"r{i}"), node("Add", f"i{i} r{i}", f"s{i}"), node("Tanh", f"s{i}", f"h{i}"),
            )),
            node("MatMul", "h2 wo", "y"),
        ],
        {"flat": np.array([-1, 16], np.int64), "wi": normal(16, 16), "wh": normal(16, 16), "wo": normal(16, 4)},
        ["n", 3, 16], 6, 13,
    ),
    "int8 weight behind DequantizeLinear": Case(
        [node("DequantizeLinear", "q s z", "w", axis=0), node("Conv", "x w", "y")],
        {"q": RNG.integers(-127, 128, (8, 4, 3, 3)).astype(np.int8), "s": np.abs(normal(8)) + 0.01, "z": np.zeros(8, np.int8)},
        ["n", 4, 9, 9], 1,
    ),
}  # fmt: skip


class Made(NamedTuple):
    prepared: onnx.ModelProto
    placement: Placement
    parameters: Parameters
    int8: onnx.ModelProto
    batches: list[dict[str, Array]]  # that it was fitted on
    judges: list[dict[str, Array]]  # others


def quantized(graph: bytes, shape: list[Any], method: str = "mse", recovery: str = "fitted") -> Made:
    """Everything int8, as `quantize` does it, without a bundle."""
    size = [4 if isinstance(axis, str) else axis for axis in shape]
    drawn = [{"x": np.random.default_rng(i).normal(size=size).astype(np.float32)} for i in range(16)]
    batches, judges = drawn[:8], drawn[8:]
    prepared = prepare(graph)
    placement = place(prepared)
    seen = observe(prepared, dict.fromkeys(placement.groups, 1), lambda: batches, 1 << 20)
    scales = {group: scale_of(METHODS[method](seen[group])) for group in dict.fromkeys(placement.groups.values())}
    axes = {layer.name: layer.axis for layer in placement.layers}
    weights = {name: weight_scales(w, axes[name], "mse") for name, w in weights_of(prepared, placement).items()}
    parameters, names = Parameters(scales, weights), placement.names
    if recovery != "none":
        parameters = reconstruct(prepared, placement, parameters, names, lambda: iter(batches), extra=recovery == "shifted")
    return Made(prepared, placement, parameters, insert(prepared, placement, parameters, names), batches, judges)


def test_parts_of_a_split_have_scales_of_their_own() -> None:
    nodes = [
        node("Mul", "x sizes", "s"), node("Split", "s", "q k v", axis=1),
        *(node("MatMul", f"{part} w{part}", f"y{part}") for part in "qkv"), node("Concat", "yq yk yv", "y", axis=1),
    ]  # fmt: skip
    sizes = np.repeat(np.array([100, 1, 10], np.float32), 4)
    known = {f"w{part}": normal(4, 4) for part in "qkv"} | {"sizes": sizes}
    made = quantized(build(Case(nodes, known, ["n", 12], 3, 13)), ["n", 12], recovery="none")
    before, after = Simulator(exposed(made.prepared, ["yk"])), Simulator(exposed(made.int8, ["yk"]))
    noise = Noise()
    for feeds in made.judges:
        noise.add({"yk": before(feeds)["yk"]}, {"yk": after(feeds)["yk"]})
    assert noise.snr_db() > 30  # 3 with the scale of the largest


def test_constant_rows_of_a_gemm_are_no_activation() -> None:
    nodes = [node("Gemm", "w x", "m", transB=1), node("MatMul", "m v", "y")]
    placement = place(prepare(build(Case(nodes, {"w": normal(6, 8), "v": normal(4, 2)}, [4, 8], 1))))
    assert placement.unquantized == (Unquantized("Gemm_m", "Gemm", "its weights are on the left"),)
    assert placement.names == ["MatMul_y"]


@pytest.mark.parametrize("recovery", ["none", "fitted", "shifted"])
@pytest.mark.parametrize("name", CASES)
def test_int8_is_near_the_float_graph(name: str, recovery: str) -> None:
    case = CASES[name]
    graph = build(case)
    made = quantized(graph, case.x, recovery=recovery)
    check(made.int8)
    assert len(made.placement.layers) == case.int8
    original = onnx.load_model_from_string(graph)
    # Folding alone changes nothing but the last bit.
    assert signal_to_noise(made.prepared, with_reference(original, made.batches)) > 100
    assert signal_to_noise(made.int8, with_reference(original, made.judges)) > 26
    # The kernels of ONNX Runtime agree with the arithmetic that the Q/DQ nodes state.

    found = session(made.int8.SerializeToString()).run(None, made.batches[0])[0]
    expected = Simulator(made.int8)(made.batches[0])["y"]
    assert np.abs(found - expected).max() <= 0.05 * np.abs(expected).max()


def build_engine(graph: bytes, shape: list[Any]) -> int:
    """Size of the engine that TensorRT-RTX builds for SM 8.9, in bytes; fails with the parser's own words."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(graph), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    if any(isinstance(axis, str) for axis in shape):
        profile = builder.create_optimization_profile()
        sizes = [tuple(n if isinstance(axis, str) else axis for axis in shape) for n in (1, 4, 8)]
        profile.set_shape("x", *sizes)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return int(plan.nbytes)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs edgekit[rtx]")
@pytest.mark.parametrize("name", CASES)
def test_tensorrt_builds_it(name: str) -> None:
    case = CASES[name]
    assert build_engine(quantized(build(case), case.x, recovery="shifted").int8.SerializeToString(), case.x) > 0


def test_placement_follows_the_table() -> None:
    made = quantized(build(CASES["residual"]), CASES["residual"].x, recovery="none")
    reads = {node.name: list(node.input) for node in made.int8.graph.node}
    assert "r/dequantized" in reads["Add_s"]  # the residual branch, by the pair that the Conv reads
    assert reads["Relu_r"] == ["a"]  # nothing between Conv and ReLU
    assert reads["Conv_a"][1] == reads["Conv_y"][1]  # equal weights are stored once
    assert sum(name.endswith("/int8") for name in (t.name for t in made.int8.graph.initializer)) == 2
    attention = quantized(build(CASES["attention"]), CASES["attention"].x)
    assert [product.inputs for product in attention.placement.products] == [("a", "t"), ("p", "x")]
    reads = {node.name: list(node.input) for node in attention.int8.graph.node}
    assert reads["Softmax_p"] == ["s"]  # nothing in front of it
    assert all(name.endswith("/dequantized") for name in [*reads["MatMul_s"], *reads["MatMul_o"]])
    concat = quantized(build(CASES["concat"]), CASES["concat"].x)
    assert concat.placement.groups["k"] == concat.placement.groups["r"]


@pytest.mark.parametrize("recovery", ["fitted", "shifted"])
def test_fitting_restores_the_mean(recovery: str) -> None:
    case = CASES["depthwise"]
    graph = build(case)
    original = onnx.load_model_from_string(graph)
    plain, corrected = (quantized(graph, case.x, recovery=name) for name in ("none", recovery))
    reference = [y for _, y in with_reference(original, plain.batches)]

    def bias(made: Made) -> float:
        run = Simulator(made.int8)
        errors = [run(feeds)["y"] - y["y"] for feeds, y in zip(made.batches, reference, strict=True)]
        return float(np.abs(np.mean(errors, axis=(0, 1, 3, 4))).max())

    assert bias(corrected) < bias(plain) / 10


def test_shift_and_factor_recover_what_one_scale_cannot() -> None:
    case = CASES["one-sided, wide and narrow channels"]
    graph = build(case)
    original = onnx.load_model_from_string(graph)
    reached = {}
    for recovery in ("none", "fitted", "shifted"):
        made = quantized(graph, case.x, recovery=recovery)
        reached[recovery] = signal_to_noise(made.int8, with_reference(original, made.batches))
    assert reached["fitted"] > reached["none"]
    assert reached["shifted"] > reached["fitted"] + 3
    ops = [n.op_type for n in made.int8.graph.node]
    assert {"Pad", "Sub", "Mul"} <= set(ops)  # zeros are padded before the shift
    assert not any(a.name == "pads" for n in made.int8.graph.node if n.name == "Conv_y" for a in n.attribute)


def recovered(case: Case) -> tuple[float, float]:
    """SNR in dB rounded to nearest, and shifted, on inputs that are one-sided."""
    graph = build(case)
    original = onnx.load_model_from_string(graph)
    found = []
    for recovery in ("none", "shifted"):
        made = quantized(graph, case.x, recovery=recovery)
        found.append(signal_to_noise(made.int8, with_reference(original, made.batches)))
    return found[0], found[1]


def test_taps_of_a_transposed_convolution_share_one_bias() -> None:
    """A shift would add another constant for each tap, and the layer has one bias a channel."""
    taps = normal(3, 4, 2, 2) + np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    nodes = [node("Abs", "x", "a"), node("ConvTranspose", "a w b", "y", strides=[2, 2])]
    plain, shifted = recovered(Case(nodes, {"w": taps, "b": normal(4)}, ["n", 3, 6, 6], 1))
    assert shifted > plain - 1


@pytest.mark.parametrize("order", ["m0 a0 m1 a1", "m0 m1 a0 a1"])
def test_a_bias_is_kept_where_its_add_lies_behind_other_layers(order: str) -> None:
    nodes = {
        "m0": node("MatMul", "p w0", "q"), "a0": node("Add", "q b0", "qb"),
        "m1": node("MatMul", "p w1", "k"), "a1": node("Add", "k b1", "kb"),
    }  # fmt: skip
    middle = [nodes[name] for name in order.split()]
    case = Case(
        [node("Abs", "x", "p"), *middle, node("Mul", "qb kb", "z"), node("MatMul", "z w2", "y")],
        {"w0": normal(16, 16), "w1": normal(16, 16), "w2": normal(16, 8), "b0": normal(16), "b1": normal(16)}, ["n", 5, 16], 3,
    )  # fmt: skip
    plain, shifted = recovered(case)
    assert shifted > plain - 2  # it was below 0 dB in the second order


def test_weights_that_are_used_both_ways_are_fitted_apart() -> None:
    """An autoencoder whose decoder is its encoder, transposed: one tensor, two geometries."""
    nodes = [node("Gemm", "x w", "h", transB=1), node("Relu", "h", "r"), node("Gemm", "r w", "y")]
    for shape in ((8, 8), (5, 12)):
        plain, shifted = recovered(Case(nodes, {"w": normal(*shape)}, ["n", shape[1]], 2))
        assert shifted > plain - 4  # few rows; with one geometry for both it was below 0 dB


@pytest.mark.parametrize("name", ["gemm", "conv, batchnorm, relu", "depthwise"])
def test_layers_wider_than_their_moments_go_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 inputs here, the last one short: about as good as whole."""
    case = CASES[name]
    graph = build(case)
    original = onnx.load_model_from_string(graph)
    found = []
    for widest in (1152, 5):
        monkeypatch.setattr(sys.modules[ROOM], "WIDEST", widest)
        made = quantized(graph, case.x, recovery="fitted")
        check(made.int8)
        found.append(signal_to_noise(made.int8, with_reference(original, made.judges)))
    assert found[1] > found[0] - 0.5


def test_shared_weights_stay_shared() -> None:
    made = quantized(build(CASES["unrolled recurrence"]), CASES["unrolled recurrence"].x, recovery="shifted")
    stored = [t.name for t in made.int8.graph.initializer if t.name.endswith("weight/int8")]
    assert len(stored) == 3
    assert len({made.placement.sites[f"f{i}"] for i in range(3)}) == 1


@pytest.mark.parametrize("recovery", ["none", "shifted"])
@pytest.mark.parametrize("name", ["gemm", "conv, batchnorm, relu", "residual", "one-sided, wide and narrow channels"])
def test_quantized_graphs_come_back_to_float_and_are_quantized_again(name: str, recovery: str) -> None:
    case = CASES[name]
    made = quantized(build(case), case.x, recovery=recovery)
    again = quantized(made.int8.SerializeToString(), case.x, recovery=recovery)
    check(again.int8)
    assert "DequantizeLinear" not in {node.op_type for node in again.prepared.graph.node}
    assert again.placement.names == made.placement.names
    assert signal_to_noise(again.prepared, with_reference(made.prepared, made.batches)) > 26
    assert signal_to_noise(again.int8, with_reference(made.int8, made.batches)) > 26


def test_nan_inside_the_model_is_named() -> None:
    case = Case([node("Log", "x", "l"), node("MatMul", "l w", "y")], {"w": normal(16, 8)}, ["n", 16], 1)
    with pytest.raises(GraphError, match="'l'"):
        quantized(build(case), case.x)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.sampled_from(["conv", "depthwise", "pool", "relu", "bn", "residual", "concat", "beside"]), min_size=1, max_size=7
    ),
    st.sampled_from(list(METHODS)),
    st.sampled_from(["none", "fitted", "shifted"]),
    st.integers(0, 2**32 - 1),
)
def test_any_net_of_these_blocks(blocks: list[str], method: str, recovery: str, seed: int) -> None:
    """Random nets: the checker passes, Q/DQ is exact where it says so, and the SNR is that of int8."""
    r = np.random.default_rng(seed)
    nodes: list[Any] = []
    weights: dict[str, Array] = {}
    last, channels = "x", 4
    for i, block in enumerate([*blocks, "conv"]):
        out = "y" if i == len(blocks) else f"t{i}"
        if block in ("conv", "depthwise", "residual"):
            groups = channels if block == "depthwise" else 1
            weights[f"w{i}"] = r.normal(0, 0.3, (channels, channels // groups, 3, 3)).astype(np.float32)
            target = f"c{i}" if block == "residual" else out
            nodes.append(node("Conv", f"{last} w{i}", target, group=groups, pads=[1] * 4))
            if block == "residual":
                nodes.append(node("Add", f"{last} c{i}", out))
        elif block == "beside":  # one tensor, read by its channels and by its last axis
            weights[f"w{i}"] = r.normal(0, 0.3, (channels, channels, 3, 3)).astype(np.float32)
            weights[f"m{i}"] = r.normal(0, 0.3, (6, 6)).astype(np.float32)
            nodes.append(node("Conv", f"{last} w{i}", f"c{i}", pads=[1] * 4))
            nodes.append(node("MatMul", f"{last} m{i}", f"p{i}"))
            nodes.append(node("Add", f"c{i} p{i}", out))
        elif block == "bn":
            weights |= {f"{k}{i}": np.abs(r.normal(1, 0.2, channels)).astype(np.float32) + 0.1 for k in "gbmv"}
            nodes.append(node("BatchNormalization", f"{last} g{i} b{i} m{i} v{i}", out))
        elif block == "concat":
            nodes.append(node("Concat", f"{last} {last}", out, axis=1))
            channels *= 2
        else:
            nodes.append(node("Relu", last, out) if block == "relu" else node("MaxPool", last, out, kernel_shape=[1, 1]))
        last = out
    graph = build(Case(nodes, weights, ["n", 4, 6, 6], 0))
    made = quantized(graph, ["n", 4, 6, 6], method, recovery)
    check(made.int8)
    original = onnx.load_model_from_string(graph)
    assert 8 < signal_to_noise(made.int8, with_reference(original, made.judges)) < MAX_DB


def test_the_room_needs_no_torch() -> None:
    import subprocess

    code = "import sys, edgekit.quantization; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 0

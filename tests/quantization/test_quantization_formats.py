"""Formats beside int8: weights alone in 8 or 4 bits, and fp8. Right in ONNX Runtime, and built by TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler.precision import activation_peaks, to_fp16
from edgekit.errors import GraphError, UsageError
from edgekit.quantization.fp8 import to_fp8
from edgekit.quantization.graph import check
from edgekit.quantization.placement import place
from edgekit.quantization.prepare import prepare
from edgekit.quantization.simulate import Simulator
from edgekit.quantization.weight_only import MIN_PARAMETERS, weight_only

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 0.2) -> Array:
    return RNG.normal(0, scale, shape).astype(np.float32)


def node(op: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}_{output}", **attributes)


def graph(nodes: list[Any], weights: dict[str, Any], x: list[int], kind: int = TensorProto.FLOAT, opset: int = 17) -> bytes:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, x)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    data: bytes = onnx.shape_inference.infer_shapes(model).SerializeToString()
    return data


def run(model: onnx.ModelProto, x: Array) -> Array:
    return Simulator(model)({"x": x})["y"]


def snr_db(truth: Array, found: Array) -> float:
    return float(10 * np.log10((truth.astype(np.float64) ** 2).sum() / ((found - truth).astype(np.float64) ** 2).sum()))


def engine(model: onnx.ModelProto, compute_capability: str = "SM89") -> int:
    """Bytes of the engine that TensorRT-RTX builds; 0 where it refuses the graph."""
    trt = pytest.importorskip("tensorrt_rtx")

    class Quiet(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            pass

    logger = Quiet()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return 0
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, compute_capability), 0)
    plan = builder.build_serialized_network(network, config)
    return 0 if plan is None else int(plan.nbytes)


def lstm(direction: str, directions: int = 1) -> tuple[list[Any], dict[str, Any], Array]:
    """One layer of 64 inputs and 80 hidden units over 12 steps of one sequence."""
    weights = {"w": normal(directions, 320, 64), "r": normal(directions, 320, 80, scale=0.1)}
    layer = node("LSTM", "x w r", "y", hidden_size=80, direction=direction)
    return [layer], weights, RNG.normal(size=(12, 1, 64)).astype(np.float32)


def gru(direction: str, directions: int, before: int) -> tuple[list[Any], dict[str, Any], Array]:
    """As `lstm`; ``before``: linear_before_reset, as PyTorch has it."""
    weights = {"w": normal(directions, 240, 72), "r": normal(directions, 240, 80, scale=0.1), "b": normal(directions, 480)}
    layer = node("GRU", "x w r b", "y", hidden_size=80, direction=direction, linear_before_reset=before)
    return [layer], weights, RNG.normal(size=(12, 1, 72)).astype(np.float32)


TOKENS = RNG.integers(0, 500, (2, 6))
ROWS = RNG.normal(size=(2, 6, 256)).astype(np.float32)
#: name -> (nodes, weights, x)
LAYERS: dict[str, tuple[list[Any], dict[str, Any], Array]] = {
    "matmul": ([node("MatMul", "x w", "y")], {"w": normal(256, 128)}, ROWS),
    "left matmul": ([node("MatMul", "w x", "y")], {"w": normal(128, 256)}, ROWS.transpose(0, 2, 1).copy()),
    "gemm": ([node("Gemm", "x w b", "y")], {"w": normal(256, 128), "b": normal(128)}, ROWS[0]),
    "gemm transB": ([node("Gemm", "x w b", "y", transB=1)], {"w": normal(128, 256), "b": normal(128)}, ROWS[0]),
    "embedding": ([node("Gather", "t x", "y")], {"t": normal(500, 64)}, TOKENS),
    "embedding as torch indexes": (
        [node("Unsqueeze", "x axis", "i"), node("GatherND", "t i", "y")],
        {"t": np.random.default_rng(1).normal(0, 0.2, (500, 64)).astype(np.float32), "axis": np.array([-1])},
        TOKENS,
    ),
    "embedding and matmul": (
        [node("Gather", "t x", "e"), node("MatMul", "e w", "m"), node("Relu", "m", "y")],
        {"t": normal(500, 128), "w": normal(128, 256)},
        TOKENS,
    ),
    "lstm": lstm("forward"),
    "reverse lstm": lstm("reverse"),
    "bidirectional lstm": lstm("bidirectional", 2),
    "gru": gru("forward", 1, 1),
    "gru, reset first": gru("forward", 1, 0),
    "reverse gru": gru("reverse", 1, 1),
    "reverse gru, reset first": gru("reverse", 1, 0),
    "bidirectional gru": gru("bidirectional", 2, 1),
    "bidirectional gru, reset first": gru("bidirectional", 2, 0),
}
#: Those that blocks do not fit: the left matrix, a table of 64 columns, LSTM, GRU.
UNBLOCKED = {("left matmul", 64), ("left matmul", 128), ("embedding", 128), ("embedding as torch indexes", 128)}
UNBLOCKED |= {(name, block) for name in LAYERS if "lstm" in name or "gru" in name for block in (64, 128)}


def layer(name: str) -> tuple[onnx.ModelProto, Array]:
    nodes, weights, x = LAYERS[name]
    kind = TensorProto.INT64 if x.dtype == np.int64 else TensorProto.FLOAT
    return onnx.load_model_from_string(graph(nodes, weights, list(x.shape), kind)), x


@pytest.mark.parametrize(("bits", "block", "least"), [(8, 0, 39), (8, 64, 40), (4, 64, 17), (4, 128, 16)])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_alone_are_small_and_near(name: str, bits: int, block: int, least: float) -> None:
    model, x = layer(name)
    made, figures = weight_only(model, bits=bits, block=block)
    check(made)
    assert snr_db(run(model, x), run(made, x)) > least
    assert figures["bytes_after"] == made.ByteSize()
    bits = 8 if (name, block) in UNBLOCKED else bits
    assert {entry["form"].split(",")[0] for entry in figures["layers"]} == {f"int{bits}"}
    assert all(entry["snr_db"] > least for entry in figures["layers"])
    assert figures["bytes_after"] < (0.29 if bits == 8 else 0.19) * figures["bytes_before"]
    large = [int(np.prod(i.dims)) for i in model.graph.initializer if np.prod(i.dims) >= MIN_PARAMETERS]
    assert figures["parameters"] == sum(large)


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (8, 64), (4, 64), (4, 128)])
@pytest.mark.parametrize("name", LAYERS)
def test_tensorrt_builds_weights_alone_and_keeps_them_small(name: str, bits: int, block: int) -> None:
    """In float32 and in float16. Kernels weigh up to 450 kB, so the small matrices show nothing in the size."""
    model, x = layer(name)
    made, _ = weight_only(model, bits=bits, block=block)
    assert engine(made) > 0
    assert engine(to_fp16(made, activation_peaks(made, {"x": x}))) > 0


def test_the_engine_holds_the_small_weights() -> None:
    model = onnx.load_model_from_string(graph([node("MatMul", "x w", "y")], {"w": normal(1024, 1024)}, [1, 1024]))
    sizes = {(bits, block): engine(weight_only(model, bits=bits, block=block)[0]) for bits, block in ((8, 0), (4, 64))}
    assert 0 < sizes[8, 0] < 0.3 * 4 * 1024**2
    assert 0 < sizes[4, 64] < 0.18 * 4 * 1024**2


@pytest.mark.parametrize(
    ("nodes", "x"),
    [
        ([node("MatMul", "x w", "y")], [3, 200]),  # 64 does not divide 200
        ([node("MatMul", "w x", "y")], [128, 5]),  # the left matrix
        ([node("MatMul", "x w", "a"), node("MatMul", "w a", "y")], [128, 200]),  # both
        ([node("MatMul", "x w", "a"), node("Add", "w a", "y")], [200, 200]),  # a reader of another kind
    ],
)
def test_a_layer_that_cannot_have_blocks_gets_a_scale_per_channel(nodes: list[Any], x: list[int]) -> None:
    weight = normal(200, 128)
    model = onnx.load_model_from_string(graph(nodes, {"w": weight}, x))
    made, figures = weight_only(model, bits=4, block=64)
    assert figures["layers"][0]["form"] == "int8, a scale per channel"
    assert engine(made) > 0


def test_small_weights_and_activations_are_left_alone() -> None:
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a v", "b"), node("Add", "b c", "y")]
    model = onnx.load_model_from_string(
        graph(nodes, {"w": normal(256, 128), "v": normal(128, 8), "c": normal(8)}, list(ROWS.shape))
    )
    made, figures = weight_only(model, bits=8, block=0)
    assert [entry["tensor"] for entry in figures["layers"]] == ["w"]
    assert [n.op_type for n in made.graph.node] == ["DequantizeLinear", "MatMul", "MatMul", "Add"]
    assert [n.op_type for n in model.graph.node] == ["MatMul", "MatMul", "Add"]  # the given graph is untouched


def test_only_the_named_weights_become_small() -> None:
    model, x = layer("embedding and matmul")
    made, figures = weight_only(model, bits=8, block=0, only={"w"})
    assert [entry["tensor"] for entry in figures["layers"]] == ["w"]
    assert "t" in {tensor.name for tensor in made.graph.initializer}
    assert snr_db(run(model, x), run(made, x)) > 39
    with pytest.raises(GraphError, match="named"):
        weight_only(model, bits=8, block=0, only=("nothing",))


def test_weights_that_others_read_too_stay_one() -> None:
    """A table that is gathered, and multiplied with (tied weights), and read by the branches of an If."""
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [500, 64])
    branches = [helper.make_graph([helper.make_node(op, ["t"], ["z"])], op, [], [value]) for op in ("Neg", "Abs")]
    nodes = [
        node("Gather", "t x", "e"),
        helper.make_node("If", ["yes"], ["z"], then_branch=branches[0], else_branch=branches[1]),
        node("Add", "t z", "s"),
        node("Transpose", "s", "u"),
        node("MatMul", "e u", "y"),
    ]
    table = normal(500, 64)
    model = onnx.load_model_from_string(graph(nodes, {"t": table, "yes": np.array(False)}, [2, 6], TensorProto.INT64))
    made, figures = weight_only(model, bits=8, block=0)
    assert len(figures["layers"]) == 1
    assert "t" not in {i.name for i in made.graph.initializer}
    assert snr_db(run(model, TOKENS), run(made, TOKENS)) > 35


def test_int4_is_stored_as_onnx_says() -> None:
    weight = np.repeat(np.arange(-8, 8, dtype=np.float32), 16)[:, None] * np.linspace(1, 2, 65, dtype=np.float32)
    model = onnx.load_model_from_string(graph([node("MatMul", "x w", "y")], {"w": weight}, [1, 256]))
    made, figures = weight_only(model, bits=4, block=256)
    assert figures["layers"][0]["snr_db"] > 100  # sixteen values are all that int4 has
    stored = next(i for i in made.graph.initializer if i.data_type == TensorProto.INT4)
    assert set(numpy_helper.to_array(stored).astype(int).ravel()) == set(range(-8, 8))
    np.testing.assert_allclose(run(made, np.eye(1, 256, 3, dtype=np.float32)), weight[3:4], rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 0), (8, 32), (4, 32), (4, 128)]), st.floats(-4, 4))
def test_the_clip_is_never_worse_than_the_largest_value(seed: int, form: tuple[int, int], size: float) -> None:
    """Heavy tails, zeros, tiny and large weights: at most the error of the scale that spans them all."""
    random = np.random.default_rng(seed)
    weight = (random.standard_t(2, (128, 128)) * 10.0**size).astype(np.float32)
    weight[:, random.integers(128)] = 0
    bits, block = form
    model = onnx.load_model_from_string(graph([node("MatMul", "x w", "y")], {"w": weight}, [128, 128]))
    made, _ = weight_only(model, bits=bits, block=block)
    found = run(made, np.eye(128, dtype=np.float32))
    groups = weight.reshape(-1, block or 128, 128)
    scale = np.abs(groups).max(1, keepdims=True) / (127 if bits == 8 else 7)
    naive = (np.rint(groups / np.where(scale > 0, scale, 1)) * scale).reshape(128, 128)
    assert np.isfinite(found).all()
    assert ((found - weight) ** 2).sum() <= ((naive - weight) ** 2).sum() * (1 + 1e-3)


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        (lambda m: weight_only(m, bits=3, block=64), UsageError, "3 bits"),
        (lambda m: weight_only(m, bits=4, block=0), UsageError, "no format"),
        (lambda m: weight_only(m, bits=8, block=48), UsageError, "blocks of 48"),
    ],
)
def test_other_formats_are_refused(call: Callable[[Any], Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        call(layer("matmul")[0])


def test_what_cannot_be_made_small_says_so() -> None:
    tiny = onnx.load_model_from_string(graph([node("MatMul", "x w", "y")], {"w": normal(8, 8)}, [1, 8]))
    with pytest.raises(GraphError, match="no matrix"):
        weight_only(tiny, bits=8, block=0)
    broken = normal(256, 128)
    broken[3, 3] = np.nan
    model = onnx.load_model_from_string(graph([node("MatMul", "x w", "y")], {"w": broken}, list(ROWS.shape)))
    with pytest.raises(GraphError, match="NaN"):
        weight_only(model, bits=8, block=0)


def test_an_operator_that_changed_with_the_opset_is_converted() -> None:
    nodes = [
        node("MatMul", "x w", "m"),
        helper.make_node("Split", ["m"], ["a", "b"], axis=2),
        helper.make_node("Mul", ["a", "b"], ["y"]),
    ]
    model = onnx.load_model_from_string(graph(nodes, {"w": normal(256, 128)}, list(ROWS.shape)))
    made, _ = weight_only(model, bits=4, block=64)
    assert made.opset_import[0].version == 21
    assert snr_db(run(model, ROWS), run(made, ROWS)) > 14


IMAGE = RNG.normal(size=(2, 16, 9, 9)).astype(np.float32)
FP8: dict[str, tuple[list[Any], dict[str, Any], Array]] = {
    "conv": ([node("Conv", "x w b", "y", pads=[1] * 4)], {"w": normal(32, 16, 3, 3), "b": normal(32)}, IMAGE),
    "depthwise": ([node("Conv", "x w", "y", group=16)], {"w": normal(16, 1, 3, 3)}, IMAGE),
    "transposed conv": ([node("ConvTranspose", "x w", "y", strides=[2, 2])], {"w": normal(16, 16, 2, 2)}, IMAGE),
    "gemm": ([node("Gemm", "x w b", "y", transB=1)], {"w": normal(64, 256), "b": normal(64)}, ROWS[0]),
    "matmul": ([node("MatMul", "x w", "y")], {"w": normal(256, 64)}, ROWS),
    "left matmul": ([node("MatMul", "w x", "y")], {"w": normal(64, 256)}, ROWS.transpose(0, 2, 1).copy()),
    "shared": (
        [node("MatMul", "x w", "a"), node("Relu", "a", "r"), node("MatMul", "r w", "y")],
        {"w": normal(256, 256, scale=0.1)},
        ROWS,
    ),
}


def in_fp8(name: str, clip: float = 1.0) -> tuple[onnx.ModelProto, onnx.ModelProto, Array]:
    """(prepared graph, its fp8 form, x)."""
    nodes, weights, x = FP8[name]
    prepared = prepare(graph(nodes, weights, list(x.shape)))
    layers = place(prepared).layers
    exposed = onnx.ModelProto.FromString(prepared.SerializeToString())
    exposed.graph.output.extend(onnx.ValueInfoProto(name=layer.data) for layer in layers if layer.data != "x")
    seen = {"x": x, **Simulator(exposed)({"x": x})}
    amax = {layer.data: clip * float(np.abs(seen[layer.data]).max()) for layer in layers}
    return prepared, to_fp8(prepared, layers, amax), x


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_as_near_as_four_bits_of_precision_are(name: str) -> None:
    prepared, made, x = in_fp8(name)
    check(made)
    assert 24 < snr_db(run(prepared, x), run(made, x)) < 40
    stored = [i for i in made.graph.initializer if i.data_type == TensorProto.FLOAT8E4M3FN and i.dims]
    assert len(stored) == 1
    reads = {n.output[0]: n for n in made.graph.node}
    for n in made.graph.node:
        if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            assert [reads[i].op_type for i in n.input[:2]] == ["DequantizeLinear"] * 2
    peaks = activation_peaks(made, {"x": x})
    assert snr_db(run(made, x), run(to_fp16(made, peaks), x)) > 35


@pytest.mark.parametrize("name", FP8)
def test_tensorrt_builds_fp8_from_ada_on(name: str) -> None:
    _, made, x = in_fp8(name)
    assert engine(made) > 0
    assert engine(to_fp16(made, activation_peaks(made, {"x": x}))) > 0


def test_tensorrt_refuses_fp8_before_ada() -> None:
    assert engine(in_fp8("conv")[1], "SM86") == 0
    assert engine(in_fp8("conv")[0], "SM86") > 0


@pytest.mark.parametrize("exponent", [-60, 80])
@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 64)])
def test_weights_of_any_size_become_the_same_integers(bits: int, block: int, exponent: int) -> None:
    """1e-18 and 1e24, whose squares float32 does not hold."""
    weight = normal(256, 128)

    def stored(weights: Array) -> tuple[list[Array], float]:
        nodes = [node("MatMul", "x w", "y")]
        made, figures = weight_only(onnx.load_model_from_string(graph(nodes, {"w": weights}, [4, 256])), bits=bits, block=block)
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
        return [tensors[f"w/int{bits}"], tensors["w/scale"]], figures["layers"][0]["snr_db"]

    (integers, scales), snr = stored(weight)
    (same, moved), other = stored(np.ldexp(weight, exponent))
    np.testing.assert_array_equal(same, integers)
    np.testing.assert_array_equal(moved, np.ldexp(scales, exponent))
    assert other == snr
    assert (stored(np.full((256, 128), 1e-44, np.float32))[0][1] > 0).all()


@pytest.mark.parametrize("amax", [1e-44, 1e-25])
def test_fp8_scales_are_positive_for_the_smallest_ranges(amax: float) -> None:
    prepared = in_fp8("matmul")[0]
    made = to_fp8(prepared, place(prepared).layers, {"x": amax})
    scales = [numpy_helper.to_array(t) for t in made.graph.initializer if t.name.endswith("/scale")]
    assert scales
    assert min(float(scale.min()) for scale in scales) > np.finfo(np.float32).tiny


def test_fp8_saturates_at_the_stated_range() -> None:
    prepared, made, x = in_fp8("matmul", clip=0.5)
    limit = 0.5 * np.abs(x).max()
    weight = numpy_helper.to_array(prepared.graph.initializer[0])
    assert snr_db(np.clip(x, -limit, limit) @ weight, run(made, x)) > 24
    assert np.isfinite(run(made, 100 * x)).all()


def test_fp8_needs_a_range_for_every_tensor() -> None:
    prepared = in_fp8("shared")[0]
    layers = place(prepared).layers
    with pytest.raises(GraphError, match="range of 'r' is None"):
        to_fp8(prepared, layers, {"x": 4.0})
    with pytest.raises(GraphError, match="range of 'x' is nan"):
        to_fp8(prepared, layers, {"x": float("nan"), "r": 1.0})
    zero = to_fp8(prepared, layers[:1], {"x": 0.0})  # always zero: any scale will do
    assert np.isfinite(run(zero, ROWS)).all()
    assert [n.op_type for n in zero.graph.node].count("QuantizeLinear") == 1

"""What each layer costs alone: in one piece or in blocks, the figures of a graph in which nothing else is int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.quantization import sensitivity, streams
from edgekit.quantization.graph import Parameters, Quantizer
from edgekit.quantization.placement import place, weights_of
from edgekit.quantization.prepare import prepare
from edgekit.quantization.rounding import weight_scales
from edgekit.quantization.samples import Samples
from edgekit.quantization.sensitivity import Study, share_right
from edgekit.quantization.simulate import Simulator

Array = np.ndarray[Any, Any]


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), output.split(), name=f"{op}_{output.split()[0]}", **attributes)


def made(nodes: list[onnx.NodeProto], weights: dict[str, Any], x: list[Any], outputs: str) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)], values, tensors)
    return prepare(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString(),
    )


def knotted() -> onnx.ModelProto:
    """Residual branches, one of which waits for long; a product; MatMuls with biases; an early output; a sequence."""
    r = np.random.default_rng(0)
    weights: dict[str, Any] = {"rows": np.array([0, 8, -1]), "flat": np.array([0, -1]), "last": np.array(-1)}
    nodes, x = [], "x"

    def weight(name: str, *shape: int) -> str:
        weights[name] = r.normal(0, 1 / np.sqrt(np.prod(shape[1:]) if len(shape) == 4 else shape[0]), shape).astype(np.float32)
        return name

    for i in range(4):
        first = weight(f"w{i}", 8, 3 if i == 0 else 8, 3, 3)
        nodes += [
            node("Conv", f"{x} {first}", f"a{i}", pads=[1] * 4),
            node("Relu", f"a{i}", f"r{i}"),
            node("Conv", f"r{i} {weight(f'v{i}', 8, 8, 3, 3)}", f"c{i}", pads=[1] * 4),
            node("Add", f"c{i} a{i}", f"s{i}"),
        ]
        x = f"s{i}"
    nodes += [node("Conv", f"s3 {weight('z', 8, 8, 1, 1)}", "late"), node("GlobalAveragePool", "s1", "early")]
    nodes += [node("SplitToSequence", "s3", "q", axis=1), node("Reshape", "s3 rows", "m0")]
    for i in range(4):  # (n, 8, 36)
        weights[f"b{i}"] = r.normal(0, 0.1, 36).astype(np.float32)
        nodes += [
            node("MatMul", f"m{i} {weight(f'u{i}', 36, 36)}", f"p{i}"),
            node("Add", f"p{i} b{i}", f"o{i}"),
            node("Tanh", f"o{i}", f"m{i + 1}"),
        ]
    nodes += [
        node("Transpose", "m2", "k", perm=[0, 2, 1]),
        node("MatMul", "m4 k", "scores"),
        node("SequenceAt", "q last", "channel"),
        node("Add", "late channel", "sum"),
        node("Reshape", "sum flat", "f"),
        node("MatMul", f"f {weight('g', 288, 6)}", "h"),
        node("ReduceMean", "scores", "level", axes=[1, 2], keepdims=0),
        node("Unsqueeze", "level last", "column"),
        node("Add", "h column", "y"),
    ]
    weights["last"] = np.array([-1])
    nodes.insert(0, node("Squeeze", "last", "end"))
    next(n for n in nodes if n.op_type == "SequenceAt").input[1] = "end"
    return made(nodes, weights, ["n", 3, 6, 6], "y early")


def study(model: onnx.ModelProto, shape: tuple[int, ...], classes: int) -> tuple[Study, Parameters]:
    """A few batches of several sizes, as many labelled samples, scales by guess, and one shifted input."""
    placement, r = place(model), np.random.default_rng(1)
    batches = [{"x": r.normal(0, 1, (n, *shape)).astype(np.float32)} for n in (2, 1, 3)]
    run = Simulator(model)
    samples = [{"x": r.normal(0, 1, (1, *shape)).astype(np.float32)} for _ in range(40)]
    labels = np.array([next(iter(run(feeds).values())).argmax() for feeds in samples])
    labels[::5] = r.integers(0, classes, 8)  # the float graph is wrong at times
    labelled = Samples(tuple(map(str, range(40))), samples.__getitem__, True, labels)
    axes = {layer.name: layer.axis for layer in placement.layers}
    weights = {name: weight_scales(value, axes[name], "mse") for name, value in weights_of(model, placement).items()}
    quantizers = {}
    if placement.layers[1].op == "Conv":
        quantizers[placement.sites[placement.layers[1].data]] = Quantizer(0.03, np.linspace(0, 1, 8), np.linspace(1, 2, 8))
    parameters = Parameters(dict.fromkeys(placement.groups.values(), 0.06), weights, quantizers=quantizers)
    return Study(model, placement, [(feeds, run(feeds)) for feeds in batches], labelled), parameters


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes of each session that is made."""
    sizes: list[int] = []

    class Counted(Simulator):
        def __init__(self, model: onnx.ModelProto) -> None:
            sizes.append(len(model.graph.node))
            super().__init__(model)

    for room in (sensitivity, streams):
        monkeypatch.setattr(room, "Simulator", Counted)
    return sizes


@pytest.mark.parametrize("kept", [0, 8 << 20])
def test_blocks_give_the_figures_of_whole_graphs(monkeypatch: pytest.MonkeyPatch, built: list[int], kept: int) -> None:
    monkeypatch.setattr(streams, "KEPT_BYTES", kept)
    given, parameters = study(knotted(), (3, 6, 6), 6)
    whole = given.sensitivities(parameters)
    assert len(whole) == 15
    assert len({round(row.alone_db, 6) for row in whole if row.alone_db}) > 12  # no layer stands for another
    for row in whole:
        assert row.alone_db == pytest.approx(given.snr_db(parameters, [row.layer]), abs=0.01)
    assert len({row.drop for row in whole}) > 1
    built.clear()
    monkeypatch.setattr(sensitivity, "WHOLE", 0)
    found = given.sensitivities(parameters)
    assert sum(size < 12 for size in built) > 10  # it was cut indeed
    assert [row.layer for row in found] == [row.layer for row in whole]
    for one, other in zip(found, whole, strict=True):
        assert one.alone_db == pytest.approx(other.alone_db, abs=0.01), one.layer
        assert (one.layer_db, one.drop) == (other.layer_db, other.drop)


def chain(layers: int) -> onnx.ModelProto:
    """x (n, 8) -> MatMul - Tanh - Neg, again and again -> y (n, 8)."""
    r = np.random.default_rng(0)
    names = ["x", *(f"t{i}" for i in range(layers - 1)), "y"]
    nodes = []
    for i in range(layers):
        nodes += [
            node("MatMul", f"{names[i]} w{i}", f"m{i}"),
            node("Tanh", f"m{i}", f"n{i}"),
            node("Neg", f"n{i}", names[i + 1]),
        ]
    weights = {f"w{i}": np.linalg.qr(r.normal(size=(8, 8)))[0].astype(np.float32) * 1.5 for i in range(layers)}
    return made(nodes, weights, ["n", 8], "y")


def test_sessions_do_not_cost_the_square_of_the_depth(built: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "WHOLE", 1000)
    cost = []
    for layers in (40, 160):
        given, parameters = study(chain(layers), (8,), 8)
        built.clear()
        rows = given.sensitivities(parameters)
        cost.append(sum(built))
    assert cost[1] < 10 * cost[0]  # four times as deep, where all whole graphs would be 16 times as much
    assert cost[1] < 160 * 3 * 160 / 4
    for row in rows[::40]:
        assert row.alone_db == pytest.approx(given.snr_db(parameters, [row.layer]), abs=0.01)


def test_an_interrupted_study_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "WHOLE", 0)
    given, parameters = study(chain(12), (8,), 8)
    known: dict[str, dict[str, Array]] = {}
    left = [5]

    def recall(name: str, make: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        if name not in known:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            known[name] = make()
        return known[name]

    with pytest.raises(KeyboardInterrupt):
        given.sensitivities(parameters, recall=recall)
    left[0] = 7
    assert given.sensitivities(parameters, recall=recall) == given.sensitivities(parameters)
    assert left == [0]


def test_an_output_in_front_of_a_layer_does_not_hear_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are of the first output: layers behind it cost none, in blocks as in one piece."""
    model = chain(12)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("t3", "y"))
    given, parameters = study(model, (8,), 8)
    assert 0 < share_right(Simulator(model), given.labelled) < 1
    whole = given.sensitivities(parameters)
    monkeypatch.setattr(sensitivity, "WHOLE", 0)
    found = given.sensitivities(parameters)
    assert {row.drop for row in found[4:]} == {0.0}
    assert [row.drop for row in found] == [row.drop for row in whole]
    assert [row.alone_db for row in found] == pytest.approx([row.alone_db for row in whole], abs=0.01)

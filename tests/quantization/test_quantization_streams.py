"""A graph run stretch by stretch gives the tensors of the whole run, in any cuts, in memory and on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.graphs.editing import exposed
from edgekit.quantization import streams
from edgekit.quantization.graph import Parameters, insert
from edgekit.quantization.placement import place
from edgekit.quantization.prepare import prepare
from edgekit.quantization.rounding import weight_scales
from edgekit.quantization.simulate import Simulator
from edgekit.quantization.streams import Spool, Stream

Array = np.ndarray[Any, Any]


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), output.split(), name=f"{op}_{output.split()[0]}", **attributes)


def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [helper.make_empty_tensor_value_info(nodes[-1].output[0])])


def graph() -> onnx.ModelProto:
    """Convolutions, a residual branch, an If whose branches read early tensors and weights, a shape, a scalar flag."""
    r = np.random.default_rng(0)
    weights = {
        "w1": r.normal(0, 0.3, (6, 3, 3, 3)), "w2": r.normal(0, 0.2, (6, 6, 3, 3)), "w3": r.normal(0, 0.3, (6, 5)),
        "late": r.normal(0, 1, (1, 6, 1, 1)), "limit": np.array(0.0),
    }  # fmt: skip
    nodes = [
        node("Conv", "x w1", "a", pads=[1] * 4),
        node("Relu", "a", "r"),
        node("ReduceSum", "x", "total", keepdims=0),
        node("Greater", "total limit", "positive"),
        node("Conv", "r w2", "c", pads=[1] * 4),
        node("Add", "c r", "s"),
        node("Shape", "x", "n", end=1),
        node("If", "positive", "f", then_branch=branch("then", [node("Sub", "s a", "t1")]),
             else_branch=branch("else", [node("Mul", "a late", "e0"), node("Add", "e0 s", "e1")])),
        node("GlobalAveragePool", "f", "g"),
        node("Concat", "n minus", "rows", axis=0),
        node("Reshape", "g rows", "flat"),
        node("MatMul", "flat w3", "m"),
        node("Tanh", "m", "y"),
    ]  # fmt: skip
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([-1], np.int64), "minus"))
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        tensors,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return prepare(model.SerializeToString())


GRAPH = graph()
NAMES = [name for node in GRAPH.graph.node for name in node.output]
COUNT = len(GRAPH.graph.node)
#: Batches of other sizes and shapes; both branches of the If are taken.
BATCHES = [
    {"x": np.random.default_rng(i).normal(0.2 * (-1) ** i, 1, (1 + i % 2, 3, 5 + i, 6)).astype(np.float32)} for i in range(4)
]


def whole(model: onnx.ModelProto, names: list[str]) -> list[dict[str, Array]]:
    run = Simulator(exposed(model, names))
    return [run(feeds) for feeds in BATCHES]


def same(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def made_in(start: int, end: int) -> list[str]:
    return [name for node in GRAPH.graph.node[start:end] for name in node.output]


def alive_at(position: int) -> list[str]:
    """Tensors made before that a later node reads, inside of its branches too."""
    later = list(GRAPH.graph.node[position:])
    later += [inner for node in later for attribute in node.attribute for inner in attribute.g.node]
    read = {name for node in later for name in node.input}
    return [name for name in made_in(0, position) if name in read]


EXPECTED = whole(GRAPH, NAMES)
CUTS = st.lists(st.integers(0, COUNT), max_size=5)


def check_cuts(
    cuts: list[int], ahead: int, rewrite: streams.Rewrite, expected: list[dict[str, Array]]
) -> list[dict[str, Array]]:
    """Advance from cut to cut, look at what is held and at what comes; all that was seen."""
    seen: list[dict[str, Array]] = [{} for _ in BATCHES]
    with Stream(GRAPH, iter(BATCHES)) as stream:
        assert stream.count == len(BATCHES)
        for cut in [*cuts, COUNT]:
            end = max(min(cut + ahead, COUNT), stream.position)
            names = [*made_in(stream.position, end), *alive_at(stream.position)]
            for i, found in enumerate(stream.look(end, names, rewrite)):
                assert list(found) == names
                for name, array in found.items():
                    np.testing.assert_allclose(array, expected[i][name], rtol=1e-4, atol=1e-5, err_msg=name)
                    assert array.dtype == expected[i][name].dtype
                seen[i].update(found)
            stream.advance(cut, rewrite)
            assert stream.position == cut
    return seen


@settings(max_examples=40, deadline=None)
@given(CUTS.map(sorted), st.integers(0, COUNT))
def test_any_cuts_give_the_tensors_of_the_whole_run(cuts: list[int], ahead: int) -> None:
    check_cuts(cuts, ahead, same, EXPECTED)


@settings(max_examples=15, deadline=None)
@given(CUTS.map(sorted), st.integers(0, COUNT))
def test_disk_and_memory_give_the_same(cuts: list[int], ahead: int) -> None:
    kept = check_cuts(cuts, ahead, same, EXPECTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "KEPT_BYTES", 0)
        spooled = check_cuts(cuts, ahead, same, EXPECTED)
    for one, other in zip(kept, spooled, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


PLACEMENT = place(GRAPH)
PARAMETERS = Parameters(
    dict.fromkeys(PLACEMENT.groups.values(), 0.05),
    {
        layer.name: weight_scales(
            numpy_helper.to_array(next(t for t in GRAPH.graph.initializer if t.name == layer.weight)), layer.axis, "mse"
        )
        for layer in PLACEMENT.layers
    },
)


def quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    return insert(model, PLACEMENT, PARAMETERS, PLACEMENT.names)


QUANTIZED = whole(quantized(GRAPH), NAMES)


@settings(max_examples=20, deadline=None)
@given(CUTS.map(sorted))
def test_quantized_stretches_give_the_quantized_graph(cuts: list[int]) -> None:
    assert len(PLACEMENT.layers) == 3
    assert not np.allclose(QUANTIZED[0]["y"], EXPECTED[0]["y"], rtol=1e-4, atol=1e-5)
    check_cuts(cuts, COUNT, quantized, QUANTIZED)


def test_what_is_no_longer_read_is_let_go() -> None:
    with Stream(GRAPH, BATCHES) as stream:
        stream.advance(NAMES.index("f") + 1, same)
        with pytest.raises(KeyError):
            list(stream.look(stream.position, ["a"], same))
        (found, *_) = stream.look(stream.position, ["f"], same)
        assert set(found) == {"f"}


def test_going_back_does_nothing() -> None:
    with Stream(GRAPH, BATCHES) as stream:
        stream.advance(5, same)
        stream.advance(3, same)
        assert stream.position == 5


def test_nothing_stays_of_a_killed_process(tmp_path: Path) -> None:
    """Not even a name, which is there while the stream lives."""
    (tmp_path / "m.onnx").write_bytes(GRAPH.SerializeToString())
    folder = tmp_path / "temporary"
    folder.mkdir()
    code = f"""
import os, signal, numpy as np, onnx
from edgekit.quantization import streams
streams.KEPT_BYTES = 0
before = os.listdir({str(folder)!r})  # ONNX Runtime may leave a file of its own
stream = streams.Stream(onnx.load({str(tmp_path / "m.onnx")!r}), [{{"x": np.ones((8, 3, 64, 64), np.float32)}}])
stream.advance(4, lambda model: model)
print(before == os.listdir({str(folder)!r}), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "TMPDIR": str(folder)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "True\n"), killed.stderr
    assert not list(folder.glob("edgekit*"))


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The files of all spools, which keep nothing in memory; what was written to each is counted in ``written``."""
    monkeypatch.setattr(streams, "KEPT_BYTES", 0)
    made: list[Any] = []
    real = tempfile.TemporaryFile

    class Counting:
        def __init__(self, **options: Any) -> None:
            self.file, self.written = real(**options), 0
            made.append(self)

        def write(self, data: Any) -> int:
            self.written += memoryview(data).nbytes
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(tempfile, "TemporaryFile", Counting)
    return made


def test_the_file_is_closed_whatever_happens(files: list[Any]) -> None:
    with Stream(GRAPH, BATCHES) as stream:
        stream.advance(4, same)
    with pytest.raises(RuntimeError, match="stop"), Stream(GRAPH, BATCHES):
        raise RuntimeError("stop")

    def damaged() -> Iterator[dict[str, Array]]:
        yield BATCHES[0]
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        Stream(GRAPH, damaged())
    assert [file.closed for file in files] == [True] * 3
    assert all(file.written for file in files)


def chain(links: int) -> onnx.ModelProto:
    """x (n, 1, 64, 64) waits for the last node; in between, a tensor (n, 1, 8, 8) follows another."""
    nodes = [node("AveragePool", "x", "t0", kernel_shape=[8, 8], strides=[8, 8])]
    nodes += [node("Tanh", f"t{i}", f"t{i + 1}") for i in range(links)]
    nodes += [node("GlobalAveragePool", f"t{links}", "g"), node("Mul", "x g", "y")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1, 64, 64]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "g", values[:1], values[1:])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_each_tensor_is_written_once_and_its_space_used_again(files: list[Any]) -> None:
    """What waits long is not written anew for every layer on the way."""
    links, samples = 20, 3
    x, small = 4 * 64 * 64, 4 * 8 * 8
    with Stream(chain(links), ({"x": np.full((1, 1, 64, 64), i, np.float32)} for i in range(samples))) as stream:
        for end in range(1, links + 2):
            stream.advance(end, same)
        assert files[0].written == samples * (x + (links + 1) * small)
        assert files[0].seek(0, 2) <= samples * (x + 2 * small)
        found = [feeds["y"] for feeds in stream.look(links + 3, ["y"], same)]
    run = Simulator(chain(links))
    for i, array in enumerate(found):
        np.testing.assert_allclose(array, run({"x": np.full((1, 1, 64, 64), i, np.float32)})["y"], rtol=1e-6)


ARRAYS = [
    np.arange(1000, dtype=np.float32), np.array(3, np.int64), np.array([True, False]), np.zeros((0, 3), np.int8),
    np.asfortranarray(np.arange(600, dtype=np.float32).reshape(20, 30)), np.arange(64.0)[::2], np.array(["text"], object),
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0, 3000, 1 << 20]), st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 6)), max_size=60)
)
def test_a_spool_gives_what_was_put(kept: int, steps: list[tuple[bool, int, int]]) -> None:
    """Arrays of any type and layout, put and dropped in any order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "KEPT_BYTES", kept)
        spool, known = Spool(), dict[tuple[int, str], Array]()
        for step, (drop, index, which) in enumerate(steps):
            held = [name for i, name in known if i == index]
            if drop and held:
                name = held[which % len(held)]
                spool.drop(index, [name, "nobody"])
                del known[index, name]
            else:
                known[index, str(step)] = ARRAYS[which]
                spool.put(index, {str(step): ARRAYS[which]})
            for (i, name), array in known.items():
                np.testing.assert_array_equal(spool.get(i, [name, "nobody"])[name], array, strict=True)
        spool.close()


def test_a_long_graph_costs_its_length() -> None:
    """Which tensors are alive is known without a look at all nodes: at 4,000 of them that took 30 ms, for each layer."""
    links = 4000
    with Stream(chain(links), [{"x": np.ones((1, 1, 64, 64), np.float32)}]) as stream:
        begun = time.process_time()
        for end in range(1, 1001):
            stream.live(end)
        assert time.process_time() - begun < 5.0
        assert set(stream.live(links)) == {"x", f"t{links - 1}"}

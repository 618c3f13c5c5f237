"""A bundle's graph is looked at before ONNX Runtime parses it: operators by a list, and no weights outside of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.errors import BundleError
from edgekit.graphs import MICROSOFT_OPERATORS
from edgekit.graphs.editing import all_nodes
from edgekit.runtime import Model, check_golden
from edgekit.runtime.onnx_wire import survey
from edgekit.runtime.operators import MICROSOFT, STANDARD

N = helper.make_node
MS = "com.microsoft"
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1), helper.make_opsetid("shop", 1)]


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])


def model_of(
    *nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = (), functions: tuple[onnx.FunctionProto, ...] = ()
) -> onnx.ModelProto:
    """x float32 (2,) -> y float32 (2,)."""
    graph = helper.make_graph(list(nodes), "g", [value("x")], [value("y")], list(tensors))
    return helper.make_model(graph, opset_imports=OPSETS, functions=list(functions), ir_version=9)


def engine(out: str = "y") -> onnx.NodeProto:
    return N("EPContext", ["x"], [out], "engine", domain=MS, embed_mode=1, ep_cache_context=b"plan")


def within_if(node: onnx.NodeProto) -> onnx.ModelProto:
    branches = [helper.make_graph([n], n.op_type, [], [value(n.output[0])]) for n in (node, N("Relu", ["x"], ["other"]))]
    choice = N("If", ["c"], ["y"], "pick", then_branch=branches[0], else_branch=branches[1])
    return model_of(choice, tensors=(numpy_helper.from_array(np.array(True), "c"),))


def within_function(node: onnx.NodeProto) -> onnx.ModelProto:
    function = helper.make_function("shop", "Stage", ["x"], ["y"], [node], OPSETS)
    return model_of(N("Stage", ["x"], ["y"], "call", domain="shop"), functions=(function,))


def external(location: str = "weights.bin") -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def adding_external(location: str = "weights.bin") -> onnx.ModelProto:
    return model_of(N("Add", ["x", "w"], ["y"], "shift"), tensors=(external(location),))


def sparse_external() -> onnx.ModelProto:
    model = model_of(N("Relu", ["x"], ["y"]))
    model.graph.sparse_initializer.add().values.CopyFrom(external())
    return model


def bundle_of(folder: Path, tiny: Bundle, graph: bytes, **files: bytes) -> Bundle:
    """A bundle whose manifest fits a graph of any kind; its golden outputs are another model's."""
    with Bundle.create(folder / "made.edge") as draft:
        draft.write(FLOAT_GRAPH, graph)
        draft.write(GOLDEN, tiny.read(GOLDEN))
        for name, data in files.items():
            draft.write(name, data)
        draft.manifest = tiny.manifest
    return Bundle.open(folder / "made.edge")


def refusal(bundle: Bundle) -> BundleError:
    """Of all that runs a graph the same."""
    with pytest.raises(BundleError) as caught, Model.open(bundle):
        pass
    with pytest.raises(BundleError) as again:
        check_golden(bundle)
    assert str(again.value) == str(caught.value)
    return caught.value


def test_the_list_is_that_of_the_standard_and_of_the_importer():
    standard = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert standard == STANDARD, "another onnx: write its names into edgekit/runtime/operators.py"
    assert MICROSOFT == MICROSOFT_OPERATORS


@pytest.mark.parametrize(
    ("model", "named"),
    [
        pytest.param(model_of(engine()), "node engine is com.microsoft.EPContext, which carries", id="top"),
        pytest.param(within_if(engine("z")), "node engine is com.microsoft.EPContext, which carries", id="branch"),
        pytest.param(within_function(engine()), "node engine in function Stage is com.microsoft.EPContext", id="function"),
        pytest.param(model_of(N("Stamp", ["x"], ["y"], domain="shop")), "node y is shop.Stamp", id="custom"),
        pytest.param(within_if(N("Stamp", ["x"], ["z"], "s", domain="shop")), "node s is shop.Stamp", id="custom in branch"),
        pytest.param(model_of(N("FastGelu", ["x"], ["y"], "g", domain=MS)), "node g is com.microsoft.FastGelu", id="fused"),
        pytest.param(model_of(N("Affine", ["x"], ["y"], "a")), "node a is Affine", id="no standard"),
    ],
)
def test_a_node_beyond_the_list_is_named(tmp_path: Path, tiny_bundle: Bundle, model: onnx.ModelProto, named: str):
    error = refusal(bundle_of(tmp_path, tiny_bundle, model.SerializeToString()))
    assert named in error.message
    assert "list of operators" in error.message
    assert "edgekit import MODEL.onnx --out B" in error.hint


def test_a_function_does_not_hide_an_engine_behind_its_own_name(tmp_path: Path, tiny_bundle: Bundle):
    disguise = helper.make_function(MS, "EPContext", ["x"], ["y"], [N("Relu", ["x"], ["y"])], OPSETS)
    model = model_of(engine(), functions=(disguise,))
    assert "node engine is" in refusal(bundle_of(tmp_path, tiny_bundle, model.SerializeToString())).message


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_listed_operators_run(tmp_path: Path, tiny_bundle: Bundle, domain: str):
    scale = numpy_helper.from_array(np.float32(0.5), "s")
    zero = numpy_helper.from_array(np.int8(0), "z")
    nodes = [
        N("QuantizeLinear", ["x", "s", "z"], ["q"], domain=MS),
        N("DequantizeLinear", ["q", "s", "z"], ["f"], domain=MS),
        N("Half", ["f"], ["h"], domain="shop"),
        N("Neg", ["h"], ["y"], domain=domain),
    ]
    body = [N("Constant", [], ["two"], value_float=2.0), N("Div", ["a", "two"], ["b"])]
    half = helper.make_function("shop", "Half", ["a"], ["b"], body, OPSETS)
    model = model_of(*nodes, tensors=(scale, zero), functions=(half,))
    with Model.open(bundle_of(tmp_path, tiny_bundle, model.SerializeToString())) as opened:
        assert opened.run({"x": np.array([1.2, -3], np.float32)})["y"].tolist() == [-0.5, 1.5]


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (adding_external("../weights.bin"), "'w', read by node shift (Add), in another file, '../weights.bin'"),
        (adding_external("weights.bin"), "in another file, 'weights.bin'"),  # ONNX Runtime would look in the current folder
        (model_of(N("Constant", [], ["y"], "c", value=external())), "'w', read by node c (Constant), in another file"),
        (within_if(N("Constant", [], ["z"], "c", value=external())), "read by node c (Constant)"),
        (within_function(N("Constant", [], ["y"], "c", value=external())), "read by node c in function Stage (Constant)"),
        (sparse_external(), "'w' in another file"),
    ],
    ids=["outside of the bundle", "listed", "attribute", "branch", "function", "sparse"],
)
def test_weights_in_another_file_are_named(tmp_path: Path, tiny_bundle: Bundle, model: onnx.ModelProto, named: str):
    data = np.ones(2, np.float32).tobytes()
    (tmp_path / "weights.bin").write_bytes(data)
    error = refusal(bundle_of(tmp_path, tiny_bundle, model.SerializeToString(), **{"weights.bin": data}))
    assert named in error.message


def test_the_word_alone_is_no_reference(tmp_path: Path, tiny_bundle: Bundle):
    inside = numpy_helper.from_array(np.ones(2, np.float32), "location")
    model = model_of(N("Add", ["x", "location"], ["y"], name="location"), tensors=(inside,))
    model.metadata_props.add(key="location", value="Hall 3")
    with Model.open(bundle_of(tmp_path, tiny_bundle, model.SerializeToString())) as opened:
        assert opened.run({"x": np.zeros(2, np.float32)})["y"].tolist() == [1, 1]


@pytest.mark.parametrize("left", [1, 40, 5000])
def test_a_truncated_file_is_no_model(tmp_path: Path, tiny_bundle: Bundle, left: int):
    error = refusal(bundle_of(tmp_path, tiny_bundle, tiny_bundle.read(FLOAT_GRAPH)[:left]))
    assert "no whole ONNX file: it ends too early" in error.message


def test_the_runtimes_own_format_is_no_way_around(tmp_path: Path, tiny_bundle: Bundle):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(tiny_bundle.read(FLOAT_GRAPH), options, providers=["CPUExecutionProvider"])
    data = (tmp_path / "model.ort").read_bytes()
    assert ort.InferenceSession(data, providers=["CPUExecutionProvider"]).get_inputs()  # it takes such bytes for a model
    assert "own format" in refusal(bundle_of(tmp_path, tiny_bundle, data)).message


def asked(model: onnx.ModelProto) -> set[tuple[str, str]]:
    nodes = [node for part in (model.graph, *model.functions) for node in all_nodes(part)]
    return {(text(node.domain).replace("ai.onnx", ""), text(node.op_type)) for node in nodes}


def text(said: str | bytes) -> str:
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else said


def parsed(data: bytes) -> onnx.ModelProto | None:
    try:
        return onnx.load_model_from_string(data)
    except Exception:  # noqa: BLE001  protobuf raises types of its own
        return None


def number(value: int, longer: int = 0) -> bytes:
    """A varint of protobuf, with ``longer`` bytes more than it takes."""
    parts = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)] + [0] * longer
    return bytes([*(part | 0x80 for part in parts[:-1]), parts[-1]])


_GRAPH = model_of(engine()).graph.SerializeToString()
_KEY = 7 << 3 | 2  # of ModelProto.graph
_REST = model_of(N("Relu", ["x"], ["y"])).SerializeToString()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_REST + number(_KEY) + number(len(_GRAPH)) + _GRAPH, id="a second part"),
        pytest.param(number(_KEY, 3) + number(len(_GRAPH)) + _GRAPH + _REST, id="a long key"),
        pytest.param(number(_KEY) + number(len(_GRAPH), 2) + _GRAPH + _REST, id="a long length"),
        pytest.param(number(_KEY | 1 << 32) + number(len(_GRAPH)) + _GRAPH + _REST, id="a key beyond 32 bits"),
        pytest.param(_REST + number(99 << 3 | 3) + number(99 << 3 | 4), id="a group"),
        pytest.param(_REST + number(99 << 3 | 2) + b"\x80" * 5000 + b"\1", id="an endless number"),
    ],
)
def test_odd_spellings_hide_nothing(tmp_path: Path, tiny_bundle: Bundle, data: bytes):
    assert "import the model anew" in refusal(bundle_of(tmp_path, tiny_bundle, data)).hint


def test_of_two_names_the_last_counts(tmp_path: Path, tiny_bundle: Bundle):
    """As protobuf has it: an operator cannot be said twice, once for each reader."""
    node = N("Relu", ["x"], ["y"], "twice").SerializeToString() + engine().SerializeToString()
    graph = number(1 << 3 | 2) + number(len(node)) + node
    model = _REST + number(_KEY) + number(len(graph)) + graph
    assert parsed(model).graph.node[1].op_type == "EPContext"
    assert "com.microsoft.EPContext" in refusal(bundle_of(tmp_path, tiny_bundle, model)).message


MAKERS: list[Callable[[onnx.NodeProto], onnx.ModelProto]] = [model_of, within_if, within_function]


@given(st.sampled_from(MAKERS), st.binary(max_size=12), st.integers(0, 400), st.integers(0, 4))
def test_what_protobuf_reads_is_seen(make: Callable[..., onnx.ModelProto], noise: bytes, at: int, cut: int):
    """Of damaged bytes, too: whatever onnx's parser makes of them is found, or the file is refused."""
    data = make(engine()).SerializeToString()
    data = data[:at] + noise + data[at + cut :]
    try:
        found = survey(data)
    except ValueError:
        return
    model = parsed(data)
    assert model is None or asked(model) <= set(found.operators)


def test_every_command_that_runs_a_graph_looks_first(tmp_path: Path, tiny_bundle: Bundle, cli: Callable[..., Any]):
    bundle = bundle_of(tmp_path, tiny_bundle, model_of(engine()).SerializeToString()).path
    root, pack = tmp_path / "root", tmp_path / "made.zip"
    assert cli("pack", bundle, "--out", pack).code == 0
    for command in (
        ("compare", bundle),
        ("bench", bundle, "--seconds", "0.1"),
        ("bench", bundle, "--layers", "--seconds", "0.1"),
        ("install", pack, "--root", root, "--unsigned"),
    ):
        done = cli(*command)
        assert done.code == 1, command
        assert "node engine is com.microsoft.EPContext" in done.err, command
    assert not (root / "current").exists()


def test_an_import_names_the_node_before_it_follows_paths(tmp_path: Path, cli: Callable[..., Any]):
    model = within_function(engine())
    model.graph.initializer.append(external("absent.bin"))
    onnx.save(model, tmp_path / "m.onnx")
    done = cli("import", tmp_path / "m.onnx", "--out", tmp_path / "out.edge", "--json")
    assert "com.microsoft.EPContext (engine in function Stage)" in done.json["error"]
    assert "compiled engine" in done.json["hint"]
    assert not (tmp_path / "out.edge").exists()

"""Weights outside the graph's file are noticed without an onnx library, wherever in the model they hide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, Bundle
from edgekit.errors import BundleError
from edgekit.runtime import Model
from edgekit.runtime.onnx_wire import holds_external_data


def external(name: str = "w", location: str = "weights.bin") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def graph_with(*nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = ()) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(list(nodes), "g", [], [], list(tensors)))


def in_attribute() -> onnx.ModelProto:
    return graph_with(helper.make_node("Constant", [], ["c"], value=external()))


def in_branch() -> onnx.ModelProto:
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=external())], "then", [], [])
    return graph_with(helper.make_node("If", ["b"], ["y"], then_branch=inner, else_branch=helper.make_graph([], "e", [], [])))


def in_function() -> onnx.ModelProto:
    model = graph_with()
    node = helper.make_node("Constant", [], ["c"], value=external())
    model.functions.append(helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 17)]))
    return model


def in_sparse() -> onnx.ModelProto:
    model = graph_with()
    model.graph.sparse_initializer.add().values.CopyFrom(external())
    return model


@pytest.mark.parametrize("make", [lambda: graph_with(tensors=(external(),)), in_attribute, in_branch, in_function, in_sparse])
def test_external_data_is_found_everywhere(make):
    assert holds_external_data(make().SerializeToString())


def test_the_word_alone_is_no_reference():
    inside = numpy_helper.from_array(np.ones(1, np.float32), "location")
    model = graph_with(helper.make_node("Relu", ["location"], ["y"], name="location"), tensors=(inside,))
    model.metadata_props.add(key="location", value="Hall 3")
    assert b"location" in model.SerializeToString()
    assert not holds_external_data(model.SerializeToString())


@given(st.binary(max_size=60), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_never_raise(noise: bytes, at: int):
    data = graph_with(tensors=(external(),)).SerializeToString()
    assert holds_external_data(data[:at] + noise + data[at:]) in (True, False)
    assert holds_external_data(noise + b"location") in (True, False)


@pytest.mark.parametrize("location", ["../secret.bin", "inside.bin"])
def test_a_bundle_never_reads_weights_that_no_hash_covers(tmp_path: Path, tiny_bundle: Bundle, location: str):
    model = onnx.load_from_string(tiny_bundle.read(FLOAT_GRAPH))
    bias = next(t for t in model.graph.initializer if t.name == "b")
    (tmp_path / "secret.bin").write_bytes(bias.raw_data)
    moved = external("b", location)
    moved.dims[:] = bias.dims
    bias.CopyFrom(moved)
    with Bundle.create(tmp_path / "bad.edge") as draft:
        draft.write(FLOAT_GRAPH, model.SerializeToString())
        draft.write("inside.bin", (tmp_path / "secret.bin").read_bytes())
        draft.manifest = tiny_bundle.manifest
    with pytest.raises(BundleError, match="no hash covers"), Model.open(tmp_path / "bad.edge"):
        pass

"""What an import tries a foreign graph on: sizes that nobody states, inputs that leave it finite, types that numpy lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.compiler import build, foreign, import_onnx, passes, trials
from edgekit.compiler.reading import drop_unproven, read_model
from edgekit.errors import GraphError, InputError, UsageError
from edgekit.runtime import Model, check_golden
from edgekit.runtime.golden import load_golden

pytestmark = pytest.mark.usefixtures("in_process")

F = TensorProto.FLOAT
N = helper.make_node
V = helper.make_tensor_value_info


def saved(path: Path, nodes: list[Any], inputs: list[Any], y: Any, version: int = 19, **weights: Any) -> Path:
    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, [y], kept)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=9)
    path.write_bytes(made.SerializeToString())
    return path


def test_an_axis_of_zero_is_an_open_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", [N("Relu", ["x"], ["y"])], [V("x", F, [0, 3])], V("y", F, [0, 3]))
    bundle = import_onnx(path, out=tmp_path / "open.edge")
    assert bundle.manifest.inputs[0].shape == ("batch", 3)
    assert "input x states an axis of 0: it is taken for an open one" in bundle.manifest.history[-1].figures["notes"]
    fixed = import_onnx(path, out=tmp_path / "fixed.edge", shape="x:2x3")
    with Model.open(fixed.path) as model:
        assert model.run({"x": np.ones((2, 3), np.float32)})["y"].shape == (2, 3)


def stale(path: Path, **stated: Any) -> Path:
    """y: the number of rows of x, through a tensor z of which the file says what it was when it was traced."""
    nodes = [N("Relu", ["x"], ["z"]), N("Shape", ["z"], ["y"])]
    saved(path, nodes, [V("x", F, ["n", 8])], V("y", TensorProto.INT64, [2]))
    made = onnx.load_model(str(path))
    made.graph.value_info.append(V("z", F, stated["z"]))
    onnx.save(made, path)
    return path


def test_sizes_of_an_earlier_trace_are_left_out(tmp_path: Path) -> None:
    """ONNX Runtime itself folds Shape from them, so that no comparison would show it."""
    bundle = import_onnx(stale(tmp_path / "m.onnx", z=[4, 8]), out=tmp_path / "b.edge", dynamic="x:1..8x8")
    assert (
        "shapes that the file states for z contradict its inputs: they were left out"
        in bundle.manifest.history[-1].figures["notes"]
    )
    with Model.open(bundle.path) as model:
        for rows in (1, 2, 8):
            assert model.run({"x": np.zeros((rows, 8), np.float32)})["y"].tolist() == [rows, 8]


def test_sizes_that_follow_from_the_inputs_stay(tmp_path: Path) -> None:
    path = stale(tmp_path / "m.onnx", z=["n", 8])
    assert read_model(path).model.graph.value_info[0].name == "z"
    assert drop_unproven(onnx.load_model(str(path))) == (False, [])


def test_a_range_is_tried_at_both_ends(tmp_path: Path) -> None:
    """Four rows are baked into the graph: it runs at the range's middle only."""
    nodes = [N("Add", ["x", "w"], ["y"])]
    path = saved(tmp_path / "m.onnx", nodes, [V("x", F, ["n", 8])], V("y", F, ["n", 8]), w=np.ones((4, 8), np.float32))
    with pytest.raises(GraphError, match="does not run at n=8, which --dynamic states") as caught:
        import_onnx(path, out=tmp_path / "b.edge", dynamic="x:1..8x8")
    assert "--shape" in caught.value.hint
    import_onnx(path, out=tmp_path / "c.edge", shape="x:4x8")


def test_a_range_is_tried_at_its_lower_end(tmp_path: Path) -> None:
    kernel = np.ones((2, 2, 3), np.float32)
    path = saved(tmp_path / "m.onnx", [N("Conv", ["x", "w"], ["y"])], [V("x", F, [1, 2, "t"])], V("y", F, None), w=kernel)
    with pytest.raises(GraphError, match="does not run at t=2, which"):
        import_onnx(path, out=tmp_path / "b.edge", dynamic="x:1x2x2..9")
    import_onnx(path, out=tmp_path / "c.edge", dynamic="x:1x2x3..9")


def test_ends_are_held_against_the_rewritten_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is right at the size of the golden inputs, and wrong at another one."""
    path = saved(tmp_path / "m.onnx", [N("Relu", ["x"], ["y"])], [V("x", F, ["n", 4])], V("y", F, ["n", 4]))

    def wrong(model: onnx.ModelProto) -> tuple[bool, list[str]]:
        model.graph.node[0].input[0] = "padded"
        whole = numpy_helper.from_array(np.array([0, 0, 4, 0]), "sizes")  # of the trials: four rows
        model.graph.initializer.append(whole)
        model.graph.node.insert(0, N("Slice", ["x", "from", "to"], ["padded"]))
        model.graph.initializer.extend(
            [numpy_helper.from_array(np.array([0]), "from"), numpy_helper.from_array(np.array([4]), "to")]
        )
        return True, []

    monkeypatch.setattr(passes, "simplify", wrong)
    request = {"model": str(path), "shape": {}, "dynamic": {"x": [[1, 8], [4, 4]]}}
    notes = foreign.import_graph(request, tmp_path)["notes"]
    assert any(note.startswith("kept as it was: ") for note in notes)


def test_what_is_too_large_to_try_is_noted(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", [N("Relu", ["x"], ["y"])], [V("x", F, ["n", 4])], V("y", F, ["n", 4]))
    notes = import_onnx(path, out=tmp_path / "b.edge", dynamic="x:1..2000000x4").manifest.history[-1].figures["notes"]
    assert "not tried at n=2000000: too large for an import" in notes


def test_a_stated_range_is_not_blamed_for_a_batch_that_nobody_stated(tmp_path: Path) -> None:
    nodes = [
        N("Concat", ["x", "w"], ["c"], axis=0),
        N("Reshape", ["c", "s"], ["y"]),
        N("Relu", ["t"], ["u"]),
        N("Neg", ["k"], ["l"]),
    ]
    weights = {"w": np.ones((4, 8), np.float32), "s": np.array([8, 8])}
    inputs = [V("x", F, ["n", 8]), V("t", F, [1, "t"]), V("k", F, ["k", 2])]
    path = saved(tmp_path / "m.onnx", nodes, inputs, V("y", F, [8, 8]), **weights)
    made = onnx.load_model(str(path))
    made.graph.output.extend([V("u", F, [1, "t"]), V("l", F, ["k", 2])])
    onnx.save(made, path)
    bundle = import_onnx(path, out=tmp_path / "b.edge", dynamic="t:1x2..16")
    assert [spec.shape for spec in bundle.manifest.inputs] == [(4, 8), (1, "t"), ("k", 2)]


def test_a_batch_that_is_baked_in_is_fixed(tmp_path: Path) -> None:
    nodes = [N("Concat", ["x", "w"], ["c"], axis=0), N("Reshape", ["c", "s"], ["y"])]
    weights = {"w": np.ones((4, 8), np.float32), "s": np.array([8, 8])}
    path = saved(tmp_path / "m.onnx", nodes, [V("x", F, ["n", 8])], V("y", F, [8, 8]), **weights)
    bundle = import_onnx(path, out=tmp_path / "b.edge")
    assert bundle.manifest.inputs[0].shape == (4, 8)
    (note,) = bundle.manifest.history[-1].figures["notes"]
    assert note == "it does not run with one sample: n=4 is fixed; state where it runs by --dynamic"


def test_a_graph_that_takes_one_sample_only_says_so(tmp_path: Path) -> None:
    nodes = [N("Reshape", ["x", "s"], ["y"])]
    path = saved(tmp_path / "m.onnx", nodes, [V("x", F, ["n", 8])], V("y", F, [1, 8]), s=np.array([1, 8]))
    bundle = import_onnx(path, out=tmp_path / "b.edge")
    assert bundle.manifest.inputs[0].shape == (1, 8)
    (note,) = bundle.manifest.history[-1].figures["notes"]
    assert note == "it runs with one sample only: n=1 is fixed; state where it runs by --dynamic"


def test_an_input_that_decides_nothing_is_noted(tmp_path: Path) -> None:
    inputs = [V("x", F, [4]), V("rate", TensorProto.INT64, [1])]
    path = saved(tmp_path / "m.onnx", [N("Relu", ["x"], ["y"])], inputs, V("y", F, [4]))
    (note,) = import_onnx(path, out=tmp_path / "b.edge").manifest.history[-1].figures["notes"]
    assert note.startswith("nothing reads rate: ")


def test_nameless_first_axes_of_different_sizes_are_no_batch(tmp_path: Path) -> None:
    inputs = [V("a", F, [None, 3]), V("b", F, [None, 3])]
    path = saved(tmp_path / "m.onnx", [N("Gemm", ["a", "b"], ["y"], transB=1)], inputs, V("y", F, [None, None]))
    bundle = import_onnx(path, out=tmp_path / "b.edge", shape=["a:2x3", "b:5x3"])
    assert [spec.shape for spec in bundle.manifest.inputs] == [(2, 3), (5, 3)]
    ranged = import_onnx(path, out=tmp_path / "c.edge", dynamic=["a:1..2x3", "b:1..5x3"])
    assert [spec.shape for spec in ranged.manifest.inputs] == [("a_0", 3), ("b_0", 3)]


def test_files_behind_symbolic_links_are_told_how_to_copy(tmp_path: Path) -> None:
    """As a cache of downloads lays them out: names are links into a folder of blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "names").mkdir()
    path = saved(
        tmp_path / "blobs/m.onnx", [N("Add", ["x", "w"], ["y"])], [V("x", F, [4])], V("y", F, [4]), w=np.ones(4, np.float32)
    )
    made = onnx.load_model(str(path))
    onnx.save(made, path, save_as_external_data=True, location="m.bin", size_threshold=0)
    for real, name in (("m.onnx", "model.onnx"), ("m.bin", "m.bin")):
        (tmp_path / "names" / name).symlink_to(tmp_path / "blobs" / real)
    with pytest.raises(GraphError, match=r"'m\.bin' is a symbolic link") as caught:
        import_onnx(tmp_path / "names/model.onnx", out=tmp_path / "b.edge")
    assert f"cp -L {tmp_path}/names/* FOLDER" in caught.value.hint


def test_infinities_of_a_mask_are_golden(tmp_path: Path) -> None:
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    path = saved(tmp_path / "m.onnx", [N("Add", ["x", "mask"], ["y"])], [V("x", F, [4, 4])], V("y", F, [4, 4]), mask=mask)
    bundle = import_onnx(path, out=tmp_path / "b.edge")
    assert np.array_equal(np.isinf(load_golden(bundle)[1]["y"]), mask < 0)
    assert check_golden(bundle).relative == 0


def test_finite_inputs_go_before_infinite_ones(tmp_path: Path) -> None:
    """The logarithm of a normal number is NaN now and then, that of a rounded one often -inf; of 1..2 it is neither."""
    nodes = [N("Floor", ["x"], ["f"]), N("Log", ["f"], ["y"])]
    bundle = import_onnx(saved(tmp_path / "m.onnx", nodes, [V("x", F, [4, 9])], V("y", F, [4, 9])), out=tmp_path / "b.edge")
    assert np.isfinite(load_golden(bundle)[1]["y"]).all()


def test_a_nan_is_never_golden(tmp_path: Path) -> None:
    bad = np.where(np.eye(4, dtype=bool), np.nan, 1).astype(np.float32)
    path = saved(tmp_path / "m.onnx", [N("Add", ["x", "bad"], ["y"])], [V("x", F, [4, 4])], V("y", F, [4, 4]), bad=bad)
    with pytest.raises(GraphError, match="not finite"):
        import_onnx(path, out=tmp_path / "b.edge")


def test_every_seed_must_stay_finite() -> None:
    class Run:
        calls = 0

        def get_outputs(self) -> list[Any]:
            return [onnx.ValueInfoProto(name="y")]

        def run(self, names: list[str], feeds: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
            self.calls += 1
            return [np.full(1, np.inf if self.calls == 2 else 1, np.float32)]  # the second seed of the first kind

    made = helper.make_model(helper.make_graph([], "g", [V("x", F, [1, 2])], []))
    run = Run()
    trials.trial_feeds(run, made, {}, [])
    assert run.calls > 4


def test_float8_at_the_border_is_float32_and_builds(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    kind = TensorProto.FLOAT8E4M3FN
    path = saved(
        tmp_path / "m.onnx",
        [N("DequantizeLinear", ["x", "s"], ["y"])],
        [V("x", kind, [4])],
        V("y", F, [4]),
        s=np.float32(2),
    )
    bundle = import_onnx(path, out=tmp_path / "b.edge")
    assert bundle.manifest.inputs[0].dtype == "float32"
    with Model.open(bundle.path) as model:
        found = model.run({"x": np.array([0.5, 1, -448, 3], np.float32)})["y"]
    assert found.tolist() == [1, 2, -896, 6]
    assert build(bundle, target="rtx-ada", precision="fp32").engine is not None


def test_an_input_that_decides_shapes_is_named_at_build(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = saved(
        tmp_path / "m.onnx",
        [N("ConstantOfShape", ["dims"], ["y"])],
        [V("dims", TensorProto.INT64, [3])],
        V("y", F, [None, None, None]),
    )
    bundle = import_onnx(path, out=tmp_path / "b.edge")
    with pytest.raises(GraphError, match="dims decides shapes") as caught:
        build(bundle, target="rtx-ada", precision="fp32")
    assert "--constant dims:" in caught.value.hint


def test_what_rtx_alone_does_not_build_is_noted_so(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.onnx", [N("NonZero", ["x"], ["y"], name="nz")], [V("x", F, [2, 4])], V("y", TensorProto.INT64, None)
    )
    notes = import_onnx(path, out=tmp_path / "b.edge").manifest.history[-1].figures["notes"]
    assert "TensorRT-RTX does not build NonZero (nz); ONNX Runtime runs it" in notes


def test_what_tensorrt_does_not_build_is_noted(tmp_path: Path) -> None:
    node = N("ScatterND", ["x", "i", "u"], ["y"], name="s", reduction="add")
    ends: dict[str, Any] = {"i": np.zeros((1, 1), np.int64), "u": np.ones((1, 4), np.float32)}
    path = saved(tmp_path / "m.onnx", [node], [V("x", F, [2, 4])], V("y", F, [2, 4]), **ends)
    notes = import_onnx(path, out=tmp_path / "b.edge").manifest.history[-1].figures["notes"]
    assert "TensorRT does not build ScatterND (s, reduction='add'); ONNX Runtime runs it" in notes


@pytest.mark.parametrize(
    ("x", "stated", "shape"),
    [(["n", 3], ["n", 4], ("n", 3)), ([2, 3], [2, 4], (2, "y_1")), (["n", 3], ["n", 3, 1], ("y_0", "y_1"))],
)
def test_an_output_that_a_file_states_wrongly_is_open(
    tmp_path: Path, x: list[Any], stated: list[Any], shape: tuple[Any, ...]
) -> None:
    path = saved(tmp_path / "m.onnx", [N("Relu", ["x"], ["y"])], [V("x", F, x)], V("y", F, stated))
    assert import_onnx(path, out=tmp_path / "b.edge").manifest.outputs[0].shape == shape


def test_an_output_of_another_type_than_its_node_makes_is_refused(tmp_path: Path) -> None:
    """ONNX's evaluator would run it, and no backend."""
    path = saved(tmp_path / "m.onnx", [N("Relu", ["x"], ["y"], "r")], [V("x", F, [3])], V("y", TensorProto.INT64, [3]))
    with pytest.raises(GraphError, match=r"node r \(Relu\): Inferred elem type differs"):
        import_onnx(path, out=tmp_path / "b.edge")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (V("x", TensorProto.STRING, [4]), "tensor of STRING"),
        (V("x", TensorProto.COMPLEX64, [4]), "tensor of COMPLEX64"),
        (helper.make_value_info("x", helper.make_sequence_type_proto(helper.make_tensor_type_proto(F, [4]))), "sequence"),
    ],
)
def test_a_border_of_no_numbers_says_what_it_holds(tmp_path: Path, value: Any, what: str) -> None:
    path = saved(tmp_path / "m.onnx", [N("Identity", ["x"], ["y"])], [value], V("y", F, [4]))
    with pytest.raises(GraphError, match=f"that numpy has: {what}"):
        import_onnx(path, out=tmp_path / "b.edge")


def test_shapes_may_be_stated_as_in_python(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", [N("Relu", ["x"], ["y"])], [V("x", F, ["n", "m"])], V("y", F, ["n", "m"]))
    assert import_onnx(path, out=tmp_path / "f.edge", shape={"x": (2, 8)}).manifest.inputs[0].shape == (2, 8)
    ranged = import_onnx(path, out=tmp_path / "d.edge", dynamic={"x": ("1..4", 8)})
    assert ranged.manifest.history[-1].config["dynamic"] == {"x": "1..4x8"}


def test_the_api_tells_what_it_takes(tmp_path: Path, tiny_bundle: Any) -> None:
    for options in ({"target": None}, {"target": "rtx-ada", "workspace_mb": 1.5}, {"target": "rtx-ada", "workspace_mb": "64"}):
        with pytest.raises(UsageError):
            build(tiny_bundle, **options)
    with Model.open(tiny_bundle) as model, pytest.raises(InputError, match="a mapping was expected"):
        model.run(np.zeros((1, 3, 32, 32), np.float32))  # type: ignore[arg-type]


def test_a_scan_over_open_steps_keeps_the_sizes_of_its_inputs(tmp_path: Path) -> None:
    """Written out, the loop leaves nothing of its inputs' shapes in the graph that the sizes could be read from."""
    body = helper.make_graph(
        [N("Add", ["sum", "step"], ["next"]), N("Identity", ["next"], ["out"])],
        "body",
        [V("sum", F, [2]), V("step", F, [2])],
        [V("next", F, [2]), V("out", F, [2])],
    )
    scan = N("Scan", ["first", "x"], ["last", "y"], num_scan_inputs=1, body=body)
    path = saved(tmp_path / "m.onnx", [scan], [V("first", F, [2]), V("x", F, [3, 2])], V("y", F, [3, 2]))
    bundle = import_onnx(path, out=tmp_path / "b.edge")
    with Model.open(bundle.path) as model:
        found = model.run({"first": np.zeros(2, np.float32), "x": np.ones((3, 2), np.float32)})["y"]
    assert found.tolist() == [[1, 1], [2, 2], [3, 3]]

"""`edgekit import`: hostile and damaged files, a child that dies, what the command says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgekit.bundle import Bundle
from edgekit.compiler import child, import_onnx
from edgekit.compiler.passes import fold_constants
from edgekit.compiler.reading import check_model, read_model
from edgekit.compiler.shapes import profiles_for
from edgekit.errors import BundleError, EdgekitError, GraphError, OutputExists, UsageError
from edgekit.runtime import check_golden

from .foreign_files import F, N, model, pooled, saved, shaped_reshape

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.mark.parametrize(
    ("shape", "why"),
    [("x:1x3x32", "4 axes"), ("x:1x3x64x64", "fixed at 32"), ("x:1x3x32x32 ", "not an axis"), ("nonsense", "no input")],
)
def test_a_shape_that_does_not_fit_leaves_nothing(tiny_onnx: Path, tmp_path: Path, shape: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        import_onnx(tiny_onnx, out=tmp_path / "b.edge", shape=[shape])
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.onnx"]


def test_external_data_inside_the_folder_is_taken_in(tmp_path: Path) -> None:
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((4, 2), np.float32)}, y=["n", 2])
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    assert (tmp_path / "m.bin").exists()
    bundle = import_onnx(tmp_path / "m.onnx", out=tmp_path / "b.edge")
    (tmp_path / "m.bin").unlink()
    assert check_golden(Bundle.open(bundle.path)).relative == 0


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link.bin", "missing.bin", "sub/../../secret.bin"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(32))
    os.symlink(tmp_path / "secret.bin", folder / "link.bin")
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((4, 2), np.float32)}, y=["n", 2])
    weight = made.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    with pytest.raises(GraphError, match=r"outside the model's folder|missing|is a symbolic link"):
        import_onnx(saved(folder / "m.onnx", made), out=tmp_path / "b.edge")
    assert not (tmp_path / "b.edge").exists()


def test_external_data_shorter_than_stated_is_refused(tmp_path: Path) -> None:
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((4, 2), np.float32)}, y=["n", 2])
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    (tmp_path / "m.bin").write_bytes(b"\0\0")
    with pytest.raises(GraphError):
        import_onnx(tmp_path / "m.onnx", out=tmp_path / "b.edge")


SEQUENCE = helper.make_value_info("x", helper.make_sequence_type_proto(helper.make_tensor_type_proto(F, [4])))


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (model([N("Fast", ["x"], ["y"], domain="com.acme", name="f1")], y=["n", 4]), r"com\.acme\.Fast \(f1\)"),
        (model([N("Fost", ["x"], ["y"], name="f2")], y=["n", 4]), r"Fost \(f2\)"),
        (model([N("Relu", ["z"], ["y"])], y=["n", 4]), r"node y \(Relu\) reads 'z', which nothing makes"),
        (model([N("RandomNormalLike", ["x"], ["y"])], y=["n", 4]), "other outputs on the same inputs"),
        (
            model([N("SequenceLength", ["x"], ["y"])], y=[], y_type=TensorProto.INT64, inputs=[SEQUENCE]),
            "input x is not a tensor",
        ),
        (model([N("Div", ["o", "o"], ["q"]), N("Add", ["x", "q"], ["y"])], {"o": np.float32(0)}, y=["n", 4]), "not finite"),
    ],
)
def test_what_cannot_be_taken_is_named(tmp_path: Path, made: onnx.ModelProto, why: str) -> None:
    with pytest.raises(GraphError, match=why):
        import_onnx(saved(tmp_path / "m.onnx", made), out=tmp_path / "b.edge")
    assert not (tmp_path / "b.edge").exists()


@pytest.mark.child
def test_a_constant_bomb_is_not_unfolded(tmp_path: Path) -> None:
    made = model([helper.make_node("ConstantOfShape", ["big"], ["c"]), helper.make_node("ReduceMax", ["c"], ["m"], keepdims=0),
                  helper.make_node("Add", ["x", "m"], ["y"])], {"big": np.array([1 << 20, 1 << 20])}, y=["n", 4])  # fmt: skip
    assert not fold_constants(made)
    with pytest.raises(GraphError):
        import_onnx(saved(tmp_path / "m.onnx", made), out=tmp_path / "b.edge", timeout_s=60)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.child
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut or flipped anywhere, reading a file ends in a model or in one `GraphError`."""
    whole = bytearray(shaped_reshape().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("f") / "m.onnx"
    path.write_bytes(bytes(whole[: data.draw(st.integers(1, len(whole)))]))
    message = ""
    try:
        check_model(read_model(path).model)
    except GraphError as error:
        message = error.message
    assert "\n" not in message


def test_a_name_that_is_no_text_is_damage(tmp_path: Path) -> None:
    """Protobuf gives it as bytes, and nothing that looks a name up takes these."""
    whole = shaped_reshape().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(whole.replace(b"Reshape", b"Resh\xffpe"))
    with pytest.raises(GraphError, match="is damaged"):
        read_model(tmp_path / "m.onnx")


@pytest.mark.child
def test_the_command_refuses_junk_in_a_few_lines(cli: Any, tmp_path: Path, tiny_onnx: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"\x08\x07not an onnx file" * 40)
    (tmp_path / "cut.onnx").write_bytes(tiny_onnx.read_bytes()[:5000])
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("junk", "cut", "empty"):
        done = cli("import", tmp_path / f"{name}.onnx", "--out", tmp_path / "b.edge")
        assert done.code == 1
        assert 1 <= len(done.err.strip().splitlines()) <= 4
        assert not (tmp_path / "b.edge").exists()
    assert cli("import", tmp_path / "none.onnx", "--out", tmp_path / "b.edge").code == 2


def test_the_command_answers_json_and_overwrites_nothing(cli: Any, tmp_path: Path, tiny_onnx: Path) -> None:
    out = tmp_path / "b.edge"
    done = cli("import", tiny_onnx, "--out", out, "--shape", "x:1x3x32x32", "--json")
    assert done.code == 0
    assert done.json["bundle"] == str(out)
    assert done.json["inputs"] == {"x": "float32 1x3x32x32"}
    before = (out / "manifest.json").read_bytes()
    assert cli("import", tiny_onnx, "--out", out).code == 2
    assert (out / "manifest.json").read_bytes() == before
    with pytest.raises(OutputExists):
        import_onnx(tiny_onnx, out=out)


@pytest.mark.parametrize(
    ("script", "limit", "why"), [("kill -SEGV $$", 30, "crashed .SIGSEGV"), ("exec sleep 60", 0.3, "longer than 0.3 s")]
)
@pytest.mark.child
def test_a_crash_or_a_hang_of_the_child_is_one_error(
    tmp_path: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, script: str, limit: float, why: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(GraphError, match=why):
        import_onnx(tiny_onnx, out=tmp_path / "b.edge", timeout_s=limit)
    assert not (tmp_path / "b.edge").exists()


@pytest.mark.child
def test_errors_cross_from_the_child_as_they_are(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", model([helper.make_node("Relu", ["x"], ["y"])], y=["n", 4]))
    with pytest.raises(UsageError, match="no input 'z'") as caught:
        import_onnx(path, out=tmp_path / "b.edge", shape="z:1x9")
    assert "x (nx4)" in caught.value.hint
    with pytest.raises(EdgekitError, match="AttributeError"):
        child.call("foreign:no_such_function", {}, tmp_path, 30)


@pytest.mark.parametrize("hidden", ["onnx", "onnxruntime"])
@pytest.mark.child
def test_without_onnx_each_command_names_the_extra(tiny_bundle: Any, tiny_onnx: Path, tmp_path: Path, hidden: str) -> None:
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / f"{hidden}.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{hidden}'\", name='{hidden}')"
    )
    path = os.pathsep.join([str(tmp_path / "hide"), *(p for p in sys.path if p)])
    commands = [
        ["import", tiny_onnx, "--out", tmp_path / "i.edge"],
        ["quantize", tiny_bundle.path, "--out", tmp_path / "q.edge"],
    ]
    commands += [["build", tiny_bundle.path, "--target", "jetson-orin-nano"]]
    if hidden == "onnx":
        commands += [["inspect", tiny_bundle.path], ["estimate", tiny_bundle.path, "--target", "jetson-orin-nano"]]
    for command in commands:
        words = [sys.executable, "-c", "from edgekit.cli import main; main()", *map(str, command)]
        done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == 1, command
        assert f"needs the Python module '{hidden}'" in done.stderr, (command, done.stderr)
        assert "pip install 'edgekit[onnx]'" in done.stderr or (hidden, "edgekit[runtime]" in done.stderr) == (
            "onnxruntime",
            True,
        )
        assert "defect" not in done.stderr


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        ("axes:1,2", "1 axes|2 numbers were stated"),
        ("axes:one", "not a number"),
        ("axes:1.5", "int64"),
        ("shape:1", "no input 'shape'"),
        ("1", "no input name"),
    ],
)
def test_a_constant_that_does_not_fit_is_refused(tmp_path: Path, stated: str, why: str) -> None:
    path = saved(tmp_path / "pool.onnx", pooled())
    with pytest.raises(UsageError, match=why):
        import_onnx(path, out=tmp_path / "b.edge", constants=stated)
    with pytest.raises(UsageError, match="every input was made a constant"):
        import_onnx(path, out=tmp_path / "b.edge", constants={"axes": [1], "x": np.ones((2, 3, 4))})
    assert not (tmp_path / "b.edge").exists()


def test_sizes_of_a_damaged_history_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    path = saved(tmp_path / "m.onnx", model(nodes, x=["n", 3, "h"], y=["n", 3, "h"]))
    bundle = import_onnx(path, out=tmp_path / "b.edge")
    bundle.manifest.history[0].figures["sizes"]["h"] = "64"
    with pytest.raises(BundleError, match="sizes that no axis has"):
        profiles_for(bundle)

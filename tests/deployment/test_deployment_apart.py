"""A model that crashes or never answers where it is tried: the install fails, and what runs stays."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, Bundle
from edgekit.deployment import apart, install, pack, status
from edgekit.errors import BudgetNotMet, GoldenError
from edgekit.manifest import FORMAT, Manifest, TensorSpec, Tolerance
from edgekit.runtime.golden import save_golden


def endless_graph() -> bytes:
    """y = x, after 2**62 rounds of a loop."""
    info, axes = helper.make_tensor_value_info, ["n", 4]
    ends = [("go_on", TensorProto.BOOL, []), ("value", TensorProto.FLOAT, axes)]
    body = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in ends],
        "body",
        [info("round", TensorProto.INT64, []), *(info(*end) for end in ends)],
        [info(f"{name}_out", kind, shape) for name, kind, shape in ends],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["rounds", "begin", "x"], ["y"], body=body)],
        "endless",
        [info("x", TensorProto.FLOAT, axes)],
        [info("y", TensorProto.FLOAT, axes)],
        [numpy_helper.from_array(np.array(2**62), "rounds"), numpy_helper.from_array(np.array(True), "begin")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


@pytest.fixture
def endless(tmp_path: Path, keys: Any) -> Path:
    """A well-signed pack of it."""
    x = np.ones((1, 4), np.float32)
    with Bundle.create(tmp_path / "endless.edge") as draft:
        draft.write(FLOAT_GRAPH, endless_graph())
        draft.write(GOLDEN, save_golden({"x": x}, {"y": x}))
        specs = [TensorSpec(name, "float32", ("n", 4)) for name in ("x", "y")]
        golden = {FLOAT_GRAPH: Tolerance("relative", 1e-3)}
        draft.manifest = Manifest(FORMAT, "endless", "tensor", (specs[0],), (specs[1],), golden=golden)
    return pack(tmp_path / "endless.edge", out=tmp_path / "endless.zip", key=keys.key)


@pytest.fixture
def root(tmp_path: Path, versions: list[Path], keys: Any) -> Path:
    install(versions[0], root=tmp_path / "root", pub=keys.pub)
    return tmp_path / "root"


def children() -> set[int]:
    """Processes of this one that still run."""
    return {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
        if "deployment.apart" in Path(f"/proc/{pid}/cmdline").read_text()
    }


def assert_nothing_has_changed(root: Path) -> None:
    now = status(root)
    assert (now["healthy"], now["name"], now["sequence"]) == (True, "v0", 1)
    assert not list(root.glob(".incoming*"))
    assert children() == set()


def test_a_model_that_never_answers(root: Path, endless: Path, keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "LIMIT_S", 1.0)
    with pytest.raises(GoldenError, match=r"has not answered within 1 s here, and was stopped") as refused:
        install(endless, root=root, pub=keys.pub)
    assert "what is installed runs on" in refused.value.hint
    assert_nothing_has_changed(root)


@pytest.mark.parametrize(
    ("fate", "words"),
    [(signal.SIGABRT, "crashed (SIGABRT)"), (signal.SIGKILL, "was killed (SIGKILL), as systems do where memory")],
)
def test_a_model_whose_process_dies(root: Path, endless: Path, keys: Any, fate: signal.Signals, words: str) -> None:
    def shoot() -> None:
        end = time.monotonic() + 60
        while not (found := children()) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        for pid in found:
            os.kill(pid, fate)

    killer = threading.Thread(target=shoot)
    killer.start()
    try:
        with pytest.raises(GoldenError) as refused:
            install(endless, root=root, pub=keys.pub)
    finally:
        killer.join()
    assert words in refused.value.message
    assert_nothing_has_changed(root)


def test_errors_answers_and_words_cross_over(
    tmp_path: Path, tiny_bundle: Bundle, liar: Path, root: Path, keys: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with apart.Apart() as ask:
        assert ask("self_test", tiny_bundle.path, "auto")["relative"] <= 1e-4
        with pytest.raises(BudgetNotMet, match="1e-06 ms are allowed") as missed:
            ask("check_latency", tiny_bundle.path, None, "auto", 1e-6)
        assert missed.value.result["latency_ms"]["p50"] > 0
        assert ask("check_latency", tiny_bundle.path, tmp_path / "none", "auto", None)["latency_before_ms"] is None
        said = capfd.readouterr().err
        assert said.count("timing answers on this device\n") == 2
        assert f"{tmp_path / 'none'} cannot be timed" in said
    with pytest.raises(GoldenError, match="misses the golden outputs") as refused:
        install(liar, root=root, pub=keys.pub)
    assert refused.value.result.relative > 0.1
    assert_nothing_has_changed(root)

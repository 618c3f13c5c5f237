"""`compare` and `doctor`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgekit
from edgekit.benchmarking import doctor
from edgekit.benchmarking.checkup import _satisfies
from edgekit.bundle import FLOAT_GRAPH, GOLDEN, INT8_GRAPH, Bundle
from edgekit.errors import BackendError, BudgetNotMet, BundleError, UsageError
from edgekit.manifest import Tolerance


def rounded(graph: bytes, steps: float = 127) -> bytes:
    """The graph with every weight rounded to ``steps`` levels each side, as quantization would."""
    model = onnx.load_from_string(graph)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        scale = np.abs(values).max() / steps
        tensor.CopyFrom(numpy_helper.from_array((np.rint(values / scale) * scale).astype(np.float32), tensor.name))
    data: bytes = model.SerializeToString()
    return data


def with_int8(bundle: Bundle, path: Path, graph: bytes, tolerance: Tolerance) -> Bundle:
    with Bundle.create(path) as draft:
        draft.write(FLOAT_GRAPH, bundle.file(FLOAT_GRAPH).read_bytes())
        draft.write(INT8_GRAPH, graph)
        draft.write(GOLDEN, bundle.file(GOLDEN).read_bytes())
        golden = {**bundle.manifest.golden, INT8_GRAPH: tolerance}
        draft.manifest = msgspec.structs.replace(bundle.manifest, files={}, golden=golden)
    return Bundle.open(path)


@pytest.fixture
def both(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    graph = rounded(tiny_bundle.file(FLOAT_GRAPH).read_bytes())
    return with_int8(tiny_bundle, tmp_path / "both.edge", graph, Tolerance("snr_db", 20.0))


def test_every_graph_is_held_against_golden(cli: Callable[..., Any], both: Bundle) -> None:
    done = cli("compare", both.path, "--backends", "onnxruntime", "--json")
    assert done.code == 0
    rows = {row["graph"]: row for row in done.json["outputs"]}
    assert set(rows) == {FLOAT_GRAPH, INT8_GRAPH}
    exact, rough = rows[FLOAT_GRAPH], rows[INT8_GRAPH]
    assert exact["snr_db"] > 100 > rough["snr_db"] > 20
    assert exact["relative"] < 1e-4 < rough["relative"]
    assert 0.99 < rough["cosine"] < 1
    assert rough["max_abs"] > 0
    assert rough["within_tolerance"] is exact["within_tolerance"] is True
    assert done.json["bundle"] == str(both.path)
    assert done.json["samples"] == 4
    assert "snr_db" in cli("compare", both.path).out


def test_figures_equal_their_definitions(both: Bundle) -> None:
    from edgekit.runtime import Model
    from edgekit.runtime.golden import load_golden

    inputs, outputs = load_golden(both)
    with Model.open(both.path, precision="int8") as model:
        found = model.run(inputs)["y"].astype(np.float64)
    golden = outputs["y"].astype(np.float64)
    row = edgekit.compare(both)["outputs"][1]
    assert row["max_abs"] == pytest.approx(np.abs(found - golden).max(), rel=1e-6)
    assert row["snr_db"] == pytest.approx(10 * np.log10((golden**2).sum() / ((found - golden) ** 2).sum()), rel=1e-6)
    cosine = (golden * found).sum() / np.sqrt((golden**2).sum() * (found**2).sum())
    assert row["cosine"] == pytest.approx(cosine, rel=1e-9)
    assert row["agree"] == (found.argmax(1) == golden.argmax(1)).mean()


def test_a_graph_beyond_its_tolerance_exits_3_with_the_rows(
    cli: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    graph = rounded(tiny_bundle.file(FLOAT_GRAPH).read_bytes(), 2)
    bad = with_int8(tiny_bundle, tmp_path / "bad.edge", graph, Tolerance("snr_db", 40.0))
    done = cli("compare", bad.path, "--json")
    assert done.code == 3
    assert [row["within_tolerance"] for row in done.json["outputs"]] == [True, False]
    assert "dB" in done.json["error"]
    assert done.json["hint"]


def test_not_a_number_is_said_where_the_figure_would_stand(tiny_bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_bundle.file(FLOAT_GRAPH).read_bytes())
    for tensor in model.graph.initializer:
        if tensor.name == "b":
            tensor.CopyFrom(numpy_helper.from_array(np.full(10, np.nan, np.float32), "b"))
    bad = with_int8(tiny_bundle, tmp_path / "nan.edge", model.SerializeToString(), Tolerance("snr_db", 1.0))
    with pytest.raises(BudgetNotMet, match="not finite") as caught:
        edgekit.compare(bad)
    row = caught.value.result["outputs"][1]
    assert row["note"] == "not finite"
    assert row["snr_db"] is row["relative"] is row["cosine"] is None


def test_wrong_usage_and_missing_parts(cli: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path) -> None:
    assert cli("compare", tiny_bundle.path, "--backends", "onnxruntime,abacus").code == 2
    for wrong in ("abacus", "", ","):
        with pytest.raises(UsageError):
            edgekit.compare(tiny_bundle, backends=wrong)
    with Bundle.create(tmp_path / "bare.edge") as draft:
        draft.write(FLOAT_GRAPH, tiny_bundle.file(FLOAT_GRAPH).read_bytes())
        draft.manifest = msgspec.structs.replace(tiny_bundle.manifest, files={}, golden={})
    with pytest.raises(BundleError, match=r"no golden\.npz"):
        edgekit.compare(tmp_path / "bare.edge")


def test_doctor_sees_what_is_there(cli: Callable[..., Any]) -> None:
    done = cli("doctor", "--json")
    assert done.code == 0
    answer = done.json
    assert {b["backend"]: b["works"] for b in answer["backends"]}["onnxruntime"] is True
    extras = {e["extra"]: e for e in answer["extras"]}
    assert extras["runtime"]["ready"]
    assert extras["runtime"]["installed"]["onnxruntime"] == answer["device"]["versions"]["onnxruntime"]
    assert {"onnx", "onnxruntime"} <= set(extras["onnx"]["installed"])  # extras of extras
    assert answer["disk_free_gb"] > 0
    for check in answer["checks"]:
        assert check["found"]
        assert check["hint"] is None or not check["ok"]
    assert "backend onnxruntime" in cli("doctor").out


def test_without_a_gpu_doctor_says_that_and_no_conflict_of_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(bundle: Bundle, module: str) -> Bundle:
        raise BackendError("no CUDA device can be used here: cudaErrorInsufficientDriver", "edgekit doctor shows what is here")

    monkeypatch.setattr("edgekit.runtime.selftest.add_tiny_engine", refuse)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    answer = doctor(tmp_path)
    rows = {check["check"]: check for check in answer["checks"]}
    for name in ("backend tensorrt", "backend tensorrt-rtx"):
        assert rows[name]["found"] == "no NVIDIA GPU and driver here"
        assert "edgekit doctor" not in rows[name]["hint"]
    assert "cudaErrorInsufficientDriver" in {row["backend"]: row for row in answer["backends"]}["tensorrt"]["reason"]


def test_doctor_names_what_is_missing_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    version = metadata.version

    def without(name: str) -> str:
        if name == "jinja2":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "onnx" else version(name)

    monkeypatch.setattr(metadata, "version", without)
    answer = doctor(tmp_path)  # and a machine whose trees are empty
    extras = {e["extra"]: e for e in answer["extras"]}
    assert extras["report"]["missing"] == ["jinja2>=3.1"]
    assert extras["report"]["install"] == "pip install 'edgekit[report]'"
    assert extras["onnx"]["missing"] == ["onnx>=1.21"]  # too old counts as missing
    checks = {check["check"]: check for check in answer["checks"]}
    assert checks["extra report"] == {
        "check": "extra report",
        "ok": False,
        "found": "lacks jinja2>=3.1",
        "hint": "pip install 'edgekit[report]'",
    }
    assert not checks["gpu"]["ok"]
    assert not checks["jetpack"]["ok"]


def test_version_clauses() -> None:
    assert _satisfies("1.21.0", ">=1.21")
    assert _satisfies("1.21", ">=1.21.0")
    assert _satisfies("2.0rc1", ">=1.7,<3")
    assert not _satisfies("1.20.9", ">=1.21")
    assert not _satisfies("2.0.0", ">=1.7,<2")
    assert _satisfies("1.10", ">=1.9")
    assert _satisfies("1.0", "")

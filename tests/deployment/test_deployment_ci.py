"""The CI script, end to end: float bundle + frozen ranges -> engine, kit and signed pack, without data or GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.bundle import CALIBRATION, INT8_GRAPH, Bundle
from edgekit.deployment import install, verify

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "ci" / "build_engines.sh"
WORKFLOW = SCRIPT.with_name("build-engines.yml")


def build(*args: object, **environment: object) -> subprocess.CompletedProcess[str]:
    variables = {"EDGEKIT": Path(sys.executable).parent / "edgekit", **environment}
    return subprocess.run(
        ["sh", SCRIPT, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def frozen(tmp_path: Path, tiny_bundle: Bundle, calibration_folder: Path) -> Path:
    """A folder as ``calibration/NAME``: float.edge, calibration.json and the digest that the int8 graph must have."""
    quantize = pytest.importorskip("edgekit.quantization").quantize
    folder = tmp_path / "tiny-frozen"
    folder.mkdir()
    int8 = quantize(tiny_bundle, out=tmp_path / "int8.edge", calib=str(calibration_folder))
    (folder / CALIBRATION).write_bytes(int8.file(CALIBRATION).read_bytes())
    (folder / f"{INT8_GRAPH}.sha256").write_text(f"{int8.manifest.files[INT8_GRAPH]}  {INT8_GRAPH}\n")
    tiny_bundle.path.rename(folder / "float.edge")
    return folder


@pytest.mark.slow
def test_the_script_builds_signs_and_reproduces(tmp_path: Path, frozen: Path, keys) -> None:
    pytest.importorskip("tensorrt_rtx")
    for out in (tmp_path / "one", tmp_path / "two"):
        done = build(frozen / "float.edge", frozen / CALIBRATION, out, SIGNING_KEY=keys.key, PUBLIC_KEY=keys.pub)
        assert done.returncode == 0, done.stderr
        assert "model.int8.onnx: OK" in done.stdout
    made = Bundle.open(tmp_path / "one" / "tiny-frozen.edge").manifest.files
    again = Bundle.open(tmp_path / "two" / "tiny-frozen.edge").manifest.files
    for name in (INT8_GRAPH, "engines/rtx-ada.engine", "engines/jetson-orin-nano.kit.zip"):
        assert made[name] == again[name], name
    packed = tmp_path / "one" / "tiny-frozen.edge.zip"
    assert verify(packed, pub=keys.pub)["key_id"] == keys.key_id
    assert packed.name in (tmp_path / "one" / "sha256sums.txt").read_text()
    assert json.loads((tmp_path / "one" / "tiny-frozen.cdx.json").read_text())["bomFormat"] == "CycloneDX"
    assert install(packed, root=tmp_path / "root", pub=keys.pub)["slot"] == "a"


@pytest.mark.slow
def test_another_graph_than_the_recorded_one_stops_the_script(tmp_path: Path, frozen: Path) -> None:
    (frozen / f"{INT8_GRAPH}.sha256").write_text(f"{'0' * 64}  {INT8_GRAPH}\n")
    done = build(frozen / "float.edge", frozen / CALIBRATION, tmp_path / "out")
    assert done.returncode != 0
    assert "FAILED" in done.stdout
    assert not list((tmp_path / "out").glob("*.zip"))


def test_a_gate_that_nothing_is_held_against_stops_the_script(tmp_path: Path) -> None:
    for gate, lacks in (("MIN_TOP1", "EVAL_DATA"), ("MAX_MS", "BENCH_BACKEND")):
        done = build(tmp_path / "none.edge", tmp_path / "none.json", tmp_path / "out", **{gate: 1})
        assert done.returncode == 1
        assert f"{gate} needs {lacks}" in done.stderr


def test_missing_inputs_stop_the_script(tmp_path: Path) -> None:
    done = build(tmp_path / "none.edge", tmp_path / "none.json", tmp_path / "out")
    assert done.returncode == 1
    assert "no float bundle" in done.stderr
    assert not (tmp_path / "out").exists()
    done = build(tmp_path, ROOT / "pyproject.toml", tmp_path)
    assert done.returncode == 1
    assert "exists already" in done.stderr


def test_the_workflow_runs_the_script_and_names_no_host() -> None:
    text = WORKFLOW.read_text()
    assert "deploy/ci/build_engines.sh" in text
    assert "://" not in text + SCRIPT.read_text()
    assert "-c constraints.txt" in text
    assert os.access(SCRIPT, os.X_OK)
    assert subprocess.run(["sh", "-n", SCRIPT], check=False).returncode == 0


@pytest.mark.slow
def test_gates_stop_the_script_and_the_cache_spares_the_work(tmp_path: Path, frozen: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    wanted = {"CACHE": tmp_path / "cache", "PYTHON": sys.executable, "TARGETS": "rtx-ada", "MIN_SHARE": 0.1, "MAX_KB": 10_000}
    done = build(frozen / "float.edge", frozen / CALIBRATION, tmp_path / "one", **wanted)
    assert done.returncode == 0, done.stderr
    assert "gate: the int8 share is" in done.stdout
    again = build(frozen / "float.edge", frozen / CALIBRATION, tmp_path / "two", **wanted)
    assert "take tiny-frozen.edge from the cache" in again.stdout
    assert json.loads((tmp_path / "two" / "rtx-ada.json").read_text())["cached"]
    missed = build(frozen / "float.edge", frozen / CALIBRATION, tmp_path / "three", **{**wanted, "MIN_SNR": 300})
    assert missed.returncode == 3
    assert "the SNR in dB is" in missed.stderr
    assert not list((tmp_path / "three").glob("*.zip"))
    typo = build(frozen / "float.edge", frozen / CALIBRATION, tmp_path / "typo", **{**wanted, "MIN_SNR": "3O"})
    assert typo.returncode == 1
    assert "'3O' is not a number to ask for" in typo.stderr
    useless = build(frozen / "float.edge", frozen / CALIBRATION, tmp_path / "four", **{**wanted, "TARGETS": "jetson-xavier-nx"})
    assert useless.returncode == 1
    assert "no TensorRT of jetson-xavier-nx builds its kit" in useless.stderr
    assert not list((tmp_path / "four").glob("*.zip"))

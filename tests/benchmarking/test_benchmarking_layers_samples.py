"""`compare --layers`: on which samples, how many at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

import edgekit
from edgekit.benchmarking import layers as module
from edgekit.bundle import FLOAT_GRAPH, GOLDEN, INT8_GRAPH, Bundle
from edgekit.errors import DataError
from edgekit.runtime.golden import load_golden


def test_tensors_are_read_in_groups_of_bounded_size(int8: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[list[int]] = []
    run = module._run

    def counted(*args: Any) -> dict[str, Any]:
        found = run(*args)
        runs.append([array.nbytes for array in found.values()])
        return found

    monkeypatch.setattr(module, "_run", counted)
    inputs, _ = load_golden(int8)
    graphs = (int8, FLOAT_GRAPH), (int8, INT8_GRAPH)
    large = len(inputs["x"]) * 16 * 32 * 32 * 4  # bytes of a feature map over all samples
    whole = module.compare_layers(*graphs, inputs)
    assert len(runs) == 2
    for limit, count in ((2 * large, 3), (large, 5), (1, 6)):  # the last two are small, and go together
        runs.clear()
        parts = module.compare_layers(*graphs, inputs, exposed_bytes=limit)
        assert len(runs) == 2 * count
        assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in runs)
        assert parts == whole


def test_a_fixed_batch_runs_sample_by_sample(int8: Bundle, tmp_path: Path) -> None:
    def fixed(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1

    float_graph, int8_graph = (onnx.load_from_string(int8.read(name)) for name in (FLOAT_GRAPH, INT8_GRAPH))
    with Bundle.create(tmp_path / "one.edge") as draft:
        for name, model in ((FLOAT_GRAPH, float_graph), (INT8_GRAPH, int8_graph)):
            fixed(model)
            draft.write(name, model.SerializeToString())
        draft.write(GOLDEN, int8.read(GOLDEN))
        draft.manifest = msgspec.structs.replace(int8.manifest, files={})
    one, many = (edgekit.compare(bundle, layers=True)["layers"] for bundle in (tmp_path / "one.edge", int8))
    assert [row["layer"] for row in one] == [row["layer"] for row in many]
    assert [row["snr_db"] for row in one] == pytest.approx([row["snr_db"] for row in many], abs=0.01)


def test_samples_of_a_folder(cli: Callable[..., Any], int8: Bundle, calibration_folder: Path, tmp_path: Path) -> None:
    result = cli("compare", int8.path, "--data", calibration_folder, "--layers", "--json").json
    golden = edgekit.compare(int8, layers=True)
    assert result["samples"] == 16
    assert result["outputs"][0]["snr_db"] == 200  # the float graph's answers are golden
    assert result["outputs"][0]["tolerance"] is None
    assert result["layers"][0]["snr_db"] == pytest.approx(golden["layers"][0]["snr_db"], abs=2)
    assert result["layers"][0]["snr_db"] != golden["layers"][0]["snr_db"]
    folder = tmp_path / "wrong"
    folder.mkdir()
    with pytest.raises(DataError, match=r"holds no \.npz"):
        edgekit.compare(int8, data=folder)
    np.savez(folder / "a.npz", z=np.zeros((1, 3, 32, 32), np.float32))
    with pytest.raises(DataError, match="no array 'x'"):
        edgekit.compare(int8, data=folder)
    np.savez(folder / "a.npz", x=np.zeros((1, 3, 32, 32), np.float32))
    np.savez(folder / "b.npz", x=np.zeros((1, 3, 32, 31), np.float32))
    with pytest.raises(DataError, match="several shapes"):
        edgekit.compare(int8, data=folder)
    whole = (folder / "b.npz").read_bytes()
    for data in (b"no zip", b"", whole[:200]):
        (folder / "b.npz").write_bytes(data)
        with pytest.raises(DataError, match=r"b\.npz cannot be read: it is no \.npz"):
            edgekit.compare(int8, data=folder)
    (folder / "b.npz").write_bytes(whole.replace(b"NUMPY", b"numpy"))
    with pytest.raises(DataError, match=r"b\.npz cannot be read: "):
        edgekit.compare(int8, data=folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_sample_that_is_not_finite_as_the_model_sees_it(int8: Bundle, tmp_path: Path, value: float) -> None:
    x = np.zeros((1, 3, 32, 32))
    np.savez(tmp_path / "a.npz", x=x)
    x[0, 1, 2, 3] = value
    np.savez(tmp_path / "b.npz", x=x)
    with pytest.raises(DataError, match=r"b\.npz: x holds NaN or Inf"):
        edgekit.compare(int8, data=tmp_path)

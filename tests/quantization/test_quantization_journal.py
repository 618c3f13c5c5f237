"""An interrupted calibration goes on where it stopped, and gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.bundle import CALIBRATION, INT8_GRAPH, Bundle
from edgekit.quantization import reconstruct as rooms
from edgekit.quantization.journal import Journal, discard


def test_what_was_made_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "work"
    arrays = {"a": np.arange(6, dtype=np.int8).reshape(2, 3), "b": np.array(1.5)}
    assert Journal(path, "key").recall("first", lambda: arrays) is arrays

    def never() -> dict[str, Any]:
        raise AssertionError

    again = Journal(path, "key").recall("first", never)
    assert {name: (array.dtype, array.tolist()) for name, array in again.items()} == {
        name: (array.dtype, array.tolist()) for name, array in arrays.items()
    }
    assert Journal(path, "other").recall("first", dict) == {}


@pytest.mark.parametrize("cut", [1, 5, 9, 40])
def test_a_torn_end_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "work"
    journal = Journal(path, "key")
    assert not path.exists()  # nothing was done yet
    journal.recall("whole", lambda: {"x": np.ones(3)})
    whole = path.stat().st_size
    journal.recall("torn", lambda: {"x": np.zeros(30)})
    path.write_bytes(path.read_bytes()[: whole + cut])
    journal = Journal(path, "key")
    assert path.stat().st_size == whole
    assert journal.recall("whole", dict)["x"].tolist() == [1, 1, 1]
    assert journal.recall("torn", lambda: {"x": np.array(2)})["x"] == 2
    assert Journal(path, "key").recall("torn", dict)["x"] == 2


def test_a_file_of_anybody_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "work"
    path.write_bytes(b"mine")
    journal = Journal(path, "key")
    assert journal.recall("x", lambda: {"x": np.ones(1)})["x"] == 1
    discard(path)
    assert path.read_bytes() == b"mine"
    folder = tmp_path / "folder"
    folder.mkdir()
    Journal(folder, "key")
    discard(folder)
    assert folder.is_dir()


def test_an_interrupted_calibration_goes_on(digits_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, limit = [0], [10**9]
    fit = rooms._Reconstruction.fit

    def counted(self: Any, *args: Any) -> None:
        if calls[0] == limit[0]:
            raise KeyboardInterrupt
        calls[0] += 1
        fit(self, *args)

    monkeypatch.setattr(rooms._Reconstruction, "fit", counted)

    def quantized(name: str) -> Bundle:
        return edgekit.quantize(digits_bundle, out=tmp_path / name, samples=24)

    whole = quantized("whole.edge")
    steps = calls[0]
    calls[0], limit[0] = 0, steps - 2
    with pytest.raises(KeyboardInterrupt):
        quantized("again.edge")
    assert not (tmp_path / "again.edge").exists()
    assert (tmp_path / "again.edge.checkpoint").is_file()
    calls[0], limit[0] = 0, steps
    again = quantized("again.edge")
    assert calls[0] == 2
    assert again.read(INT8_GRAPH) == whole.read(INT8_GRAPH)
    assert again.read(CALIBRATION) == whole.read(CALIBRATION)
    assert not (tmp_path / "again.edge.checkpoint").exists()

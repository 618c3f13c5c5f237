"""A folder of results: what is added, what is drawn, and what a gate takes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.benchmarking import history
from edgekit.bundle import Bundle
from edgekit.errors import DataError, UsageError

SHORT = 0.05


def test_each_run_is_added_and_drawn(cli: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for _ in range(3):
        outcome = cli("bench", tiny_bundle.path, "--seconds", "0.05", "--history", folder, "--no-save", "--json")
        assert outcome.code == 0
        assert Path(outcome.json["history"]).parent == folder
    assert len(list(folder.glob("*.json"))) == 3
    drawn = (folder / "history.svg").read_text()
    assert drawn.count("<circle") == 3
    assert drawn.count("<polyline") == 1  # one model, one set-up


def test_a_gate_takes_the_newest_trustworthy_of_a_folder(tiny_bundle: Bundle, tmp_path: Path) -> None:
    result = edgekit.bench(tiny_bundle, seconds=SHORT, save=False)
    result = {key: value for key, value in result.items() if key not in ("bundle", "file", "history", "against")}
    for time, p50, trustworthy in (
        ("2026-01-01T00:00:00Z", 1.0, True),
        ("2026-01-02T00:00:00Z", 2.0, True),
        ("2026-01-03T00:00:00Z", 3.0, False),
    ):
        history.add(tmp_path, {**result, "time": time, "trustworthy": trustworthy, "latency_ms": {"p50": p50}})
    found = edgekit.bench(tiny_bundle, seconds=SHORT, save=False, against=tmp_path, force=True)["against"]
    assert found["old_p50_ms"] == 2.0


def test_other_scenarios_are_no_baseline(tiny_bundle: Bundle, tmp_path: Path) -> None:
    edgekit.bench(tiny_bundle, seconds=SHORT, save=False, history=tmp_path)
    with pytest.raises(DataError, match="no result for onnxruntime-float-offline"):
        edgekit.bench(tiny_bundle, seconds=SHORT, save=False, scenario="offline", against=tmp_path)


def test_files_that_are_no_results_stay(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text(json.dumps({"mine": 1}))
    (tmp_path / "broken.json").write_bytes(b"\xff{")
    edgekit.bench(tiny_bundle, seconds=SHORT, save=False, history=tmp_path)
    assert json.loads((tmp_path / "notes.json").read_text()) == {"mine": 1}
    (tmp_path / "history.svg").write_text("<svg>years of work</svg>")
    with pytest.raises(UsageError, match="not drawn by edgekit"):
        edgekit.bench(tiny_bundle, seconds=SHORT, save=False, history=tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        edgekit.bench(tiny_bundle, seconds=SHORT, save=False, history=tmp_path / "notes.json")

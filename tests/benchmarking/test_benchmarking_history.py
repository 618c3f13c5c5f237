"""A folder of results: what is added, what is drawn, and what a gate takes from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.benchmarking import history
from edgekit.bundle import Bundle
from edgekit.errors import DataError, OutputExists, UsageError

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


def plain(bundle: Bundle, **options: Any) -> dict[str, Any]:
    """A result as it lies in a folder."""
    result = edgekit.bench(bundle, seconds=SHORT, save=False, **options)
    return {key: value for key, value in result.items() if key not in ("bundle", "file", "history", "against")}


def fill(folder: Path, result: dict[str, Any], *runs: dict[str, Any]) -> None:
    """Runs of following days, each with another pace."""
    for day, changes in enumerate(runs):
        pace = changes.pop("p50")
        relative = {**result["yardstick"], "relative": [pace] * 20} if result["yardstick"] else None
        day_of = {"time": f"2026-01-{day + 1:02}T00:00:00Z", "latency_ms": {"p50": pace}, "yardstick": relative}
        history.add(folder, {**result, **day_of, "trustworthy": True, **changes})


def test_a_gate_takes_the_middle_of_the_last_five(tiny_bundle: Bundle, tmp_path: Path) -> None:
    result = plain(tiny_bundle)
    fill(
        tmp_path,
        result,
        *({"p50": pace} for pace in (9.0, 9.0, 9.0, 5.0, 1.0, 3.0, 2.0, 4.0)),
        {"p50": 7, "trustworthy": False},
    )
    found = edgekit.bench(tiny_bundle, seconds=SHORT, save=False, against=tmp_path)["against"]
    assert found["old_p50_ms"] == 3.0


def test_the_first_run_of_a_history_is_its_beginning(cli: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The line for CI works from the first day on; a folder that is only looked into must hold something."""
    gate = ["--seconds", SHORT, "--against", tmp_path / "results", "--fail-over", "400%"]
    missing = cli("bench", tiny_bundle.path, *gate)
    assert (missing.code, "cannot be read" in missing.err) == (1, True)
    first = cli("bench", tiny_bundle.path, *gate, "--history", tmp_path / "results", "--json")
    assert (first.code, first.json["against"], first.json["passed"]) == (0, None, None)
    assert "this run is the first" in first.err
    second = cli("bench", tiny_bundle.path, *gate, "--history", tmp_path / "results", "--json")
    assert second.json["against"]["limit"] == 4


def test_a_slowdown_fails_again_and_again(cli: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The failed run is kept, and drawn, but the next is not held against it."""
    fill(tmp_path, plain(tiny_bundle), {"p50": 1e-6})
    for count in (2, 3, 4):
        gate = ("--against", tmp_path, "--fail-over", "5%", "--history", tmp_path)
        assert cli("bench", tiny_bundle.path, "--seconds", SHORT, "--no-save", *gate).code == 3
        assert len(list(tmp_path.glob("*.json"))) == count
    passed = [json.loads(file.read_text())["passed"] for file in sorted(tmp_path.glob("*.json"))]
    assert passed == [None, False, False, False]


RESULT = {
    "model": "tiny",
    "graph": "model.onnx",
    "precision": "float",
    "backend": "onnxruntime",
    "scenario": "single-stream",
    "threads": 1,
    "batch": 1,
    "streams": None,
    "rate": None,
    "time": "2026-01-01T00:00:00Z",
    "digest": "",
    "yardstick": None,
    "latency_ms": {"p50": 1.0},
    "samples_ms": [1.0, 1.1] * 8,
    "trustworthy": True,
    "device": {"cpu": "A", "versions": {}},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "another"},
        {"graph": "model.int8.onnx"},
        {"backend": "tensorrt"},
        {"scenario": "offline"},
        {"device": {"cpu": "abacus", "versions": {}}},
        {"device": {"cpu": "B", "versions": "none", "jetson": ["Orin"]}},
        {"threads": 2},
        {"batch": 3},
        {"streams": 3},
        {"rate": 3.0},
        {"samples_ms": [1.0, 1.1, 1.0] * 5},
        {"passed": False},
    ],
)
def test_only_what_is_like_it_is_a_baseline(tmp_path: Path, changes: dict[str, Any]) -> None:
    history.add(tmp_path, {**RESULT, **changes})
    with pytest.raises(DataError, match=r"no earlier .* result of tiny .* on this set-up") as caught:
        history.baseline(tmp_path, RESULT)
    assert "--history" in caught.value.hint
    history.add(tmp_path, {**RESULT, "digest": "this"})
    assert history.baseline(tmp_path, RESULT).digest == "this"


def test_what_was_not_asked_for_is_that_of_the_newest(tmp_path: Path) -> None:
    """Five runs of two batches are not ranked by pace."""
    for day, batch in enumerate((4, 4, 4, 16)):
        run = {"scenario": "offline", "batch": batch, "time": f"2026-01-0{day + 1}T00:00:00Z"}
        history.add(tmp_path, {**RESULT, **run, "latency_ms": {"p50": float(batch)}})
    known = {key: value for key, value in RESULT.items() if key not in ("batch", "streams", "rate")}
    assert history.baseline(tmp_path, {**known, "scenario": "offline"}).batch == 16
    assert history.baseline(tmp_path, {**known, "scenario": "offline", "batch": 4}).batch == 4


def test_another_version_is_refused_and_another_device_forced(tiny_bundle: Bundle, tmp_path: Path) -> None:
    result = plain(tiny_bundle)
    versions = {**result["device"]["versions"], "onnxruntime": "0.1"}
    history.add(tmp_path, {**result, "device": {**result["device"], "versions": versions}})
    with pytest.raises(UsageError, match=r"onnxruntime: 0\.1, now"):
        edgekit.bench(tiny_bundle, seconds=SHORT, save=False, against=tmp_path)
    history.add(tmp_path / "other", {**result, "device": {"cpu": "abacus", "versions": {}}})
    found = edgekit.bench(tiny_bundle, seconds=SHORT, save=False, against=tmp_path / "other", force=True)["against"]
    assert any("abacus" in difference for difference in found["differs"])


def test_streams_have_lines_of_their_own(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for streams in (2, 3):
        edgekit.bench(tiny_bundle, scenario="multi-stream", streams=streams, seconds=SHORT, save=False, history=tmp_path)
    assert (tmp_path / "history.svg").read_text().count("<polyline") == 2


def test_files_that_are_no_results_stay(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text(json.dumps({"mine": 1}))
    (tmp_path / "broken.json").write_bytes(b"\xff{")
    for number, odd in enumerate(({"p50": 5e-324}, {"p50": 1.0, "p90": -1.0}, {"p50": 1e300})):
        (tmp_path / f"odd{number}.json").write_text(json.dumps({**RESULT, "latency_ms": odd}))
    edgekit.bench(tiny_bundle, seconds=SHORT, save=False, history=tmp_path)
    assert (tmp_path / "history.svg").read_text().count("<polyline") == 1
    assert json.loads((tmp_path / "notes.json").read_text()) == {"mine": 1}
    (tmp_path / "history.svg").write_text("<svg>years of work</svg>")
    with pytest.raises(UsageError, match="not drawn by edgekit"):
        edgekit.bench(tiny_bundle, seconds=SHORT, save=False, history=tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        edgekit.bench(tiny_bundle, seconds=SHORT, save=False, history=tmp_path / "notes.json")


def test_what_cannot_be_written_is_told_before_anything_is_measured(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr("edgekit.benchmarking.harness._measure", never)
    os.mkfifo(tmp_path / "history.svg")
    with pytest.raises(OutputExists, match=r"history\.svg exists already"):
        edgekit.bench(tiny_bundle, history=tmp_path)
    with pytest.raises(UsageError, match=r"/proc/nowhere"):
        edgekit.bench(tiny_bundle, history="/proc/nowhere")

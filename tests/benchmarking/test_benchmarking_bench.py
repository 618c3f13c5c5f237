"""`bench`: what it reports, what it refuses, and the gate. No test depends on how fast this machine is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import edgekit
from edgekit.benchmarking import cold
from edgekit.bundle import Bundle
from edgekit.errors import UsageError

SHORT = 0.05  # seconds
RESULT = "bench/onnxruntime-float-single-stream.json"


def test_the_answer_keeps_the_contract(cli: Callable[..., Any], digits_bundle: Bundle) -> None:
    done = cli("bench", digits_bundle.path, "--seconds", SHORT, "--json")
    assert done.code == 0
    answer = done.json
    latency = answer["latency_ms"]
    assert 0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p95"] <= latency["p99"] <= latency["max"]
    assert isinstance(answer["trustworthy"], bool)
    assert answer["trustworthy"] is (answer["reasons"] == [])
    assert answer["bundle"] == str(digits_bundle.path)
    assert answer["backend"] == "onnxruntime"
    assert answer["graph"] == "model.onnx"
    assert answer["throughput"] > 0
    assert answer["cold_start_ms"] > latency["min"]
    assert answer["memory"]["rss_mb"] > 10
    assert sum(answer["histogram"]["counts"]) + answer["histogram"]["over"] == answer["iterations"]
    assert answer["end_to_end"]["frame"] == [28, 28]
    assert answer["end_to_end"]["latency_ms"]["p50"] > 0
    assert answer["end_to_end"]["trustworthy"] is (answer["end_to_end"]["reasons"] == [])
    assert answer["inputs"] == {"x": ["float32", 1, 1, 28, 28]}
    assert {"cpu", "cores", "governor", "mhz", "memory_mb", "python", "versions", "jetson", "gpu"} <= set(answer["device"])


def test_it_is_written_into_the_bundle_with_history(digits_bundle: Bundle) -> None:
    before = digits_bundle.digest
    answer = edgekit.bench(digits_bundle, seconds=SHORT)
    after = Bundle.open(digits_bundle.path)  # verifies every hash
    assert after.digest == before
    stored = json.loads(after.file(RESULT).read_text())
    assert stored["latency_ms"] == answer["latency_ms"]
    assert 1 <= len(stored["samples_ms"]) <= 512
    assert str(digits_bundle.path) not in after.file(RESULT).read_text()
    entry = after.last("bench")
    assert entry is not None
    assert entry.parent == before
    assert entry.figures["p50"] == answer["latency_ms"]["p50"]
    assert entry.figures["graph"] == "model.onnx"
    assert entry.config["scenario"] == "single-stream"


def test_it_can_leave_the_bundle_alone(tiny_bundle: Bundle) -> None:
    before = {p: p.read_bytes() for p in tiny_bundle.path.rglob("*") if p.is_file()}
    assert edgekit.bench(tiny_bundle, seconds=SHORT, save=False)["file"] is None
    assert before == {p: p.read_bytes() for p in tiny_bundle.path.rglob("*") if p.is_file()}


def test_offline_runs_batches(tiny_bundle: Bundle) -> None:
    answer = edgekit.bench(tiny_bundle, scenario="offline", seconds=SHORT)
    assert answer["batch"] in (1, 4, 16, 64)
    assert set(answer["tried"]) == {"1", "4", "16", "64"}
    assert answer["end_to_end"] is None
    fixed = edgekit.bench(tiny_bundle, scenario="offline", batch=3, seconds=SHORT)
    assert (fixed["batch"], set(fixed["tried"]), fixed["inputs"]["x"][1]) == (3, {"3"}, 3)
    assert fixed["throughput"] == pytest.approx(3 * fixed["iterations"] / fixed["seconds"])


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_query_of_several_streams(tiny_bundle: Bundle, tmp_path: Path, tiny_onnx: Path, dynamic: bool) -> None:
    """In one batch where the graph takes it, one after the other where it does not."""
    bundle = tiny_bundle if dynamic else edgekit.import_onnx(tiny_onnx, out=tmp_path / "one.edge", shape="x:1x3x32x32")
    result = edgekit.bench(bundle, scenario="multi-stream", streams=4, seconds=0.1, save=False)
    assert (result["streams"], result["batch"], result["key"]) == (4, 4 if dynamic else 1, "p99")
    assert result["throughput"] == pytest.approx(4 * result["iterations"] / result["seconds"])


def test_a_process_takes_longer_than_an_open_interpreter(tiny_bundle: Bundle) -> None:
    result = edgekit.bench(tiny_bundle, seconds=SHORT, save=False)
    assert result["process_start_ms"] > result["cold_start_ms"]
    assert result["end_to_end"] is None
    assert 0 <= result["jitter_ms"] < result["latency_ms"]["max"]
    assert result["energy"] is None or result["energy"]["watts"]


def test_a_process_that_never_answers_is_not_waited_for(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "_APPLICATION", "import time; time.sleep(60)")
    monkeypatch.setattr(cold, "PATIENCE_S", 0.2)
    begin = time.perf_counter()
    assert edgekit.bench(tiny_bundle, seconds=SHORT, save=False)["process_start_ms"] is None
    assert time.perf_counter() - begin < 30


def test_server_queues(tiny_bundle: Bundle) -> None:
    answer = edgekit.bench(tiny_bundle, scenario="server", rate=400, seconds=0.5)
    assert answer["rate"] == 400
    assert answer["iterations"] == 200
    assert 0 < answer["utilisation"] <= 1
    assert answer["queue"]["wait_ms"]["min"] >= 0
    assert answer["latency_ms"]["p50"] >= answer["service_ms"]["min"]


def test_every_scenario_but_server_carries_one(tiny_bundle: Bundle) -> None:
    for scenario, carries in (("single-stream", True), ("multi-stream", True), ("offline", True), ("server", False)):
        result = edgekit.bench(tiny_bundle, scenario=scenario, seconds=SHORT, save=False)
        assert (result["yardstick"] is not None) is carries


def test_too_few_runs_are_no_trustworthy_figure(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.runtime.onnxruntime import OnnxRuntimeRunner

    run = OnnxRuntimeRunner.run
    monkeypatch.setattr(OnnxRuntimeRunner, "run", lambda self, feeds: (time.sleep(0.02), run(self, feeds))[1])
    answer = edgekit.bench(tiny_bundle, seconds=0.05)
    assert not answer["trustworthy"]
    assert any("too few" in reason for reason in answer["reasons"])


@pytest.mark.parametrize(
    "options",
    [
        ["--scenario", "multi"],
        ["--precision", "int3"],
        ["--backend", "abacus"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--batch", "4"],
        ["--scenario", "offline", "--batch", "0"],
        ["--streams", "4"],
        ["--scenario", "multi-stream", "--streams", "0"],
        ["--rate", "5"],
        ["--scenario", "server", "--rate", "-1"],
        ["--scenario", "server", "--rate", "1e6", "--seconds", "600"],
        ["--fail-over", "5%"],
        ["--fail-over", "five", "--against", "x"],
        ["--fail-over", "5", "--against", "x"],
        ["--threads", "-1"],
    ],
)
def test_wrong_usage(cli: Callable[..., Any], tiny_bundle: Bundle, options: list[str]) -> None:
    done = cli("bench", tiny_bundle.path, *options)
    assert done.code == 2
    assert done.out == ""
    assert 0 < len(done.err.strip().splitlines()) <= 4


def test_a_missing_bundle_and_a_missing_graph(cli: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path) -> None:
    assert cli("bench", tmp_path / "nothing.edge").code == 1
    assert cli("bench", tiny_bundle.path, "--precision", "int8").code == 1


def test_text_for_people(cli: Callable[..., Any], digits_bundle: Bundle) -> None:
    done = cli("bench", digits_bundle.path, "--seconds", SHORT, "--scenario", "server")
    for word in ("latency ms", "p99", "throughput", "queue", "trustworthy", "written to"):
        assert word in done.out
    assert "with frame" in cli("bench", digits_bundle.path, "--seconds", SHORT).out


@pytest.mark.parametrize(("scenario", "samples"), [("single-stream", 4), ("offline", 4), ("server", 4), ("multi-stream", 8)])
def test_a_graph_of_a_fixed_batch_counts_all_its_samples(four_at_once: Bundle, scenario: str, samples: int) -> None:
    """Two runs of four serve eight streams."""
    found = edgekit.bench(four_at_once, scenario=scenario, seconds=SHORT, save=False)
    assert found["batch"] == 4
    assert found["throughput"] == pytest.approx(samples * found["iterations"] / found["seconds"], rel=0.01)


def test_a_fixed_batch_is_not_timed_beside_one_sample(four_at_once: Bundle, tmp_path: Path) -> None:
    one = fixed_batch(tmp_path / "one.edge", 1)
    with pytest.raises(UsageError, match="takes batches of 1 at most, the other one of 4 at least"):
        edgekit.bench_pair(one, four_at_once, seconds=SHORT)
    with pytest.raises(UsageError, match="fixed at 4"):
        edgekit.bench(four_at_once, scenario="offline", batch=1, seconds=SHORT, save=False)
    assert edgekit.bench_pair(four_at_once, four_at_once, seconds=SHORT)["batch"] == 4


@pytest.fixture
def four_at_once(tmp_path: Path) -> Bundle:
    return fixed_batch(tmp_path / "four.edge", 4)


def fixed_batch(path: Path, batch: int) -> Bundle:
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[{batch},6] x) => (float[{batch},6] y) {{ y = Tanh(x) }}'
    (file := path.with_suffix(".onnx")).write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return edgekit.import_onnx(file, out=path)

"""`bench`: what it reports, what it refuses, and the gate. No test depends on how fast this machine is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.benchmarking import gate
from edgekit.benchmarking.scenarios import server, single_stream, warm_up
from edgekit.bundle import Bundle
from edgekit.errors import BudgetNotMet, BundleError, DataError, UsageError

SHORT = 0.05  # seconds
RESULT = "bench/onnxruntime-float-single-stream.json"
VALID = {
    "scenario": "single-stream",
    "backend": "onnxruntime",
    "threads": 1,
    "batch": 1,
    "latency_ms": {"p50": 1.0},
    "samples_ms": [1.0] * 16,
    "device": {"cpu": "A", "cores": 2, "versions": {}},
    "trustworthy": True,
}


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
    assert (fixed["batch"], set(fixed["tried"])) == (3, {"3"})
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
    assert 0 <= result["jitter_ms"] < result["latency_ms"]["max"]
    assert result["energy"] is None or result["energy"]["watts"]


def test_server_queues(tiny_bundle: Bundle) -> None:
    answer = edgekit.bench(tiny_bundle, scenario="server", rate=400, seconds=0.5)
    assert answer["rate"] == 400
    assert answer["iterations"] == 200
    assert 0 < answer["utilisation"] <= 1
    assert answer["queue"]["wait_ms"]["min"] >= 0
    assert answer["latency_ms"]["p50"] >= answer["service_ms"]["min"]


def test_a_low_rate_ends_in_time_and_too_low_a_one_is_refused() -> None:
    run = server(lambda: None, 0.1, rate=100)
    assert len(run.samples_ms) < 100  # which would take a second; five times the 0.1 s are allowed
    with pytest.raises(UsageError, match="arrivals a second"):
        server(lambda: None, 0.1, rate=1)


def test_a_server_is_compared_at_the_rate_of_the_earlier_run(tiny_bundle: Bundle, tmp_path: Path) -> None:
    first = edgekit.bench(tiny_bundle, scenario="server", rate=200, seconds=0.2)
    kept = tmp_path / "kept.json"
    kept.write_bytes(Path(first["file"]).read_bytes())
    again = edgekit.bench(tiny_bundle, scenario="server", seconds=0.2, against=kept)
    assert again["rate"] == 200
    with pytest.raises(UsageError, match="rate: 200"):
        edgekit.bench(tiny_bundle, scenario="server", rate=400, seconds=0.2, against=kept)


def test_an_overloaded_server_says_so() -> None:
    run = server(lambda: time.sleep(0.002), 0.1, rate=100_000)
    assert run.extra["utilisation"] > 0.98
    assert run.extra["queue"]["longest"] > 10
    waits = run.extra["queue"]["wait_ms"]
    assert waits["p99"] > waits["p50"] > 2  # they wait for more than one service


def test_a_stream_counts_every_call() -> None:
    calls: list[int] = []
    run = single_stream(lambda: calls.append(1), 0.02)
    assert len(run.samples_ms) == len(calls) >= 100
    assert len(run.windows_ms) == 20
    assert run.throughput == pytest.approx(len(calls) / run.seconds)


def test_a_slow_model_stops_at_its_patience() -> None:
    run = single_stream(lambda: time.sleep(0.02), 0.02)
    assert 20 <= len(run.samples_ms) < 100


def test_a_warm_up_that_never_settles_ends() -> None:
    rng = np.random.default_rng(0)
    found = warm_up(lambda: time.sleep(float(rng.choice([0.0002, 0.03]))), limit_s=0.3)
    assert found.seconds < 5
    assert found.iterations >= 3


def test_too_few_runs_are_no_trustworthy_figure(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.runtime.onnxruntime import OnnxRuntimeRunner

    run = OnnxRuntimeRunner.run
    monkeypatch.setattr(OnnxRuntimeRunner, "run", lambda self, feeds: (time.sleep(0.02), run(self, feeds))[1])
    answer = edgekit.bench(tiny_bundle, seconds=0.05)
    assert not answer["trustworthy"]
    assert any("too few" in reason for reason in answer["reasons"])


def slowed(tmp_path: Path, bundle: Bundle, factor: float, **changes: Any) -> Path:
    """The bundle's stored result as it would be had that run been ``factor`` times as slow."""
    found = json.loads((bundle.path / RESULT).read_text())
    found["latency_ms"] = {key: value * factor for key, value in found["latency_ms"].items()}
    found["samples_ms"] = [value * factor for value in found["samples_ms"]]
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps({**found, **changes}))
    return path


def test_the_gate_fails_on_a_slowdown_and_passes_a_speedup(
    cli: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    cli("bench", tiny_bundle.path, "--seconds", SHORT)
    fast = slowed(tmp_path, tiny_bundle, 0.001)  # the earlier run was a thousand times as fast
    failed = cli("bench", tiny_bundle.path, "--seconds", SHORT, "--against", fast, "--fail-over", "5%", "--json")
    assert failed.code == 3
    assert failed.json["against"]["verdict"] == "slower"
    assert failed.json["against"]["passed"] is False
    assert failed.json["latency_ms"]["p50"] > 0
    assert failed.json["error"]
    assert failed.json["hint"]
    slow = slowed(tmp_path, tiny_bundle, 1000)
    passed = cli("bench", tiny_bundle.path, "--seconds", SHORT, "--against", slow, "--fail-over", "5%", "--json")
    assert passed.code == 0
    assert passed.json["against"]["verdict"] == "faster"
    assert passed.json["against"]["low"] <= passed.json["against"]["high"] < 1


def test_a_comparison_without_a_gate_only_tells(tiny_bundle: Bundle, tmp_path: Path) -> None:
    edgekit.bench(tiny_bundle, seconds=SHORT)
    answer = edgekit.bench(tiny_bundle, seconds=SHORT, against=slowed(tmp_path, tiny_bundle, 0.001))
    assert answer["against"]["verdict"] == "slower"
    assert answer["against"]["passed"] is None


def test_a_failed_gate_keeps_its_baseline(tiny_bundle: Bundle, tmp_path: Path) -> None:
    edgekit.bench(tiny_bundle, seconds=SHORT)
    baseline = slowed(tmp_path, tiny_bundle, 0.001).read_bytes()
    bundle = Bundle.open(tiny_bundle.path).extend({RESULT: baseline})
    for against in (bundle.path, bundle.path / RESULT):
        with pytest.raises(BudgetNotMet):
            edgekit.bench(bundle, seconds=SHORT, against=against, fail_over="5%")
        assert bundle.file(RESULT).read_bytes() == baseline


def test_the_gate_wants_both_size_and_certainty() -> None:
    rng = np.random.default_rng(0)

    def result(samples: Any) -> dict[str, Any]:
        return {**VALID, "samples_ms": samples.tolist(), "latency_ms": {"p50": float(np.median(samples))}}

    def verdict(old: Any, new: Any) -> tuple[str, bool]:
        earlier = gate.Earlier(**result(old))
        found = gate.judge(earlier, result(new), 0.05, force=False)
        return found["verdict"], found["passed"]

    steady = rng.normal(1, 0.01, 512)
    assert verdict(steady, steady) == ("same", True)
    assert verdict(steady, steady * 1.03) == ("slower", True)  # certain, but within 5%
    assert verdict(steady, steady * 1.08) == ("slower", False)
    wild = np.repeat(rng.choice([0.5, 1.5], 16), 32)
    assert verdict(wild, np.roll(wild, 7) * 1.08)[1] is True  # large, but it may be chance


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": {"cpu": "abacus"}}, "cpu: abacus, now"),
        ({"threads": 7}, "threads: 7, now 1"),
        ({"backend": "tensorrt"}, "backend: tensorrt, now onnxruntime"),
    ],
)
def test_another_device_is_compared_only_by_force(
    tiny_bundle: Bundle, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    edgekit.bench(tiny_bundle, seconds=SHORT)
    other = slowed(tmp_path, tiny_bundle, 1.0, **changes)
    with pytest.raises(UsageError, match=words) as caught:
        edgekit.bench(tiny_bundle, seconds=SHORT, against=other)
    assert "--force" in caught.value.hint
    differs = edgekit.bench(tiny_bundle, seconds=SHORT, against=other, force=True)["against"]["differs"]
    assert any(words in difference for difference in differs)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b"\xff\xfe", {"samples_ms": []}, {"samples_ms": [0.0] * 16}, {"latency_ms": {}}, {"threads": "1"}],
)
def test_a_file_that_is_no_result(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps({**VALID, "more": 1}))
    assert gate.load_earlier(path, RESULT).latency_ms == {"p50": 1.0}
    path.write_bytes(content if isinstance(content, bytes) else json.dumps({**VALID, **content}).encode())
    with pytest.raises(DataError, match="is no bench result") as caught:
        gate.load_earlier(path, RESULT)
    assert "edgekit bench" in caught.value.hint


def test_no_file_and_no_result_in_a_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        edgekit.bench(tiny_bundle, seconds=SHORT, against=tmp_path / "nothing.json")
    with pytest.raises(BundleError, match="has no bench/"):
        edgekit.bench(tiny_bundle, seconds=SHORT, against=tiny_bundle.path)


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


def test_shares() -> None:
    assert gate.parse_share("5%") == gate.parse_share(0.05) == gate.parse_share(" 0.05 ") == pytest.approx(0.05)
    assert gate.parse_share("0%") == 0
    assert gate.parse_share(None) is None
    for wrong in ("5", "-5%", "nan", "inf%", "", "%", 20.0):
        with pytest.raises(UsageError):
            gate.parse_share(wrong)


def test_text_for_people(cli: Callable[..., Any], digits_bundle: Bundle) -> None:
    done = cli("bench", digits_bundle.path, "--seconds", SHORT, "--scenario", "server")
    for word in ("latency ms", "p99", "throughput", "queue", "trustworthy", "written to"):
        assert word in done.out
    assert "with frame" in cli("bench", digits_bundle.path, "--seconds", SHORT).out

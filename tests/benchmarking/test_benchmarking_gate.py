"""A run against an earlier one: what is compared, what is refused, and what the gate lets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import edgekit
from edgekit.benchmarking import gate, harness
from edgekit.benchmarking.stored import Stored
from edgekit.bundle import Bundle
from edgekit.errors import BudgetNotMet, DataError, UsageError

SHORT = 0.05  # seconds
RESULT = "bench/onnxruntime-float-single-stream.json"
VALID = {
    "model": "m",
    "graph": "model.onnx",
    "scenario": "single-stream",
    "backend": "onnxruntime",
    "threads": 1,
    "batch": 1,
    "latency_ms": {"p50": 1.0},
    "samples_ms": [1.0, 1.1] * 8,
    "device": {"cpu": "A", "cores": 2, "versions": {}},
    "trustworthy": True,
}


def test_a_server_is_compared_at_the_rate_of_the_earlier_run(tiny_bundle: Bundle, tmp_path: Path) -> None:
    first = edgekit.bench(tiny_bundle, scenario="server", rate=200, seconds=0.2)
    kept = tmp_path / "kept.json"
    kept.write_bytes(Path(first["file"]).read_bytes())
    again = edgekit.bench(tiny_bundle, scenario="server", seconds=0.2, against=kept)
    assert again["rate"] == 200
    with pytest.raises(UsageError, match="rate: 200"):
        edgekit.bench(tiny_bundle, scenario="server", rate=400, seconds=0.2, against=kept)


def slowed(tmp_path: Path, bundle: Bundle, factor: float, **changes: Any) -> Path:
    """The bundle's stored result as it would be had that run been ``factor`` times as slow."""
    found = json.loads((bundle.path / RESULT).read_text())
    found["yardstick"]["relative"] = [value * factor for value in found["yardstick"]["relative"]]
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
    assert failed.json["against"]["passed"] is failed.json["passed"] is False
    assert failed.json["against"]["method"] == "yardstick"
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


def test_a_doubtful_baseline_is_named(cli: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path) -> None:
    edgekit.bench(tiny_bundle, seconds=SHORT)
    for factor in (0.001, 1000):
        earlier = slowed(tmp_path, tiny_bundle, factor, trustworthy=False)
        done = cli("bench", tiny_bundle.path, "--seconds", SHORT, "--no-save", "--against", earlier, "--fail-over", "5%")
        assert done.code == (3 if factor < 1 else 0)
        assert "the earlier run was not to be trusted" in done.out
        assert "by the yardstick, 99% interval" in done.out


def test_without_a_common_yardstick_latencies_are_compared(tiny_bundle: Bundle, tmp_path: Path) -> None:
    edgekit.bench(tiny_bundle, seconds=SHORT)
    of_another_day = {"name": "products-1", "ms": 1.0, "relative": [1.0] * 20}
    for changes in ({"yardstick": None}, {"yardstick": of_another_day}):
        earlier = slowed(tmp_path, tiny_bundle, 1.0, **changes)
        found = edgekit.bench(tiny_bundle, seconds=SHORT, save=False, against=earlier)["against"]
        assert found["method"] == "latency"
        assert found["ratio"] == found["new_p50_ms"] / found["old_p50_ms"]
    elsewhere = json.loads(earlier.read_text())["device"] | {"cpu": "abacus"}
    earlier = slowed(tmp_path, tiny_bundle, 1.0, device=elsewhere)
    assert edgekit.bench(tiny_bundle, seconds=SHORT, against=earlier, force=True)["against"]["method"] == "latency"


def test_batch_and_streams_are_those_of_the_earlier_run(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Offline chooses its batch anew each time, and a gate would refuse by chance."""
    for scenario, options in (("offline", {"batch": 3}), ("multi-stream", {"streams": 2})):
        first = edgekit.bench(tiny_bundle, scenario=scenario, seconds=SHORT, **options)
        kept = tmp_path / f"{scenario}.json"
        kept.write_bytes(Path(first["file"]).read_bytes())
        again = edgekit.bench(tiny_bundle, scenario=scenario, seconds=SHORT, against=kept)
        assert {key: again[key] for key in options} == options
        with pytest.raises(UsageError, match=rf"{next(iter(options))}: \d, now 5"):
            edgekit.bench(tiny_bundle, scenario=scenario, seconds=SHORT, against=kept, **dict.fromkeys(options, 5))


def test_what_processes_differ_by_decides_whether_a_slowdown_is_certain() -> None:
    """6% slower by five processes each: certain where they agree within 1%, not where they differ by 5%."""

    def result(pace: float, spread: float | None) -> dict[str, Any]:
        relative = (pace * np.random.default_rng(0).normal(1, 0.01, 400)).tolist()
        others = [] if spread is None else [pace * (1 + part * spread) for part in (-1, -0.5, 0.5, 1)]
        return {**VALID, "yardstick": {"name": "y", "ms": 1.0, "relative": relative, "processes": others}}

    for spread, method, verdict in ((0.01, "processes", "slower"), (0.05, "processes", "same"), (None, "yardstick", "same")):
        earlier = msgspec.convert(result(1.0, spread), Stored)
        found = gate.judge(earlier, result(1.06, spread), 0.05, force=False)
        assert found["method"] == method
        assert found["ratio"] == pytest.approx(1.06, abs=0.005)  # though p50 is the same
        assert (found["verdict"], found["passed"]) == (verdict, verdict == "same")
        assert ("wider than the limit" in (found["caution"] or "")) is found["passed"]


def test_a_run_is_measured_in_processes_of_its_own_too(cli: Callable[..., Any], tiny_bundle: Bundle) -> None:
    first = cli("bench", tiny_bundle.path, "--seconds", 1, "--json").json
    assert len(first["yardstick"]["processes"]) == 4
    again = cli("bench", tiny_bundle.path, "--seconds", 1, "--no-save", "--against", tiny_bundle.path)
    assert "by several processes, 99% interval" in again.out, again.err
    assert edgekit.bench(tiny_bundle, seconds=SHORT)["yardstick"]["processes"] == []


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
        earlier = Stored(**result(old))
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
        ({"model": "another"}, "model: another, now tiny"),
        ({"batch": 4}, "batch: 4, now 1"),
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
    [
        b"",
        b"{}",
        b"[1]",
        b"\xff\xfe",
        {"samples_ms": []},
        {"samples_ms": [0.0] * 16},
        {"latency_ms": {}},
        {"threads": "1"},
        {"yardstick": {"name": "y", "ms": 1.0, "relative": [0.0] * 16}},
    ],
)
def test_a_file_that_is_no_result(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps({**VALID, "more": 1}))
    assert gate.load_earlier(path, RESULT, VALID).latency_ms == {"p50": 1.0}
    path.write_bytes(content if isinstance(content, bytes) else json.dumps({**VALID, **content}).encode())
    with pytest.raises(DataError, match="is no bench result") as caught:
        gate.load_earlier(path, RESULT, VALID)
    assert "edgekit bench" in caught.value.hint


def test_no_file_and_no_result_in_a_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        edgekit.bench(tiny_bundle, seconds=SHORT, against=tmp_path / "nothing.json")
    with pytest.raises(DataError, match="has no bench/"):
        edgekit.bench(tiny_bundle, seconds=SHORT, against=tiny_bundle.path)


def test_shares() -> None:
    assert gate.parse_share("5%") == gate.parse_share(0.05) == gate.parse_share(" 0.05 ") == pytest.approx(0.05)
    assert gate.parse_share("0%") == 0
    assert gate.parse_share(None) is None
    for wrong in ("5", "-5%", "nan", "inf%", "", "%", 20.0):
        with pytest.raises(UsageError):
            gate.parse_share(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": -1}, {"threads": 10**9}, {"threads": "2"}, {"seconds": "2"}, {"seconds": None},
        {"scenario": "offline", "batch": "4"}, {"scenario": "offline", "batch": 2.5}, {"scenario": "offline", "batch": 100_000},
        {"scenario": "server", "rate": "9"}, {"scenario": "multi-stream", "streams": 1.5},
    ],
)  # fmt: skip
def test_arguments_of_another_kind_are_told(tiny_bundle: Bundle, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        edgekit.bench(tiny_bundle, **{"save": False, "seconds": 0.02, **wrong})


def test_another_model_is_refused_before_anything_is_measured(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = edgekit.bench(tiny_bundle, seconds=0.02)
    earlier = {**result, "model": "another"}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(harness, "_measure", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(UsageError, match="model: another, now "):
        edgekit.bench(tiny_bundle.path, seconds=0.02, against=tmp_path / "earlier.json")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace('"cv":', '"cv":NaN,"was":'), "it holds NaN or Infinity"),
        (lambda _: "{", "is no bench result"),
    ],
)
def test_what_a_file_holds_instead_of_a_result_is_told(
    tiny_bundle: Bundle, tmp_path: Path, change: Callable[[str], str], why: str
) -> None:
    result = edgekit.bench(tiny_bundle, seconds=0.02)
    (tmp_path / "earlier.json").write_text(change(json.dumps(result, separators=(",", ":"))))
    with pytest.raises(DataError, match=why):
        edgekit.bench(tiny_bundle.path, seconds=0.02, against=tmp_path / "earlier.json")


def test_a_run_of_no_variance_is_no_baseline(tiny_bundle: Bundle, tmp_path: Path) -> None:
    result = edgekit.bench(tiny_bundle, seconds=0.02)
    (tmp_path / "earlier.json").write_text(json.dumps({**result, "samples_ms": [0.5] * 100}))
    with pytest.raises(DataError, match="not all equal"):
        edgekit.bench(tiny_bundle.path, seconds=0.02, against=tmp_path / "earlier.json")


def test_a_bundle_without_such_a_run_says_how_to_make_one(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no bench/onnxruntime-float-single-stream") as caught:
        edgekit.bench(tiny_bundle, seconds=0.02, against=tiny_bundle.path)
    assert f"edgekit bench {tiny_bundle.path}" in caught.value.hint


def test_a_picture_may_be_named_by_a_text(tiny_bundle: Bundle, tmp_path: Path) -> None:
    edgekit.bench(tiny_bundle, seconds=0.02, plot=str(tmp_path / "layers.svg"), save=False)
    assert (tmp_path / "layers.svg").is_file()

"""Two bundles timed in turns. No test depends on how fast this machine is."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgekit
from edgekit.benchmarking import pairs
from edgekit.benchmarking.statistics import Interval, paired_ratio
from edgekit.bundle import Bundle
from edgekit.errors import BudgetNotMet, UsageError
from edgekit.manifest import TensorSpec


def test_both_are_measured_and_nothing_is_written(cli: Any, tiny_bundle: Bundle) -> None:
    before = sorted(tiny_bundle.path.rglob("*"))
    outcome = cli("bench", tiny_bundle.path, tiny_bundle.path, "--seconds", "0.1", "--json")
    assert outcome.code == 0
    found = outcome.json
    assert found["low"] <= found["ratio"] <= found["high"]
    assert found["rounds"] >= pairs.FEWEST
    assert [one["iterations"] >= pairs.FEWEST for one in found["bundles"]] == [True, True]
    assert found["passed"] is None
    assert sorted(tiny_bundle.path.rglob("*")) == before
    assert found["batch"] == 1


def test_a_slower_one_is_found_out(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the wait: no neighbour makes up for it."""
    waits = iter((0.001, 0.003))

    def waiting(*_: Any) -> Any:
        wait = next(waits)
        return lambda: time.sleep(wait)

    monkeypatch.setattr(pairs, "_call", waiting)
    with pytest.raises(BudgetNotMet, match=r"longer than tiny.*allowed is 50\.0%") as missed:
        edgekit.bench_pair(tiny_bundle, tiny_bundle, seconds=0.3, fail_over="50%")
    assert missed.value.result["verdict"] == "slower"
    assert missed.value.result["passed"] is False


def test_slow_models_are_not_waited_for_forty_times(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that take longer than the seconds asked for: as many rounds as the interval needs."""
    monkeypatch.setattr(pairs, "_call", lambda *_: lambda: time.sleep(0.01))
    assert edgekit.bench_pair(tiny_bundle, tiny_bundle, seconds=0.02)["rounds"] == pairs.FEWEST


@pytest.mark.parametrize(
    ("interval", "passed", "words"),
    [
        (Interval(1.08, 1.03, 1.12), False, "slower"),
        (Interval(1.04, 1.03, 1.05), True, "slower"),  # certain, and within what is allowed
        (Interval(1.20, 0.98, 1.40), True, "same"),  # more than is allowed, and not certain
        (Interval(0.50, 0.49, 0.51), True, "faster"),
    ],
)
def test_the_gate_wants_both_size_and_certainty(
    cli: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, interval: Interval, passed: bool, words: str
) -> None:
    monkeypatch.setattr(pairs, "paired_ratio", lambda *_: interval)
    outcome = cli("bench", tiny_bundle.path, tiny_bundle.path, "--seconds", "0.05", "--fail-over", "5%")
    assert outcome.code == (0 if passed else 3)
    assert words in outcome.out
    assert ("wide" in outcome.out) == (interval.high / interval.low > 1.1)


def test_the_table_names_the_backend(cli: Any, tiny_bundle: Bundle) -> None:
    assert cli("bench", tiny_bundle.path, tiny_bundle.path, "--seconds", "0.05").out.count("onnxruntime") == 2


class Engine:
    """A runner's answer to how many samples it takes."""

    def __init__(self, batches: tuple[int, int] | None, axis: int | str = "n") -> None:
        self.batches, self.inputs = batches, (TensorSpec("x", "float32", (axis, 2)),)
        self.outputs = self.inputs


@pytest.mark.parametrize(
    ("first", "second", "batch"),
    [
        (Engine((1, 1)), Engine((4, 4)), None),  # as single inferences the second would look four times as slow
        (Engine((1, 8)), Engine((4, 4)), 4),
        (Engine(None), Engine((4, 4)), 4),
        (Engine(None, 1), Engine((4, 4)), None),
        (Engine(None), Engine(None, 1), 1),
    ],
)
def test_both_take_one_batch(tiny_bundle: Bundle, first: Engine, second: Engine, batch: int | None) -> None:
    models: Any = [SimpleNamespace(bundle=tiny_bundle, runner=runner) for runner in (first, second)]
    for both in (models, models[::-1]):
        if batch is None:
            with pytest.raises(UsageError, match="takes batches of 1 at most, the other one of 4 at least"):
                pairs._batch(both)
        else:
            assert pairs._batch(both) == batch


@pytest.mark.parametrize("option", [["--rate", "5"], ["--scenario", "offline"], ["--against", "x"], ["--no-save"]])
def test_options_that_mean_nothing_for_two(cli: Any, tiny_bundle: Bundle, option: list[str]) -> None:
    outcome = cli("bench", tiny_bundle.path, tiny_bundle.path, *option)
    assert outcome.code == 2
    assert "two bundles" in outcome.err


def test_no_time_is_no_measurement(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="cannot be measured"):
        edgekit.bench_pair(tiny_bundle, tiny_bundle, seconds=0)


def test_a_drift_that_both_share_cancels() -> None:
    random = np.random.default_rng(0)
    pace = np.repeat([1.0, 1.6, 0.8, 2.0], 25)  # a neighbour comes and goes
    old, new = (pace * factor * random.normal(1, 0.01, 100) for factor in (1.0, 1.05))
    interval = paired_ratio(old, new)
    assert interval.low > 1.03
    assert interval.high < 1.07
    same = paired_ratio(old, pace * random.normal(1, 0.01, 100))
    assert same.low < 1 < same.high


@given(st.lists(st.floats(1e-4, 1e4), min_size=16, max_size=60), st.floats(0.1, 10))
def test_an_interval_holds_its_ratio_and_scales(values: list[float], factor: float) -> None:
    old = np.array(values)
    interval = paired_ratio(old, old * factor)
    assert interval.low <= interval.ratio <= interval.high
    assert interval.ratio == pytest.approx(factor)


def test_too_few_pairs() -> None:
    for old, new in ((np.ones(15), np.ones(15)), (np.ones(16), np.ones(17)), (np.zeros(16), np.ones(16))):
        with pytest.raises(ValueError, match="16 pairs"):
            paired_ratio(old, new)

"""How inferences arrive: what a run counts, and what a server's queue says. No test depends on how fast this machine is."""

from __future__ import annotations

import time
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgekit.benchmarking import scenarios, yardstick
from edgekit.benchmarking.doubts import doubts
from edgekit.benchmarking.scenarios import Run, WarmUp, _served, multi_stream, offline, server, single_stream, warm_up
from edgekit.errors import UsageError

SHORT = 0.05  # seconds
STEADY = WarmUp(100, 0.2, True)


def test_a_low_rate_ends_in_time_and_too_low_a_one_is_refused() -> None:
    run = server(lambda: None, 0.1, rate=100)
    assert len(run.samples_ms) < 100  # which would take a second; five times the 0.1 s are allowed
    with pytest.raises(UsageError, match="arrivals a second"):
        server(lambda: None, 0.1, rate=1)


def test_an_overloaded_server_says_so() -> None:
    run = server(lambda: time.sleep(0.002), 0.1, rate=100_000)
    assert run.extra["utilisation"] > 0.98
    queue = run.extra["queue"]
    assert queue["longest"] > 10
    assert queue["wait_ms"]["p99"] > queue["wait_ms"]["p50"] > 2  # they wait for more than one service
    assert run.samples_ms.min() >= run.extra["service_ms"]["min"]
    assert run.samples_ms.max() >= queue["wait_ms"]["max"] + run.extra["service_ms"]["min"]  # from arrival, not from the start
    assert queue["behind_ms"] == run.samples_ms[-1] > 50
    assert queue["last_fifth_ms"] > 4 * queue["first_fifth_ms"]
    assert any("more than it can serve" in reason for reason in doubts(run, STEADY, "server"))


def test_an_overloaded_server_of_a_short_call_says_so() -> None:
    """The loop takes as long as the call, so it never looks busy."""
    run = server(lambda: None, 0.1, rate=5e6)
    assert run.extra["utilisation"] < 0.9
    assert any("more than it can serve" in reason for reason in doubts(run, STEADY, "server"))


def test_those_that_were_never_served_wait_too() -> None:
    run = server(lambda: time.sleep(0.001), 0.1, rate=20_000)  # 2,000 come, under 500 are served in five times as long
    queue = run.extra["queue"]
    assert queue["unserved"] == 2000 - len(run.samples_ms) > 1400
    assert queue["longest"] > 1400
    assert any(f"{queue['unserved']:,} more had come" in reason for reason in doubts(run, STEADY, "server"))


def served(service_us: Any) -> Run:
    """What a server's clock would show, had each of so many arrivals at 700 a second been served in that time."""
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1e9 / 700, len(service_us))).astype(np.int64)
    started, finished = np.empty_like(arrivals), np.empty_like(arrivals)
    free = 0
    for i, (arrival, service) in enumerate(zip(arrivals, service_us, strict=True)):
        started[i] = max(arrival, free)
        free = finished[i] = started[i] + int(1e3 * service)
    return _served(700, arrivals, started, finished)


def test_a_server_is_judged_by_its_latencies() -> None:
    """A queue comes and goes with the arrivals; what is beyond that is a stall, though the services around it were steady."""
    steady = np.full(3000, 1000.0)
    run = served(steady)
    assert run.samples_ms.max() > 5 * run.samples_ms.min()
    assert doubts(run, STEADY, "server") == []
    stalled = served(np.where(np.arange(3000) == 1500, 300_000, steady))
    assert any("drifted" in reason for reason in doubts(stalled, STEADY, "server"))


def test_a_stream_counts_every_call() -> None:
    calls: list[int] = []
    run = single_stream(lambda: calls.append(1), 0.02)
    assert len(run.samples_ms) == len(calls) >= 100
    assert len(run.windows_ms) == 20
    assert run.throughput == pytest.approx(len(calls) / run.seconds)
    assert run.yardstick is None


def test_the_yardstick_is_timed_between_the_stretches() -> None:
    """Its own work, run as a model, takes as long as the yardstick beside it, whatever else this machine does."""
    run = single_stream(yardstick.work(), 1.0, yardstick=True)
    assert run.yardstick is not None
    assert run.yardstick["name"] == yardstick.NAME
    assert run.yardstick["ms"] > 0
    assert 20 <= len(run.yardstick["relative"]) <= 512
    assert 0.5 < np.median(run.yardstick["relative"]) < 2  # a neighbour takes more from one than from the other
    assert run.throughput == pytest.approx(len(run.samples_ms) / run.seconds)
    assert run.seconds == pytest.approx(run.samples_ms.sum() / 1e3, rel=0.5)  # the yardstick's time is none of the run's


def test_a_slow_call_has_a_stretch_to_itself() -> None:
    calls: list[int] = []
    run = single_stream(lambda: (calls.append(1), time.sleep(0.006)), 0.05, yardstick=True)
    assert run.yardstick is not None
    assert len(run.yardstick["relative"]) == len(run.samples_ms) == len(calls)


def test_a_scenario_that_chooses_its_call_says_how_that_warmed_up() -> None:
    for run in (multi_stream(lambda: time.sleep(0.001), 2, SHORT), offline(lambda n: lambda: time.sleep(0.001), [1], SHORT)):
        assert run.warm_up is not None
        assert run.warm_up.iterations > 4


def test_a_slow_model_stops_at_its_patience() -> None:
    run = single_stream(lambda: time.sleep(0.02), 0.02)
    assert 20 <= len(run.samples_ms) < 100


class Clock:
    """Stands for the clock of `scenarios`; a call takes what it is told to, whatever else the machine does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = 0
        monkeypatch.setattr(scenarios, "perf_counter_ns", lambda: self.ns)
        monkeypatch.setattr(scenarios, "time", SimpleNamespace(perf_counter=lambda: self.ns / 1e9))

    def take(self, seconds: float) -> None:
        self.ns += round(seconds * 1e9)


def test_a_warm_up_that_never_settles_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, clock = count(1), Clock(monkeypatch)
    found = warm_up(lambda: clock.take(0.003 * next(calls)), limit_s=0.3)  # slower and slower
    assert found.seconds < 5
    assert not found.steady


def test_a_slow_model_is_given_the_windows_that_it_takes_to_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = warm_up(lambda: clock.take(0.1), limit_s=0.2)
    assert found.iterations == 4
    assert found.steady

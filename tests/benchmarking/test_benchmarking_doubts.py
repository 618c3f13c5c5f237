"""Each reason not to trust a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekit.benchmarking.doubts import doubts
from edgekit.benchmarking.scenarios import Run, WarmUp

STEADY = WarmUp(100, 0.2, True)


def run(samples: Any, windows: Any = None, **extra: Any) -> Run:
    windows = [np.median(part) for part in np.array_split(samples, 20)] if windows is None else windows
    return Run(np.asarray(samples), np.asarray(windows), 2.0, 1.0, extra)


def calm(count: int = 2000, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(1, 0.01, count)


def test_a_calm_run_is_trusted() -> None:
    for scenario in ("single-stream", "multi-stream", "offline", "server"):
        assert doubts(run(calm()), STEADY, scenario) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: run(calm(99)), "99 runs are too few"),
        (lambda: run(np.ones(2000)), "took the same time"),
        (lambda: run(calm() * np.repeat([1, 1.2], 1000)), r"vary by \d+\.\d%"),
        (lambda: run(calm() * np.repeat([1, 1.06], 1000)), r"second half's median is \+[56]\.\d%"),  # a step
        (lambda: run(calm() * np.linspace(1, 1.1, 2000)), r"second half's median is \+[45]\.\d%"),  # a ramp
        (lambda: run(calm() * np.linspace(1.1, 1, 2000)), r"second half's median is -[45]\.\d%"),
    ],
)
def test_a_run_that_is_not(bad: Callable[[], Run], words: str) -> None:
    found = doubts(bad(), STEADY, "single-stream")
    assert len(found) == 1
    assert re.search(words, found[0])


def test_a_warm_up_that_did_not_settle() -> None:
    assert doubts(run(calm()), WarmUp(100, 2.0, False), "single-stream") == ["the warm-up did not settle in 2.0 s"]


@pytest.mark.parametrize(
    ("scenario", "count", "doubtful"),
    [
        ("single-stream", 100, False),
        ("server", 999, True),
        ("multi-stream", 150, True),
        ("server", 1000, False),
        ("offline", 150, False),
    ],
)
def test_the_figure_that_counts_needs_its_runs(scenario: str, count: int, doubtful: bool) -> None:
    found = doubts(run(calm(count)), STEADY, scenario)
    assert [reason.startswith("p99, which only") for reason in found] == ([True] if doubtful else [])
    if count == 150:
        assert not found or "--seconds 15" in found[0]  # 2 s held 150: ten above p99 take 1000, and a tenth more to be sure


@pytest.mark.parametrize(
    ("queue", "grows"),
    [
        ({"first_fifth_ms": 1.0, "last_fifth_ms": 6.9, "behind_ms": 9.0}, False),
        ({"first_fifth_ms": 1.0, "last_fifth_ms": 7.1, "behind_ms": 9.0}, True),
        ({"first_fifth_ms": 1.0, "last_fifth_ms": 1.0, "behind_ms": 41.0}, True),
        ({"first_fifth_ms": 1.0, "last_fifth_ms": 1.0, "behind_ms": 39.0}, False),
    ],
)
def test_a_queue_that_grows(queue: dict[str, float], grows: bool) -> None:
    """Of a service of 1 ms: 2 + 5 times that may wait, and the last answer may come 2% of the 2 s late."""
    found = doubts(run(calm(), rate=700.0, service_ms={"p50": 1.0}, queue={**queue, "unserved": 0}), STEADY, "server")
    assert any("700 arrivals a second are more than it can serve" in reason for reason in found) is grows

"""Reading a line from CTC's probabilities: greedy, beam, and what beam search is for."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.runtime.ctc import read_line


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(key for key, _ in itertools.groupby(path) if key != 0)


def best_by_hand(scores: np.ndarray) -> dict[tuple[int, ...], float]:
    """The probability of every reading, over all alignments."""
    total: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        chance = float(np.prod([scores[t, c] for t, c in enumerate(path)]))
        total[collapsed(path)] = total.get(collapsed(path), 0.0) + chance
    return total


def distribution(values: list[list[float]]) -> np.ndarray:
    scores = np.array(values, np.float32) + 0.01
    return scores / scores.sum(1, keepdims=True)


tables = st.integers(1, 5).flatmap(
    lambda steps: st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=steps, max_size=steps)
)


@given(tables)
def test_greedy_is_the_best_path_collapsed(values: list[list[float]]):
    scores = distribution(values)
    read, confidence = read_line(scores)
    assert tuple(read) == collapsed(tuple(scores.argmax(1)))
    assert 0 <= confidence <= 1


@settings(deadline=None)
@given(tables)
def test_a_wide_beam_finds_the_most_likely_reading(values: list[list[float]]):
    scores = distribution(values)
    by_hand = best_by_hand(scores)
    read, _ = read_line(scores, beam=100)
    assert by_hand[tuple(read)] >= max(by_hand.values()) * (1 - 1e-4)


def test_beam_sees_what_greedy_misses():
    """Blank is likeliest at both steps, yet "a" in one of the two is likelier than nothing (Hannun et al.)."""
    scores = np.array([[0.6, 0.4], [0.6, 0.4]], np.float32)
    assert read_line(scores)[0] == []
    assert read_line(scores, beam=4)[0] == [1]


def test_a_doubled_character_needs_a_blank_between():
    sure = np.eye(3, dtype=np.float32)
    assert read_line(sure[[1, 1, 2]])[0] == [1, 2]
    assert read_line(sure[[1, 0, 1, 2]])[0] == [1, 1, 2]
    assert read_line(sure[[1, 0, 1, 2]], beam=8)[0] == [1, 1, 2]
    assert read_line(sure[[0, 0]]) == ([], 0.0)

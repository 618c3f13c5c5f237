"""Which layers stay float: as few as a budget takes, the most harmful first."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.quantization.budget import UNITS, Budget, by_share, fewest_float, returned_to_int8, tightened


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40))
def test_one_layer_fewer_misses(count: int, needed: int) -> None:
    order = [f"layer{i}" for i in range(count)]
    tried: list[int] = []

    def attempt(names: list[str]) -> int:
        assert names == order[count - len(names) :]  # the most harmful are left out
        tried.append(count - len(names))
        return tried[-1]

    found, met = fewest_float(order, attempt, lambda left: left >= needed, float)
    assert met == (needed <= count - 1)
    assert found == min(needed, count - 1)
    assert len(tried) == len(set(tried)) <= 8  # bisection, none twice


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0.0, 1.0)), min_size=1, max_size=8), st.floats(0.0, 1.0))
def test_a_share_leaves_the_noisiest_float_that_there_is_room_for(layers: list[tuple[int, float]], share: float) -> None:
    macs = {f"layer{i}": size for i, (size, _) in enumerate(layers)}
    noise = {f"layer{i}": power for i, (_, power) in enumerate(layers)}
    room = (1.0 - share) * sum(macs.values())
    chosen = by_share(noise, macs, room)
    left = {*macs} - {*chosen}
    assert sum(macs[name] for name in left) <= room
    if not room:
        assert not left  # nor what costs no multiply-accumulate
        return
    assert all(sum(macs[name] for name in left) + macs[name] > room for name in chosen)  # each one is needed
    subsets = (set(some) for size in range(len(macs) + 1) for some in itertools.combinations(macs, size))
    # units are rounded up: of a room smaller by one unit a layer, nothing better is known
    tight = room * (1 - len(macs) / UNITS)
    most = max(sum(noise[name] for name in some) for some in subsets if sum(macs[name] for name in some) <= tight)
    assert sum(noise[name] for name in left) >= most - 1e-9


def test_equal_layers_are_taken_from_the_least_harmful() -> None:
    macs, noise = dict.fromkeys("abcdefgh", 10), {name: 1.0 - i / 10 for i, name in enumerate("abcdefgh")}
    assert by_share(noise, macs, 40) == list("efgh")
    assert by_share(noise, macs, 72) == ["h"]
    assert by_share(noise, macs, 0) == by_share(noise, macs, -5) == list("abcdefgh")


def test_a_large_quiet_layer_does_not_hide_a_better_choice() -> None:
    assert by_share({"large": 0.3, "small": 0.2}, {"large": 90, "small": 40}, 90) == ["small"]
    assert by_share({"large": 0.3, "small": 0.2}, {"large": 90, "small": 40}, 80) == ["large"]


@pytest.mark.parametrize("budget", [Budget(1.0, 2.0), Budget(share=1.1), Budget(max_drop=-1.0), Budget(min_snr=float("nan"))])
def test_wrong_budgets(budget: Budget) -> None:
    with pytest.raises(UsageError):
        budget.checked()


class Tried(NamedTuple):
    names: list[str]


@pytest.mark.parametrize("needed", [1, 2, 5, 8])
def test_fewer_float_layers_are_found_with_the_dearer_attempt(needed: int) -> None:
    order, calls = [str(i) for i in range(12)], list[int]()

    def attempt(names: list[str]) -> Tried:
        calls.append(len(names))
        return Tried(names)

    found = tightened(order, Tried(order[8:]), attempt, lambda trial: len(order) - len(trial.names) >= needed)
    assert found.names == order[needed:]
    assert len(calls) <= 3


def test_small_layers_left_float_with_others_are_int8_again() -> None:
    macs = {"tiny": 1, "small": 5, "large": 100, "rest": 1000}
    order = list(macs)

    def met(trial: Tried) -> bool:
        return "large" not in trial.names

    found = returned_to_int8(order, Tried(["rest"]), macs, Tried, met)
    assert found.names == ["tiny", "small", "rest"]

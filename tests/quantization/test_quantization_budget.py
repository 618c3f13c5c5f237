"""Which layers stay float: as few as a budget takes, the most harmful first."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.quantization.budget import Budget, by_share, fewest_float, tightened


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
@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.floats(0.0, 1.0))
def test_a_share_needs_each_of_its_layers(sizes: list[int], share: float) -> None:
    macs = {f"layer{i}": size for i, size in enumerate(sizes)}
    order, total = list(macs), sum(sizes)
    chosen = by_share(order, macs, total, share)
    reached = sum(macs[name] for name in chosen)
    assert reached >= share * total
    if len(chosen) > 1:
        assert all(reached - macs[name] < share * total for name in chosen)
    least = order[order.index(min(chosen, key=order.index)) :] if chosen else []
    assert sum(macs[name] for name in least[1:]) < share * total or len(chosen) <= 1  # nothing more harmful than needed


def test_equal_layers_are_taken_from_the_least_harmful() -> None:
    macs = dict.fromkeys("abcdefgh", 10)
    assert sorted(by_share("abcdefgh", macs, 80, 0.5)) == list("efgh")
    assert by_share("abcdefgh", macs, 80, 0.1) == ["h"]


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

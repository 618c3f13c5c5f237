"""Progress off a terminal: a log says where a long work is, and a short one does not fill it."""

from __future__ import annotations

import pytest

from edgekit import progress


def test_a_log_hears_of_long_work_now_and_then(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar("training", 100) as advance:
        advance(40, "")  # what an earlier run has done
        for step in range(60):
            now[0] += 2
            advance(1, f"loss {step}")
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "training"
    assert said[1] == "training 55/100, 0:01:30 left  loss 14"  # 15 steps in 30 seconds, 45 to go
    assert len(said) == 1 + 4


def test_short_work_is_one_line_in_a_log(capfd: pytest.CaptureFixture[str]):
    with progress.bar("reading", 3) as advance:
        for _ in range(3):
            advance(1, "")
    assert capfd.readouterr().err == "reading\n"


@pytest.mark.parametrize(
    ("value", "digits", "words"),
    [
        (0.158712, 4, "0.1587"),
        (8348.4, 4, "8348"),
        (12449.7, 4, "12,450"),
        (4460.2, 3, "4,460"),
        (0.0, 4, "0"),
        (1e15, 4, "1e+15"),
    ],
)
def test_figures_have_no_powers_of_ten(value: float, digits: int, words: str) -> None:
    assert progress.short(value, digits) == words

"""How `bench` is asked to measure, and what cannot be asked."""

from __future__ import annotations

from typing import Any, NamedTuple

from edgekit.errors import UsageError

from .scenarios import MAX_ARRIVALS, SCENARIOS
from .stored import Stored

__all__ = ["STREAMS", "Asked", "check_threads"]

STREAMS, MAX_STREAMS = 8, 1024  # MLPerf's multi-stream asks for 8 samples at once
MAX_BATCH, MAX_THREADS = 1024, 1024


class Asked(NamedTuple):
    """``batch`` is of offline, ``streams`` of multi-stream, ``rate`` (arrivals a second) of server."""

    scenario: str
    seconds: float
    batch: int | None
    streams: int | None
    rate: float | None

    def given(self) -> dict[str, Any]:
        """``batch``, ``streams`` and ``rate``, where they were asked for."""
        given = {"batch": self.batch, "streams": self.streams, "rate": self.rate}
        return {key: value for key, value in given.items() if value is not None}

    def like(self, earlier: Stored) -> Asked:
        """What was not asked for as ``earlier`` had it: latencies of another batch, or under another load, tell nothing."""
        if earlier.scenario != self.scenario:
            return self
        return self._replace(
            batch=self.batch or (earlier.batch if self.scenario == "offline" else None),
            streams=self.streams or (earlier.streams if self.scenario == "multi-stream" else None),
            rate=self.rate or (earlier.rate if self.scenario == "server" else None),
        )

    def check(self) -> None:
        """Raises `UsageError` for what does not fit."""
        scenario, batch, streams, rate = self.scenario, self.batch, self.streams, self.rate
        self._check_kinds()
        if scenario not in SCENARIOS:
            raise UsageError(f"there is no scenario {scenario!r}", f"choose one of: {', '.join(SCENARIOS)}")
        if not 0.01 <= self.seconds <= 3600:
            raise UsageError(f"{self.seconds:g} seconds cannot be measured", "choose --seconds from 0.01 to 3600")
        if batch is not None and (scenario != "offline" or not 1 <= batch <= MAX_BATCH):
            raise UsageError(
                f"--batch {batch} does not fit the {scenario} scenario",
                f"use --scenario offline --batch N, N from 1 to {MAX_BATCH}",
            )
        if streams is not None and (scenario != "multi-stream" or not 1 <= streams <= MAX_STREAMS):
            raise UsageError(
                f"--streams {streams} does not fit the {scenario} scenario",
                f"use --scenario multi-stream --streams N, N from 1 to {MAX_STREAMS}",
            )
        if rate is not None and (scenario != "server" or not 0 < rate <= 1e6):
            raise UsageError(
                f"--rate {rate:g} does not fit the {scenario} scenario", "use --scenario server --rate N, N up to a million"
            )
        if rate is not None and rate * self.seconds > MAX_ARRIVALS:
            raise UsageError(
                f"{rate:g} arrivals a second for {self.seconds:g} s are over {MAX_ARRIVALS:,}", "lower --seconds or --rate"
            )

    def _check_kinds(self) -> None:
        if not isinstance(self.seconds, int | float):
            raise UsageError(f"seconds: {self.seconds!r} is no number", "give seconds=2.0 for example")
        if self.rate is not None and not isinstance(self.rate, int | float):
            raise UsageError(f"rate: {self.rate!r} is no number", "give rate=100.0 for example")
        for name, value in (("batch", self.batch), ("streams", self.streams)):
            if value is not None and type(value) is not int:
                raise UsageError(f"{name}: {value!r} is no whole number", f"give {name}=8 for example")


def check_threads(threads: int) -> None:
    """Raises `UsageError` for a number of cores that no backend takes."""
    if type(threads) is not int or not 0 <= threads <= MAX_THREADS:
        raise UsageError(f"threads: {threads!r} is no number of cores", f"give 0 (all of them) to {MAX_THREADS}")

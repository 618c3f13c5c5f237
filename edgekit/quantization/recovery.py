"""`auto`: where ranges come from, and which error recovery is worth having, by the output that each one leaves."""

from __future__ import annotations

from typing import NamedTuple

from edgekit.progress import say

from .bench import Bench, Ranges, affordable
from .graph import Parameters, insert
from .simulate import signal_to_noise, with_reference

__all__ = ["Recovered", "recover"]

JUDGED = (8, 256)  # held-out samples behind the choice of a recovery
WORTH_DB = 0.5  # operators in front of Q must gain this much at the output, fitting at all must gain something
METHODS = ("mse", "percentile", "minmax")
MARGINS = (1.1, 1.25)


class Recovered(NamedTuple):
    """Numbers, by which recovery, and the output SNR of each recovery that was tried, all int8; what the first was."""

    parameters: Parameters
    recovery: str
    tried: dict[str, float]
    ranges: Ranges
    rounded: Parameters


def recover(bench: Bench, method: str, extra: bool) -> Recovered:
    """A stated method as the books have it; ``auto``: the recovery with the best output, each step only where it helps."""
    if method != "auto":
        ranges = Ranges(method, method)
        rounded = bench.rounded(ranges)
        return Recovered(rounded, "none", {}, ranges, rounded)
    ranges = _ranges(bench)
    rounded = bench.rounded(ranges)
    names = bench.placement.names
    held = bench.pool.held_out.spread(affordable(JUDGED, 6 * sum(bench.macs.values())))
    best, recovery, tried = rounded, "none", {"none": bench.snr_db(rounded, held)}
    for trial in ("fitted", "shifted") if extra else ("fitted",):
        parameters = bench.fitted(rounded, names, trial)
        tried[trial] = bench.snr_db(parameters, held)
        say(f"{trial}: {tried[trial]:.1f} dB ({', '.join(f'{k} {v:.1f}' for k, v in tried.items() if k != trial)})")
        if tried[trial] > tried[recovery] + (WORTH_DB if trial == "shifted" else 0.0):
            best, recovery = parameters, trial
    return Recovered(best, recovery, {name: round(value, 2) for name, value in tried.items()}, ranges, rounded)


def _ranges(bench: Bench) -> Ranges:
    """The best of a few, all layers int8, on the samples of the study and as many held-out ones.

    The ranges have seen the former; a choice among this few has nothing to learn by heart, and the more samples judge it
    the less it is luck.
    """
    held = bench.pool.held_out.spread(bench.studied)
    judges = [*bench.study.batches, *with_reference(bench.original, held.batches(bench.batch))]

    def snr(ranges: Ranges) -> float:
        model = insert(bench.prepared, bench.placement, bench.rounded(ranges), bench.placement.names)
        return signal_to_noise(model, judges)

    pairs = {
        (method, products): None
        for method in METHODS
        for products in (method, *(("minmax",) if bench.placement.products else ()))
    }
    tried = {ranges: snr(ranges) for ranges in (Ranges(*pair) for pair in pairs)}
    best = max(tried, key=tried.__getitem__)
    tried |= {ranges: snr(ranges) for ranges in (best._replace(margin=margin) for margin in MARGINS)}
    return max(tried, key=tried.__getitem__)

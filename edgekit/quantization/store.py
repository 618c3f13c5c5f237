"""Weights that no layer of the int8 graph rounds, embedding tables and those of LSTM and GRU, as int8 where the output stays.

They are most of many a text model's file. They are dequantized where they are read: the sums are computed as before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from .bench import Bench, Candidate
from .simulate import signal_to_noise, with_reference
from .weight_only import KINDS, storable, stored_small

__all__ = ["left_float", "store"]

MOST_DB = 0.3  # of the output: what a smaller file may cost
MARGIN_DB = 10.0  # between the weights and the output: the samples may not have seen the rows that matter


def left_float(graph: onnx.GraphProto) -> int:
    """Bytes of the tables and recurrent weights that could be stored small, and are not."""
    some = {name for name, op in storable(graph).items() if any(op in kind for kind in KINDS)}
    return sum(4 * int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.name in some)


def store(bench: Bench, found: Candidate, kept: Callable[[Candidate], bool]) -> tuple[Candidate, tuple[str, ...]]:
    """The graph with tables and recurrent weights in int8, each kind where it costs next to nothing, and their names.

    ``kept``: whether a graph still meets the budget.
    """
    stored: tuple[str, ...] = ()
    least = found.snr_db - MOST_DB
    for kind in KINDS:
        names = [name for name, op in storable(found.model.graph).items() if op in kind]
        if not names:
            continue
        model, weights_db = stored_small(found.model, names)
        if weights_db < found.snr_db + MARGIN_DB:
            continue
        snr = signal_to_noise(model, with_reference(bench.original, bench.judging()))
        if snr < least:
            continue
        smaller = found._replace(model=model, snr_db=snr, drop=None if found.drop is None else bench.drop(model))
        if kept(smaller):
            found, stored = smaller, (*stored, *names)
    return found, stored

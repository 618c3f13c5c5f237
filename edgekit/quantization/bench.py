"""What every candidate of one calibration is made from and measured with."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import onnx

from edgekit.errors import GraphError
from edgekit.graphs.dequantize import quantized_nodes

from .graph import Parameters, insert
from .journal import Journal
from .memory import give_back
from .placement import Placement, kept_float, multiply_accumulates, place, shape_tensors, weights_of, without
from .prepare import prepare
from .reconstruct import reconstruct
from .rounding import weight_scales
from .samples import Pool, Samples
from .sensitivity import Study, share_right
from .simulate import Array, Feeds, Simulator, measured_shapes, observe, signal_to_noise, with_reference
from .statistics import METHODS, Statistics, scale_of
from .weight_only import storable

__all__ = ["Bench", "Candidate", "Ranges", "affordable", "make_bench"]

STUDIED = (2, 64)  # samples behind the sensitivities: fewest and most
LABELLED = (0, 256)  # samples behind the points that each layer costs
STUDIED_BYTES = 16 << 20  # of inputs and float outputs that are held meanwhile
FITTED = (16, 128)  # samples behind the fitted weights
SPOOLED_BYTES = 2 << 30  # on disk meanwhile
WORK = 4 * 10**11  # multiply-accumulates that each of these may cost: a minute on one core
BATCH_BYTES = 16 << 20  # of tensors that one run shows


class Candidate(NamedTuple):
    """An int8 graph that was tried. ``drop`` in points of top-1, where labels are at hand."""

    names: list[str]
    parameters: Parameters
    model: onnx.ModelProto
    snr_db: float
    drop: float | None


class Ranges(NamedTuple):
    """Where ranges come from: a method for all tensors, one for those that only products read, and how far to widen them.

    Attention hangs on its largest scores, which a squared error over all of them may clip; and few samples have not shown
    how large a tensor becomes.
    """

    method: str
    products: str
    margin: float = 1.0


class Bench(NamedTuple):
    """The graph as it came and as it is quantized, what is known of its tensors, and the samples."""

    original: onnx.ModelProto
    prepared: onnx.ModelProto
    placement: Placement
    macs: dict[str, int]
    pool: Pool
    batch: int
    statistics: dict[str, Statistics]  # by tensor
    grouped: dict[str, Statistics]  # by group
    study: Study
    first: Feeds
    journal: Journal
    studied: int  # samples behind `study`
    right: Callable[[], float]  # share of the labelled samples that the float graph has right, counted once

    def rounded(self, ranges: Ranges) -> Parameters:
        """Ranges as stated, weights rounded to nearest."""
        placement = self.placement
        layers = {placement.groups[layer.data] for layer in placement.layers}
        products = {placement.groups[name] for product in placement.products for name in product.inputs} - layers
        scales = {
            name: scale_of(ranges.margin * METHODS[ranges.products if name in products else ranges.method](seen))
            for name, seen in self.grouped.items()
        }
        weights, axes = weights_of(self.prepared, placement), {layer.name: layer.axis for layer in placement.layers}
        how = "minmax" if ranges.method == "minmax" else "mse"
        return Parameters(scales, {name: weight_scales(w, axes[name], how) for name, w in weights.items()})

    def fitted(self, parameters: Parameters, names: Sequence[str], recovery: str) -> Parameters:
        """Weights fitted layer by layer, for these layers int8."""
        cost = 6 * sum(self.macs.values())
        live = sum(seen.count for seen in self.statistics.values()) // max(len(self.pool.calibration), 1)
        count = min(affordable(FITTED, cost), max(FITTED[0], SPOOLED_BYTES // max(4 * live, 1)))
        some = self.pool.calibration.spread(count)
        # Every fourth batch judges: it must not be of one kind where samples come in turns, class after class.
        some = some.take([int(i) for i in np.random.default_rng(0).permutation(len(some))])
        size = max(1, min(self.batch, len(some) // 8))

        def batches() -> Iterator[Feeds]:
            return some.batches(size)

        stage = hashlib.sha256("\0".join([recovery, *names]).encode()).hexdigest()[:16]

        def recall(step: str, make: Callable[[], dict[str, Array]]) -> dict[str, Array]:
            return self.journal.recall(f"{recovery}/{stage}/{step}", make)

        return reconstruct(
            self.prepared, self.placement, parameters, names, batches, extra=recovery == "shifted", recall=recall
        )

    def candidate(self, names: list[str], parameters: Parameters, labelled: bool) -> Candidate:
        """Quantize these layers, measure on samples that gave no range and no weight; they chose among a dozen graphs."""
        model = insert(self.prepared, self.placement, parameters, names)
        snr = signal_to_noise(model, with_reference(self.original, self.judging()))
        return Candidate(names, parameters, model, snr, self.drop(model) if labelled else None)

    def drop(self, model: onnx.ModelProto) -> float:
        """Points of top-1 that an int8 graph loses on the labelled samples."""
        return 100 * (self.right() - share_right(Simulator(model), self.pool.labelled))

    def judging(self) -> Iterator[Feeds]:
        return self.pool.held_out.batches(self.batch) if len(self.pool.held_out) else iter([self.first])

    def snr_db(self, parameters: Parameters, held: Samples) -> float:
        """Output SNR of the graph with all layers int8."""
        model = insert(self.prepared, self.placement, parameters, self.placement.names)
        judges = held.batches(self.batch) if len(held) else iter([self.first])
        return signal_to_noise(model, with_reference(self.original, judges))


def make_bench(graph: bytes, pool: Pool, journal: Journal, keep_float: Sequence[str] = ()) -> Bench:
    """Observe all that will be quantized; ``journal`` knows what was seen before. Raises `GraphError` where nothing can be."""
    prepared = prepare(graph)
    placement = kept_float(place(prepared), keep_float)
    if not placement.names:
        reasons = "; ".join(sorted({f"{node.op}: {node.reason}" for node in placement.unquantized})[:3])
        raise GraphError(
            f"the graph has no layer to quantize ({reasons or 'no Conv, Gemm or MatMul'})",
            "its tables and recurrent weights can be stored small: --format weights8"
            if storable(prepared.graph)
            else "build it as it is: edgekit build B",
        )
    original = onnx.load_model_from_string(graph)
    if quantized_nodes(original):  # what is rounded already is no reference: the same graph made float is
        original = prepared
    first = pool.calibration.read(0)
    wanted = list(dict.fromkeys([*shape_tensors(prepared, placement), *placement.groups]))
    shapes = measured_shapes(prepared, wanted, first)
    shown = {name: 4 * int(np.prod(shapes[name], dtype=np.int64)) for name in placement.groups}
    batch = int(np.clip(BATCH_BYTES // max(sum(shown.values()), 1), 1, 64))
    statistics = observe(prepared, shown, lambda: pool.calibration.batches(batch), BATCH_BYTES, journal.recall)
    give_back()
    placement = _reached(placement, statistics)
    macs = multiply_accumulates(prepared, placement, shapes)
    grouped: dict[str, Statistics] = {}
    for name, group in placement.groups.items():
        grouped[group] = grouped[group].merged(statistics[name]) if group in grouped else statistics[name]
    ends = measured_shapes(original, [value.name for value in original.graph.output], first)
    size = 4 * sum(int(np.prod(shape, dtype=np.int64)) for shape in ends.values()) + sum(a.nbytes for a in first.values())
    count = min(affordable(STUDIED, 4 * len(placement.names) * sum(macs.values())), max(2, STUDIED_BYTES // max(size, 1)))
    studied = pool.calibration.spread(count)
    known = pool.labelled if pool.labelled.targets is not None else pool.labelled.take([])
    labelled = known.spread(affordable(LABELLED, len(placement.names) * sum(macs.values())))
    study = Study(prepared, placement, list(with_reference(original, studied.batches(batch))), labelled)
    right = functools.cache(lambda: share_right(Simulator(original), pool.labelled))
    return Bench(
        original, prepared, placement, macs, pool, batch, statistics, grouped, study, first, journal, len(studied), right
    )


def _reached(placement: Placement, statistics: dict[str, Statistics]) -> Placement:
    """Without the layers that no sample reached: rows that a Where or NonZero picked, and never did."""
    empty = {name for name, seen in statistics.items() if not seen.count}
    if not empty:
        return placement
    some = [layer.name for layer in placement.layers if layer.data in empty]
    some += [product.name for product in placement.products if empty & {*product.inputs}]
    found = without(placement, dict.fromkeys(some, "no sample reached it"), empty)
    if not found.names:
        raise GraphError("no sample reached a layer that could be quantized", "give samples that run through the whole graph")
    return found


def affordable(limits: tuple[int, int], cost: int) -> int:
    """How many samples at ``cost`` multiply-accumulates each fit `WORK`, within the limits. No clock: the same everywhere."""
    return int(np.clip(WORK // max(cost, 1), *limits))

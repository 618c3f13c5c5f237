"""Inputs on which a foreign graph runs, found by trying: the sizes that nobody states, and numbers that it takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgekit.errors import EdgekitError, GraphError, first_line
from edgekit.runtime.golden import compare_arrays

from . import passes
from .shapes import Axis

__all__ = ["MAX_RELATIVE", "Feeds", "outputs", "trial_feeds"]

_PARAMETERS = "give inputs that are parameters their values: --constant NAME:V; or state --shape"
_FAILS = "ONNX Runtime fails on the graph"
MAX_RELATIVE = 1e-4  # as the bundle's golden tolerance
SEEDS = 3  # the first becomes golden, all are compared
SAMPLES = (4, 1)  # golden samples tried along a dynamic first axis
SIZES = (64, 32, 128, 224, 256, 16, 8, 1, 512, 640, 2048, 16000)  # tried for dynamic axes without a range
MAX_GOLDEN_AXIS = 640
MAX_TRIED = 1 << 22  # elements of an input of sizes that nobody stated
Feeds = dict[str, NDArray[Any]]


def outputs(run: Any, feeds: Feeds) -> Feeds:
    names = [value.name for value in run.get_outputs()]
    try:
        return dict(zip(names, run.run(names, feeds), strict=True))
    except Exception as error:  # noqa: BLE001  ONNX Runtime raises many types of its own
        raise GraphError(f"{_FAILS}: {first_line(error)[:300]}", _PARAMETERS) from None


def _sizes(model: onnx.ModelProto, ranges: Mapping[str, Axis]) -> Iterator[tuple[dict[str, int], set[str]]]:
    """(sizes to try for the symbols of the inputs, which nameless ones go with the batch), likeliest first."""
    first = {passes.dims(i)[0] for i in model.graph.input if passes.dims(i)} - {None}
    symbols = {d for i in model.graph.input for d in passes.dims(i) if isinstance(d, str)}
    nameless = {f"{i.name}_{axis}" for i in model.graph.input for axis in range(1, len(passes.dims(i)))} & symbols
    like_batch = [set[str](), *({name} for name in sorted(nameless)), nameless] if nameless else [set()]
    for samples, size, batched in itertools.product(SAMPLES, SIZES, like_batch):
        chosen = {}
        for symbol in sorted(symbols):
            wanted = samples if symbol in first or symbol in batched else size
            if symbol in ranges:
                low, high = ranges[symbol]
                wanted = min(high, samples if symbol in first else MAX_GOLDEN_AXIS)
                wanted = max(low, wanted)
            chosen[symbol] = wanted
        yield chosen, batched
        if not symbols - first - set(ranges) and samples == SAMPLES[-1]:
            return


def trial_feeds(run: Any, model: onnx.ModelProto, ranges: Mapping[str, Axis], notes: list[str]) -> list[Feeds]:
    """Seeded random inputs on which the original runs, repeats itself and stays finite: `SEEDS` of them.

    Where no inputs leave it finite, infinities beside numbers will do, as masks make them; a NaN never.
    """
    failure: EdgekitError | None = None
    for sizes, batched in _sizes(model, ranges):
        shapes = (
            [sizes.get(axis, axis) if isinstance(axis, str) else axis or 1 for axis in passes.dims(v)]
            for v in model.graph.input
        )
        if failure and any(math.prod(map(int, shape)) > MAX_TRIED for shape in shapes):
            continue
        masked: tuple[str, list[Feeds]] | None = None
        for kind in ("normal", "uniform", "small", "above"):
            trials = [_random(model, sizes, kind, seed) for seed in range(SEEDS)]
            try:
                truths = [outputs(run, feeds) for feeds in trials]
                twice = outputs(run, trials[0])
            except GraphError as error:
                failure = failure or error
                continue
            floats = [value for truth in truths for value in truth.values() if value.dtype.kind in "fc"]
            if not all(np.isfinite(value).all() for value in floats):
                failure = failure or GraphError("the graph's outputs are not finite on random inputs", _PARAMETERS)
                if not masked and all(_masked(value) for value in floats):
                    masked = kind, trials
                continue
            _check_repeats(truths[0], twice)
            return _chosen(run, model, (sizes, batched, ranges), (kind, trials), notes)
        if masked:
            kind, trials = masked
            _check_repeats(outputs(run, trials[0]), outputs(run, trials[0]))
            return _chosen(run, model, (sizes, batched, ranges), masked, notes)
    if failure and ranges and failure.message.startswith(_FAILS):
        raise _outside({name: min(axis.high, MAX_GOLDEN_AXIS) for name, axis in ranges.items()}, failure)
    raise failure or GraphError("the graph has no inputs", "give it one; a constant needs no model")


def _masked(value: NDArray[Any]) -> bool:
    """Whether infinities stand beside numbers: in an output that is infinite throughout, something was divided by zero."""
    return not np.isnan(value).any() and (not value.size or bool(np.isfinite(value).any()))


def _check_repeats(once: Feeds, twice: Feeds) -> None:
    if any(compare_arrays(once[name], twice[name]).relative > MAX_RELATIVE for name in once):
        raise GraphError("the graph gives other outputs on the same inputs", "export it in inference mode, without dropout")


def _chosen(
    run: Any,
    model: onnx.ModelProto,
    axes: tuple[dict[str, int], set[str], Mapping[str, Axis]],
    found: tuple[str, list[Feeds]],
    notes: list[str],
) -> list[Feeds]:
    """The trials that were found, and inputs of the other sizes that the graph is to take; a note on what nobody stated.

    ``axes``: sizes of the trials, the symbols that go with the batch, the stated ranges. ``found``: kind and trials.
    """
    (sizes, batched, ranges), (kind, trials) = axes, found
    ends = list[Feeds]()

    def tried(wanted: Mapping[str, int]) -> GraphError | None:
        """Why the graph does not run at these sizes; else the inputs of them are among ``ends``."""
        feeds = _random(model, {**sizes, **wanted}, kind, SEEDS)
        try:
            answer = outputs(run, feeds)
        except GraphError as error:
            return error
        if all(_masked(value) for value in answer.values() if value.dtype.kind in "fc"):
            ends.append(feeds)
        return None

    for wanted in _stated_ends(model, sizes, ranges, notes):
        if error := tried(wanted):
            raise _outside(wanted, error) from None
    baked = _baked_in(_one_sample(model, sizes, batched, ranges), tried)
    single = {name for name in _firsts(model) if name not in ranges and sizes.get(name) == 1}  # four were tried before
    sizes = _tied(model, batched, sizes)
    if alone := {name: size for name, size in sizes.items() if name in single}:
        _fix(model, alone)
        notes.append(f"it runs with one sample only: {_sizes_text(alone)} is fixed; state where it runs by --dynamic")
    if fixed := {name: size for name, size in sizes.items() if name in baked}:
        _fix(model, fixed)
        notes.append(f"it does not run with one sample: {_sizes_text(fixed)} is fixed; state where it runs by --dynamic")
    if unstated := {name: size for name, size in sizes.items() if name not in {*ranges, *fixed, *alone}}:
        notes.append(f"golden outputs were made with {_sizes_text(unstated)}")
    return [*trials, *ends]


def _stated_ends(
    model: onnx.ModelProto, sizes: Mapping[str, int], ranges: Mapping[str, Axis], notes: list[str]
) -> Iterator[dict[str, int]]:
    """The smallest and the largest sizes that are stated: what a graph bakes in of the size at which it was traced shows at
    another one only. Not those that would fill the memory, with a note."""
    seen = [{name: sizes[name] for name in sizes if name in ranges}]
    for which in (0, 1):
        wanted = {name: ranges[name][which] for name in sizes if name in ranges}
        if wanted in seen:
            continue
        seen.append(wanted)
        all_ = {**sizes, **wanted}
        shapes = ([all_.get(d, 1) if isinstance(d, str) else d or 1 for d in passes.dims(v)] for v in model.graph.input)
        if all(math.prod(shape) <= MAX_TRIED for shape in shapes):
            yield wanted
        else:
            notes.append(f"not tried at {_sizes_text(wanted)}: too large for an import")


def _one_sample(
    model: onnx.ModelProto, sizes: Mapping[str, int], batched: set[str], ranges: Mapping[str, Axis]
) -> list[set[str]]:
    """Groups of symbols that would be 1 together for one sample, of which nobody stated anything."""
    names = [name for name in _firsts(model) if name not in ranges and sizes.get(name, 1) > 1]
    return [{name, *(batched if index == 0 else ())} for index, name in enumerate(names)]


def _firsts(model: onnx.ModelProto) -> list[str]:
    """The symbols of first axes."""
    first = [passes.dims(value)[0] for value in model.graph.input if passes.dims(value)]
    return [name for name in dict.fromkeys(first) if isinstance(name, str)]


def _baked_in(groups: list[set[str]], tried: Callable[[Mapping[str, int]], GraphError | None]) -> set[str]:
    """The symbols whose size cannot be 1: of all groups together, or where that does not run, of each by itself."""
    together: set[str] = set().union(*groups)
    if not together or not tried(dict.fromkeys(together, 1)):
        return set()
    alone = [group for group in groups if len(groups) == 1 or tried(dict.fromkeys(group, 1))]
    return set().union(*alone)


def _sizes_text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def _outside(refused: Mapping[str, int], error: EdgekitError) -> GraphError:
    return GraphError(
        f"the graph does not run at {_sizes_text(refused)}, which --dynamic states: {error.message}"[:500],
        "state the range in which it runs, or fix the axis by --shape",
    )


def _fix(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Give axes their only size, in place."""
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in sizes:
                axis.dim_value = sizes[axis.dim_param]
    del model.graph.value_info[:]


def _tied(model: onnx.ModelProto, batched: set[str], sizes: dict[str, int]) -> dict[str, int]:
    """Nameless axes that only ran with the batch's size get its name, in place; the sizes that are left."""
    first = {passes.dims(i)[0] for i in model.graph.input if passes.dims(i) and isinstance(passes.dims(i)[0], str)}
    if not batched or len(first) != 1:
        return sizes
    (batch,) = first
    for value in model.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in batched:
                axis.dim_param = batch
    return {symbol: size for symbol, size in sizes.items() if symbol not in batched}


def _random(model: onnx.ModelProto, sizes: Mapping[str, int], kind: str, seed: int) -> Feeds:
    """One set of inputs. Floats: standard normal, 0..1, or 1..2 (logarithms, roots); integers: 0..7, 0..1 (indices must stay
    small), 1..7 (divisors), or the number that the graph compares them with (a sampling rate); bools."""
    random, known = np.random.default_rng(seed), _compared(model.graph)
    feeds: Feeds = {}
    for value in model.graph.input:
        shape = tuple(sizes[d] if isinstance(d, str) else int(d or 1) for d in passes.dims(value))
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        if dtype.kind == "f":
            floats = random.normal(size=shape) if kind == "normal" else random.uniform(size=shape) + (kind == "above")
            feeds[value.name] = np.asarray(floats).astype(dtype)
        else:
            high = 2 if dtype.kind == "b" or kind == "small" else 8
            low = int(kind == "above" and dtype.kind != "b")
            feeds[value.name] = np.asarray(random.integers(low, high, size=shape)).astype(dtype)
            if value.name in known:
                feeds[value.name][...] = known[value.name]
    return feeds


def _compared(graph: onnx.GraphProto) -> dict[str, int]:
    """Integer inputs that an Equal holds against a constant -> the first such constant."""
    known = {tensor.name: tensor for tensor in graph.initializer}
    known |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant" and node.attribute}
    inputs = {value.name for value in graph.input}
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Equal" and (names := inputs & set(node.input)) and (others := known.keys() & set(node.input)):
            values = onnx.numpy_helper.to_array(known[others.pop()])
            if values.size == 1 and values.dtype.kind in "iu":
                found.setdefault(names.pop(), int(values.ravel()[0]))
    return found

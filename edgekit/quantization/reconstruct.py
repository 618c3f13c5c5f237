"""Layer by layer through the graph: choose how each input becomes int8, then fit and round the weights to what arrives.

What arrives is what the quantized layers before have made of it, so each layer also mends their errors, as far as it can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekit.graphs.sparsity import dense_layers
from edgekit.progress import track

from .graph import Parameters, Quantizer, difference, insert, merged, scaled_weight
from .memory import give_back
from .placement import Layer, Placement
from .prepare import constants
from .ranges import Drawn, Reader, propose
from .rounding import SWEEPS, Moments, Rounded, clip_scales, fit_and_round, round_to_scales
from .simulate import Feeds, Recall
from .statistics import LEVELS
from .streams import Stream, sequence_lives
from .unfold import Unfolding, unfolding

__all__ = ["reconstruct"]

Array = NDArray[Any]
ROWS = (2048, 16384)  # rows of a layer that are looked at: fewest and most
DRAWN = (2048, 1 << 17)  # rows behind the choice of a range: at least so many, more where they are few values
WORK = 4 * 10**11  # multiply-accumulates that the second moments of all layers may cost
WIDEST = 1152  # inputs whose second moments are kept whole: 10 MB
BLOCK = 384  # wider layers in blocks of at most so many
HELD_OUT = 4  # every fourth batch judges the ridge and the quantizer
JUDGES = 1024  # rows of those that are kept to judge, of all layers that share their weights
TRIAL = 4  # a trial sees a fourth of the rows
WORTH = 0.8  # an operator in front of Q must take a fifth of a layer's error away


class _Unit(NamedTuple):
    """Layers that share their weights, in the graph's order, with their geometry; ``start`` and ``end`` node indices."""

    layers: tuple[Layer, ...]
    unfolding: Unfolding
    start: int
    end: int


def reconstruct(
    prepared: onnx.ModelProto,
    placement: Placement,
    parameters: Parameters,
    chosen: Collection[str],
    batches: Callable[[], Iterator[Feeds]],
    *,
    extra: bool = True,
    recall: Recall | None = None,
) -> Parameters:
    """Better numbers for the chosen layers than ``parameters``, by the samples in ``batches``.

    ``extra`` allows Sub, Mul and Pad in front of QuantizeLinear where they take a fifth of a layer's input error away.
    Layers with no simple geometry (`unfolding`) keep what they have; zeros of layers with the 2:4 pattern stay zero.
    ``recall`` remembers what each step gave (`Journal`): the streams then run again, so that all that follows sees the same
    numbers, but nothing is fitted twice.
    """
    work = _Reconstruction(prepared, placement, parameters, set(chosen), extra)
    units = work.units()
    if not units:
        return parameters
    with Stream(prepared, batches()) as exact, Stream(prepared, batches()) as rounded:
        for i, unit in enumerate(track(units, "fitting layers")):
            exact.advance(unit.start, lambda model: model)
            rounded.advance(unit.start, work.rewrite)

            def fit(unit: _Unit = unit) -> dict[str, Array]:
                before = work.parameters
                work.fit(unit, exact, rounded)
                return difference(before, work.parameters)

            found = recall(str(i), fit) if recall else fit()
            work.take(unit, found)
            give_back()
    return work.parameters


class _Reconstruction:
    def __init__(
        self, prepared: onnx.ModelProto, placement: Placement, parameters: Parameters, chosen: set[str], extra: bool
    ) -> None:
        self.prepared, self.placement, self.parameters, self.extra = prepared, placement, parameters, extra
        self.chosen = chosen
        self.position = {node.name: i for i, node in enumerate(prepared.graph.node)}
        self.made = {name: i + 1 for i, node in enumerate(prepared.graph.node) for name in node.output}  # the index behind
        known = constants(prepared.graph)
        self.known = known
        self.fitted = {name for name in chosen if name not in {layer.name for layer in placement.layers}}
        self.shapes: dict[str, Unfolding] = {}
        within = sequence_lives(prepared)
        for layer in placement.layers:
            at = self.position[layer.name]
            node = prepared.graph.node[at]
            if any(at in life for life in within):
                continue
            found = unfolding(layer, node, tuple(known[layer.weight].dims))
            foreign_bias = not layer.biased and layer.bias is not None
            if found is not None and not foreign_bias:
                self.shapes[layer.name] = found
        self.sparse = {layer.name for layer in dense_layers(prepared) if layer.sparse}
        self.plain = _plain_sites(placement, self.shapes)
        self.decided: set[str] = set()

    def units(self) -> list[_Unit]:
        shared: dict[tuple[str, str, int, int], list[Layer]] = {}
        for layer in self.placement.layers:
            if layer.name in self.chosen and layer.name in self.shapes:
                shared.setdefault(layer.shares, []).append(layer)
            elif layer.name in self.chosen:
                self.fitted.add(layer.name)  # rounded only, and so ready from the start
        found = []
        for layers in shared.values():
            at = [self.position[layer.name] for layer in layers]
            found.append(_Unit(tuple(layers), self.shapes[layers[0].name], min(at), max(at) + 1))
        return sorted(found, key=lambda unit: unit.start)

    def rewrite(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A stretch of the graph with all that is decided quantized."""
        return insert(model, self.placement, self.parameters, self.fitted)

    def fit(self, unit: _Unit, exact: Stream, rounded: Stream) -> None:
        site = self.placement.sites[unit.layers[0].data]
        if site not in self.decided:
            self._decide(site, unit, exact, rounded)
        quantizer = self.parameters.quantizers.get(site)
        found, gathered = self._solve(unit, quantizer, exact, rounded, 1)
        self._store(unit, found, gathered, self._biased(unit, quantizer))

    def take(self, unit: _Unit, found: dict[str, Array]) -> None:
        """What `fit` changed; nothing new where it has just run."""
        self.parameters = merged(self.parameters, found)
        self.decided.add(self.placement.sites[unit.layers[0].data])
        self.fitted |= {layer.name for layer in unit.layers}

    def _biased(self, unit: _Unit, quantizer: Quantizer | None) -> bool:
        shifted = quantizer is not None and quantizer.shift is not None
        return all(layer.biased or shifted for layer in unit.layers)

    def _solve(
        self, unit: _Unit, quantizer: Quantizer | None, exact: Stream, rounded: Stream, thinned: int
    ) -> tuple[Rounded, _Gathered]:
        """The unit's weights for one quantizer of its inputs; None: each tensor keeps the scale of its group."""
        biased = self._biased(unit, quantizer)
        weight = numpy_helper.to_array(self.known[unit.layers[0].weight])
        matrix = unit.unfolding.matrix(scaled_weight(weight, unit.layers[0], quantizer.factor if quantizer else None))
        tie = None
        if unit.layers[0].op == "ConvTranspose":
            tie = unit.unfolding.output_scales(np.arange(weight.shape[1]))[0]
        inputs = unit.unfolding.inputs
        blocks = 1 if inputs <= WIDEST else -(-inputs // BLOCK)
        gathered = self._gather(unit, quantizer, matrix, exact, rounded, blocks, thinned)
        sparse = unit.layers[0].name in self.sparse  # what is 2:4 stays 2:4
        if blocks > 1:
            nearest, fitted = _in_blocks(matrix, gathered, blocks, biased, sparse)
            return (fitted if gathered.error(fitted, biased) < gathered.error(nearest, biased) else nearest), gathered
        sweeps = SWEEPS if thinned == 1 else 0
        mask = matrix != 0 if sparse else None
        found = fit_and_round(matrix, gathered.fit, gathered.held_out, tie, biased=biased, sweeps=sweeps, mask=mask)
        return found, gathered

    def _decide(self, site: str, unit: _Unit, exact: Stream, rounded: Stream) -> None:
        """The quantizer of a site, from all its chosen layers; the first of them is measured with each that is proposed."""
        self.decided.add(site)
        if site in self.plain:
            return
        layers = [x for x in self.placement.layers if self.placement.sites[x.data] == site and x.name in self.chosen]
        proposals: list[Quantizer | None] = [*self._proposals(layers, rounded)]
        if not proposals:
            return
        if len({layer.data for layer in layers}) > 1:  # tensors that share nothing but weights may need scales of their own
            proposals.insert(1, None)
        elif not self._alone(site):  # a scale of its own parts it from the tensors on the other side of a Concat
            proposals.insert(0, None)
        best, chosen = np.inf, proposals[0]
        if len(proposals) > 1:
            for quantizer in proposals:
                found, gathered = self._solve(unit, quantizer, exact, rounded, TRIAL)
                error = gathered.error(found, self._biased(unit, quantizer))
                dearer = (chosen is None and not self._alone(site)) or (_is_plain(chosen) and not _is_plain(quantizer))
                if error < (WORTH * best if dearer else best):
                    best, chosen = error, quantizer
        if chosen is not None:
            self._settle(site, chosen)

    def _settle(self, site: str, quantizer: Quantizer) -> None:
        """A plain scale becomes that of the tensor's group where no other tensor is in it, so that all readers share a pair."""
        parameters, groups = self.parameters, self.placement.groups
        if quantizer.plain and self._alone(site) and list(self.placement.sites.values()).count(site) == 1:
            self.parameters = dataclasses.replace(parameters, scales={**parameters.scales, groups[site]: quantizer.scale})
        else:
            self.parameters = dataclasses.replace(parameters, quantizers={**parameters.quantizers, site: quantizer})

    def _alone(self, site: str) -> bool:
        """Whether no other quantized tensor shares its scale."""
        groups = self.placement.groups
        return [name for name, group in groups.items() if group == groups[site]] == [site]

    def _proposals(self, layers: list[Layer], rounded: Stream) -> list[Quantizer]:
        tensors = list(dict.fromkeys(layer.data for layer in layers))
        end = max((self.made.get(tensor, 0) for tensor in tensors), default=0)
        shape = self.shapes[layers[0].name]
        rows: tuple[list[Array], list[Array]] = ([], [])
        low, high = np.full((2, shape.channels), np.inf), np.full((2, shape.channels), -np.inf)
        wanted = max(DRAWN[0], DRAWN[1] // shape.channels)
        each = max(wanted // max(rounded.count * len(tensors), 1), 16)
        for i, feeds in enumerate(rounded.look(max(end, rounded.position), tensors, self.rewrite)):
            half = i % 2
            for tensor in tensors:
                found = shape.channel_rows(feeds[tensor])
                if not len(found):
                    continue
                low[half], high[half] = np.minimum(low[half], found.min(0)), np.maximum(high[half], found.max(0))
                at = np.random.default_rng([i, len(found)]).choice(len(found), min(each, len(found)), replace=False)
                rows[half].append(found[np.sort(at)].astype(np.float32))
        readers = {}
        for layer in layers:
            value = numpy_helper.to_array(self.known[layer.weight])
            readers[layer.weight] = Reader(self.shapes[layer.name], self.shapes[layer.name].matrix(value))
        if any(any(reader.unfolding.pads) for reader in readers.values()):
            low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)  # padded zeros must be representable
        halves = [Drawn(np.concatenate(part), low[i], high[i]) for i, part in enumerate(rows) if part]
        return [] if not halves else propose(halves, list(readers.values()), extra=self.extra)

    def _gather(
        self, unit: _Unit, quantizer: Quantizer | None, matrix: Array, exact: Stream, rounded: Stream, blocks: int, thinned: int
    ) -> _Gathered:
        groups, inputs, outputs = matrix.shape
        size = -(-inputs // blocks)
        gathered = _Gathered(groups * blocks, size, 1 if blocks > 1 else outputs, JUDGES // len(unit.layers))
        cost = groups * inputs * (size + outputs)
        limit = int(np.clip(WORK // max(len(self.chosen), 1) // max(cost, 1), *ROWS))
        limit = max(limit // max(exact.count * len(unit.layers) * thinned, 1), 8)
        expanded = {
            layer.name: _expanded(quantizer or self.parameters.quantizer(self.placement, layer.data), unit.unfolding)
            for layer in unit.layers
        }
        last = max(self.made.get(layer.data, 0) for layer in unit.layers)
        seen = rounded.look(max(last, rounded.position), [layer.data for layer in unit.layers], self.rewrite)
        wanted = exact.look(unit.end, [layer.output for layer in unit.layers], lambda model: model)
        for i, (have, want) in enumerate(zip(seen, wanted, strict=True)):
            for layer in unit.layers:
                shape = self.shapes[layer.name]
                if not have[layer.data].size:
                    continue
                x, y = shape.rows(have[layer.data], want[layer.output], limit, i)
                x = _moved(x, expanded[layer.name])
                gathered.means(layer.name, x, y, i % HELD_OUT == HELD_OUT - 1 or exact.count < HELD_OUT)
                if blocks > 1:
                    padded = np.pad(x, ((0, 0), (0, 0), (0, size * blocks - inputs)))
                    x = padded.reshape(groups, -1, blocks, size).transpose(0, 2, 1, 3).reshape(groups * blocks, -1, size)
                    y = np.zeros((groups * blocks, x.shape[1], 1), np.float32)
                # in blocks nothing is fitted, and so nothing held out: two sets of moments would be most of the memory
                gathered.add(x, y, blocks == 1 and i % HELD_OUT == HELD_OUT - 1)
        return gathered

    def _store(self, unit: _Unit, found: Rounded, gathered: _Gathered, biased: bool) -> None:
        parameters = self.parameters
        integers, weights, biases = dict(parameters.integers), dict(parameters.weights), dict(parameters.biases)
        scales = unit.unfolding.channel_scales(found.scales).astype(np.float32)
        matrix = found.integers * found.scales[:, None, :]
        for layer in unit.layers:
            integers[layer.name] = unit.unfolding.weight(found.integers)
            weights[layer.name] = scales
            if not biased or layer.name not in gathered.sums:  # no row of any sample came by
                continue
            x, y, count = gathered.sums[layer.name]
            bias = unit.unfolding.bias(y / count - np.einsum("gk,gko->go", x / count, matrix))
            if layer.bias and layer.biased != layer.name:  # the Add behind a MatMul: the output did not hold it yet
                bias = bias + numpy_helper.to_array(self.known[layer.bias]).astype(np.float64).ravel()
            biases[layer.name] = bias.astype(np.float32)
        self.parameters = dataclasses.replace(parameters, integers=integers, weights=weights, biases=biases)


def _plain_sites(placement: Placement, shapes: dict[str, Unfolding]) -> set[str]:
    """Sites that keep the scale of their group: a reader is only rounded, or readers disagree where the channels are."""
    geometry: dict[str, set[tuple[int, int] | None]] = {}
    for layer in placement.layers:
        shape = shapes.get(layer.name)
        geometry.setdefault(placement.sites[layer.data], set()).add(shape and (layer.features, shape.channels))
    return {site for site, found in geometry.items() if None in found or len(found) > 1}


def _is_plain(quantizer: Quantizer | None) -> bool:
    return quantizer is None or quantizer.plain


class _Gathered:
    """Moments of a unit, and the means of each of its layers."""

    def __init__(self, groups: int, inputs: int, outputs: int, judges: int) -> None:
        self.shape = (groups, inputs, outputs)
        self.fit, self.held_out = Moments(*self.shape), Moments(*self.shape)
        self.sums: dict[str, tuple[Array, Array, int]] = {}
        self.judges: dict[str, list[tuple[Array, Array]]] = {}  # by layer, whole rows of held-out batches
        self.wanted = judges  # rows of each layer

    def error(self, found: Rounded, biased: bool) -> float:
        """Mean squared error of the outputs on held-out rows, over the float outputs' power: the mean of the layers'."""
        matrix = (found.integers * found.scales[:, None, :]).astype(np.float32)
        errors = []
        for rows in filter(None, self.judges.values()):
            off = np.concatenate([y - x @ matrix for x, y in rows], axis=1)
            wanted = np.concatenate([y for _, y in rows], axis=1)
            if biased:
                off, wanted = off - off.mean(1, keepdims=True), wanted - wanted.mean(1, keepdims=True)
            power = max(float(np.square(wanted, dtype=np.float64).mean()), float(np.finfo(np.float32).tiny))
            errors.append(float(np.square(off, dtype=np.float64).mean()) / power)
        return sum(errors) / len(errors) if errors else np.inf

    def add(self, x: Array, y: Array, held_out: bool) -> None:
        if not self.fit.count:
            origin = (x.mean(1, dtype=np.float64).astype(np.float32), y.mean(1, dtype=np.float64).astype(np.float32))
            self.fit, self.held_out = Moments(*self.shape, origin), Moments(*self.shape, origin)
        (self.held_out if held_out else self.fit).add(x, y)

    def means(self, layer: str, x: Array, y: Array, judge: bool) -> None:
        kept = self.judges.setdefault(layer, [])
        if judge and sum(rows.shape[1] for rows, _ in kept) < self.wanted:
            kept.append((x, y))
        before = self.sums.get(layer, (0.0, 0.0, 0))
        self.sums[layer] = (
            before[0] + x.sum(1, dtype=np.float64), before[1] + y.sum(1, dtype=np.float64), before[2] + x.shape[1],
        )  # fmt: skip


def _expanded(quantizer: Quantizer, shape: Unfolding) -> tuple[np.float32, Array | None, Array | None]:
    """Scale, shift and factor for each input of the unfolded layer: (groups, 1, inputs)."""
    parts = [None if v is None else shape.per_input(v.astype(np.float32))[:, None] for v in (quantizer.shift, quantizer.factor)]
    return np.float32(quantizer.scale), parts[0], parts[1]


def _moved(x: Array, expanded: tuple[np.float32, Array | None, Array | None]) -> Array:
    """Unfolded inputs (groups, rows, inputs) as the product sees them: shifted, scaled, rounded, back to float32."""
    scale, shift, factor = expanded
    x = x.astype(np.float32)
    if shift is not None:
        x = x - shift
    if factor is not None:
        x = x * factor
    moved: Array = np.clip(np.rint(x / scale), -LEVELS - 1, LEVELS) * scale
    return moved


def _in_blocks(matrix: Array, gathered: _Gathered, blocks: int, biased: bool, sparse: bool) -> tuple[Rounded, Rounded]:
    """Very wide layers: rounded to nearest, and by second moments inside of blocks of inputs, those between taken as none.

    One block after the other, so that but one block's moments are worked on.
    """
    inputs, size = matrix.shape[1], gathered.shape[1]

    def moments(block: int) -> Moments:
        chosen = slice(block, None, blocks)
        return gathered.fit.of_groups(chosen).merged(gathered.held_out.of_groups(chosen))

    power = [np.einsum("gkk->gk", moments(block).centred(biased)[0]) for block in range(blocks)]
    scales = clip_scales(matrix, np.concatenate(power, axis=1)[:, :inputs]).astype(np.float32)
    nearest, integers = np.empty(matrix.shape, np.int8), np.empty(matrix.shape, np.int8)
    for block in range(blocks):
        rows = slice(block * size, min((block + 1) * size, inputs))
        part = matrix[:, rows].astype(np.float32)
        short = size - part.shape[1]  # the last block is padded, as its moments are
        part = np.pad(part, ((0, 0), (0, short), (0, 0))) if short else part
        mask = part != 0 if sparse else None
        integers[:, rows] = round_to_scales(part, scales, moments(block), biased=biased, mask=mask)[:, : size - short]
        nearest[:, rows] = np.clip(np.rint(part / scales[:, None, :]), -LEVELS, LEVELS)[:, : size - short]
    return Rounded(nearest, scales, 0.0), Rounded(integers, scales, 0.0)

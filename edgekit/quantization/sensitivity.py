"""Which layers lose what: each one quantized alone, and how far all of them have fallen where each one ends."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import onnx

from edgekit.graphs.editing import exposed
from edgekit.progress import track

from .graph import Parameters, insert
from .placement import Layer, Placement
from .record import nearest_integers
from .samples import Samples, digests
from .simulate import Array, Feeds, Noise, Recall, Simulator, signal_to_noise
from .statistics import Statistics
from .streams import Stream, sequence_lives

__all__ = ["Sensitivity", "Study", "most_harmful_first", "noise_power", "share_right"]

WHOLE = 1 << 17  # nodes times layers: up to here each layer has a session of the whole graph, seconds in all


class Sensitivity(NamedTuple):
    """Of one layer. ``layer_db``: SNR of its own output, behind the bias, where all are int8.

    Where only this layer is int8: ``alone_db`` of the graph's output, ``drop`` in points of top-1. None: not measured.
    """

    layer: str
    layer_db: float
    alone_db: float | None = None
    drop: float | None = None


class Study(NamedTuple):
    """A graph under study and a few batches with the float outputs, held in memory.

    ``labelled``: samples with targets for the first output, none where there are no labels.
    """

    prepared: onnx.ModelProto
    placement: Placement
    batches: list[tuple[Feeds, dict[str, Array]]]
    labelled: Samples

    def snr_db(self, parameters: Parameters, layers: Collection[str], **parts: bool) -> float:
        """Output SNR in dB with these layers quantized."""
        return signal_to_noise(insert(self.prepared, self.placement, parameters, layers, **parts), self.batches)

    def sensitivities(self, parameters: Parameters, *, alone: bool = True, recall: Recall | None = None) -> list[Sensitivity]:
        """One row for each layer and product, in the graph's order; ``alone`` also measures each one as the only int8 layer.

        Alone, for what a layer gains where it is float among others hangs on how these were fitted to its errors.
        """
        rows = self._falls(parameters)
        if not alone:
            return rows
        missing = [layer.name for layer in self.placement.layers if layer.name not in parameters.integers]
        nearest = dict(nearest_integers(self.prepared, self.placement, parameters, missing))  # once, not for every graph
        parameters = dataclasses.replace(parameters, integers={**parameters.integers, **nearest})
        about = hashlib.sha256("\0".join(digests(self.labelled)).encode())
        about.update(b"" if self.labelled.targets is None else self.labelled.targets.tobytes())
        judged = about.hexdigest()[:16]  # what the points hang on
        labelled = len(self.labelled) > 0
        right = share_right(Simulator(self.prepared), self.labelled) if labelled else 0.0
        found: dict[str, tuple[float, float | None]] = {}
        with _Alone(self, parameters, right) as graphs:
            for name in track(graphs.names, "measuring layers"):
                make = functools.partial(graphs.measured, name)
                one = recall(f"alone/{judged}/{name}", make) if recall else make()
                found[name] = float(one["alone_db"]), 100 * (right - float(one["right"])) if labelled else None
        return [row._replace(alone_db=found[row.layer][0], drop=found[row.layer][1]) for row in rows]

    def _falls(self, parameters: Parameters) -> list[Sensitivity]:
        """How near each layer's output is to the float one where all are int8: behind its bias, which restores the mean."""
        outputs = {node.name: node.output[0] for node in self.prepared.graph.node if node.output}
        ends = {layer.name: outputs[layer.biased or layer.name] for layer in self.placement.layers}
        ends |= {product.name: product.output for product in self.placement.products}
        shown = list(dict.fromkeys(ends.values()))
        quantized = insert(self.prepared, self.placement, parameters, self.placement.names)
        runs = [Simulator(exposed(model, shown)) for model in (self.prepared, quantized)]
        noises = {tensor: Noise() for tensor in shown}
        for feeds, _ in self.batches:
            exact, rounded = (run({k: v for k, v in feeds.items() if k in run.inputs}) for run in runs)
            for tensor, noise in noises.items():
                noise.add({tensor: exact[tensor]}, {tensor: rounded[tensor]})
        return [Sensitivity(name, noises[tensor].snr_db()) for name, tensor in ends.items()]

    def why(self, layer: Layer, parameters: Parameters, statistics: Mapping[str, Statistics]) -> str:
        """In words: whether the layer's input or its weights cost more, and what is odd about them."""
        weights = self.snr_db(parameters, [layer.name], activations=False)
        inputs = self.snr_db(parameters, [layer.name], weights=False)
        if weights < inputs:
            return f"its weights cost most ({weights:.1f} dB alone, its input {inputs:.1f} dB)"
        seen = statistics[layer.data]
        spread = f"its range is {seen.amax / seen.rms:.0f} times its rms" if seen.rms else "it is all zeros"
        sided = ", one-sided: half of int8 is unused" if seen.minimum >= 0 or seen.maximum <= 0 else ""
        return f"its input costs most ({inputs:.1f} dB alone, its weights {weights:.1f} dB): {spread}{sided}"


class _Alone:
    """The graph with one layer int8, for each layer in the order of ``names``. A context manager: it spools float tensors.

    A large graph is cut into blocks. Only the layer's block is made anew for it; what lies in front has run once for all, and
    what lies behind is made once a block: a session of the whole graph for each layer would cost the square of its depth.
    """

    def __init__(self, study: Study, parameters: Parameters, right: float) -> None:
        self._study, self._parameters, self._right = study, parameters, right
        self._graph = study.prepared.graph
        self._blocks = _blocks(study.prepared, study.placement)
        self.names = sorted(self._blocks, key=lambda name: self._blocks[name].start)
        self._made = {name: i for i, node in enumerate(self._graph.node) for name in node.output}
        self._open = contextlib.ExitStack()
        self._streams: list[Stream] = []  # of the batches, and of the labelled samples
        self._behind: tuple[int, Simulator] | None = None  # the nodes from an index on

    def __enter__(self) -> _Alone:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def measured(self, layer: str) -> dict[str, Array]:
        """``alone_db``, and ``right``: the share of the labelled samples."""
        noise, whole = Noise(), len(self._blocks[layer]) == len(self._graph.node)
        studied, judged = self._whole(layer) if whole else self._through(layer)
        for (_, expected), found in zip(self._study.batches, studied, strict=True):
            noise.add(expected, {**expected, **found})
        right, first = self._right, self._graph.output[0].name
        if len(self._study.labelled) and self._made.get(first, -1) >= self._blocks[layer].start:
            right = _share((found[first] for found in judged), self._study.labelled)
        return {"alone_db": np.array(noise.snr_db()), "right": np.array(right)}

    def _insert(self, layer: str, model: onnx.ModelProto) -> onnx.ModelProto:
        return insert(model, self._study.placement, self._parameters, [layer])

    def _whole(self, layer: str) -> list[Iterator[dict[str, Array]]]:
        """Outputs of all batches, and of all labelled samples."""
        run = Simulator(self._insert(layer, self._study.prepared))
        return [(run(feeds) for feeds, _ in self._study.batches), (run(feeds) for feeds in self._study.labelled.batches())]

    def _through(self, layer: str) -> list[Iterator[dict[str, Array]]]:
        """The same of the outputs that are made in the layer's block or behind it: the others stay as they are."""
        if not self._streams:
            for batches in ((feeds for feeds, _ in self._study.batches), self._study.labelled.batches()):
                self._streams.append(self._open.enter_context(Stream(self._study.prepared, batches)))
        return [self._run(layer, stream) for stream in self._streams]

    def _run(self, layer: str, stream: Stream) -> Iterator[dict[str, Array]]:
        block, outputs = self._blocks[layer], [value.name for value in self._graph.output]
        stream.advance(block.start, lambda model: model)
        inner = [name for name in outputs if self._made.get(name) in block]
        outer = [name for name in outputs if self._made.get(name, -1) >= block.stop]
        for found in stream.look(block.stop, [*stream.live(block.stop), *inner], functools.partial(self._insert, layer)):
            if outer and (self._behind is None or self._behind[0] != block.stop):
                self._behind = None  # two at once would hold more weights than the graph
                behind = stream.cut(block.stop, len(self._graph.node), found, outer)
                self._behind = block.stop, Simulator(behind)
            answers = {name: found[name] for name in inner}
            if outer and self._behind is not None:
                run = self._behind[1]
                answers |= run({name: found[name] for name in run.inputs})
            yield answers


def _blocks(prepared: onnx.ModelProto, placement: Placement) -> dict[str, range]:
    """Node indices around each layer and product. What is quantized with a layer lies in one block with it.

    With b nodes a block, L layers cost sessions of L * b nodes, and what lies behind the blocks of n nodes n / b of n / 2
    on average: b = n / sqrt(2 L) is least.
    """
    count, names = len(prepared.graph.node), placement.names
    at = {node.name: i for i, node in enumerate(prepared.graph.node)}
    parts = {name: [at[name]] for name in names}
    for layer in placement.layers:
        parts[layer.name].append(at[layer.biased or layer.name])
    for pair in placement.pairs:
        parts[pair.owner].append(at[pair.node])
    ends = [0, count]
    if count * len(names) > WHOLE:
        joined = {i for life in sequence_lives(prepared) for i in life}
        joined.update(i for part in parts.values() for i in range(min(part) + 1, max(part) + 1))
        size = math.ceil(count / math.sqrt(2 * len(names)))
        ends = [0]
        for i in sorted(at[name] for name in names):  # in front of a layer, for ONNX Runtime fuses what follows it
            if i >= ends[-1] + size and i not in joined:
                ends.append(i)
        ends.append(count)
    blocks = [range(start, end) for start, end in itertools.pairwise(ends)]
    return {name: blocks[bisect.bisect(ends, at[name]) - 1] for name in names}


def _noise(snr_db: float) -> float:
    return float(10.0 ** (-snr_db / 10))


def share_right(run: Simulator, labelled: Samples) -> float:
    """Share of the labelled samples whose class a graph's first output names, 0..1."""
    return _share((run(feeds)[run.outputs[0]] for feeds in labelled.batches()), labelled)


def _share(outputs: Iterable[Array], labelled: Samples) -> float:
    answers = np.concatenate([output.argmax(-1).ravel() for output in outputs])
    return float((answers == labelled.targets).mean())


def noise_power(rows: list[Sensitivity]) -> dict[str, float]:
    """Over the signal's, of each layer alone at the output; where that was not measured, of all where the layer ends."""
    return {row.layer: _noise(row.layer_db if row.alone_db is None else row.alone_db) for row in rows}


def most_harmful_first(rows: list[Sensitivity], macs: Mapping[str, int]) -> list[str]:
    """Layer names by the noise power that each alone makes, for every multiply-accumulate that leaving it float costs."""
    power = noise_power(rows)
    return sorted(power, key=lambda name: power[name] / max(macs[name], 1), reverse=True)

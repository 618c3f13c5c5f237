"""Which layers lose what: each one quantized alone, and how far all of them have fallen where each one ends."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
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

__all__ = ["Sensitivity", "Study", "most_harmful_first", "noise_power", "share_right"]


class Sensitivity(NamedTuple):
    """Of one layer. ``layer_db``: SNR of its own output where all are int8.

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
        labelled = len(self.labelled) > 0
        about = hashlib.sha256("\0".join(digests(self.labelled)).encode())
        about.update(b"" if self.labelled.targets is None else self.labelled.targets.tobytes())
        judged = about.hexdigest()[:16]  # what the points hang on
        right = share_right(Simulator(self.prepared), self.labelled) if labelled else 0.0

        def measured(layer: str) -> dict[str, Array]:
            run, noise = Simulator(insert(self.prepared, self.placement, parameters, [layer])), Noise()
            for feeds, expected in self.batches:
                noise.add(expected, run(feeds))
            return {
                "alone_db": np.array(noise.snr_db()),
                "right": np.array(share_right(run, self.labelled) if labelled else 0.0),
            }

        found = []
        for row in track(rows, "measuring layers"):
            layer = row.layer
            one = recall(f"alone/{judged}/{layer}", lambda layer=layer: measured(layer)) if recall else measured(layer)  # type: ignore[misc]
            drop = 100 * (right - float(one["right"])) if labelled else None
            found.append(row._replace(alone_db=float(one["alone_db"]), drop=drop))
        return found

    def _falls(self, parameters: Parameters) -> list[Sensitivity]:
        """How near each layer's output is to the float one where all are int8."""
        ends = {layer.name: layer.output for layer in self.placement.layers}
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


def _noise(snr_db: float) -> float:
    return float(10.0 ** (-snr_db / 10))


def share_right(run: Simulator, labelled: Samples) -> float:
    """Share of the labelled samples whose class a graph's first output names, 0..1."""
    answers = np.concatenate([run(feeds)[run.outputs[0]].argmax(-1).ravel() for feeds in labelled.batches()])
    return float((answers == labelled.targets).mean())


def noise_power(rows: list[Sensitivity]) -> dict[str, float]:
    """Over the signal's, of each layer alone at the output; where that was not measured, of all where the layer ends."""
    return {row.layer: _noise(row.layer_db if row.alone_db is None else row.alone_db) for row in rows}


def most_harmful_first(rows: list[Sensitivity], macs: Mapping[str, int]) -> list[str]:
    """Layer names by the noise power that each alone makes, for every multiply-accumulate that leaving it float costs."""
    power = noise_power(rows)
    return sorted(power, key=lambda name: power[name] / max(macs[name], 1), reverse=True)

"""Which layers lose what: each one quantized alone, and each one left float in an int8 graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import NamedTuple

import onnx

from edgekit.progress import track

from .graph import Parameters, insert
from .placement import Layer, Placement
from .record import nearest_integers
from .simulate import Array, Feeds, signal_to_noise
from .statistics import Statistics

__all__ = ["Sensitivity", "Study", "most_harmful_first"]


class Sensitivity(NamedTuple):
    """``alone_db``: output SNR where only this layer is int8, None where it was not measured.

    ``gain_db``: what the output gains where only this one is float; ``power``: the noise power that it takes away, over the
    signal's.
    """

    layer: str
    alone_db: float | None
    gain_db: float
    power: float


class Study(NamedTuple):
    """A graph under study and a few batches with the float outputs, held in memory."""

    prepared: onnx.ModelProto
    placement: Placement
    batches: list[tuple[Feeds, dict[str, Array]]]

    def snr_db(self, parameters: Parameters, layers: Collection[str], **parts: bool) -> float:
        """Output SNR in dB with these layers quantized."""
        return signal_to_noise(insert(self.prepared, self.placement, parameters, layers, **parts), self.batches)

    def sensitivities(self, parameters: Parameters, *, alone: bool = True) -> list[Sensitivity]:
        """One row for each layer and product, in the graph's order; ``alone`` also measures each one as the only int8 layer."""
        names = self.placement.names
        missing = [layer.name for layer in self.placement.layers if layer.name not in parameters.integers]
        nearest = dict(nearest_integers(self.prepared, self.placement, parameters, missing))  # once, not for every graph
        parameters = dataclasses.replace(parameters, integers={**parameters.integers, **nearest})
        every = self.snr_db(parameters, names)
        rows = []
        for name in track(names, "measuring layers"):
            without = self.snr_db(parameters, [other for other in names if other != name])
            single = self.snr_db(parameters, [name]) if alone else None
            rows.append(Sensitivity(name, single, without - every, _noise(every) - _noise(without)))
        return rows

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


def most_harmful_first(rows: list[Sensitivity], macs: Mapping[str, int]) -> list[str]:
    """Layer names by the noise power that leaving each float takes away, for every multiply-accumulate that it costs."""
    return [row.layer for row in sorted(rows, key=lambda row: row.power / max(macs[row.layer], 1), reverse=True)]

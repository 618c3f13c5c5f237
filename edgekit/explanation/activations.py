"""What the layers carry: ranges, sparsity, dead channels and saturation, read from the graph that runs.

Of a quantized bundle also how far the ranges leave those that calibration saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.bundle import Bundle
from edgekit.errors import GraphError, MissingExtra
from edgekit.runtime.graph_file import read_graph
from edgekit.runtime.onnxruntime import session

from .calibrated import Range, calibrated
from .question import Float

try:
    import onnx
except ImportError:
    raise MissingExtra("onnx", "onnx") from None

__all__ = ["Layer", "Probe"]

#: Operators that move or convert values without making new ones, and the shape arithmetic around them.
_SILENT = {
    *("Constant", "Shape", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Cast", "Gather"),
    *("QuantizeLinear", "DequantizeLinear", "Slice", "Concat", "Dropout", "Pad"),
}
_ACTIVATIONS = {"Relu", "Clip", "HardSwish", "LeakyRelu", "PRelu", "Elu", "Gelu", "Swish", "Mish", "Sigmoid", "Tanh"}
#: Bounded functions and where they flatten; Clip's bounds are its own.
_BOUNDS = {"Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
#: What puts channels on axis 1, and what leaves no telling where they are until the next of those.
_OF_MAPS = ("Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GlobalAveragePool", "GlobalMaxPool")
_TURNING = {"Reshape", "Transpose", "MatMul", "Gemm", "Einsum", "Softmax", "Unsqueeze", "Squeeze", "Gather"}
_CLOSE = 1e-3
#: Of a calibrated range: what lies so near beyond it is the rounding of the layers before.
_ROUNDING = 1e-3
MAX_GRAPH_BYTES = 1 << 30


@dataclass
class Layer:
    """One node's output over all images seen. A channel is dead where it never changes.

    ``maps``: it holds feature maps, whose channels are axis 1; those of tokens (1, T, C) are the last, and attention (1, heads,
    T, T) has none. ``seen``: what calibration saw of it; ``beyond``: how many values leave that.
    """

    name: str
    op: str
    maps: bool = True
    seen: Range | None = None
    shape: tuple[int, ...] = ()
    low: float = np.inf
    high: float = -np.inf
    zeros: int = 0
    limited: int | None = None
    beyond: int = 0
    count: int = 0
    lows: NDArray[Any] = field(default_factory=lambda: np.empty(0))
    highs: NDArray[Any] = field(default_factory=lambda: np.empty(0))

    def add(self, values: Float, limited: int | None) -> None:
        """``values``: one image's output; ``limited`` of them lie at the end of what can be represented."""
        self.shape = values.shape[1:]
        axis = self._axis
        channels = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        lows, highs = channels.min(1), channels.max(1)
        first = not self.count
        self.lows = lows if first else np.minimum(self.lows, lows)
        self.highs = highs if first else np.maximum(self.highs, highs)
        self.low, self.high = float(self.lows.min()), float(self.highs.max())
        self.zeros += int((values == 0).sum())
        self.limited = None if limited is None else (self.limited or 0) + limited
        self.count += values.size
        if self.seen is not None:
            low, high = self.seen.minimum, self.seen.maximum
            slack = _ROUNDING * (high - low)
            self.beyond += int(((values < low - slack) | (values > high + slack)).sum())

    @property
    def _axis(self) -> int | None:
        """Of the channels; None where there are none."""
        if self.maps or len(self.shape) == 1:
            return 1
        return -1 if len(self.shape) == 2 else None

    def figures(self) -> dict[str, Any]:
        """Shares in 0..1: ``zeros`` of the values, ``saturated`` of them (None where nothing limits them), ``beyond`` what
        calibration saw (None where it recorded nothing), with a ``note`` where there are any.

        ``dead`` is None where each channel gave a single value, of which nobody can say whether it changes, and where there are
        no channels.
        """
        judged = self._axis is not None and self.count > len(self.lows)
        still = judged & (self.highs - self.lows <= 1e-6 * max(self.high - self.low, 1e-30))
        return {
            "name": self.name,
            "op": self.op,
            "shape": "x".join(map(str, self.shape)),
            "low": self.low,
            "high": self.high,
            "zeros": self.zeros / self.count,
            "dead": int(still.sum()) if judged else None,
            "dead_channels": np.flatnonzero(still).tolist(),
            "channels": None if self._axis is None else len(still),
            "saturated": None if self.limited is None else self.limited / self.count,
            **self._against_calibration(),
        }

    def _against_calibration(self) -> dict[str, Any]:
        if self.seen is None:
            return {"calibrated_low": None, "calibrated_high": None, "beyond": None, "note": None}
        low, high, share = self.seen.minimum, self.seen.maximum, self.beyond / self.count
        found = f"{self.low:.4g} to {self.high:.4g}, calibration saw {low:.4g} to {high:.4g}: {share:.2%} beyond"
        return {"calibrated_low": low, "calibrated_high": high, "beyond": share, "note": found if self.beyond else None}


class Probe:
    """A bundle's graph with every layer's output laid open."""

    def __init__(self, bundle: Bundle, graph: str) -> None:
        path = bundle.file(graph)
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise GraphError(f"{path} is over {MAX_GRAPH_BYTES >> 30} GiB", "use --method occlusion")
        model = onnx.load_model_from_string(read_graph(bundle, graph))
        self._nodes = [n for n in model.graph.node if n.op_type not in _SILENT and n.output and n.output[0]]
        made = {name for node in model.graph.node for name in node.output}
        self._quantized = {n.input[0]: n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in made}
        self._constants = _constants(model)
        self._clips = {n.output[0]: _clip_bounds(self._constants, n) for n in self._nodes if n.op_type == "Clip"}
        wanted = [n.output[0] for n in self._nodes]
        wanted += [node.output[0] for tensor, node in self._quantized.items() if tensor in set(wanted)]
        known = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(wanted) if name not in known)
        self._session = session(model.SerializeToString())
        ranges = calibrated(bundle)
        self._input = self._session.get_inputs()[0].name
        # Samples unlike those that calibrated leave the range at the input first.
        self.layers = {self._input: Layer(self._input, "Input", seen=ranges[self._input])} if self._input in ranges else {}
        maps = _maps_of(model, self._input)
        for node in self._nodes:
            name = node.output[0]
            self.layers[name] = Layer(node.name or name, node.op_type, name in maps, ranges.get(name))

    def __call__(self, x: Float) -> Float | None:
        """Run one image (1, C, H, W), add to `layers`; the first layer's feature maps (C, h, w), None without any."""
        names = [output.name for output in self._session.get_outputs()]
        values = dict(zip(names, self._session.run(None, {self._input: x}), strict=True))
        if self._input in self.layers:
            self.layers[self._input].add(x, None)
        maps: dict[str, Float] = {}
        for node in self._nodes:
            found = values[node.output[0]]
            if found.dtype.kind != "f" or found.ndim < 2 or not found.size:
                self.layers.pop(node.output[0], None)
                continue
            self.layers[node.output[0]].add(found, self._limited(node, found, values))
            if found.ndim == 4 and found.shape[2] * found.shape[3] > 1:
                maps.setdefault("activation" if node.op_type in _ACTIVATIONS else node.op_type, found[0].astype(np.float32))
        return maps.get("activation", maps.get("Conv"))

    def _limited(self, node: onnx.NodeProto, found: Float, values: dict[str, NDArray[Any]]) -> int | None:
        if (quantizer := self._quantized.get(node.output[0])) is not None:
            return self._cut(quantizer, found, values[quantizer.output[0]].dtype)
        low, high = self._clips.get(node.output[0], _BOUNDS.get(node.op_type, (None, None)))
        if node.op_type == "Clip" and low == 0:
            low = None  # that end is a ReLU's, not saturation
        if low is None and high is None:
            return None
        near = _CLOSE * abs((high or 0.0) - (low or 0.0))
        above = 0 if high is None else int((found >= high - near).sum())
        return above + (0 if low is None else int((found <= low + near).sum()))

    def _cut(self, quantizer: onnx.NodeProto, found: Float, kind: np.dtype[Any]) -> int | None:
        """How many values a scale cuts off: those beyond the grid, not those on its ends, where a shifted ReLU's zero lies.
        None where the scale is computed, or the grid is no grid of integers."""
        grid = [self._constants.get(name) for name in quantizer.input[1:3]]
        if kind.kind not in "iu" or any(part is None for part in grid):
            return None
        axis = next((a.i for a in quantizer.attribute if a.name == "axis"), 1)
        shape = [-1 if k == axis % found.ndim else 1 for k in range(found.ndim)]
        scale, *zero = (part.astype(np.float64).reshape(shape if part.size > 1 else []) for part in grid if part is not None)
        scaled = found / scale + (zero[0] if zero else 0)
        limits = np.iinfo(kind)
        return int(((scaled > limits.max + 0.5) | (scaled < limits.min - 0.5)).sum())


def _constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return found


def _maps_of(model: onnx.ModelProto, source: str) -> set[str]:
    """Values with channels on axis 1: the input, of a convolution or the like, and what keeps the order of axes from there."""
    found = {source}
    for node in model.graph.node:
        turned = node.op_type in _TURNING or node.op_type.startswith("Reduce")
        if node.op_type in _OF_MAPS or (not turned and found & set(node.input)):
            found.update(node.output)
    return found


def _clip_bounds(constants: Mapping[str, NDArray[Any]], node: onnx.NodeProto) -> tuple[float | None, float | None]:
    """Clip's constant bounds; None for an absent or computed one."""
    low, high = (constants.get(node.input[index]) if len(node.input) > index else None for index in (1, 2))
    return None if low is None else float(low), None if high is None else float(high)

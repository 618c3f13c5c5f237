"""What a layer costs on this machine: a table of measured kernel times, filled as shapes occur and kept for next time.

Each entry is a graph of one layer, run by ONNX Runtime on one thread; its time is that of the kernels as the profiler sees
them, without the reorders at its ends, which a whole network does not have between its layers.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from edgekit.files import atomic_write
from edgekit.runtime.onnxruntime import session

from .coupling import Operation

__all__ = ["LatencyTable", "device_name"]

RUNS, WARM = 220, 20
VERSION = 2  # of what is measured under a key: an older table's entries are of other graphs
#: Gauges beside each layer; the known one counts as so many microseconds, whatever the machine.
_EMPTY, _KNOWN, _KNOWN_US = "gauge_empty", "gauge_known", 20.0
SAVED_EVERY = 50
#: What the known gauge takes over its quickest when the machine counts as disturbed; how often a layer is tried for better.
DISTURBED, TRIES = 1.08, 3
_LONGEST = 1e9  # microseconds that a layer may take


def device_name() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(named, platform.processor() or platform.machine())


class Timed(NamedTuple):
    """``us`` of a layer in units of the known gauge, which took ``pace`` microseconds meanwhile."""

    us: float
    pace: float


class LatencyTable:
    """Time of one sample, by layer and shape; kept in the user's cache under device, ONNX Runtime's version and `VERSION`.

    In units of a known kernel, near microseconds: `LatencyPrice.anchored` makes them milliseconds of a whole network.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.device = f"{device_name()}, onnxruntime {onnxruntime.__version__}, 1 thread"
        name = "".join(c if c.isalnum() else "-" for c in f"{self.device} v{VERSION}")
        self.path = (folder or _cache()) / f"{name}.json"
        self.measured = 0
        self._entries = _read(self.path)
        self._quickest = min((one.pace for one in self._entries.values()), default=math.inf)
        # What was taken while others used the machine is taken again: once for each table that is opened.
        self._entries = {key: one for key, one in self._entries.items() if not self._disturbed(one)}

    def microseconds(self, operation: Operation, sizes: tuple[int, ...], samples: int) -> float:
        """Kernel time of an operator with ``sizes`` channels, for one of the ``samples`` that it was traced with."""
        if 0 in sizes:
            return 0.0
        static = _static(operation, sizes, samples)
        key = " ".join(map(str, (operation.kind, *sizes, "-", *static)))
        if key not in self._entries:
            self._entries[key] = self._undisturbed(_MODELS[operation.kind](sizes, static))
            self.measured += 1
            if self.measured % SAVED_EVERY == 0:
                self.save()
        return self._entries[key].us

    def _undisturbed(self, model: onnx.ModelProto) -> Timed:
        """The reading at the machine's quickest pace. The gauge makes up for a slow machine only in part: who shares the core
        slows a recurrence by 40%, the gauge by 20%."""
        _add_gauges(model)
        readings = list[Timed]()
        for _ in range(TRIES):
            readings.append(_measure(model))
            self._quickest = min(self._quickest, readings[-1].pace)
            if not self._disturbed(readings[-1]):
                break
        return min(readings, key=lambda one: one.pace)

    def _disturbed(self, reading: Timed) -> bool:
        return reading.pace > DISTURBED * self._quickest

    def save(self) -> None:
        """Keep what was measured, beside what others have by now; where the cache cannot be written, it is measured anew."""
        self._entries = _read(self.path) | self._entries
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, json.dumps(self._entries, indent=0).encode())
        except OSError:
            pass


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekit" / "latency"


def _read(path: Path) -> dict[str, Timed]:
    try:
        found = {key: Timed(float(us), float(pace)) for key, (us, pace) in json.loads(path.read_bytes()).items()}
        # A NaN would make every price one.
        return {key: one for key, one in found.items() if all(0 < value < _LONGEST for value in one)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _static(operation: Operation, sizes: tuple[int, ...], samples: int) -> tuple[int, ...]:
    """The shape for one sample, with ``sizes`` channels left.

    Attention has as many heads as hold the less narrowed of query and value; products by hand, whose heads cannot be told
    from their width, are fewer.
    """
    if operation.kind in ("convolution", "deconvolution", "recurrence"):
        *static, batch = operation.shape
        return (*static, -(-batch // samples))
    first, *others = operation.shape
    whole = tuple(len(numbers) for numbers in operation.dims)
    if operation.kind == "attention" and len(sizes) == 2:
        heads = others[0]
        others[0] = max(-(-size * heads // full) for size, full in zip(sizes, whole, strict=True))
    elif operation.kind in ("pointwise", "transcendental", "product") and sizes:
        first = -(-first * sizes[0] // whole[0])
    return (-(-first // samples), *others)


def _measure(model: onnx.ModelProto) -> Timed:
    """Microseconds in the kernels of a layer with gauges, as if the machine were idle.

    An empty kernel in the same graph shows what the profiler itself takes, and a known one how slow the machine is at that
    moment: others may be using it.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        layer = session(model.SerializeToString(), profile=os.path.join(folder, "p"))
        feeds = {i.name: rng.standard_normal(i.shape, np.float32) for i in layer.get_inputs()}
        for _ in range(RUNS):
            layer.run(None, feeds)
        events = json.loads(Path(layer.end_profiling()).read_bytes())
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name = event["name"]
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and "Reorder" not in event["args"].get("op_name", ""):
            kernels[name].append(event["dur"])
    # The profiler rounds to microseconds, which a mean evens out and a quantile does not; most runs may be disturbed.
    times = {name: float(np.sort(found[WARM:])[: (RUNS - WARM) // 5].mean()) for name, found in kernels.items()}
    empty = next(time for name, time in times.items() if _EMPTY in name)
    known = next(time for name, time in times.items() if _KNOWN in name)
    total = sum(max(time - empty, 0.1) for name, time in times.items() if _EMPTY not in name and _KNOWN not in name)
    pace = max(known - empty, 1.0)
    return Timed(total / pace * _KNOWN_US, pace)


def _add_gauges(model: onnx.ModelProto) -> None:
    """An empty convolution and a known one, beside the layer."""
    graph = model.graph
    for name, channels, side, kernel in ((_EMPTY, 8, 1, 1), (_KNOWN, 32, 14, 3)):
        weight = np.full((channels, channels, kernel, kernel), 0.01, np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(weight, f"{name}_w"))
        graph.node.append(helper.make_node("Conv", [f"{name}_x", f"{name}_w"], [f"{name}_y"], name))
        graph.input.append(helper.make_tensor_value_info(f"{name}_x", TensorProto.FLOAT, (1, channels, side, side)))
        graph.output.append(helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None))


def _model(nodes: list[Any], inputs: dict[str, tuple[int, ...]], weights: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    stored = [
        onnx.numpy_helper.from_array((rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "layer", given, results, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _convolution(sizes: tuple[int, ...], static: tuple[int, ...]) -> onnx.ModelProto:
    """``static``: groups, or minus the outputs a channel if depthwise; dimensions; for each of these the sizes before, after
    and of the kernel, stride and dilation; pictures a sample."""
    inputs, outputs = sizes
    grouping = static[0]
    before, after, kernel, stride, dilation = _by_axis(static)
    groups = inputs if grouping < 0 else grouping
    if grouping < 0:
        outputs = -grouping * inputs
    spans = ((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
    pads = [max((a - 1) * s + k - b, 0) for a, s, k, b in zip(after, stride, spans, before, strict=True)]
    nodes = [
        helper.make_node(
            "Conv",
            ["x", "w", "b"],
            ["c"],
            strides=stride,
            dilations=dilation,
            group=groups,
            pads=[p // 2 for p in pads] + [p - p // 2 for p in pads],
        ),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    weights = {"w": (outputs, max(inputs // groups, 1), *kernel), "b": (outputs,)}
    return _model(nodes, {"x": (static[-1], inputs, *before)}, weights)


def _deconvolution(sizes: tuple[int, ...], static: tuple[int, ...]) -> onnx.ModelProto:
    """``static``: as of `_convolution`."""
    inputs, outputs = sizes
    before, _, kernel, stride, dilation = _by_axis(static)
    groups = inputs if static[0] < 0 else 1
    columns = -static[0] if static[0] < 0 else outputs
    nodes = [helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], strides=stride, dilations=dilation, group=groups)]
    return _model(nodes, {"x": (static[-1], inputs, *before)}, {"w": (inputs, columns, *kernel), "b": (groups * columns,)})


def _by_axis(static: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Sizes before, after and of the kernel, stride and dilation, each for all axes."""
    space = static[1]
    return (static[2 + k * space : 2 + (k + 1) * space] for k in range(5))


def _linear(sizes: tuple[int, ...], static: tuple[int, ...]) -> onnx.ModelProto:
    """``static``: rows, axes of the input."""
    (inputs, outputs), (rows, axes) = sizes, static
    if axes == 2:
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
        return _model(nodes, {"x": (rows, inputs)}, {"w": (inputs, outputs), "b": (outputs,)})
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    return _model(nodes, {"x": (1, rows, inputs)}, {"w": (inputs, outputs), "b": (outputs,)})


def _recurrence(sizes: tuple[int, ...], static: tuple[int, ...]) -> onnx.ModelProto:
    """``static``: gates, steps, series a sample."""
    (inputs, units), (gates, steps, series) = sizes, static
    more: dict[str, Any] = {"linear_before_reset": 1} if gates == 3 else {}
    node = helper.make_node({4: "LSTM", 3: "GRU", 1: "RNN"}[gates], ["x", "w", "r", "b"], ["y"], hidden_size=units, **more)
    weights = {"w": (1, gates * units, inputs), "r": (1, gates * units, units), "b": (1, 2 * gates * units)}
    return _model([node], {"x": (steps, series, inputs)}, weights)


def _product(sizes: tuple[int, ...], static: tuple[int, ...]) -> onnx.ModelProto:
    """``static``: products, rows, columns, depth, as they were traced."""
    count, rows, columns, depth = static
    return _model(
        [helper.make_node("MatMul", ["a", "b"], ["y"])], {"a": (count, rows, depth), "b": (count, depth, columns)}, {}
    )


def _attention(sizes: tuple[int, ...], static: tuple[int, ...]) -> onnx.ModelProto:
    """``static``: samples, heads, queries, keys, as they were traced."""
    _, heads, queries, keys = static
    query, value = (max(size // heads, 1) for size in sizes) if len(sizes) == 2 else (1, 1)
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    inputs: dict[str, tuple[int, ...]] = {"q": (heads, queries, query), "k": (heads, query, keys), "v": (heads, keys, value)}
    return _model(nodes, inputs, {})


def _normalisation(sizes: tuple[int, ...], static: tuple[int, ...]) -> onnx.ModelProto:
    node = helper.make_node("LayerNormalization", ["x", "w", "b"], ["y"])
    return _model([node], {"x": (static[0], sizes[0])}, {"w": sizes[:1], "b": sizes[:1]})


def _pointwise(operator: str) -> Any:
    def made(sizes: tuple[int, ...], static: tuple[int, ...]) -> onnx.ModelProto:
        second = ["x", "x"] if operator == "Add" else ["x"]
        return _model([helper.make_node(operator, second, ["y"])], {"x": (1, static[0])}, {})

    return made


_MODELS = {
    "attention": _attention,
    "convolution": _convolution,
    "deconvolution": _deconvolution,
    "linear": _linear,
    "normalisation": _normalisation,
    "pointwise": _pointwise("Add"),
    "product": _product,
    "recurrence": _recurrence,
    "transcendental": _pointwise("Tanh"),
}

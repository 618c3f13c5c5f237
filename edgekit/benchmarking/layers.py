"""Where a graph departs from the float graph: the tensors that both hold, layer by layer, on the same inputs.

Quantization keeps the names of the float graph's tensors, so a tensor of one name and shape is one layer's output in both.
Both graphs run with these tensors as further outputs, a bounded share of them at a time, so that memory stays flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.bundle import Bundle
from edgekit.errors import BackendError, GraphError, first_line
from edgekit.graphs.editing import exposed, reads
from edgekit.progress import track
from edgekit.runtime.golden import decibel
from edgekit.runtime.graph_file import read_graph

from .comparison import errors_between

__all__ = ["EXPOSED_BYTES", "compare_layers"]

Array = NDArray[Any]

#: Size of the tensors that are read from one graph at a time; one larger tensor is read alone.
EXPOSED_BYTES = 64 << 20

#: SNR of an evenly spread tensor rounded to 255 levels, 20 log10 254: no fall is counted from above what int8 can keep.
INT8_CEILING_DB = 48.1

#: A scale and an offset for each channel must explain this much of a tensor's error for it to count as rescaled.
RESCALED_DB = 10.0

#: Operators that pass every value on: their SNR is their input's, so they are no rows of their own.
_MOVERS = {"DepthToSpace", "Dropout", "Flatten", "Identity", "Reshape", "SpaceToDepth", "Squeeze", "Transpose", "Unsqueeze"}
_QDQ = {"DequantizeLinear", "QuantizeLinear"}
_UNBIASED = "/unbiased"  # behind the name of a tensor whose layer had no bias: the layer's own output, in front of an Add
_SHIFTS = {"Mul", "Pad", "Sub"}  # what quantization puts in front of QuantizeLinear


@dataclass
class _Row:
    """One layer; ``level`` is the SNR in dB that counts: after the fit for a rescaled tensor, -200 for one not finite."""

    data: dict[str, Any]
    fitted_db: float
    level: float
    sources: frozenset[int]  # the rows that it reads, through whatever has no row; _INPUT for a graph input
    readers: set[int] = field(default_factory=set)
    ends: bool = False  # an output of the graph, at once or through what has no row


_INPUT = -1


def compare_layers(
    reference: tuple[Bundle, str],
    candidate: tuple[Bundle, str],
    inputs: Mapping[str, Array],
    *,
    threads: int = 1,
    diverge: float = 20.0,
    exposed_bytes: int = EXPOSED_BYTES,
) -> dict[str, Any]:
    """Errors of every float tensor that two graphs, each (bundle, file), hold under one name and shape; ONNX Runtime, CPU.

    ``inputs``: input name -> array, the first axis of all the sample. ``exposed_bytes``: how much of each graph is read in
    one run. Returns

    - ``layers``: rows in graph order: ``layer`` (node), ``op``, ``tensor``, ``type`` (``int8`` or ``fp8`` where the node
      reads a quantized activation, else ``float``), ``snr_db`` (200 for equal), ``cosine``, ``max_abs``, ``relative`` (max
      |error| over max |reference|), ``fitted_db`` and ``note``. A node that the reference lacks is named after the
      reference's: a MatMul whose bias came by quantization is that MatMul and not the Add behind it. ``rescaled`` stands where
      a scale and an offset for each channel explain the error and all that reads the tensor is right again: a scale that
      was moved into the layer in front. Then ``fitted_db`` is the SNR that is left.
    - ``first_diverging``: ``layer``, ``op``, ``tensor``, ``snr_db`` of the first row below ``diverge`` dB; None without.
    - ``largest_fall``: ``layer``, ``op``, ``tensor``, ``input`` (the worst layer that it reads; None for the graph's
      input), ``from_db``, ``to_db``, ``fall_db``: the layer that itself costs most. Inputs above 48.1 dB count as that,
      since rounding to int8 alone leaves no more; None where no layer falls.
    - ``unmatched``: layers of the candidate that have no such tensor in the reference, but for what quantization adds
      between them: shifts, factors and pads in front of QuantizeLinear, biases. ``diverge_db``: as given.

    Raises `GraphError` where no tensor is common, `BundleError` and `BackendError` for a graph that cannot be read or run.
    """
    models = _load(*reference), _load(*candidate)
    common = _computed(models[0].graph)
    own = [tensor for _, tensor in _outputs(models[1].graph)]
    names = [tensor for tensor in own if tensor in common]
    step, samples = _step(models[0], inputs)
    figures: dict[str, dict[str, Any]] = {}
    no_floats = 0
    groups = list(_groups(names, _sizes(models[0], inputs, step, samples), exposed_bytes))
    for group in track(groups, "comparing layers"):
        expected, found = (_run(model, group, inputs, range(0, samples, step), threads) for model in models)
        for tensor in group:
            a, b = expected.pop(tensor), found.pop(tensor)
            if not _is_float(a):
                no_floats += 1
            elif _is_float(b) and a.shape == b.shape:
                figures[tensor] = _figures(a, b)
    rows = _rows(models[1].graph, figures, _makers(models[0].graph))
    if not rows:
        raise GraphError(
            f"{candidate[0].path / candidate[1]} and {reference[0].path / reference[1]} have no tensor in common",
            "compare a bundle with one that was made from it",
        )
    _note_rescaled(rows, diverge)
    return {
        "layers": [row.data for row in rows],
        "first_diverging": _first_below(rows, diverge),
        "largest_fall": _largest_fall(rows),
        "unmatched": len(set(own) - _added(models[1].graph, common)) - len(rows) - no_floats,
        "diverge_db": diverge,
    }


def _load(bundle: Bundle, file: str) -> onnx.ModelProto:
    data = read_graph(bundle, file)
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:  # noqa: BLE001  protobuf raises types of its own
        raise GraphError(f"{bundle.path / file} is no ONNX graph: {error}", "make the bundle again") from None


def _graph_inputs(graph: onnx.GraphProto) -> set[str]:
    return {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}


def _makers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {tensor: node for node in graph.node for tensor in node.output}


def _computed(graph: onnx.GraphProto) -> set[str]:
    """Tensors that depend on a graph input: all but the inputs themselves and what is constant."""
    known = _graph_inputs(graph)
    inputs = set(known)
    for node in graph.node:
        if not known.isdisjoint(reads(node)):
            known.update(filter(None, node.output))
    return known - inputs


def _outputs(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """(node, tensor) for every computed output of a node that may be a row, in graph order."""
    computed = _computed(graph)
    for node in graph.node:
        if node.op_type not in _MOVERS | _QDQ:
            for tensor in node.output:
                if tensor in computed:
                    yield node, tensor


def _added(graph: onnx.GraphProto, common: set[str]) -> set[str]:
    """Tensors that quantization makes between the layers: on the way to QuantizeLinear, and products without their bias."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    added = set[str]()
    for node in reversed(graph.node):
        for tensor in node.output:
            into = readers.get(tensor, []) if node.op_type in _SHIFTS else []
            shifted = into and all(reader.op_type == "QuantizeLinear" or reader.output[0] in added for reader in into)
            if tensor not in common and (shifted or tensor.removesuffix(_UNBIASED) in common):
                added.add(tensor)
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    return added


def _step(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> tuple[int, int]:
    """(samples a run, samples): all at once, or as many as a fixed first axis takes."""
    samples = min((len(array) for array in inputs.values() if array.ndim), default=1)
    axes = [value.type.tensor_type.shape.dim[:1] for value in model.graph.input if value.name in inputs]
    step = min((axis.dim_value for dims in axes for axis in dims if axis.HasField("dim_value")), default=samples)
    return (step, samples) if 0 < step <= samples and samples % step == 0 else (samples, samples)


def _sizes(model: onnx.ModelProto, inputs: Mapping[str, Array], step: int, samples: int) -> dict[str, int]:
    """Bytes of each tensor over all samples, as far as shapes can be inferred from those of the inputs."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for value in copy.graph.input:
        if value.name in inputs:
            array = inputs[value.name]
            shape = array[:step].shape if step < samples else array.shape
            del value.type.tensor_type.shape.dim[:]
            for length in shape:
                value.type.tensor_type.shape.dim.add().dim_value = length
    for stale in (copy.graph.value_info, *(value.type.tensor_type.shape.dim for value in copy.graph.output)):
        del stale[:]  # these say what the exporter assumed, often a symbolic batch
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except Exception:  # noqa: BLE001  inference raises types of its own; sizes are only an economy
        return {}
    sizes = {}
    for value in (*inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            sizes[value.name] = 4 * math.prod(dim.dim_value for dim in dims) * (samples // step)
    return sizes


def _groups(names: Iterable[str], sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Neighbours together up to ``limit`` bytes; a tensor of unknown size counts as large as the largest known."""
    unknown = max(sizes.values(), default=limit)
    held: list[str] = []
    total = 0
    for name in names:
        size = sizes.get(name, unknown)
        if held and total + size > limit:
            yield held
            held, total = [], 0
        held.append(name)
        total += size
    if held:
        yield held


def _open(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    """Runs the graph as it is written: optimized, ONNX Runtime moves QuantizeLinear to the far side of a Transpose."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  ONNX Runtime raises many types of its own
        raise BackendError(
            f"ONNX Runtime cannot load the graph with its layers exposed: {first_line(error)}", "make the bundle again"
        ) from None


def _run(
    model: onnx.ModelProto, tensors: list[str], inputs: Mapping[str, Array], starts: range, threads: int
) -> dict[str, Array]:
    """The named tensors over all samples."""
    opened = _open(exposed(model, tensors), threads)
    known = {value.name for value in opened.get_inputs()}  # a branch may need only some of the inputs
    feeds = {name: array for name, array in inputs.items() if name in known}
    parts = []
    for start in starts:
        part = {k: v[start : start + starts.step] for k, v in feeds.items()} if len(starts) > 1 else feeds
        try:
            parts.append(opened.run(None, part))
        except Exception as error:  # noqa: BLE001  ONNX Runtime raises many types of its own
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}", "check the input values") from None
    if len(parts) == 1:
        return dict(zip(tensors, parts[0], strict=True))
    return {name: np.concatenate([np.atleast_1d(part[i]) for part in parts]) for i, name in enumerate(tensors)}


def _is_float(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind == "f"  # a sequence is a list


def _figures(expected: Array, found: Array) -> dict[str, Any]:
    """Errors of a tensor, and ``fitted_db``."""
    errors = errors_between(expected, found)
    if errors["snr_db"] is None:
        return {**errors, "fitted_db": -200.0}
    both = np.isfinite(expected)  # infinities agree here
    return {**errors, "fitted_db": _fitted_db(np.where(both, expected, 0), np.where(both, found, 0))}


def _fitted_db(expected: Array, found: Array) -> float:
    """SNR in dB after the best scale and offset for each channel, which lie on the second axis or the last.

    The residual is divided by n - 2 and not n, or two free numbers would explain much of a channel of few values.
    """
    best = -200.0
    power = float(np.square(expected, dtype=np.float64).sum())
    for axis in {min(1, expected.ndim - 1), expected.ndim - 1} if expected.ndim else ():
        r, f = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64) for array in (expected, found))
        count = r.shape[1]
        if count < 4:
            continue
        r, f = r - r.mean(1, keepdims=True), f - f.mean(1, keepdims=True)
        spread = np.square(f).sum(1)
        scale = (r * f).sum(1) / np.where(spread > 0, spread, 1)
        noise = float(np.square(r - scale[:, None] * f).sum()) * count / (count - 2)
        best = max(best, decibel(power, noise))
    return best


def _rows(
    graph: onnx.GraphProto, figures: Mapping[str, dict[str, Any]], references: Mapping[str, onnx.NodeProto]
) -> list[_Row]:
    """A row for every tensor with figures, linked along the graph. ``references``: who makes a tensor in the reference."""
    computed, rows, known = _computed(graph), list[_Row](), {node.name for node in references.values()}
    origins = dict.fromkeys(_graph_inputs(graph), frozenset({_INPUT}))
    makers = _makers(graph)
    kind = "fp8" if any(tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN for tensor in graph.initializer) else "int8"
    for node in graph.node:
        read = set(reads(node))
        sources = frozenset[int]().union(*(origins.get(name, ()) for name in read))
        for tensor in filter(None, node.output):
            figure = figures.get(tensor)
            if figure is None or node.op_type in _MOVERS | _QDQ:
                origins[tensor] = sources
                continue
            maker = node if (raw := f"{tensor}{_UNBIASED}") in references else makers.get(raw, node)
            inputs = [makers[name].op_type for name in reads(maker) if name in computed and name in makers]
            shown = maker if maker.name in known or not references[tensor].name else references[tensor]
            data = {"layer": shown.name or tensor, "op": shown.op_type, "tensor": tensor}
            data |= {"type": kind if "DequantizeLinear" in inputs else "float"} | figure | {"fitted_db": None}
            level = -200.0 if figure["snr_db"] is None else figure["snr_db"]
            data["note"] = "not finite" if figure["snr_db"] is None else None
            origins[tensor] = frozenset({len(rows)})
            rows.append(_Row(data, figure["fitted_db"], level, sources))
    for i, row in enumerate(rows):
        for source in row.sources - {_INPUT}:
            rows[source].readers.add(i)
    for value in graph.output:
        for i in origins.get(value.name, frozenset[int]()) - {_INPUT}:
            rows[i].ends = True
    return rows


def _note_rescaled(rows: list[_Row], diverge: float) -> None:
    """Mark rows whose error a fit for each channel explains, where all that follows is right again."""
    fits = [row.data["note"] is None and row.fitted_db >= max(row.level + RESCALED_DB, diverge) for row in rows]
    candidates = {i for i, fit in enumerate(fits) if fit}
    for i in candidates:
        seen, ahead, levels = {i}, [i], list[float]()
        while ahead:
            row = rows[ahead.pop()]
            levels += [row.level] if row.ends else []
            for reader in row.readers - seen:
                seen.add(reader)
                if reader in candidates:
                    ahead.append(reader)  # what passes it on, a ReLU for one, is rescaled as well
                else:
                    levels.append(rows[reader].level)
        if min(levels, default=-200.0) >= rows[i].data["snr_db"] + RESCALED_DB:
            rows[i].data |= {"note": "rescaled", "fitted_db": rows[i].fitted_db}
    for row in rows:
        if row.data["note"] == "rescaled":
            row.level = row.fitted_db


def _named(row: _Row) -> dict[str, Any]:
    return {key: row.data[key] for key in ("layer", "op", "tensor")}


def _first_below(rows: list[_Row], diverge: float) -> dict[str, Any] | None:
    below = (row for row in rows if row.level < diverge and row.data["note"] != "rescaled")
    first = next(below, None)
    return None if first is None else {**_named(first), "snr_db": first.data["snr_db"]}


def _largest_fall(rows: list[_Row]) -> dict[str, Any] | None:
    best: dict[str, Any] | None = None
    for row in rows:
        if row.data["note"] == "rescaled" or not row.sources:
            continue
        worst = min(row.sources, key=lambda i: 200.0 if i == _INPUT else rows[i].level)
        before = 200.0 if worst == _INPUT else rows[worst].level
        fall = min(before, INT8_CEILING_DB) - row.level
        if fall > max(0.0, best["fall_db"] if best else 0.0):
            name = None if worst == _INPUT else rows[worst].data["layer"]
            best = {**_named(row), "input": name, "from_db": before, "to_db": row.level, "fall_db": fall}
    return best

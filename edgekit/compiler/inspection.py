"""The heavy half of `inspect`: what a graph costs and which targets take it; of a foreign file in a child process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from edgekit.errors import EdgekitError, GraphError
from edgekit.graphs import is_explicit, quantized_nodes, to_float
from edgekit.graphs.editing import all_nodes
from edgekit.graphs.sparsity import dense_layers

from .binding import bind_inputs
from .cost import LayerCost, Tensor, graph_cost
from .coverage import coverage
from .faults import check_structure, inference_fault
from .passes import dims, opset
from .reading import MAX_BYTES, check_model, read_model
from .shapes import Axis

__all__ = ["graph_figures", "inspect_graph"]

HEAVIEST = 8  # layers shown, where not all are asked for
LONGEST_SYMBOL = 24  # characters; exporters write whole formulas


def inspect_graph(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What `summarise` says of an ONNX file; ``request``: its path, the stated shapes, and whether every layer is asked for.

    Raises `GraphError` for what is no ONNX graph, or a hostile one, `UsageError` for shapes that its inputs cannot have.
    """
    path = Path(request["model"])
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise GraphError(f"{path.name} has {size} bytes, {MAX_BYTES} at most", "keep large weights beside the file")
    try:
        source = read_model(path)
        check_structure(source.model)
        check_model(source.model)
        notes = [*source.notes, *_bound(source.model, request["shape"])]
        figures = graph_figures(source.model, _form(source.model), every=request["layers"])
    except (EdgekitError, OSError):
        raise
    except Exception as error:  # noqa: BLE001  onnx raises anything on hostile files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise GraphError(f"the graph cannot be read: {reason}", "check it with onnx.checker, or export it again") from None
    model = source.model
    if fault := inference_fault(model):
        notes.append(f"contradicts itself, and is likely to be refused: {fault}")
    targets = figures.pop("targets")
    if figures["form"] == "float" and (count := len(quantized_nodes(model))):
        targets, note = _as_imported(model, targets, count)
        notes.append(note)
    return {
        "name": model.graph.name,
        "made_by": " ".join(filter(None, (model.producer_name, model.producer_version))) or None,
        "inputs": {value.name: _tensor(value) for value in model.graph.input},
        "outputs": {value.name: _tensor(value) for value in model.graph.output},
        "graphs": {path.name: figures},
        "targets": targets,
        "notes": notes,
    }


def _bound(model: onnx.ModelProto, stated: Mapping[str, Any]) -> list[str]:
    """Write stated shapes into the inputs, in place; returns notes, also of the axes that nobody states."""
    notes = []
    if stated:
        fixed = {name: tuple(Axis(*axis) for axis in axes) for name, axes in stated.items()}
        notes += bind_inputs(model, fixed, {}).notes
    open_ = [value.name for value in model.graph.input if any(not isinstance(axis, int) for axis in dims(value))]
    if open_:
        notes.append(f"dynamic axes count as 1: state those of {', '.join(open_)} by --shape NAME:AxBxC")
    return notes


def _form(model: onnx.ModelProto) -> str:
    """As `Bundle.form` has it: what is not explicit int8 Q/DQ becomes float at import."""
    return "int8" if is_explicit(model) else "float"


def _as_imported(model: onnx.ModelProto, targets: list[dict[str, Any]], count: int) -> tuple[list[dict[str, Any]], str]:
    """(the targets that take the graph once `import` has brought it back to float, a note)."""
    form = onnx.ModelProto()
    form.CopyFrom(model)
    try:
        to_float(form)
    except EdgekitError as reason:
        return targets, f"{count} quantized nodes, which do not come back to float: {reason.message}"
    return coverage(
        form, "float"
    ), f"{count} quantized nodes: edgekit import brings them back to float, and so the targets count them"


def _tensor(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "?"
    if not tensor.HasField("shape"):
        return f"{kind} of any shape"
    axes = ("?" if axis is None or len(str(axis)) > LONGEST_SYMBOL else str(axis) for axis in dims(value))
    return f"{kind} {'x'.join(axes) or 'scalar'}"


def graph_figures(model: onnx.ModelProto, form: str, *, every: bool, sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Opset, operators, parameters, MACs, bytes and layers of a graph, and the targets that take it.

    ``form``: as `Bundle.form` has it. ``every``: all layers, not the heaviest alone. ``sizes``: of dynamic axes, else 1.
    """
    cost = graph_cost(model, sizes)
    nodes = Counter(node.op_type for node in all_nodes(model.graph))
    counted = cost.by_op()
    free = {op: {"layers": number, "macs": 0, "parameters": 0, "bytes": 0} for op, number in nodes.items() if op not in counted}
    heaviest = sorted(cost.layers, key=lambda layer: (-layer.macs, -layer.size_bytes))[:HEAVIEST]
    return {
        "form": form,
        "opset": opset(model),
        "nodes": nodes.total(),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "bytes": sum(layer.size_bytes for layer in cost.layers),
        "sparse_layers": sum(layer.sparse for layer in dense_layers(model)),
        "layers": [{"op": op, **row} for op, row in (counted | free).items()],
        ("every_layer" if every else "heaviest"): [_layer(layer) for layer in (cost.layers if every else heaviest)],
        "not_counted": list(cost.unknown),
        "targets": coverage(model, form),
    }


def _layer(layer: LayerCost) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "op": layer.op,
        "reads": ", ".join(map(_shape, layer.reads)),
        "weights": ", ".join(map(_shape, layer.weights)),
        "writes": ", ".join(map(_shape, layer.writes)),
        "macs": layer.macs,
        "parameters": layer.parameters,
        "bytes": layer.size_bytes,
    }


def _shape(tensor: Tensor) -> str:
    return "?" if tensor.shape is None else "x".join(map(str, tensor.shape)) or "scalar"

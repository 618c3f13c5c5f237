"""`inspect`: what a bundle or an engine file holds, in figures."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BundleError, MissingExtra, UsageError
from edgekit.files import sha256_file
from edgekit.manifest import TensorSpec

if TYPE_CHECKING:
    from .cost import LayerCost, Tensor

__all__ = ["summarise"]

MAX_RECORD_BYTES = 1 << 20
HEAVIEST = 8  # layers shown, where not all are asked for
_DERIVED = (".engine", ".kit.zip")


def summarise(path: str | os.PathLike[str], *, layers: bool = False) -> dict[str, Any]:
    """A bundle's task, tensors, files, history, the cost of its graphs and what targets take it; or the record beside an
    engine or kit.

    ``layers``: every layer of the graphs with its shapes, not the heaviest ones alone. Bytes are those of the stored types,
    nothing fused, weights included; one MAC is a multiply and an add; dynamic axes count as 1.

    Raises `UsageError` where there is nothing at ``path``, `BundleError` for a damaged bundle or an engine without record.
    """
    where = Path(path)
    if where.is_file() and where.name.endswith(_DERIVED):
        return _engine(where)
    if where.is_file() and where.suffix == ".zip":
        raise UsageError(f"{where} is a packed bundle", f"edgekit verify {where} --pub P says what is inside")
    if not where.exists():
        raise UsageError(f"there is nothing at {where}", "give a bundle (NAME.edge) or an engine inside one")
    return _bundle(Bundle.open(where), layers)


def _bundle(bundle: Bundle, layers: bool) -> dict[str, Any]:
    manifest = bundle.manifest
    graphs = {name: _graph(bundle, name, layers) for name in (FLOAT_GRAPH, INT8_GRAPH) if bundle.has(name)}
    targets = [graph.pop("targets") for graph in graphs.values()]
    return {
        "bundle": str(bundle.path),
        "name": manifest.name,
        "task": manifest.task,
        "digest": bundle.digest,
        "inputs": {spec.name: _tensor(spec) for spec in manifest.inputs},
        "outputs": {spec.name: _tensor(spec) for spec in manifest.outputs},
        "labels": len(manifest.labels),
        "graphs": graphs,
        "targets": targets[-1] if targets else [],  # of the graph that `build` takes
        "files": {name: (bundle.path / name).stat().st_size for name in sorted(manifest.files)},
        "history": [_entry(entry.stage, entry.time, entry.figures) for entry in manifest.history],
    }


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.dtype} {'x'.join(map(str, spec.shape)) or 'scalar'}"


def _entry(stage: str, time: str, figures: dict[str, Any]) -> str:
    """One line; long and nested figures are left to the manifest."""
    shown = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in figures.items()
        if _short(value)
    ]
    return " ".join([time, stage, ", ".join(shown)]).strip()


def _short(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 40)


def _graph(bundle: Bundle, name: str, every: bool) -> dict[str, Any]:
    """Opset, operators, parameters, MACs, bytes and layers of a graph, and the targets that take it."""
    try:
        import onnx

        from edgekit.graphs.sparsity import dense_layers

        from .cost import graph_cost
        from .coverage import coverage
        from .passes import all_nodes, opset
    except ModuleNotFoundError as error:
        raise MissingExtra.of(error) from None

    model = onnx.load_model(str(bundle.file(name)), load_external_data=False)
    cost = graph_cost(model)
    form = bundle.form if name == INT8_GRAPH else "float"
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


def _engine(path: Path) -> dict[str, Any]:
    """The record that `build` wrote beside an engine or kit, and whether the file is still the one it describes."""
    record_path = path.with_name(path.name.removesuffix(".kit.zip").removesuffix(".engine") + ".json")
    if not record_path.is_file() or record_path.stat().st_size > MAX_RECORD_BYTES:
        raise BundleError(
            f"{path} has no record {record_path.name} beside it", "an engine tells nothing without a GPU; build it again"
        )
    try:
        record = msgspec.json.decode(record_path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise BundleError(f"{record_path} is damaged: {error}", "build it again: edgekit build B --target NAME") from None
    stated = record.get("engine_sha256") or record.get("kit_sha256")
    if sha256_file(path) != stated:
        raise BundleError(
            f"{path} is not the file that {record_path.name} describes", "build it again: edgekit build B --target NAME"
        )
    note = "read from the record: an engine cannot be deserialised without a GPU" if path.suffix == ".engine" else "a build kit"
    return {"engine": str(path), "note": note, **record}

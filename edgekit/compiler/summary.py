"""`inspect`: what a bundle, an ONNX file or an engine file holds, in figures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BundleError, MissingExtra, UsageError
from edgekit.files import sha256_file
from edgekit.manifest import TensorSpec

from . import child
from .shapes import Axis, parse_shapes

__all__ = ["summarise"]

MAX_RECORD_BYTES = 1 << 20
TIMEOUT_S = 600.0  # for the child that reads an ONNX file
_DERIVED = (".engine", ".kit.zip")


def summarise(path: str | os.PathLike[str], *, layers: bool = False, shape: Iterable[str] | str = ()) -> dict[str, Any]:
    """A bundle's task, tensors, files, history, the cost of its graphs and what targets take it; the same of an ONNX file, as
    far as it says; or the record beside an engine or kit.

    ``layers``: every layer of the graphs with its shapes, not the heaviest ones alone. Bytes are those of the stored types,
    nothing fused, weights included; one MAC is a multiply and an add. Dynamic axes count as 1 in an ONNX file, in a bundle as
    `estimate` takes them: the fewest samples, the largest of other ranges (``counted_at``). ``shape``: texts as
    ``x:1x3x48x320``, for an ONNX file whose inputs have dynamic axes.

    Raises `UsageError` where there is nothing at ``path``, `BundleError` for a damaged bundle or an engine without record,
    `GraphError` for a file that is no ONNX graph, or whose graph nothing could run (naming node and tensor).
    """
    where = Path(path)
    fixed = parse_shapes([shape] if isinstance(shape, str) else shape)
    if fixed and (where.is_dir() or where.name.endswith((*_DERIVED, ".zip"))):
        raise UsageError("--shape is for an ONNX file; a bundle's shapes were stated when it was made", "leave --shape out")
    if where.is_file() and where.name.endswith(_DERIVED):
        return _engine(where)
    if where.is_file() and where.suffix == ".zip":
        raise UsageError(f"{where} is a packed bundle", f"edgekit verify {where} --pub P says what is inside")
    if not where.exists():
        raise UsageError(f"there is nothing at {where}", "give a bundle (NAME.edge), an ONNX file or an engine of a bundle")
    if where.is_file():
        return _foreign(where, fixed, layers)
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
    try:
        import onnx

        from .inspection import graph_figures
        from .roofline import sizes_of
    except ModuleNotFoundError as error:
        raise MissingExtra.of(error) from None

    model = onnx.load_model(str(bundle.file(name)), load_external_data=False)
    try:
        sizes = sizes_of(bundle)[1]
    except UsageError:  # of some axis nothing is known
        sizes = {}
    figures = graph_figures(model, bundle.form if name == INT8_GRAPH else "float", every=every, sizes=sizes)
    return {**figures, "counted_at": sizes} if sizes else figures


def _foreign(path: Path, fixed: Mapping[str, tuple[Axis, ...]], layers: bool) -> dict[str, Any]:
    """An ONNX file, read in a child process as `import_onnx` reads it; nothing is written that stays."""
    digest = sha256_file(path)
    with tempfile.TemporaryDirectory(prefix="edgekit-inspect-") as work:
        request = {"model": os.path.abspath(path), "shape": fixed, "layers": layers}
        found = child.call("inspection:inspect_graph", request, Path(work), TIMEOUT_S)
    return {"file": str(path), "size_bytes": path.stat().st_size, "sha256": digest, **found}


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

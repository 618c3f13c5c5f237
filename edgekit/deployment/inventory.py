"""What is inside a pack, file by file: what it is, which stage made it, with which tools. And the same as a bill of materials
that other people's tools read: CycloneDX 1.6, JSON.

Nothing here is guessed: a stage, a tool's version, a data set's digest or a source stands here if the bundle's history has it.
Licences of models and data are known to nobody but who made them; a history records where they came from.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle import CALIBRATION, FLOAT_GRAPH, GOLDEN, INT8_GRAPH, TOKENIZER, refuse_inside_bundle
from edgekit.errors import OutputExists
from edgekit.files import atomic_write, check_new
from edgekit.manifest import History, Manifest
from edgekit.version import __version__

from .archive import Entry

__all__ = ["describe", "write_sbom"]

_KINDS = {
    FLOAT_GRAPH: "float graph",
    INT8_GRAPH: "quantized graph",
    CALIBRATION: "calibration",
    GOLDEN: "golden outputs",
    TOKENIZER: "tokenizer",
}
_ENDINGS = {
    ".engine": "engine",
    ".kit.zip": "build kit",
    ".golden.npz": "golden outputs",
    ".layers.json": "layers",
    ".json": "record",
}
#: Which stages write a file, besides the target's `build` for what lies in engines/.
_QUANTIZE = ("quantize",)
_MODEL = ("train", "prune", "import")
_STAGES = {INT8_GRAPH: _QUANTIZE, CALIBRATION: _QUANTIZE, FLOAT_GRAPH: _MODEL, GOLDEN: _MODEL, TOKENIZER: _MODEL}
_MODELS = ("float graph", "quantized graph", "engine")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)


def describe(entry: Entry, manifest: Manifest) -> dict[str, Any]:
    """``name``, ``size_bytes``, ``sha256``, ``kind`` and ``producer`` (``stage``, ``edgekit`` and tools with their versions;
    None where the history does not say)."""
    kind, made = _kind(entry.name), _maker(entry.name, manifest)
    return {
        "name": entry.name,
        "size_bytes": entry.size_bytes,
        "sha256": entry.sha256,
        "kind": kind,
        "producer": {"stage": made.stage, "edgekit": made.edgekit, **_tools(made)} if made else None,
    }


def _kind(name: str) -> str:
    if name in _KINDS:
        return _KINDS[name]
    if name.startswith("engines/"):
        return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), "other")
    return "other"


def _maker(name: str, manifest: Manifest) -> History | None:
    """The newest history entry of a stage that writes this file."""
    stages = _STAGES.get(name, ())
    for entry in reversed(manifest.history):
        target = entry.config.get("target")
        built = entry.stage == "build" and isinstance(target, str) and name.startswith(f"engines/{target}.")
        if entry.stage in stages or built:
            return entry
    return None


def _tools(entry: History) -> dict[str, str]:
    """Tool -> version, as an entry recorded them; what built an engine recorded its TensorRT."""
    tools = {} if isinstance(entry.tools, msgspec.UnsetType) else dict(entry.tools)
    version = entry.figures.get("tensorrt")
    return tools | ({"tensorrt": version} if entry.stage == "build" and isinstance(version, str) else {})


def write_sbom(path: Path, manifest: Manifest, listing: Mapping[str, Any]) -> None:
    """Write the bill of materials of a verified pack (``listing`` as `verify` answers it). The same pack gives the same bytes.

    Raises `OutputExists` where ``path`` is there.
    """
    refuse_inside_bundle(path)
    if path.exists() or path.is_symlink():
        raise OutputExists(path, "--sbom")
    check_new(path)
    found = _sbom(manifest, listing)
    atomic_write(path, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


def _sbom(manifest: Manifest, listing: Mapping[str, Any]) -> dict[str, Any]:
    times = [entry.time for entry in manifest.history if _TIME.fullmatch(entry.time)]
    tools = {("edgekit", entry.edgekit) for entry in manifest.history}
    tools |= {tool for entry in manifest.history for tool in _tools(entry).items()}
    files = [_file(file) for file in listing["files"]]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, 'edgekit pack ' + listing['pack_digest'])}",
        "version": 1,
        "metadata": {
            **({"timestamp": times[-1]} if times else {}),
            "tools": {"components": [{"type": "application", "name": "edgekit", "version": __version__}]},
            "component": _model(manifest, listing),
        },
        "components": [*files, *(_tool(name, version) for name, version in sorted(tools))],
        "dependencies": [{"ref": "pack", "dependsOn": [file["bom-ref"] for file in files]}],
    }


def _model(manifest: Manifest, listing: Mapping[str, Any]) -> dict[str, Any]:
    """The pack as one component: what it was made from, stage by stage, is its model card and its properties."""
    datasets = [
        {
            "type": "dataset",
            "name": str(entry.config.get("data", entry.stage)),
            "description": f"{entry.stage}: digest {digest}",
        }
        for entry in manifest.history
        for digest in [entry.config.get("data_digest") or entry.figures.get("data_digest")]
        if isinstance(digest, str)
    ]
    card: dict[str, Any] = {"task": manifest.task}
    if manifest.model:
        card["modelArchitecture"] = manifest.model.name
    if datasets:
        card["datasets"] = datasets
    rows = [("edgekit:digest", listing["digest"]), *(("edgekit:signed-by", key_id) for key_id in listing["key_ids"])]
    rows += [("edgekit:expires", listing["expires"])] if listing["expires"] else []
    for entry in manifest.history:
        rows.append(("edgekit:stage", f"{entry.stage} {entry.time}"))
        if isinstance(entry.commit, str):
            rows.append(("edgekit:commit", f"{entry.stage} {entry.commit}"))
        if "sha256" in entry.config:  # of an import: the file that a foreign model was
            rows.append(("edgekit:source", f"{entry.config.get('model')} sha256 {entry.config['sha256']}"))
    return {
        "type": "machine-learning-model",
        "bom-ref": "pack",
        "name": manifest.name,
        "version": str(listing["release"]),
        "hashes": [{"alg": "SHA-256", "content": listing["pack_digest"]}],
        "modelCard": {"modelParameters": card},
        "properties": [{"name": name, "value": value} for name, value in rows],
    }


def _file(file: Mapping[str, Any]) -> dict[str, Any]:
    rows = [("edgekit:kind", file["kind"]), ("edgekit:size_bytes", str(file["size_bytes"]))]
    rows += [(f"edgekit:producer:{name}", version) for name, version in (file["producer"] or {}).items()]
    return {
        "type": "machine-learning-model" if file["kind"] in _MODELS else "file",
        "bom-ref": f"file:{file['name']}",
        "name": file["name"],
        "hashes": [{"alg": "SHA-256", "content": file["sha256"]}],
        "properties": [{"name": name, "value": value} for name, value in rows],
    }


def _tool(name: str, version: str) -> dict[str, Any]:
    return {"type": "library", "bom-ref": f"tool:{name}@{version}", "name": name, "version": version, "scope": "excluded"}

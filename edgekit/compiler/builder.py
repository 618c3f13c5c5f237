"""`build`: a bundle and a target in, an engine (RTX) or a build kit (Jetson) beside the graph, cached by digest.

This half loads neither onnx nor TensorRT: with nothing changed a second build only hashes files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, INT8_GRAPH, Bundle
from edgekit.errors import BundleError, MissingExtra, UsageError
from edgekit.manifest import Tolerance
from edgekit.targets import PRECISIONS, JetPack, Target, buildable
from edgekit.trust import trust_engine
from edgekit.version import __version__

from . import child
from .kit import SCRIPT, make_kit
from .shapes import Profiles, profiles_for

__all__ = ["BuildResult", "build"]

RECIPE = 4  # raise it where the same inputs would now give another engine
#: Distributions that bring the module ``tensorrt_rtx``; asking one for its version costs no import of TensorRT.
_RTX_DISTRIBUTIONS = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
_DEFAULT_TOLERANCE = Tolerance("snr_db", 40.0)
_FP8_SM = "8.9"  # the first with E4M3 in its tensor cores, as `targets.toml` has it
#: Of a target: what an engine or kit depends on. Figures of speed and the file they stand in are none of it.
_DECIDES = ("name", "title", "kind", "sm", "precisions", "tensorrt")
_INT8_MARGIN_DB = 3.0  # as `quantize` leaves


@dataclass(frozen=True)
class BuildResult:
    """What `build` made. ``seconds`` is the time inside `build`; ``tensorrt`` the version used, or expected on a device.

    ``sparse_layers``: layers with 2:4 weights, for which sparse kernels are tried where the target has them.
    """

    bundle: Bundle
    engine: Path | None
    kit: Path | None
    cached: bool
    target: str
    precision: str
    tensorrt: str
    seconds: float
    size_bytes: int
    sparse_layers: int = 0
    note: str = ""

    def figures(self) -> dict[str, Any]:
        """JSON-plain, paths as text."""
        plain = {key: value for key, value in asdict(self).items() if key != "bundle"}
        paths = {key: None if plain[key] is None else str(plain[key]) for key in ("engine", "kit")}
        return {"bundle": str(self.bundle.path), **plain, **paths}


def build(
    bundle: Bundle | str | os.PathLike[str],
    *,
    target: str,
    precision: str = "best",
    batch: int | str | None = None,
    timeout_s: float = 1800,
) -> BuildResult:
    """Compile a bundle's graph for ``target`` (see ``edgekit targets``) into ``engines/`` of the same bundle.

    ``rtx`` targets get ``engines/TARGET.engine``, built here by TensorRT-RTX without a GPU; devices get
    ``engines/TARGET.kit.zip``, which their own TensorRT compiles. ``engines/TARGET.json`` says what decided it.
    ``precision``: fp32, fp16, int8, or best: int8 where the bundle is quantized, else fp16 where it reproduces the golden
    outputs within 40 dB, else fp32. int8 is whatever the bundle was quantized to; the answer names it (`Bundle.form`).
    Outside of int8 an int8 engine computes in float16, but for nodes whose range needs float32, and but for graphs in which
    float16 makes noise near that of int8; the note says so. ``batch``: 4 or "1..8", for graphs with a dynamic first axis;
    1 if not given. Where the graph has 2:4 weights and the target sparse tensor cores, the builder tries them.

    Raises `UsageError` for an unknown target, a precision the target lacks or a batch the graph cannot take,
    `BundleError` for a damaged bundle, `GoldenError` where fp16 was asked for and does not hold, `GraphError` where
    TensorRT refuses the graph (named by node and operator), `MissingExtra` without TensorRT-RTX.
    """
    started = time.perf_counter()
    chosen = buildable(target)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    _check_precision(opened, chosen, precision)
    spec = _specification(opened, chosen, precision, profiles_for(opened, batch))
    key = hashlib.sha256(msgspec.json.encode(spec, order="sorted")).hexdigest()
    if (found := _cached(opened, chosen, key)) is not None:
        return _result(opened, chosen, found, cached=True, seconds=time.perf_counter() - started)
    with tempfile.TemporaryDirectory(prefix="edgekit-build-") as name:
        folder = Path(name)
        answer = child.call("compilation:compile_graph", _request(opened, chosen, spec), folder, timeout_s, address_space=0)
        answer.setdefault("tensorrt", spec["tensorrt"])
        files, record = _outputs(opened, chosen, {**spec, "key": key}, answer, folder)
    files[f"engines/{chosen.name}.json"] = msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"
    figures = {k: record[k] for k in ("precision", "tensorrt", "seconds", "size_bytes", "golden_snr_db")}
    entry = opened.entry("build", {"target": target, "precision": precision, "batch": batch}, figures)
    updated = opened.extend(files, entry)
    if "engine_sha256" in record:
        trust_engine(record["engine_sha256"])  # made here: the runtime may load it here
    return _result(updated, chosen, record, cached=False, seconds=time.perf_counter() - started)


def _check_precision(bundle: Bundle, target: Target, precision: str) -> None:
    if precision not in ("best", *target.precisions):
        raise UsageError(
            f"{target.name} does not run {precision!r}; it runs {', '.join(target.precisions)}",
            f"choose --precision {', '.join(p for p in PRECISIONS if p in target.precisions)} or best",
        )
    if precision not in ("best", *PRECISIONS):
        raise UsageError(
            f"{target.name} runs {precision}, but edgekit does not make {precision} graphs",
            f"choose --precision {', '.join(PRECISIONS)} or best",
        )
    if precision == "int8" and not bundle.has(INT8_GRAPH):
        raise BundleError(
            f"{bundle.path} has no int8 graph", f"quantize it first: edgekit quantize {bundle.path} --out B2 --calib SPEC"
        )
    quantized = bundle.has(INT8_GRAPH) and precision in ("best", "int8")
    if quantized and bundle.form == "fp8" and "fp8" not in target.precisions:
        raise UsageError(
            f"{bundle.path} is fp8, which needs SM {_FP8_SM} (Ada Lovelace) or later; {target.name} is SM {target.sm}",
            "quantize it to int8 for this target (--format int8), or build its float graph: --precision fp16",
        )
    if not bundle.has(FLOAT_GRAPH) and not bundle.has(INT8_GRAPH):
        raise BundleError(f"{bundle.path} holds no graph to build", "make it again with edgekit train or edgekit import")


def _tensorrt_version(target: Target) -> str:
    """The version that will compile: installed TensorRT-RTX here, the JetPacks' on a device."""
    if target.kind == "device":
        return _listed(target.tensorrt)
    for name in _RTX_DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise MissingExtra("rtx", "tensorrt_rtx")


def _listed(entries: Iterable[JetPack]) -> str:
    return ", ".join(f"{entry.tensorrt} ({entry.release})" for entry in entries)


def _readers(target: Target, opset: int, untyped: int | None = None) -> tuple[tuple[JetPack, ...], list[str]]:
    """(the JetPacks whose TensorRT reads a graph of this opset, a note for each of the others).

    ``untyped``: opset of the graph that a weakly typed TensorRT takes instead.
    """

    def read(entry: JetPack) -> int:
        return opset if entry.strongly_typed or untyped is None else untyped

    able = tuple(entry for entry in target.tensorrt if read(entry) <= entry.opset)
    notes = [
        f"not for {entry.release}: TensorRT {entry.tensorrt} "
        + (f"reads opset {entry.opset} at most, the graph has {read(entry)}" if entry.opset else "is older than the kit's 8.6")
        for entry in target.tensorrt
        if entry not in able
    ]
    return able, notes


def _specification(bundle: Bundle, target: Target, precision: str, profiles: Profiles) -> dict[str, Any]:
    """Everything that decides the engine, the builder's flags too, which follow from it; its digest is the cache's key."""
    manifest = bundle.manifest
    sources = {name: manifest.files[name] for name in (FLOAT_GRAPH, INT8_GRAPH, GOLDEN) if name in manifest.files}
    return {
        "recipe": RECIPE,
        "edgekit": __version__,
        "script": hashlib.sha256(SCRIPT.read_bytes()).hexdigest(),
        "target": {key: value for key, value in msgspec.to_builtins(target).items() if key in _DECIDES},
        "requested": precision,
        "tensorrt": _tensorrt_version(target),
        "sources": sources,
        "golden": msgspec.to_builtins(manifest.golden),
        "profiles": profiles,
    }


def _request(bundle: Bundle, target: Target, spec: Mapping[str, Any]) -> dict[str, Any]:
    """What the child needs; taking a file's path checks its hash."""

    def path(name: str) -> str | None:
        return str(bundle.file(name).resolve()) if bundle.has(name) else None

    return {
        "float_graph": path(FLOAT_GRAPH),
        "int8_graph": path(INT8_GRAPH),
        "golden": path(GOLDEN),
        "precision": spec["requested"],
        "form": bundle.form,
        "target": target.name,
        "target_precisions": list(target.precisions),
        "engine": target.kind == "rtx",
        "module": "tensorrt_rtx",
        "extra": "rtx",
        "compute_capability": target.sm,
        "profiles": spec["profiles"],
        "sparse": target.sparse,
    }


def _tolerance(bundle: Bundle, precision: str, golden_snr_db: float | None) -> Tolerance:
    """What the engine owes the golden outputs on a GPU: TF32 and fp16 have 11 bits, int8 what the bundle states.

    float16 around int8 draws the rounding to int8 anew: on few samples the graph itself may lie below the one it was made
    from (`compilation`), and the engine owes what the typed graph reaches, less the same margin.
    """
    stated = bundle.manifest.golden.get(INT8_GRAPH) if precision == "int8" else None
    if stated is not None and stated.kind == "snr_db" and golden_snr_db is not None:
        return Tolerance("snr_db", min(stated.limit, round(golden_snr_db - _INT8_MARGIN_DB, 1)))
    return stated or _DEFAULT_TOLERANCE


def _outputs(
    bundle: Bundle, target: Target, spec: Mapping[str, Any], answer: Mapping[str, Any], folder: Path
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files for the bundle, the record for ``engines/TARGET.json``)."""
    graph = (folder / "graph.onnx").read_bytes()
    used = bundle.form if answer["precision"] == "int8" else answer["precision"]
    record = {
        **{k: spec[k] for k in ("key", "recipe", "edgekit", "requested", "sources", "profiles")},
        **{k: answer[k] for k in ("flags", "sparse_layers")},
        "target": target.name,
        "kind": target.kind,
        "compute_capability": target.sm,
        "precision": used,
        "module": "tensorrt_rtx" if target.kind == "rtx" else "tensorrt",
        "tensorrt": answer["tensorrt"],
        "graph_sha256": answer["graph_sha256"],
        "golden": msgspec.to_builtins(_tolerance(bundle, answer["precision"], answer["golden_snr_db"])),
        "golden_snr_db": answer["golden_snr_db"],
        "opset": answer["opset"],
        "seconds": answer.get("seconds"),
        "graph_seconds": answer["graph_seconds"],
        "notes": list(answer["notes"]),
    }
    if target.kind == "rtx":
        data = (folder / "plan.engine").read_bytes()
        name, record["engine_sha256"] = f"engines/{target.name}.engine", hashlib.sha256(data).hexdigest()
        if used == "int8":
            record["notes"].append("TensorRT-RTX documents int8 for weights only: expect no int8 speed")
    else:
        golden = bundle.file(GOLDEN).read_bytes() if bundle.has(GOLDEN) else None
        able, unable = _readers(target, answer["opset"], answer["untyped_opset"])
        record["tensorrt"] = _listed(able) or "none"
        record["notes"] += unable
        untyped = (folder / "untyped.onnx").read_bytes() if answer["untyped_opset"] else None
        data = make_kit(target, able, record, graph, golden, untyped)
        name, record["kit_sha256"] = f"engines/{target.name}.kit.zip", hashlib.sha256(data).hexdigest()
        if able:
            record["notes"].append("compile it on the device: unzip the kit there and run python3 build_engine.py")
    return {name: data}, {**record, "file": name, "size_bytes": len(data)}


def _cached(bundle: Bundle, target: Target, key: str) -> dict[str, Any] | None:
    """The record of an earlier build with the same key whose files are there and whole."""
    sidecar = f"engines/{target.name}.json"
    if not bundle.has(sidecar):
        return None
    try:
        record: dict[str, Any] = msgspec.json.decode(bundle.file(sidecar).read_bytes(), type=dict[str, Any])
        if record["key"] != key or not bundle.has(record["file"]):
            return None
        bundle.file(record["file"])
    except (msgspec.DecodeError, KeyError, BundleError):
        return None  # a damaged derived file is made again
    return record


def _result(bundle: Bundle, target: Target, record: Mapping[str, Any], *, cached: bool, seconds: float) -> BuildResult:
    file = bundle.path / record["file"]
    return BuildResult(
        bundle=bundle,
        engine=file if target.kind == "rtx" else None,
        kit=file if target.kind == "device" else None,
        cached=cached,
        target=target.name,
        precision=record["precision"],
        tensorrt=record["tensorrt"],
        seconds=round(seconds, 4),
        size_bytes=record["size_bytes"],
        sparse_layers=record["sparse_layers"],
        note="; ".join(record["notes"]),
    )

"""`build`: a bundle and a target in, an engine (RTX) or a build kit (Jetson) beside the graph, cached by digest.

This half loads neither onnx nor TensorRT: with nothing changed a second build only hashes files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle import FLOAT_GRAPH, GOLDEN, INT8_GRAPH, Bundle
from edgekit.errors import BundleError, UsageError
from edgekit.manifest import Tolerance, batch_axes
from edgekit.targets import Target, buildable
from edgekit.trust import is_trusted, trust_engine
from edgekit.version import __version__

from . import child
from .build_options import layer_report
from .changes import changes, difference
from .kit import SCRIPTS, make_kit
from .options import Options, check_precision, frame_profiles, frames_of, read_timings
from .shapes import Profiles, profiles_for, unstated_sizes
from .versions import listed, readers, tensorrt_version

__all__ = ["BuildResult", "build"]

RECIPE = 6  # raise it where the same inputs would now give another engine
_DEFAULT_TOLERANCE = Tolerance("snr_db", 40.0)
#: Of a target: what an engine or kit depends on. Figures of speed and the file they stand in are none of it.
_DECIDES = ("name", "title", "kind", "sm", "precisions", "tensorrt")
_MARGIN_DB = 3.0  # as `quantize` leaves


@dataclass(frozen=True)
class BuildResult:
    """What `build` made. ``seconds`` is the time inside `build`; ``tensorrt`` the version used, or expected on a device.

    ``sparse_layers``: layers with 2:4 weights, for which sparse kernels are tried where the target has them. ``layers``: the
    report of a verbose build. ``changed``: what differs from the build before; ``reproduced``: whether, where nothing of its
    inputs does, the bytes are the same. ``usable``: False for a kit that no TensorRT of its device builds.
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
    layers: Path | None = None
    layer_summary: str = ""
    changed: list[str] = field(default_factory=list)
    reproduced: bool | None = None
    usable: bool = True
    note: str = ""

    def figures(self) -> dict[str, Any]:
        """JSON-plain, paths as text."""
        plain = {key: value for key, value in asdict(self).items() if key != "bundle"}
        paths = {key: None if plain[key] is None else str(plain[key]) for key in ("engine", "kit", "layers")}
        return {"bundle": str(self.bundle.path), **plain, **paths}


def build(
    bundle: Bundle | str | os.PathLike[str],
    *,
    target: str,
    precision: str = "best",
    batch: int | str | None = None,
    workspace_mb: int | None = None,
    dla: int | None = None,
    compatible: str | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    verbose: bool = False,
    uint8_input: bool = False,
    again: bool = False,
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
    ``workspace_mb``: scratch memory in MiB that one kernel may use, without a limit if not given. ``dla``: the core of the
    deep learning accelerator that runs what it can, in fp16 or int8; the GPU runs the rest. ``compatible``: "hardware" for
    an engine that other GPUs run as well, "version" for one that later TensorRT runs; what each costs is in the answer's note.
    ``timing_cache``: a file that the kit's script wrote on such a device; it goes into the kit, which then builds faster.
    ``verbose``: report the layers in ``engines/TARGET.layers.json``: for RTX those of the network, before fusion, for nothing
    can look into its engines without a GPU; a device writes its engine's own beside it.
    ``uint8_input``: of a model of pictures; the engine takes resized frames, uint8 (n, H, W, C), a quarter of the bytes, and
    normalises them itself. The runtime sees that in the record and feeds it so.
    ``again``: build although nothing changed; the answer's ``reproduced`` says whether the bytes are those of the build before.

    Raises `UsageError` for an unknown target, a precision or an option the target lacks or a batch the graph cannot take,
    `BundleError` for a damaged bundle, `GoldenError` where fp16 was asked for, or is needed by the DLA, and does not hold,
    `GraphError` where TensorRT refuses the graph (named by node and operator), `MissingExtra` without TensorRT-RTX.
    """
    started = time.perf_counter()
    chosen = buildable(target)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, but="engines")  # a damaged engine is made again
    check_precision(opened, chosen, precision)
    frames = frames_of(opened) if uint8_input else None
    profiles = profiles_for(opened, batch) if frames is None else frame_profiles(profiles_for(opened, batch))
    timings, remarks = read_timings(timing_cache, chosen)
    options = Options(workspace_mb, dla, compatible, timings, verbose or opened.has(_layers(chosen)), uint8_input)
    options.check(chosen, precision, profiles)
    spec = _specification(opened, chosen, precision, profiles, options)
    key = hashlib.sha256(msgspec.json.encode(spec, order="sorted")).hexdigest()
    earlier = _earlier(opened, chosen)
    if earlier is not None and not again and _serves(opened, chosen, earlier, key, options):
        remarks += _foreign(chosen, earlier)
        return _result(opened, chosen, earlier, remarks, cached=True, seconds=time.perf_counter() - started)
    files, record = _compiled(opened, chosen, options, {**spec, "key": key}, timeout_s)
    changed, reproduced = _compared(opened, earlier, record, files[record["file"]])
    updated = _kept(opened, files, record, {"target": target, "precision": precision, "batch": batch, **spec["options"]})
    if changed:
        remarks = [f"rebuilt: {', '.join(changed)}", *remarks]
    made = _result(updated, chosen, record, remarks, cached=False, seconds=time.perf_counter() - started)
    return replace(made, changed=changed, reproduced=reproduced)


def _kept(bundle: Bundle, files: Mapping[str, bytes], record: Mapping[str, Any], config: Mapping[str, Any]) -> Bundle:
    """The bundle with what was built, its record and a line of history."""
    sidecar = {f"engines/{record['target']}.json": msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"}
    figures = {k: record[k] for k in ("precision", "tensorrt", "seconds", "size_bytes", "golden_snr_db")}
    # A target may have changed its kind: the record is the new one's.
    other = {f"engines/{record['target']}{suffix}" for suffix in (".engine", ".kit.zip", ".golden.npz")} - files.keys()
    updated = bundle.extend({**files, **sidecar}, bundle.entry("build", config, figures), drop=other)
    if "engine_sha256" in record:
        trust_engine(record["engine_sha256"])  # made here: the runtime may load it here
    return updated


def _assumptions(bundle: Bundle, profiles: Profiles) -> list[str]:
    """A note where the engine takes sizes that nobody stated."""
    sizes = ", ".join(f"{symbol}={size}" for symbol, size in unstated_sizes(bundle, profiles).items())
    return [f"takes {sizes} only, which nobody stated: import it with --shape or --dynamic"] if sizes else []


def _compiled(
    bundle: Bundle, target: Target, options: Options, spec: Mapping[str, Any], timeout_s: float
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files for the bundle, the record for ``engines/TARGET.json``)."""
    if not os.access(bundle.path, os.W_OK | os.X_OK):  # told before minutes of work
        raise UsageError(f"{bundle.path} may not be written", "copy it to where you may write: an engine goes into its bundle")
    with tempfile.TemporaryDirectory(prefix="edgekit-build-") as name:
        folder = Path(name)
        request = _request(bundle, target, spec, options)
        try:
            answer = child.call("compilation:compile_graph", request, folder, timeout_s, address_space=0)
        except child.NativeCrash as crash:
            if not crash.fault or not request["engine"] or not spec["profiles"]:
                raise
            request |= {"fixed": True}  # dynamic axes are what TensorRT crashes on; those that the profile fixes need not be
            answer = child.call("compilation:compile_graph", request, folder, timeout_s, address_space=0)
        answer.setdefault("tensorrt", spec["tensorrt"])
        options.check_chosen(answer)
        answer["notes"] += _assumptions(bundle, spec["profiles"])
        answer["notes"] += options.notes(target, answer["precision"], answer.get("memory"))
        return _outputs(bundle, target, spec, answer, folder, options.timings)


def _compared(
    bundle: Bundle, earlier: Mapping[str, Any] | None, record: Mapping[str, Any], made: bytes
) -> tuple[list[str], bool | None]:
    """(what differs from the build before, whether the same inputs gave the same bytes: None where they were not the same)."""
    if earlier is None:
        return [], None
    if earlier.get("key") != record["key"]:
        return changes(earlier.get("decided_by"), record["decided_by"]), None
    try:
        before = bundle.read(earlier["file"])
    except (BundleError, KeyError):
        return ["the file of the earlier build is gone or damaged"], None
    words = difference(before, made, same_graph=earlier.get("graph_sha256") == record["graph_sha256"])
    return [words] if words else [], not words


def _specification(bundle: Bundle, target: Target, precision: str, profiles: Profiles, options: Options) -> dict[str, Any]:
    """Everything that decides the engine, the builder's flags too, which follow from it; its digest is the cache's key."""
    manifest = bundle.manifest
    sources = {name: manifest.files[name] for name in (FLOAT_GRAPH, INT8_GRAPH, GOLDEN) if name in manifest.files}
    frames = (
        {"frames": json.loads(msgspec.json.encode(frames_of(bundle)))} if options.uint8_input else {}
    )  # as a record says it
    return {
        "recipe": RECIPE,
        "edgekit": __version__,
        "script": hashlib.sha256(b"".join(script.read_bytes() for script in SCRIPTS)).hexdigest(),
        "target": {key: value for key, value in msgspec.to_builtins(target).items() if key in _DECIDES},
        "requested": precision,
        "tensorrt": tensorrt_version(target),
        "sources": sources,
        "golden": msgspec.to_builtins(manifest.golden),
        "profiles": profiles,
        "options": options.decides(target),
        **frames,
    }


def _request(bundle: Bundle, target: Target, spec: Mapping[str, Any], options: Options) -> dict[str, Any]:
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
        "compute_capability": target.sm,
        "profiles": spec["profiles"],
        "shapes": {tensor.name: list(tensor.shape) for tensor in bundle.manifest.inputs},
        "batch_axes": batch_axes(bundle.manifest.inputs, bundle.manifest.outputs),
        "options": {**spec["options"], "verbose": options.verbose},
        "sparse": target.sparse,
        "frames": spec.get("frames"),
    }


def _tolerance(bundle: Bundle, precision: str, golden_snr_db: float | None, *, others: bool) -> Tolerance:
    """What the engine owes the golden outputs on a GPU: TF32 and fp16 have 11 bits, int8 what the bundle states.

    An engine that is given ``others`` than the bundle's golden inputs, rounded to bytes or of its own sizes, owes no more than
    its graph answers to them here, less the same margin. float16 around int8 draws the rounding to int8 anew: on few samples
    the graph itself may lie below the one it was made from (`compilation`), and the engine owes what the typed graph reaches,
    less the same margin.
    """
    stated = bundle.manifest.golden.get(INT8_GRAPH) if precision == "int8" else None
    owed = stated or _DEFAULT_TOLERANCE
    if (stated is not None or others) and owed.kind == "snr_db" and golden_snr_db is not None:
        return Tolerance("snr_db", min(owed.limit, round(golden_snr_db - _MARGIN_DB, 1)))
    return owed


def _outputs(
    bundle: Bundle,
    target: Target,
    spec: Mapping[str, Any],
    answer: Mapping[str, Any],
    folder: Path,
    timings: bytes | None,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files for the bundle, the record for ``engines/TARGET.json``)."""
    files: dict[str, bytes] = {}
    graph = (folder / "graph.onnx").read_bytes()
    frames = spec.get("frames")
    golden = _golden(bundle, answer, folder, frames is not None)
    made = f"engines/{target.name}.golden.npz" if answer["golden"] == "made" else None
    if made is not None and golden is not None:
        files[made] = golden
    used = bundle.form if answer["precision"] == "int8" else answer["precision"]
    record = {
        **{k: spec[k] for k in ("key", "recipe", "edgekit", "requested", "sources", "profiles", "options")},
        **{k: answer[k] for k in ("flags", "sparse_layers")},
        "decided_by": _decided_by(spec),
        "target": target.name,
        "kind": target.kind,
        "compute_capability": target.sm,
        "precision": used,
        "module": "tensorrt_rtx" if target.kind == "rtx" else "tensorrt",
        "tensorrt": answer["tensorrt"],
        "graph_sha256": answer["graph_sha256"],
        "golden": msgspec.to_builtins(
            _tolerance(bundle, answer["precision"], answer["golden_snr_db"], others=bool(frames or made))
        ),
        "golden_file": made,
        "batch_axes": batch_axes(bundle.manifest.inputs, bundle.manifest.outputs),
        "golden_snr_db": answer["golden_snr_db"],
        "opset": answer["opset"],
        "seconds": answer.get("seconds"),
        "graph_seconds": answer["graph_seconds"],
        "memory": answer.get("memory"),
        "notes": list(answer["notes"]),
        **({"frames": frames} if frames else {}),
    }
    if target.kind == "rtx":
        data = (folder / "plan.engine").read_bytes()
        name, record["engine_sha256"] = f"engines/{target.name}.engine", hashlib.sha256(data).hexdigest()
        files |= _layer_report(target, spec["key"], folder / "layers.json")
        if used == "int8":
            record["notes"].append("TensorRT-RTX documents int8 for weights only: expect no int8 speed")
    else:
        able, unable = readers(target, answer["opset"], answer["untyped_opset"], "dla" in spec["options"])
        reason = answer["refused_as"] or ("" if able else f"no TensorRT for {target.name} takes it")
        record["tensorrt"], record["usable"] = listed(able) or "none", not reason
        useless = f"NOTHING BUILDS THIS KIT: {reason}; ONNX Runtime runs its graph"
        record["notes"] = [*([useless] if reason else []), *record["notes"], *unable]
        untyped = (folder / "untyped.onnx").read_bytes() if answer["untyped_opset"] else None
        data = make_kit(target, able, record, graph, golden, untyped, timings)
        name, record["kit_sha256"] = f"engines/{target.name}.kit.zip", hashlib.sha256(data).hexdigest()
        if record["usable"]:
            record["notes"].append("compile it on the device: unzip the kit there and run python3 build_engine.py")
    return {name: data, **files}, {**record, "file": name, "size_bytes": len(data)}


def _golden(bundle: Bundle, answer: Mapping[str, Any], folder: Path, frames: bool) -> bytes | None:
    """The golden file for the engine: the bundle's, or what the child wrote because it takes frames or other sizes."""
    if answer["golden"] == "none" or not bundle.has(GOLDEN):
        return None
    return (folder / GOLDEN if frames or answer["golden"] == "made" else bundle.file(GOLDEN)).read_bytes()


def _decided_by(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What the next build is compared with: all that the key is made of, the target's description as a digest."""
    digest = hashlib.sha256(msgspec.json.encode(spec["target"], order="sorted")).hexdigest()
    return {**{name: value for name, value in spec.items() if name != "key"}, "target": digest}


def _layers(target: Target) -> str:
    return f"engines/{target.name}.layers.json"


def _layer_report(target: Target, key: str, layers: Path) -> dict[str, bytes]:
    """The report for the bundle, where the child wrote one."""
    if not layers.is_file():
        return {}
    found = json.loads(layers.read_text(encoding="utf-8"))
    return {_layers(target): layer_report(target.name, key, "network", found)}


def _earlier(bundle: Bundle, target: Target) -> dict[str, Any] | None:
    """The record of the build before, if there is one and it can be read."""
    sidecar = f"engines/{target.name}.json"
    if not bundle.has(sidecar):
        return None
    try:
        return msgspec.json.decode(bundle.read(sidecar), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, BundleError):
        return None  # a damaged derived file is made again


def _foreign(target: Target, record: Mapping[str, Any]) -> list[str]:
    """A remark where the engine in the cache came with its bundle: it may be passed on, and a cache never vouches for it."""
    if target.kind != "rtx" or is_trusted(record["engine_sha256"]):
        return []
    return ["not built on this machine, whose runtime loads it after edgekit build --again, or out of a signed pack"]


def _serves(bundle: Bundle, target: Target, record: Mapping[str, Any], key: str, options: Options) -> bool:
    """Whether an earlier build has the same key, and files that are there and whole."""
    try:
        if record["key"] != key or not bundle.has(record["file"]):
            return False
        for name in filter(None, (record["file"], record.get("golden_file"))):
            bundle.file(name)
        reported = not options.verbose or target.kind == "device"
        return reported or json.loads(bundle.read(_layers(target)))["key"] == key
    except (ValueError, KeyError, BundleError):
        return False


def _result(
    bundle: Bundle, target: Target, record: Mapping[str, Any], remarks: list[str], *, cached: bool, seconds: float
) -> BuildResult:
    file = bundle.path / record["file"]
    report = _layers(target) if bundle.has(_layers(target)) else None
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
        layers=bundle.path / report if report else None,
        layer_summary=json.loads(bundle.read(report))["summary"] if report else "",
        usable=record.get("usable", True),
        note="; ".join([*record["notes"], *remarks]),
    )

"""The build kit: one deterministic zip with all that a device needs to compile its own engine and to check it."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgekit.targets import JetPack, Target

from .build_options import TIMINGS

__all__ = ["SCRIPTS", "make_kit"]

#: What runs on the device: the first is called, the others lie beside it.
SCRIPTS = tuple(Path(__file__).with_name(name) for name in ("build_engine.py", "build_options.py", "check_engine.py"))
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can state: the same inputs give the same bytes
_OF_RECORD = ("target", "precision", "profiles", "batch_axes", "flags", "options", "memory", "golden", "key")
_GRAPH, _UNTYPED = "graph.onnx", "untyped.onnx"


def make_kit(
    target: Target,
    readers: Sequence[JetPack],
    record: Mapping[str, Any],
    graph: bytes,
    golden: bytes | None,
    untyped: bytes | None = None,
    timings: bytes | None = None,
) -> bytes:
    """A stored (not deflated: zlib's versions differ) zip of the typed graph, build.json, golden.npz, script and README.

    ``readers``: the JetPacks whose TensorRT reads the graph. ``untyped``: the graph that a weakly typed TensorRT (8.6)
    takes instead, where it does not read the typed one; left out where no reader is one. ``timings``: a timing cache.
    """
    files = {_GRAPH: graph, **{script.name: script.read_bytes() for script in SCRIPTS}}
    if golden is not None:
        files["golden.npz"] = golden
    if timings is not None:
        files[TIMINGS] = timings
    if untyped is not None and not all(entry.strongly_typed for entry in readers):
        files[_UNTYPED] = untyped
    spec = {
        **{k: record[k] for k in _OF_RECORD},
        "graph": _GRAPH,
        "untyped_graph": _UNTYPED if _UNTYPED in files else _GRAPH,
        "compute_capability": target.sm,
        "tensorrt": [msgspec.to_builtins(entry) for entry in readers],
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }
    files["build.json"] = msgspec.json.format(msgspec.json.encode(spec), indent=1) + b"\n"
    readme = _readme(target, readers, spec, golden is not None) if readers else _useless(target, spec, record["notes"])
    files["README.txt"] = readme.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(files.items()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    return buffer.getvalue()


def _trtexec(spec: Mapping[str, Any]) -> str:
    words = ["trtexec", f"--onnx={_GRAPH}", f"--saveEngine={spec['target']}.engine", "--stronglyTyped"]
    for index, word in enumerate(("min", "opt", "max")):
        shapes = ",".join(f"{name}:{'x'.join(map(str, shape[index]))}" for name, shape in spec["profiles"].items())
        words += [f"--{word}Shapes={shapes}"] if shapes else []
    words += ["--sparsity=enable"] if "SPARSE_WEIGHTS" in spec["flags"] else []
    options = spec["options"]
    words += [f"--useDLACore={options['dla']}", "--allowGPUFallback"] if "dla" in options else []
    words += {"hardware": ["--hardwareCompatibilityLevel=ampere+"], "version": ["--versionCompatible"]}.get(
        options.get("compatible"), []
    )
    words += [f"--timingCacheFile={TIMINGS}"] if "timing_cache" in options else []
    words += ["--profilingVerbosity=detailed", "--dumpLayerInfo"] if "verbose" in options else []
    words += [f"--memPoolSize=workspace:{options['workspace_mb']}"] if "workspace_mb" in options else []
    return " ".join(words)


def _useless(target: Target, spec: Mapping[str, Any], notes: Sequence[str]) -> str:
    reasons = "\n".join(f"    {note}" for note in notes if note.startswith("not for "))
    return f"""Build kit: {spec["target"]} ({target.title}, SM {target.sm}), precision {spec["precision"]}

NOTHING BUILDS THIS KIT: no TensorRT that is released for this device takes it.

{reasons}

ONNX Runtime runs graph.onnx there. The kit serves a device whose TensorRT is newer than those.
"""


def _readme(target: Target, readers: Sequence[JetPack], spec: Mapping[str, Any], golden: bool) -> str:
    versions = "\n".join(f"    {e.release}: TensorRT {e.tensorrt}, CUDA {e.cuda}" for e in readers)
    legacy = {"fp32": "", "fp16": "--fp16"}.get(spec["precision"], "--int8 --fp16")
    shipped = f" Without it {TIMINGS}, which lies here, is read." if "timing_cache" in spec["options"] else ""
    takes = "It takes frames of bytes, uint8 (n, H, W, C) at the model's size, and normalises them; golden.npz has such frames."
    frames = f"\n{takes}" if "uint8_input" in spec["options"] else ""
    check = "Afterwards it runs the engine on golden.npz and refuses one that misses the stated tolerance."
    return f"""Build kit: {spec["target"]} ({target.title}, SM {target.sm}), precision {spec["precision"]}

On the device, in this folder:

    python3 build_engine.py

It needs the tensorrt of JetPack or of NVIDIA's container, numpy and nothing else. It writes
{spec["target"]}.engine and {spec["target"]}.json.
{check if golden else "The kit has no golden outputs: nobody checks the engine."}
With --timing-cache FILE a later build is faster (--timing-cache-read-only: and never changes the file).{shipped}
An engine runs only with the TensorRT that built it, unless it was asked to be version-compatible.{frames}

The same with NVIDIA's own tool (TensorRT 10; version 11 needs no --stronglyTyped; version 8 takes {legacy or "nothing"}
in its place{f", and --onnx={other}" if (other := spec["untyped_graph"]) != _GRAPH else ""}):

    {_trtexec(spec)}

Made for:
{versions}

The typed graph decides the precision (TensorRT 10 and later); build.json lists profiles, flags and the files' sha256.
"""

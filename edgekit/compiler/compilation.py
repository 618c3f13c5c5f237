"""The heavy half of `build`, run in a child process: decide the precision in the graph, then let TensorRT compile it."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray

from edgekit.errors import EdgekitError, GoldenError, GraphError, UsageError
from edgekit.graphs.sparsity import dense_layers
from edgekit.progress import say
from edgekit.runtime.golden import parse_golden
from edgekit.runtime.onnxruntime import session
from edgekit.runtime.tensorrt_engine import load_library

from . import build_engine, frames, passes, precision
from .coverage import refused, said_of
from .golden_sizes import fit_golden
from .memory import build_memory
from .refusals import cure, explained
from .remedies import Refusal, remedies
from .shapes import Profiles

__all__ = ["MIN_FP16_SNR_DB", "compile_graph"]

#: An fp16 graph must reproduce the golden outputs this well on ONNX Runtime. float16 has 11 bits: about 66 dB an
#: operation; below 40 dB something overflowed or lost its small values.
MIN_FP16_SNR_DB = 40.0
#: How far the noise of float16 must lie below that of int8 where it is measured alone: it then costs 1 dB.
INT8_HEADROOM_DB = 6.0
#: An int8 graph this near to the golden outputs may lose to float16: an fp16 graph is taken at as much.
INT8_FINE_DB = MIN_FP16_SNR_DB
#: What both together may lose against the golden outputs. More than 1 dB, for few golden samples give another draw of the
#: rounding to int8 (0.5 dB were seen with 80 outputs, where 2,500 showed none); it is the margin that a device has as well.
INT8_MARGIN_DB = 3.0
#: The same operations in another order of memory: what rounding in float16 can differ by.
SAME = 2e-3
#: The builder flag that lets TensorRT look for the 2:4 pattern in the weights, and try sparse kernels where it finds it.
SPARSE = "SPARSE_WEIGHTS"
_REFUSED = "TensorRT refuses the graph: "
#: By `Bundle.form`.
_HELD = {
    "int8": "int8 inputs and weights",
    "fp8": "fp8 inputs and weights",
    "weights8": "int8 weights",
    "weights4": "int4 and int8 weights",
}


def compile_graph(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write ``graph.onnx`` (typed) and, where ``request["engine"]``, ``plan.engine`` into ``folder``.

    Where the typed graph has a newer opset than the bundle's, that one is written too, as ``untyped.onnx``: TensorRT 8.6
    reads opset 17 at most, and chooses types by flags. Returns what was chosen: ``precision``, ``notes``,
    ``golden_snr_db`` (ONNX Runtime's, None where the graph is one that an earlier stage checked), ``tensorrt``,
    ``seconds`` in TensorRT, ``graph_sha256``, ``opset``, ``untyped_opset`` (None where there is none), ``sparse_layers`` (how
    many are 2:4), ``flags`` (names of builder flags: SPARSE_WEIGHTS where there are any and ``request["sparse"]``), ``golden``
    (see `fit_golden`) and, for a device, ``memory`` (see `build_memory`) and ``refused_as`` (what its TensorRT does not build,
    or nothing). With ``request["frames"]`` all graphs take frames of bytes, and there is a ``golden.npz`` of them (`frames`).
    """
    started = time.perf_counter()
    graph, chosen = _typed_graph(request)
    source = Path(untyped) if (untyped := chosen.pop("untyped")) else None
    if request.get("frames"):
        graph, source, request = _in_frames(graph, source, chosen, request, folder)
    source_snr_db, about = chosen.pop("source_snr_db", None), chosen.pop("about_frames", [])
    fitted = fit_golden(graph, {**request, "precision": chosen["precision"]}, folder)
    answer: dict[str, Any] = {**chosen, **_described(graph), "untyped_opset": None, "golden": fitted.golden}
    about += [fitted.note] if fitted.note else []
    if fitted.snr_db is not None:
        answer["golden_snr_db"] = min(fitted.snr_db, chosen["golden_snr_db"] or fitted.snr_db)
    sparsity, note = _sparsity(graph, request)
    answer |= sparsity
    answer["graph_seconds"] = _since(started)
    if request["engine"]:
        wanted = {**request, "precision": chosen["precision"], "flags": sparsity["flags"]}
        try:
            graph, built = _built(graph, wanted, folder)
        except GraphError as error:
            if source is None or chosen["precision"] != "int8":
                raise
            say(f"refused; trying again with float32 outside of {request['form']}")
            graph, built = _built(source.read_bytes(), wanted, folder)
            reason = f"because TensorRT refuses the graph with float16: {error.message}"
            answer |= {
                "golden_snr_db": source_snr_db,
                "notes": [f"float32 outside of {request['form']}, {reason}"[:300]],
            }
        answer |= {**built, **_described(graph), "notes": [*answer["notes"], *built["notes"]]}
    elif source is not None and (before := _described(source.read_bytes())["opset"]) < answer["opset"]:
        (folder / "untyped.onnx").write_bytes(source.read_bytes())
        answer["untyped_opset"] = before
    (folder / "graph.onnx").write_bytes(graph)
    if not request["engine"]:
        answer["memory"] = build_memory(graph, request["profiles"], request["options"].get("workspace_mb"))
        names = refused(onnx.load_model_from_string(graph), "device")
        answer["refused_as"] = said_of(names) if names else ""
    return {**answer, "notes": [*answer["notes"], *about, *note]}


def _in_frames(
    graph: bytes, source: Path | None, chosen: dict[str, Any], request: Mapping[str, Any], folder: Path
) -> tuple[bytes, Path | None, dict[str, Any]]:
    """(the typed graph and the one it was made from, taking frames; the request, whose golden inputs are frames).

    After the types are chosen, so that the normalisation is in float32 and no choice depends on it.
    """
    quantized = chosen["precision"] == "int8"
    if source is not None:
        plain = frames.take_frames(source.read_bytes(), request, folder, quantized=quantized)
        (folder / "source.onnx").write_bytes(plain.graph)
        source, chosen["source_snr_db"] = folder / "source.onnx", plain.snr_db
    made = frames.take_frames(graph, request, folder, quantized=quantized)
    # That of the typed graph counts float16's rounding, which ONNX Runtime hides; this one that of the frames.
    known = [snr_db for snr_db in (chosen["golden_snr_db"], made.snr_db) if snr_db is not None]
    chosen |= {"golden_snr_db": min(known, default=None), "about_frames": [made.note]}
    return made.graph, source, {**request, "golden": None if made.golden is None else str(made.golden)}


def _sparsity(graph: bytes, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """``sparse_layers``, ``flags``, and a note where there are any: looking for sparse kernels costs time, so only then."""
    layers = dense_layers(onnx.load_model_from_string(graph))
    count = sum(layer.sparse for layer in layers)
    if not count:
        return {"sparse_layers": 0, "flags": []}, []
    note = f"{count} of {len(layers)} layers {'is' if count == 1 else 'are'} 2:4"
    if not request["sparse"]:
        return {"sparse_layers": count, "flags": []}, [f"{note}, which SM {request['compute_capability']} cannot use"]
    say(f"{note}: TensorRT tries sparse kernels for {'it' if count == 1 else 'them'}")
    return {"sparse_layers": count, "flags": [SPARSE]}, [f"{note}: {SPARSE} is set"]


def _described(graph: bytes) -> dict[str, Any]:
    return {
        "graph_sha256": hashlib.sha256(graph).hexdigest(),
        "opset": passes.opset(onnx.load_model_from_string(graph)),
    }


def _built(graph: bytes, wanted: Mapping[str, Any], folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Write ``plan.engine``; returns the graph that TensorRT took, and ``tensorrt``, ``seconds``, ``notes``.

    A graph that is refused is tried again with what `remedies` change, as long as they change something.
    """
    notes: list[str] = []
    first: GraphError | None = None
    if wanted.get("fixed"):
        graph = _mended(graph, "it crashed", wanted, notes) or graph
    while True:
        try:
            built, version, seconds = _engine(graph, wanted)
            break
        except GraphError as refusal:
            first = first or refusal
            mended = _mended(graph, refusal.message.removeprefix(_REFUSED), wanted, notes)
            if mended is None:
                raise first from None
            graph = mended
    (folder / "plan.engine").write_bytes(built.plan)
    if built.layers is not None:
        (folder / "layers.json").write_text(json.dumps(built.layers), encoding="utf-8")
    return graph, {"tensorrt": version, "seconds": seconds, "notes": notes}


def _mended(graph: bytes, refusal: str, wanted: Mapping[str, Any], notes: list[str]) -> bytes | None:
    """The graph after the first remedy that changes it and not its answers; None where none does. ``notes`` gets its note."""
    if not wanted.get("golden"):
        return None  # nothing could vouch for it
    golden, quantized = Path(wanted["golden"]), wanted["precision"] == "int8"
    refused = Refusal(refusal, wanted["profiles"], passes.loads)
    for remedy, note in remedies():
        model = onnx.load_model_from_string(graph)
        try:
            if not remedy(model, refused):
                continue
            passes.simplify(model)
            mended: bytes = model.SerializeToString(deterministic=True)
            _check_same(graph, mended, golden, wanted["profiles"], quantized=quantized)
        except Exception as reason:  # noqa: BLE001  onnx raises anything; or a branch cannot run beside the one that is taken
            say(f"refused, and one remedy does not hold: {' '.join(str(reason).split())[:200]}")
            continue
        notes.append(note.format(refusal.split(" ", 1)[0]))
        say(f"refused; trying again: {notes[-1]}")
        return mended
    return None


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 4)


def _typed_graph(request: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """(the graph that decides the types, what was chosen). ``untyped``: the path of the graph it was made from, if any."""
    wanted = request["precision"]
    int8 = bool(request["int8_graph"]) and wanted in ("int8", "best")
    source = Path(request["int8_graph"] if int8 else request["float_graph"])
    answer: dict[str, Any] = {"precision": "int8" if int8 else "fp32", "golden_snr_db": None, "notes": [], "untyped": None}
    if wanted == "fp32" or "fp16" not in request["target_precisions"]:
        return source.read_bytes(), answer
    try:
        graph, answer["golden_snr_db"], kept = _half_graph(source, request["golden"], request["form"] if int8 else None)
    except (EdgekitError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        if wanted == "fp16":
            raise GoldenError(f"the graph cannot run in fp16: {reason}"[:400], "use --precision fp32 or best") from None
        plain = f"float32 outside of {request['form']}" if int8 else "fp32"
        answer["notes"] = [f"{plain}, because fp16 did not hold: {reason}"[:300]]
        return source.read_bytes(), answer
    if int8:
        answer["notes"] = [f"{_HELD.get(request['form'], request['form'])} where the graph says so, float16 elsewhere"]
    else:
        answer["precision"] = "fp16"
    answer["notes"] += [f"{kept} of the graph's nodes stay float32"] if kept else []
    return graph, {**answer, "untyped": str(source)}


def _half_graph(path: Path, golden: str | None, form: str | None) -> tuple[bytes, float, int]:
    """(float16 graph, golden SNR in dB, nodes left in float32). Raises `GoldenError` where it is too far from ``golden``.

    A float graph (``form`` None) owes `MIN_FP16_SNR_DB`. A quantized one owes its own distance from the golden outputs less
    `INT8_MARGIN_DB`, and float16 alone, without the rounding to int8, must make less noise than that by `INT8_HEADROOM_DB`.
    """
    if golden is None:
        raise GoldenError("the bundle has no golden outputs to hold it against")
    model = onnx.load_model(str(path), load_external_data=False)
    inputs, outputs = parse_golden(Path(golden).read_bytes())
    peaks = precision.activation_peaks(model, inputs)
    least = MIN_FP16_SNR_DB
    if form:
        own = precision.against_golden(path.read_bytes(), inputs, outputs, quantized=True).snr_db
        own = min(own, INT8_FINE_DB)
        least = own - INT8_MARGIN_DB
        alone = _half_noise(precision.without_rounding(model), peaks, inputs)
        if not alone >= own + INT8_HEADROOM_DB:
            raise GoldenError(f"float16 alone makes noise at {alone:.1f} dB, {form} at {own:.1f} dB")
    made = precision.to_fp16(model, peaks)
    graph: bytes = made.SerializeToString(deterministic=True)
    twin: bytes = precision.to_fp16(model, peaks, twin=True).SerializeToString()
    halves = (precision.against_golden(half, inputs, outputs, quantized=form is not None) for half in (twin, graph))
    snr_db = min(result.snr_db for result in halves)
    if not snr_db >= least:
        raise GoldenError(f"{snr_db:.1f} dB against the golden outputs, {least:.4g} dB are needed")
    return graph, round(snr_db, 2), precision.kept_float32(model, peaks)


def _half_noise(model: onnx.ModelProto, peaks: Mapping[str, float], inputs: Mapping[str, NDArray[Any]]) -> float:
    """Output SNR in dB of a graph with the rounding to float16 against the graph without."""
    truth = precision.answers(model.SerializeToString(), inputs)
    twin = precision.to_fp16(model, peaks, twin=True).SerializeToString()
    return precision.against_golden(twin, inputs, truth, quantized=True).snr_db


def _feeds(run: Any, golden: Path, profiles: Profiles) -> Iterator[dict[str, NDArray[Any]]]:
    """The golden inputs, repeated or cut to the graph's fixed axes, then to the smallest and the largest of the profiles."""
    inputs, _ = parse_golden(golden.read_bytes())
    graph = {value.name: value.shape for value in run.get_inputs()}
    stated = [{}, *({name: shapes[which] for name, shapes in profiles.items()} for which in (0, 2))]
    for sizes in stated if profiles else stated[:1]:
        feeds = {}
        for name, shape in graph.items():
            wanted = zip(shape, sizes.get(name, inputs[name].shape), strict=True)
            feeds[name] = np.resize(inputs[name], [own if isinstance(own, int) else size for own, size in wanted])
        yield feeds


def _check_same(before: bytes, after: bytes, golden: Path, profiles: Profiles, *, quantized: bool) -> None:
    """Raise `EdgekitError` where a rewritten graph answers the golden inputs otherwise than before, or not at all; in all
    sizes that the profiles bound."""
    run, rewritten = session(before), session(after)
    try:
        for inputs in _feeds(rewritten, golden, profiles):
            old = dict(zip([o.name for o in run.get_outputs()], run.run(None, inputs), strict=True))
            worst = precision.against_golden(after, inputs, old, quantized=quantized).relative
            if worst > SAME:
                raise GoldenError(f"the rewritten graph differs by {worst:.2g} relative", "report this with the model")
    except EdgekitError:
        raise
    except Exception as error:  # noqa: BLE001  ONNX Runtime raises many types of its own
        raise GoldenError(f"it does not run: {' '.join(str(error).split())}"[:300], "report this with the model") from None


def _advance(bar: Any, phase: str, share: float) -> bool:
    bar.update(int(share * bar.length) - bar.pos)
    return True


def _engine(graph: bytes, request: Mapping[str, Any]) -> tuple[build_engine.Built, str, float]:
    """(what was built, TensorRT version, seconds). Parser and builder errors become `GraphError`.

    Raises `MissingExtra` where TensorRT is not installed, `BackendError` where it does not load.
    """
    trt: Any = load_library(request["module"])
    if "SM" + request["compute_capability"].replace(".", "") not in trt.ComputeCapability.__members__:
        raise UsageError(
            f"TensorRT {trt.__version__} does not compile for SM {request['compute_capability']}", "choose another --target"
        )
    say(f"TensorRT {trt.__version__} compiles for {request['target']} (SM {request['compute_capability']})")
    started = time.perf_counter()
    try:
        with click.progressbar(length=1000, label="building", file=sys.stderr) as bar:
            built = build_engine.build(trt, graph, dict(request), partial(_advance, bar))
    except build_engine.BuildError as error:
        raise GraphError(_REFUSED + explained(graph, str(error)), cure(graph, str(error))) from None
    return built, trt.__version__, _since(started)

"""The heavy half of `import_onnx`, run in a child process: read, bind, rewrite, and prove that nothing changed."""

from __future__ import annotations

import contextlib
import os
import shutil
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from edgekit.bundle import FLOAT_GRAPH, GOLDEN
from edgekit.errors import BackendError, EdgekitError, GraphError, UsageError, first_line
from edgekit.graphs import exact_reference, float_biases, is_explicit, quantized_nodes, to_float
from edgekit.graphs.control import drop_branches
from edgekit.graphs.editing import all_nodes
from edgekit.graphs.light import store, without_weights
from edgekit.graphs.narrow import to_signed
from edgekit.progress import say
from edgekit.runtime.golden import compare_arrays, save_golden
from edgekit.runtime.onnxruntime import DTYPES, session

from . import passes
from .binding import bind_constants, bind_inputs
from .coverage import refused, said_of
from .evaluator import Evaluator
from .faults import check_structure, inference_fault
from .reading import check_model, drop_unproven, read_model
from .shapes import Axis, Constant
from .trials import MAX_RELATIVE, Feeds, outputs, trial_feeds

__all__ = ["import_graph"]

MIN_SNR_DB = 10.0  # between a quantized original and its float form: only rounding may be missing
EXACT_SNR_DB = 25.0  # with the rounding emulated, ties and the order of sums remain: 45 to 200 dB are usual
_MEND = "mend that node, or export the model again"
OLDEST_RUN = 7  # the oldest opset that ONNX Runtime states to run


def import_graph(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write ``model.onnx`` and ``golden.npz`` into ``folder``; returns inputs, outputs, shape, dynamic, figures, notes."""
    try:
        return _import_graph(request, folder)
    except (UsageError, OSError):
        raise
    except EdgekitError as error:
        raise _by_node(Path(request["model"]), error) from None
    except Exception as error:  # noqa: BLE001  onnx and ONNX Runtime raise anything on hostile files
        if os.environ.get("EDGEKIT_DEBUG"):
            traceback.print_exc()
        raise GraphError(
            f"the graph cannot be imported: {first_line(error)[:300]}", "check it with onnx.checker, or export it again"
        ) from None


def _by_node(path: Path, error: EdgekitError) -> EdgekitError:
    """The error, or the node of the file that contradicts its operator, where that is why: then it says more."""
    try:
        model = read_model(path).model
        check_structure(model)
        fault = inference_fault(model)
    except EdgekitError as found:
        return found
    return GraphError(fault, _MEND) if fault else error


def _import_graph(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A large model is held as seldom as can be: never beside two of its sessions, nor as bytes."""
    path = Path(request["model"])
    fixed = {name: tuple(Axis(*axis) for axis in axes) for name, axes in request["shape"].items()}
    ranges = {name: tuple(Axis(*axis) for axis in axes) for name, axes in request["dynamic"].items()}
    source = read_model(path)
    check_structure(source.model)
    bound, changed, before = source.model, source.changed, len(source.model.graph.node)
    if constants := request.get("constants"):
        bind_constants(bound, {name: Constant(*stated) for name, stated in constants.items()})
        changed = True
    check_model(bound)
    dropped, said = drop_unproven(bound)
    changed, notes = changed or dropped, [*source.notes, *said]
    original: Any = _reference(bound, folder / "original.onnx" if changed else path, notes)
    binding = bind_inputs(bound, fixed, ranges)
    notes += binding.notes
    say("looking for inputs on which it runs")
    named = [value.SerializeToString() for value in bound.graph.input]
    trials = trial_feeds(original, bound, binding.ranges, notes)
    truths = [outputs(original, feeds) for feeds in trials]
    changed = changed or binding.changed or named != [value.SerializeToString() for value in bound.graph.input]
    changed, quantized = _signed(bound, original, trials, truths, notes) or changed, {}
    if quantized_nodes(bound):
        quantized = _unquantized(bound, trials, truths, notes)
        changed = changed or bool(quantized)
    evaluated = isinstance(original, Evaluator)
    del original
    if not evaluated and _without_branches(bound):
        notes.append("a branch of If that does not fit these shapes was left out")
        changed = True
    proof, sizes = _Proof(trials, truths, evaluated), _sizes_run(bound, trials[0])  # before `bound` is rewritten
    run, figures = _rewritten(bound, folder / FLOAT_GRAPH, None if changed else path, proof, notes)
    (folder / GOLDEN).write_bytes(save_golden(trials[0], truths[0]))
    return {
        "inputs": [_spec(value, trials[0][value.name]) for value in run.get_inputs()],
        "outputs": [_spec(value, truths[0][value.name]) for value in run.get_outputs()],
        "shape": {name: [axis.low for axis in axes] for name, axes in binding.fixed.items()},
        "dynamic": {name: "x".join(map(str, axes)) for name, axes in binding.dynamic.items()},
        "notes": notes,
        "figures": {**figures, "nodes_before": before, **sizes, **quantized},
    }


def _reference(model: onnx.ModelProto, file: Path, notes: list[str]) -> Any:
    """A session of the original, which is in ``file`` or is written there.

    ONNX Runtime has no kernels below opset 7: there ONNX's own converter vouches, with a note.
    """
    if quantized_nodes(model):
        with contextlib.suppress(BackendError):  # not every kernel takes signed inputs beside unsigned weights
            return session(exact_reference(model), 0)
    try:
        if not file.exists():
            store(model, file)
        return session(str(file), 0, low_memory=True)
    except BackendError as error:
        raised = onnx.ModelProto()
        raised.CopyFrom(model)
        if passes.opset(model) >= OLDEST_RUN or not passes.raise_opset(raised, []):
            return _evaluator(model, error, notes)
        notes.append(f"ONNX Runtime does not run opset {passes.opset(model)}: golden outputs are of the converted graph")
        return session(raised.SerializeToString(), 0)


def _sizes_run(bound: onnx.ModelProto, feeds: Feeds) -> dict[str, dict[str, int]]:
    """``sizes``: symbol -> size of the golden inputs' dynamic axes; nothing where there are none."""
    axes = {d: size for v in bound.graph.input for d, size in zip(passes.dims(v), feeds[v.name].shape, strict=True)}
    found = {symbol: size for symbol, size in axes.items() if isinstance(symbol, str)}
    return {"sizes": found} if found else {}


def _signed(bound: onnx.ModelProto, original: Any, trials: list[Feeds], truths: list[Feeds], notes: list[str]) -> bool:
    """Bring integer types that TensorRT lacks to int32 and int64, with what goes in and comes out; whether it was done."""
    if quantized_nodes(bound) or not to_signed(without_weights(bound)):
        return False
    form = onnx.ModelProto()
    form.CopyFrom(bound)
    to_signed(form)
    wanted = {value.name: value.type.tensor_type.elem_type for value in (*form.graph.input, *form.graph.output)}

    def cast(tensors: Feeds) -> Feeds:
        return {name: value.astype(onnx.helper.tensor_dtype_to_np_dtype(wanted[name])) for name, value in tensors.items()}

    tried = [*trials, *_full_range(bound, trials[0])]
    try:
        run = _Proof(trials, truths, isinstance(original, Evaluator)).runner(form.SerializeToString())
        for index, feeds in enumerate(tried):
            try:
                truth = truths[index] if index < len(truths) else outputs(original, feeds)
            except EdgekitError:
                continue  # such numbers are no inputs of it
            answer = outputs(run, cast(feeds))
            if any(not np.array_equal(answer[name], value, equal_nan=True) for name, value in cast(truth).items()):
                return False  # it counts on numbers that wrap around
    except EdgekitError:
        return False
    notes.append("16-bit and unsigned integers became int32 and int64, which TensorRT has")
    bound.CopyFrom(form)
    trials[:], truths[:] = list(map(cast, trials)), list(map(cast, truths))
    return True


def _full_range(model: onnx.ModelProto, feeds: Feeds) -> Iterator[Feeds]:
    """``feeds`` with numbers from all over the range of each integer input, and with the largest ones."""
    random = np.random.default_rng(0)
    for largest in (False, True):
        found = dict(feeds)
        for name, value in feeds.items():
            if value.dtype.kind in "iu":
                limits = np.iinfo(value.dtype)
                high = min(limits.max, np.iinfo(np.int64).max)
                drawn = random.integers(limits.min, high, size=value.shape, dtype=value.dtype, endpoint=True)
                found[name] = np.full(value.shape, high, value.dtype) if largest else np.asarray(drawn)
        yield found


def _evaluator(model: onnx.ModelProto, refusal: BackendError, notes: list[str]) -> Evaluator:
    """ONNX's own evaluator, slow and in numpy, for graphs that ONNX Runtime has no kernels for; not for contradictory ones."""
    if fault := inference_fault(model):
        raise GraphError(fault, _MEND)
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    try:
        found = Evaluator(kept)
    except Exception:  # noqa: BLE001  it raises anything for what it does not know
        raise GraphError(refusal.message, "export the model again, with opset 17") from None
    notes.append(f"golden outputs are of ONNX's reference evaluator, for {first_line(refusal)[:160]}")
    return found


def _unquantized(bound: onnx.ModelProto, trials: list[Feeds], truths: list[Feeds], notes: list[str]) -> dict[str, float]:
    """Bring a quantized graph back to float, in place; ``truths`` become its answers. Returns figures, none where it stays.

    The original rounds and the float form does not, so no tolerance holds them together. Two things speak for the rewrite:
    its distance from the original, and that the same rewrite with the rounding left in agrees. Explicit int8 Q/DQ graphs,
    which TensorRT takes, stay quantized; only their int32 biases become float.
    """
    form = onnx.ModelProto()
    form.CopyFrom(bound)
    proven = None
    try:
        if is_explicit(bound):
            count, said, limit = float_biases(form), [], EXACT_SNR_DB
            if not count:
                return {}
            said = [f"{count} int32 biases became float, which TensorRT needs; the graph stays quantized"]
        else:
            said, limit = to_float(form)[1], MIN_SNR_DB
            proven = _emulated(bound, trials, truths)
        run = session(
            form.SerializeToString(), 0, low_memory=True
        )  # as `_Proof.runner` has it: Floor and Round tell sums apart
        answers = [outputs(run, feeds) for feeds in trials]
        snr = _distance(truths, answers)
        if snr < limit and (proven is None or proven < EXACT_SNR_DB):
            raise GraphError(
                f"brought back to float, the graph is only {snr:.1f} dB from the quantized original, {limit:g} were expected",
                "import the float model that it was made from",
            )
    except EdgekitError as reason:
        if any(node.domain == "com.microsoft" for node in quantized_nodes(bound)):
            raise
        notes.append(f"the graph stays quantized as it was: {reason.message}")
        return {}
    bound.CopyFrom(form)
    truths[:] = answers
    figures = {"quantized_snr_db": round(snr, 1)}
    if proven is not None:
        figures["emulated_snr_db"] = round(proven, 1)
        said.append(
            f"the original's rounding is gone: {snr:.1f} dB between them on random inputs, {proven:.1f} dB with it emulated"
            "; the float graph is the reference from now on, and edgekit quantize makes it int8 again"
        )
    notes += said
    return figures


def _emulated(bound: onnx.ModelProto, trials: list[Feeds], truths: list[Feeds]) -> float | None:
    """SNR in dB between the original and its rewrite with all rounding left in; None where that does not run."""
    twin = onnx.ModelProto()
    twin.CopyFrom(bound)
    try:
        to_float(twin, rounding=True)
        run = session(exact_reference(twin), 0)
        return _distance(truths, [outputs(run, feeds) for feeds in trials])
    except EdgekitError:
        return None


def _distance(truths: list[Feeds], answers: list[Feeds]) -> float:
    """The lowest output's SNR in dB; integers beside float outputs (labels, indices) have no noise power and do not count."""
    floats = {name for name, value in truths[0].items() if value.dtype.kind == "f"} or set(truths[0])
    pairs = [(truth[name], found[name]) for truth, found in zip(truths, answers, strict=True) for name in sorted(floats)]
    return min(compare_arrays(truth, found).snr_db for truth, found in pairs)


class _Proof(NamedTuple):
    """What the original answers to ``trials``, and whether ONNX's evaluator did."""

    trials: list[Feeds]
    truths: list[Feeds]
    evaluated: bool

    def runner(self, graph: str | bytes) -> Any:
        """What runs ``graph``, a file or its bytes, as the original was run."""
        if not self.evaluated:
            return session(graph, 0, low_memory=True)
        return Evaluator(onnx.load_model(graph) if isinstance(graph, str) else onnx.load_model_from_string(graph))

    def error(self, run: Any) -> float:
        """The largest relative error over all trials and outputs."""
        worst = 0.0
        for feeds, truth in zip(self.trials, self.truths, strict=True):
            found = outputs(run, feeds)
            worst = max([worst, *(compare_arrays(truth[name], found[name]).relative for name in truth)])
        return worst


def _rewritten(
    bound: onnx.ModelProto, file: Path, source: Path | None, proof: _Proof, notes: list[str]
) -> tuple[Any, dict[str, Any]]:
    """Write the most rewritten form that still agrees: all passes, else only the bound inputs. Returns what runs it, and
    figures. ``source``: the file that holds ``bound`` as it is; without one it is written beside ``file``, so that memory
    never holds it twice."""
    if source is None:
        source = file.with_name("bound.onnx")
        store(bound, source)
    say("rewriting it, and holding each form against the original")
    before, reason = _counted(bound), ""
    rewrote, said = passes.simplify(bound)
    if rewrote:
        figures = _counted(bound)
        store(bound, file)
        try:
            return _proven(file, proof, figures, [*notes, *said], notes)
        except EdgekitError as error:
            reason = error.message
    shutil.copyfile(source, file)
    return _proven(file, proof, before, [*notes, *([f"kept as it was: {reason}"] if reason else [])], notes)


def _proven(
    file: Path, proof: _Proof, figures: dict[str, Any], said: list[str], notes: list[str]
) -> tuple[Any, dict[str, Any]]:
    """What runs ``file``, and its figures, where it answers as the original; ``notes`` become ``said`` then."""
    run = proof.runner(str(file))
    error = proof.error(run)
    if error > MAX_RELATIVE:
        raise GraphError(
            f"the rewritten graph differs from the original by {error:.2g} (relative), allowed {MAX_RELATIVE:g}",
            "the graph may hold random operators; export it in inference mode",
        )
    runs = "" if proof.evaluated else "; ONNX Runtime runs it"
    said = [*said, *figures.pop("unread"), *(f"{words}{runs}" for words in figures.pop("refused"))]
    notes[:] = said
    return run, {**figures, "relative_error": error}


def _counted(model: onnx.ModelProto) -> dict[str, Any]:
    """Figures; ``refused``: what TensorRT does not build, ``unread``: notes on inputs that decide nothing."""
    weights = (i for i in model.graph.initializer if i.data_type in passes.WEIGHT_TYPES)
    return {
        "opset": passes.opset(model),
        "nodes": len(model.graph.node),
        "parameters": sum(int(np.prod(i.dims)) for i in weights),
        "refused": _refused(model),
        "unread": _unread(model.graph),
    }


def _refused(model: onnx.ModelProto) -> list[str]:
    """By any TensorRT, and by TensorRT-RTX alone."""
    names = refused(model, "device")
    others = sorted(set(refused(model, "rtx")) - set(names))
    return [*([said_of(names)] if names else []), *([said_of(others, "TensorRT-RTX")] if others else [])]


def _unread(graph: onnx.GraphProto) -> list[str]:
    read = {name for node in all_nodes(graph) for name in node.input} | {value.name for value in graph.output}
    names = [value.name for value in graph.input if value.name not in read]
    return [
        f"nothing reads {name}: the answer is the same for all its values; --constant {name}:V takes it away" for name in names
    ]


def _without_branches(bound: onnx.ModelProto) -> bool:
    """Leave out branches that do not fit the stated shapes, in place; whether there were any.

    Those that a constant excludes go first: ONNX Runtime 1.32 checks them, too, and crashes now and then where one fails.
    """
    if not any(node.op_type == "If" for node in bound.graph.node):
        return False
    decided = onnx.ModelProto()
    decided.CopyFrom(bound)
    passes.simplify(decided)
    if (
        not any(node.op_type == "If" for node in decided.graph.node)
        or passes.loads(decided)
        or not drop_branches(decided, passes.loads)
    ):
        return False
    bound.CopyFrom(decided)
    return True


def _spec(value: Any, found: NDArray[Any]) -> dict[str, Any]:
    """What the manifest says of an input or output. Axes that a file states and ``found`` contradicts are open ones: ONNX
    Runtime only warns of an output that has another shape than its file says."""
    stated = value.shape if len(value.shape) == found.ndim else [None] * found.ndim
    shape = [
        f"{value.name}_{index}" if axis is None or (isinstance(axis, int) and axis != size) else axis
        for index, (axis, size) in enumerate(zip(stated, found.shape, strict=True))
    ]
    return {"name": value.name, "dtype": DTYPES[value.type], "shape": shape}

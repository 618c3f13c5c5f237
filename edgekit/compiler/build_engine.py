"""Build a TensorRT engine from a build kit: this file, build_options.py, build.json, the graph, golden.npz.

    python3 build_engine.py                      on the device, with the TensorRT of its JetPack
    python3 build_engine.py --module tensorrt_rtx --compute-capability 8.9 --no-check     anywhere, without a GPU

Needs numpy and `tensorrt`, nothing else; edgekit itself builds through `build` below, so a kit runs the code that was
tested. Written for TensorRT 8.6 to 11 and TensorRT-RTX by asking for features, never for versions, and for Python 3.8.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING or __package__:
    from . import build_options as asked
else:  # in a kit, whose folder is not on the path where Python runs with -P
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import build_options as asked

BuildError = asked.BuildError

__all__ = ["BuildError", "Built", "build", "check", "main"]

if TYPE_CHECKING:
    from collections.abc import Callable

    #: (phase, share done in 0..1) -> go on?
    Progress = Callable[[str, float], bool]


class Built(NamedTuple):
    """A serialized engine; which layers fall back from the DLA where one was asked for (`build_options.fallback`); the timing
    cache as it is now, and why the given one was not used; the network's layers, for a verbose build."""

    plan: bytes
    dla: dict[str, Any] | None = None
    timings: bytes | None = None
    unused: str = ""
    layers: list[Any] | None = None


def _monitor(trt: Any, progress: Progress) -> Any:
    """TensorRT 10 reports steps of nested phases; each phase shares out one step of the phase around it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[int]] = {}  # name -> [steps done, steps], outermost first
            self.share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = [0, max(num_steps, 1)]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][0] = min(step + 1, self.phases[phase_name][1])
            share, width = 0.0, 1.0
            for done, steps in self.phases.values():
                share += width * done / steps
                width /= steps
            self.share = max(self.share, min(share, 1.0))
            return progress(phase_name, self.share)

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()


def build(
    trt: Any,
    graph: bytes,
    spec: dict[str, Any],
    progress: Progress | None = None,
    timings: bytes | None = None,
) -> Built:
    """An ONNX graph and its build.json -> a serialized engine, with the TensorRT module ``trt``.

    ``spec`` holds ``precision``, ``profiles`` ({input: [min, opt, max] shapes}), ``flags`` (names of builder flags; one
    that this TensorRT lacks is left out), ``options`` (see `build_options`) and, for TensorRT-RTX, ``compute_capability``.
    ``progress(phase, share)`` is called where TensorRT reports progress; returning False cancels. ``timings``: a timing
    cache, or nothing yet (empty); None for none. Raises `BuildError`.
    """
    lines: list[str] = []
    warnings: list[str] = []
    logger = asked.make_logger(trt, lines, warnings)
    builder = trt.Builder(logger)
    network = builder.create_network(asked.network_flags(trt))
    parser = asked.parser_of(trt, network, logger, spec.get("options", {}))
    if not parser.parse(graph):
        raise BuildError(asked.parser_error(parser))
    config = builder.create_builder_config()
    for name in [*spec["flags"], *asked.precision_flags(trt, spec["precision"])]:
        if hasattr(trt.BuilderFlag, name):
            config.set_flag(getattr(trt.BuilderFlag, name))
    options = spec.get("options", {})
    asked.configure(trt, builder, config, options, spec.get("compute_capability"))
    if spec["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in spec["profiles"].items():
            profile.set_shape(name, *[tuple(shape) for shape in shapes])
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"the profile does not fit the graph: {' '.join(lines[-1:]) or spec['profiles']}")
    unused = "" if timings is None else asked.use_timings(trt, config, timings, warnings)
    if progress is not None and hasattr(trt, "IProgressMonitor"):
        monitor = _monitor(trt, progress)
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(asked.shape_inputs(network) or " ".join(" ".join(lines[-1:]).split()) or "TensorRT gave no reason")
    dla = asked.fallback(config, network) if options.get("dla") is not None else None
    layers = asked.network_layers(network) if options.get("verbose") else None
    return Built(bytes(plan), dla, asked.timings_of(config) if timings is not None else None, unused, layers)


class _Cuda:
    """The few calls of the CUDA runtime that a check needs, so that a kit needs no further package."""

    def __init__(self) -> None:
        for name in ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"):
            try:
                self.library = ctypes.CDLL(name)
                return
            except OSError:
                continue
        raise OSError("libcudart.so was not found")

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise BuildError(f"{name} failed with CUDA error {code}: {asked.CUDA_CURES.get(code, 'see cudaError_t')}")

    def capability(self) -> str:
        """Of the first GPU: "8.7"."""
        found = []
        for attribute in (75, 76):  # cudaDevAttrComputeCapabilityMajor and Minor
            value = ctypes.c_int()
            self.call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(0))
            found.append(str(value.value))
        return ".".join(found)

    def malloc(self, size: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def copy(self, target: Any, source: Any, size: int, kind: int) -> None:
        self.call("cudaMemcpy", target, source, ctypes.c_size_t(size), ctypes.c_int(kind))


def _run(trt: Any, engine: Any, feeds: dict[str, Any], cuda: Any) -> dict[str, Any]:
    """One inference: input name -> array, to output name -> array, through device memory of its own."""
    context = engine.create_execution_context()
    held: dict[str, tuple[ctypes.c_void_p, Any]] = {}
    stream = ctypes.c_void_p()
    cuda.call("cudaStreamCreate", ctypes.byref(stream))
    try:
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in inputs:
            array = np.ascontiguousarray(feeds[name], trt.nptype(engine.get_tensor_dtype(name)))
            context.set_input_shape(name, tuple(array.shape))
            held[name] = (cuda.malloc(max(array.nbytes, 1)), array)
            cuda.copy(held[name][0], ctypes.c_void_p(array.ctypes.data), array.nbytes, 1)
        for name in names:
            if name not in held:
                array = np.empty(tuple(context.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))
                held[name] = (cuda.malloc(max(array.nbytes, 1)), array)
            context.set_tensor_address(name, held[name][0].value)
        if not context.execute_async_v3(stream.value or 0):
            raise BuildError("the engine did not run")
        cuda.call("cudaStreamSynchronize", stream)
        outputs = [name for name in names if name not in inputs]
        for name in outputs:
            pointer, array = held[name]
            cuda.copy(ctypes.c_void_p(array.ctypes.data), pointer, array.nbytes, 2)
        return {name: held[name][1] for name in outputs}
    finally:
        for pointer, _ in held.values():
            cuda.call("cudaFree", pointer)
        cuda.call("cudaStreamDestroy", stream)


def _errors(truth: Any, found: Any, quantized: bool) -> tuple[float, float]:
    """(relative, SNR in dB) as `edgekit.runtime.golden` has them; of a quantized engine's integers, which are choices, by
    the share that differs."""
    if quantized and truth.dtype.kind not in "fc":
        wrong = int((truth != found).sum())
        return wrong / max(truth.size, 1), float(10 * np.log10(truth.size / wrong)) if wrong else 200.0
    judged = ~(np.isinf(truth) & (truth == found))  # infinities that agree are right
    wide = truth[judged].astype(np.float64)
    error = found[judged].astype(np.float64) - wide
    if not np.isfinite(error).all():
        return float("inf"), float("-inf")
    if not error.any():
        return 0.0, 200.0
    normal, zero = float(np.finfo(np.float32).tiny), 1e-6  # GPUs flush what is smaller; the size of an output of zeros
    largest, signal = float(np.abs(wide).max()), float(np.square(wide).sum())
    signal = signal if signal >= normal**2 else zero**2
    snr = 10 * (np.log10(signal) - np.log10(np.square(error).sum()))
    return float(np.abs(error).max()) / (largest if largest >= normal else zero), float(np.clip(snr, -200.0, 200.0))


def check(
    trt: Any,
    plan: bytes,
    golden: Path,
    tolerance: dict[str, Any],
    cuda: Any = None,
    quantized: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Run the engine on the golden inputs, one profile-sized batch at a time; returns the worst output's errors.

    Of a ``quantized`` engine, integer outputs beside float ones are choices, and are not held against the golden ones.

    ``options``: those of build.json. Raises `BuildError` where the engine does not load or misses ``tolerance``
    ({"kind": "snr_db" | "relative", "limit"}).
    """
    cuda = cuda or _Cuda()
    engine = asked.load(trt, asked.make_logger(trt), plan, options or {})
    if engine is None:
        raise BuildError("the engine does not load on this device")
    with np.load(golden, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    inputs = {name[6:]: array for name, array in arrays.items() if name.startswith("input/")}
    batched = [name for name, array in inputs.items() if array.ndim]  # a scalar goes along with every batch
    profiles = [engine.get_tensor_profile_shape(name, 0) for name in batched]
    least = max([int(p[0][0]) for p in profiles] or [1])
    most = min([int(p[2][0]) for p in profiles] or [1])
    samples = min([len(inputs[name]) for name in batched] or [1])
    found: dict[str, list[Any]] = {}
    for start in range(0, samples, most):
        rows = [min(i, samples - 1) for i in range(start, start + max(least, min(most, samples - start)))]
        part = {
            name: array[rows] if array.ndim else array for name, array in inputs.items()
        }  # the last sample fills up a fixed batch
        for name, array in _run(trt, engine, part, cuda).items():
            found.setdefault(name, []).append(np.atleast_1d(array))
    relative, snr = 0.0, 200.0
    floats = {name for name in found if arrays["output/" + name].dtype.kind in "fc"}
    for name in floats if quantized and floats else found:
        truth = np.atleast_1d(arrays["output/" + name])
        worst = _errors(truth, np.concatenate(found[name])[: len(truth)], quantized)
        if worst[0] == float("inf"):
            raise BuildError(f"output {name} is not finite")
        relative, snr = max(relative, worst[0]), min(snr, worst[1])
    missed = snr < tolerance["limit"] if tolerance["kind"] == "snr_db" else relative > tolerance["limit"]
    if missed:
        raise BuildError(f"the engine misses the golden outputs: {snr:.1f} dB, {relative:.2g} relative; allowed {tolerance}")
    return {"snr_db": snr, "relative": relative}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _verify(folder: Path, spec: dict[str, Any]) -> None:
    for name, expected in spec["files"].items():
        if _digest((folder / name).read_bytes()) != expected:
            raise BuildError(f"{name} is damaged: its sha256 is not that of build.json")


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing: a full disk leaves what was there."""
    temporary = path.with_name("." + path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(str(temporary), str(path))
    finally:
        if temporary.exists():
            temporary.unlink()


def _print_progress(phase: str, share: float) -> bool:
    sys.stderr.write(f"\r{share:4.0%}  {phase[:60]:60s}")
    sys.stderr.flush()
    return True


def _parser() -> argparse.ArgumentParser:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Build the TensorRT engine of this kit.")
    parser.add_argument("--kit", type=Path, default=here, help="folder with build.json (default: beside this file)")
    parser.add_argument("--out", type=Path, help="folder for the engine (default: the kit's)")
    parser.add_argument("--module", default="tensorrt", choices=["tensorrt", "tensorrt_rtx"])
    parser.add_argument("--compute-capability", metavar="X.Y", help="tensorrt_rtx only: which GPUs to compile for")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="read and write timings: later builds are faster")
    parser.add_argument("--timing-cache-read-only", action="store_true", help="never write it, as for CI")
    parser.add_argument("--no-check", action="store_true", help="do not run the engine on the golden inputs")
    return parser


def _say(text: str) -> None:
    sys.stderr.write(f"\n{text}\n")


def _layers(trt: Any, built: Built, spec: dict[str, Any]) -> bytes:
    """By the engine itself, after fusion, where it loads here; else by the network that it was made from."""
    found = asked.engine_layers(trt, asked.load(trt, asked.make_logger(trt), built.plan, spec["options"]))
    source, layers = ("network", built.layers or []) if found is None else ("engine", found)
    _say(f"{source}: {asked.layers_text(layers)}")
    return asked.layer_report(spec["target"], spec["key"], source, layers)


def _compiled(options: argparse.Namespace) -> dict[str, Any]:
    """Build, check, write; returns what TARGET.json says, and ``engine``, the path."""
    spec = json.loads((options.kit / "build.json").read_text(encoding="utf-8"))
    _verify(options.kit, spec)
    try:
        trt = importlib.import_module(options.module)
    except ImportError as error:
        raise BuildError(
            f"this Python has no usable {options.module} ({error}); JetPack's own has it: sudo apt-get install tensorrt, then "
            "run the system's python3, outside any virtual environment"
        ) from None
    name = spec["graph" if asked.strongly_typed(trt) else "untyped_graph"]
    graph = (options.kit / name).read_bytes()
    if not options.no_check:
        asked.check_device(spec, _Cuda().capability())
    spec["compute_capability"] = options.compute_capability
    shipped = options.kit / asked.TIMINGS if asked.TIMINGS in spec["files"] else None
    timings = asked.read_timings(options.timing_cache, options.timing_cache_read_only, shipped)
    memory = {"estimated": spec["memory"]["total"], "available": asked.memory_in(asked.MEMINFO, "MemAvailable")}
    if warning := asked.memory_warning(memory["estimated"], memory["available"]):
        _say(warning)
    start = time.perf_counter()
    built = build(trt, graph, spec, _print_progress, timings)
    if built.unused:
        _say(f"warning: the timing cache was not used: {built.unused}")
    if built.dla:
        _say(asked.fallback_text(built.dla))
    checked = None
    if not options.no_check:
        golden, limit = options.kit / "golden.npz", spec["golden"]
        checked = check(trt, built.plan, golden, limit, None, asked.quantized(spec["precision"]), spec["options"])
    answer = {
        "target": spec["target"],
        "precision": spec["precision"],
        "tensorrt": trt.__version__,
        "module": options.module,
        "seconds": round(time.perf_counter() - start, 3),
        "size_bytes": len(built.plan),
        "engine_sha256": _digest(built.plan),
        "graph_sha256": spec["files"][name],
        "key": spec["key"],
        "options": spec["options"],
        "golden": checked,
        "dla": built.dla,
        "memory": {**memory, "peak": asked.memory_in(asked.STATUS, "VmHWM")},
        "timing_cache": None if timings is None else {"sha256": _digest(timings), "unused": built.unused},
    }
    out = options.out or options.kit
    out.mkdir(parents=True, exist_ok=True)
    answer["changed"] = asked.changes(out / (spec["target"] + ".json"), answer)
    if answer["changed"]:
        _say("rebuilt: " + ", ".join(answer["changed"]))
    engine = out / (spec["target"] + ".engine")
    _write(engine, built.plan)
    if built.layers is not None:
        _write(out / (spec["target"] + ".layers.json"), _layers(trt, built, spec))
    _write(out / (spec["target"] + ".json"), json.dumps(answer, indent=1).encode())
    answer["engine"] = str(engine)
    if built.timings and options.timing_cache and not options.timing_cache_read_only:
        try:
            _write(options.timing_cache, built.timings)
        except OSError as error:  # the engine is worth more than the time that the next build would have saved
            answer["error"] = f"{engine} is written, the timing cache is not: {error}"
    return answer


def main(arguments: list[str] | None = None) -> int:
    """The command line of a kit; prints one JSON object, returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        answer = _compiled(options)
    except (BuildError, OSError, ImportError, LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        _say(f"error: {type(error).__name__}: {error}")
        return 1
    sys.stderr.write("\n")
    sys.stdout.write(json.dumps(answer) + "\n")
    if "error" in answer:
        _say(f"error: {answer['error']}")
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main())

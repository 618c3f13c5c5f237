"""Build a TensorRT engine from a build kit: this file, those beside it, build.json, the graph, golden.npz.

    python3 build_engine.py                      on the device, with the TensorRT of its JetPack
    python3 build_engine.py --module tensorrt_rtx --compute-capability 8.9 --no-check     anywhere, without a GPU

Needs numpy and `tensorrt`, nothing else; edgekit itself builds through `build` below, so a kit runs the code that was
tested. Written for TensorRT 8.6 to 11 and TensorRT-RTX by asking for features, never for versions, and for Python 3.8.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING or __package__:
    from . import build_options as asked
    from . import check_engine as checked
else:  # in a kit, whose folder is not on the path where Python runs with -P
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        import build_options as asked
        import check_engine as checked
    except ImportError as error:
        here = (
            "unzip the whole kit" if error.name in ("build_options", "check_engine") else "sudo apt-get install python3-numpy"
        )
        sys.exit(f"error: {error}: {here}")

BuildError = asked.BuildError
check = checked.check

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
    """TensorRT 10 reports steps of nested phases, from several threads; each phase shares out one step of the one around it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()
            self.phases: dict[str, list[int]] = {}  # name -> [steps done, steps], outermost first
            self.share = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.phases[phase_name] = [0, max(num_steps, 1)]

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:  # `progress` too: it writes to a terminal
                if phase_name in self.phases:
                    self.phases[phase_name][0] = min(step + 1, self.phases[phase_name][1])
                share, width = 0.0, 1.0
                for done, steps in self.phases.values():
                    share += width * done / steps
                    width /= steps
                self.share = max(self.share, min(share, 1.0))
                return progress(phase_name, self.share)

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
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
            raise BuildError(f"the profile does not fit the graph: {asked.first_error(lines) or spec['profiles']}")
    unused = "" if timings is None else asked.use_timings(trt, config, timings, warnings)
    if progress is not None and hasattr(trt, "IProgressMonitor"):
        monitor = _monitor(trt, progress)
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(asked.shape_inputs(network) or asked.first_error(lines) or "TensorRT gave no reason")
    dla = asked.fallback(config, network) if options.get("dla") is not None else None
    layers = asked.network_layers(network) if options.get("verbose") else None
    return Built(bytes(plan), dla, asked.timings_of(config) if timings is not None else None, unused, layers)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_KEYS = ("graph", "untyped_graph", "target", "key", "profiles", "flags", "options", "precision", "memory", "golden")


def _specification(kit: Path) -> dict[str, Any]:
    """build.json, and all that it names is there and whole."""
    try:
        spec: dict[str, Any] = json.loads((kit / "build.json").read_text(encoding="utf-8"))
        files = dict(spec["files"])
        if missing := [key for key in _KEYS if key not in spec]:
            raise LookupError("without " + ", ".join(missing))
        files[spec["graph"]], files[spec["untyped_graph"]]  # named among those that are checked
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BuildError(f"{kit / 'build.json'} is not that of a kit ({error}): unzip the whole kit again") from None
    for name, expected in files.items():
        try:
            data = (kit / name).read_bytes()
        except OSError as error:
            raise BuildError(f"{name} cannot be read ({error.strerror}): unzip the whole kit again") from None
        if _digest(data) != expected:
            raise BuildError(f"{name} is damaged, its sha256 is not that of build.json: unzip the whole kit again")
    return spec


def _write(files: dict[Path, bytes], mode: int | None = None) -> None:
    """All of them or none: a full disk leaves what was there. ``mode``: theirs, whatever the umask."""
    temporary = {path: path.with_name("." + path.name + ".tmp") for path in files}
    try:
        for path, data in files.items():
            temporary[path].write_bytes(data)
            if mode is not None:
                temporary[path].chmod(mode)
        for path in files:
            os.replace(str(temporary[path]), str(path))
    finally:
        for left in temporary.values():
            if left.exists():
                left.unlink()


def _make_folder(path: Path) -> None:
    """Only its owner writes it, whatever the umask: a runtime loads no engine that another user could have changed."""
    for part in [*reversed(path.parents), path]:
        if not part.exists():
            part.mkdir(exist_ok=True)
            part.chmod(0o755)
    if not path.is_dir():
        raise BuildError(f"{path} is no folder: choose another --out")


def _progress() -> Progress:
    """A line that is written over on a terminal; elsewhere one at every tenth."""
    live, told = sys.stderr.isatty(), [0]

    def show(phase: str, share: float) -> bool:
        if live:
            sys.stderr.write(f"\r{share:4.0%}  {phase[:60]:60s}")
        elif int(10 * share) > told[0]:
            told[0] = int(10 * share)
            sys.stderr.write(f"{share:4.0%}  {phase[:60]}\n")
        sys.stderr.flush()
        return True

    return show


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


def _opened(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """(build.json, TensorRT's module), both fit for this device as far as can be told before minutes of work."""
    spec = _specification(options.kit)
    _make_folder(options.out or options.kit)
    if not os.access(str(options.out or options.kit), os.W_OK):
        raise BuildError(f"{options.out or options.kit} may not be written: choose another --out")
    try:
        trt = importlib.import_module(options.module)
    except ImportError as error:
        raise BuildError(
            f"this Python has no usable {options.module} ({error}); JetPack's own has it: sudo apt-get install tensorrt, then "
            "run the system's python3, outside any virtual environment"
        ) from None
    if not options.no_check:
        asked.check_device(spec, checked.Cuda().capability())
    return spec, trt


def _built(trt: Any, graph: bytes, spec: dict[str, Any], timings: bytes | None) -> Built:
    """`build`, with its progress and what it found said."""
    built = build(trt, graph, spec, _progress(), timings)
    if built.unused:
        _say(f"warning: the timing cache was not used: {built.unused}")
    if built.dla:
        _say(asked.fallback_text(built.dla))
    return built


def _checked(trt: Any, plan: bytes, spec: dict[str, Any], kit: Path) -> dict[str, float] | None:
    """What `check` says of a kit's engine; None where the kit has nothing to hold it against."""
    if checked.GOLDEN not in spec["files"]:
        _say("warning: the kit has no golden outputs, so nobody has checked this engine")
        return None
    quantized, axes = asked.quantized(spec["precision"]), spec["batch_axes"]
    return check(trt, plan, kit / checked.GOLDEN, spec["golden"], axes, quantized=quantized, options=spec["options"])


def _compiled(options: argparse.Namespace) -> dict[str, Any]:
    """Build, check, write; returns what TARGET.json says, and ``engine``, the path."""
    spec, trt = _opened(options)
    name = spec["graph" if asked.strongly_typed(trt) else "untyped_graph"]
    graph = (options.kit / name).read_bytes()
    capability = options.compute_capability or spec["compute_capability"]
    spec["compute_capability"] = options.compute_capability
    shipped = options.kit / asked.TIMINGS if asked.TIMINGS in spec["files"] else None
    timings = asked.read_timings(options.timing_cache, options.timing_cache_read_only, shipped)
    memory = {"estimated": spec["memory"]["total"], "available": asked.memory_in(asked.MEMINFO, "MemAvailable")}
    if warning := asked.memory_warning(memory["estimated"], memory["available"]):
        _say(warning)
    start = time.perf_counter()
    built = _built(trt, graph, spec, timings)
    golden = None if options.no_check else _checked(trt, built.plan, spec, options.kit)
    return _kept(
        trt,
        options,
        spec,
        built,
        {
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
            "profiles": spec["profiles"],
            "compute_capability": capability,
            "golden": golden,
            "dla": built.dla,
            "memory": {**memory, "peak": asked.memory_in(asked.STATUS, "VmHWM")},
            "timing_cache": None if timings is None else {"sha256": _digest(timings), "unused": built.unused},
        },
    )


def _kept(trt: Any, options: argparse.Namespace, spec: dict[str, Any], built: Built, answer: dict[str, Any]) -> dict[str, Any]:
    """The engine, its layers and its record, all at once: an engine beside the record of another one is never loaded."""
    out = options.out or options.kit
    engine, record = out / (spec["target"] + ".engine"), out / (spec["target"] + ".json")
    answer["changed"] = asked.changes(record, answer)
    if answer["changed"]:
        _say("rebuilt: " + ", ".join(answer["changed"]))
    files = {engine: built.plan}
    if built.layers is not None:
        files[out / (spec["target"] + ".layers.json")] = _layers(trt, built, spec)
    _write({**files, record: json.dumps(answer, indent=1).encode()}, 0o644)
    answer["engine"] = str(engine)
    if built.timings and options.timing_cache and not options.timing_cache_read_only:
        try:
            _write({options.timing_cache: built.timings})
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

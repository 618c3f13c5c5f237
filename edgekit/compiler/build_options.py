"""What a build asks of TensorRT beyond the graph. Part of every build kit, beside build_engine.py, and with the same rules:
features by name, never by version; Python 3.8 and nothing else."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "CUDA_CURES",
    "TIMINGS",
    "BuildError",
    "changes",
    "check_device",
    "configure",
    "counted",
    "engine_layers",
    "fallback",
    "fallback_text",
    "first_error",
    "layer_report",
    "layers_text",
    "load",
    "make_logger",
    "memory_in",
    "memory_warning",
    "network_flags",
    "network_layers",
    "parser_error",
    "parser_of",
    "precision_flags",
    "quantized",
    "read_timings",
    "shape_inputs",
    "strongly_typed",
    "timings_of",
    "use_timings",
]

TIMINGS = "timing.cache"  # the file of a kit
#: What to do about an error of the CUDA runtime, by its number (cudaError_t).
CUDA_CURES = {
    2: "the memory is full: stop other programs, or make the kit with a smaller --batch",
    35: "the driver is older than this CUDA runtime: update JetPack or the driver",
    46: "the GPU is in use by another process, exclusively",
    100: "there is no GPU here: run this on the device, or with --no-check",
    999: "the driver does not answer: restart the device",
}
MEMINFO, STATUS = "/proc/meminfo", "/proc/self/status"


class BuildError(Exception):
    """TensorRT refused the graph, or lacks what was asked for; the message names it."""


def _member(trt: Any, enumeration: str, name: str, option: str) -> Any:
    """A member of one of TensorRT's enumerations. Raises `BuildError` that names the option which needs it."""
    found = getattr(getattr(trt, enumeration, None), name, None)
    if found is None:
        version = getattr(trt, "__version__", "")
        raise BuildError(f"{option}: TensorRT {version} has no {enumeration}.{name}; build the kit again without {option}")
    return found


def network_flags(trt: Any) -> int:
    """Bits for ``create_network``: EXPLICIT_BATCH must be set in 8.6 and is gone in 11; STRONGLY_TYPED came with 10."""
    members = getattr(trt, "NetworkDefinitionCreationFlag", None)
    wanted = [getattr(members, name, None) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED")]
    return sum(1 << int(flag) for flag in wanted if flag is not None)


def strongly_typed(trt: Any) -> bool:
    """Whether the graph decides the types (TensorRT 10 and later, TensorRT-RTX)."""
    return hasattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED")


def quantized(precision: str) -> bool:
    """Whether the graph has Q/DQ: int8, fp8, or weights alone."""
    return precision not in ("fp32", "fp16")


def precision_flags(trt: Any, precision: str) -> list[str]:
    """Builder flags that allow a precision. Only weakly typed TensorRT needs them; a strongly typed one rejects them."""
    if strongly_typed(trt):
        return []
    wanted = ["INT8", "FP16"] if quantized(precision) else ["FP16"] if precision == "fp16" else []
    return [name for name in wanted if hasattr(trt.BuilderFlag, name)]


@functools.lru_cache(maxsize=None)  # noqa: UP033  Python 3.8
def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] | None = None
            self.warnings: list[str] | None = None

        def log(self, severity: Any, message: str) -> None:
            kept = self.errors if int(severity) <= int(trt.ILogger.ERROR) else self.warnings
            if kept is not None and int(severity) <= int(trt.ILogger.WARNING):
                kept.append(message)

    return Logger()


def parser_of(trt: Any, network: Any, logger: Any, options: dict[str, Any]) -> Any:
    """The parser of a graph; where the DLA is asked for, one that writes layers as the DLA takes them (TensorRT 10.16)."""
    parser = trt.OnnxParser(network, logger)
    flag = getattr(getattr(trt, "OnnxParserFlag", None), "ADJUST_FOR_DLA", None)
    if options.get("dla") is not None and flag is not None:
        parser.set_flag(flag)
    return parser


def make_logger(trt: Any, errors: list[str] | None = None, warnings: list[str] | None = None) -> Any:
    """TensorRT's calls answer False or None; why is said to a logger only, and at times to the first that the process made.

    So there is one, and the latest caller's lists get what is said.
    """
    logger = _logger(trt)
    logger.errors, logger.warnings = errors, warnings
    return logger


def first_error(lines: list[str]) -> str:
    """TensorRT's first error in one line, for those after it follow from it; "" where it gave none.

    Those of checkMacros are CUDA's, which is asked on the way and has no say in a build without a GPU.
    """
    own = [line for line in lines if "checkMacros" not in line]
    return " ".join((own or lines or [""])[0].split())


def parser_error(parser: Any) -> str:
    """The parser's first error in one line: operator, node, reason. ``node_operator`` came with TensorRT 10."""
    if not parser.num_errors:
        return "the parser gave no reason"
    error = parser.get_error(0)
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    name = error.node_name() if hasattr(error, "node_name") else ""
    where = "{} (node {})".format(operator or "an operator", name or f"number {error.node()}")
    return "{}: {}".format(where, " ".join(str(error.desc()).split()))


def shape_inputs(network: Any) -> str:
    """Why a network with inputs that decide shapes does not build, "" where it has none: their values belong in a profile."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    names = [tensor.name for tensor in inputs if tensor.is_shape_tensor]
    return f"{', '.join(names)} decides shapes: TensorRT needs such values when it compiles" if names else ""


def check_device(spec: dict[str, Any], capability: str) -> None:
    """Minutes before the runtime would refuse the engine. Raises `BuildError` for a GPU that a build.json is not for."""
    wanted = spec["compute_capability"]
    if capability != wanted and spec["options"].get("compatible") != "hardware":
        raise BuildError(
            f"this kit is for {spec['target']} (SM {wanted}), this GPU is SM {capability}: build one for it (edgekit targets)"
        )


def configure(trt: Any, builder: Any, config: Any, options: dict[str, Any], capability: str | None) -> None:
    """Set on a builder's configuration what ``options`` of a build.json asks for, and for which GPU. Raises `BuildError`.

    ``capability``: "8.9"; for TensorRT-RTX, which compiles for GPUs that are not there.
    """
    hardware = options.get("compatible") == "hardware"
    if capability and hasattr(config, "set_compute_capability"):
        _compile_for(trt, config, capability, hardware)
    elif hardware:
        level = _member(trt, "HardwareCompatibilityLevel", "AMPERE_PLUS", "--compatible hardware")
        config.hardware_compatibility_level = level
        if config.hardware_compatibility_level != level:  # some releases only log that they do not support it
            raise BuildError("--compatible hardware: this TensorRT does not support it here; build without --compatible")
    if options.get("compatible") == "version":
        config.set_flag(_member(trt, "BuilderFlag", "VERSION_COMPATIBLE", "--compatible version"))
    if options.get("workspace_mb") is not None:
        pool = _member(trt, "MemoryPoolType", "WORKSPACE", "--workspace-mb")
        config.set_memory_pool_limit(pool, options["workspace_mb"] << 20)
    if options.get("dla") is not None:
        if options["dla"] >= builder.num_DLA_cores:
            cores = f"{builder.num_DLA_cores} DLA cores" if builder.num_DLA_cores else "no DLA"
            raise BuildError(f"--dla {options['dla']}: this device, with this TensorRT, has {cores}; build without --dla")
        config.default_device_type = _member(trt, "DeviceType", "DLA", "--dla")
        config.DLA_core = options["dla"]
        config.set_flag(_member(trt, "BuilderFlag", "GPU_FALLBACK", "--dla"))
    if options.get("verbose") and not hasattr(config, "set_compute_capability"):  # no GPU, nobody to inspect the engine
        config.profiling_verbosity = _member(trt, "ProfilingVerbosity", "DETAILED", "--verbose")


def _compile_for(trt: Any, config: Any, capability: str, later: bool) -> None:
    """One compute capability, or it and all others from Ampere on that this TensorRT knows."""
    wanted = ["SM" + capability.replace(".", "")]
    if later:
        numbers = {name: int(name[2:]) for name in trt.ComputeCapability.__members__ if name[2:].isdigit()}
        wanted += sorted(name for name, number in numbers.items() if number >= 80 and name not in wanted)
    config.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        member = getattr(trt.ComputeCapability, name, None)
        if member is None or not config.set_compute_capability(member, index):
            raise BuildError(f"TensorRT {trt.__version__} does not compile for compute capability {capability} ({name})")


def fallback(config: Any, network: Any) -> dict[str, Any]:
    """Which layers of a network the DLA does not take, by TensorRT's own word; ``on_gpu`` is None where it is not asked.

    Said of each layer alone, before fusion: TensorRT may move more to the GPU, where a core has no room for another part.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    ask = getattr(config, "can_run_on_DLA", None)
    left = None if ask is None else [{"name": item.name, "type": item.type.name} for item in layers if not ask(item)]
    return {"core": config.DLA_core, "layers": len(layers), "on_gpu": left}


def counted(words: Any) -> str:
    """``3 CONVOLUTION, 1 SOFTMAX``: how often each occurs, the most frequent first."""
    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common())


def fallback_text(found: dict[str, Any]) -> str:
    """What `fallback` found, in one line."""
    if found["on_gpu"] is None:
        return f"DLA core {found['core']}: this TensorRT does not say which layers fall back to the GPU"
    left = len(found["on_gpu"])
    which = counted(layer["type"] for layer in found["on_gpu"])
    text = f"DLA core {found['core']}: {left} of {found['layers']} layers fall back to the GPU"
    return f"{text}: {which}" if left else text


def layer_report(target: str, key: str, source: str, layers: list[Any]) -> bytes:
    """TARGET.layers.json, a layer a line. ``source``: "network" (before fusion) or "engine" (after)."""
    head = json.dumps({"target": target, "key": key, "source": source, "summary": layers_text(layers)})[:-1]
    lines = ",\n".join(json.dumps(layer) for layer in layers)
    return (head + ', "layers": [\n' + lines + "\n]}\n").encode()


def _shape(tensor: Any) -> list[int] | None:
    try:
        return [int(axis) for axis in tensor.shape]
    except ValueError:  # not even the number of axes is known
        return None


def network_layers(network: Any) -> list[dict[str, Any]]:
    """Name, type, precision (of the first output) and shapes of a network's layers, as the parser made them: before fusion."""
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = [tensor for tensor in map(layer.get_input, range(layer.num_inputs)) if tensor is not None]
        outputs = [tensor for tensor in map(layer.get_output, range(layer.num_outputs)) if tensor is not None]
        about = {"name": layer.name, "type": layer.type.name, "precision": outputs[0].dtype.name.lower() if outputs else ""}
        found.append({**about, "inputs": [_shape(tensor) for tensor in inputs], "outputs": [_shape(t) for t in outputs]})
    return found


def engine_layers(trt: Any, engine: Any) -> list[Any] | None:
    """What the engine's inspector says of its layers, after fusion; None where there is no engine or no such answer."""
    if engine is None:
        return None
    try:
        said = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
        return list(said["Layers"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def layers_text(layers: list[Any]) -> str:
    """A report of layers in one line. An engine that was not built for it has names only."""
    known = [layer for layer in layers if isinstance(layer, dict)]
    types = counted(layer.get("LayerType") or layer.get("type") or "?" for layer in known)
    precisions = counted(layer["precision"] for layer in known if layer.get("precision"))
    return ": ".join(filter(None, [f"{len(layers)} layers", "; ".join(filter(None, [types, precisions]))]))


def memory_in(path: str, name: str) -> int | None:
    """Bytes by one line of /proc/meminfo or /proc/self/status; None where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = [line.split()[1] for line in file if line.startswith(name + ":")]
        return int(found[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None


def memory_warning(needed: int, available: int | None) -> str:
    """What to say before a build that may not fit; empty where it fits, or where nobody knows."""
    if available is None or needed <= available:
        return ""
    return (
        f"warning: this build needs about {needed >> 20} MB, by estimate, and {available >> 20} MB are available: "
        "stop other programs, add swap, or make the kit with --workspace-mb or a smaller --batch"
    )


def changes(record: Path, answer: dict[str, Any]) -> list[str]:
    """What differs from the engine that lies there already; nothing where there is none."""
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        # A timing cache grows with every build.
        names = ("key", "graph_sha256", "options", "profiles", "module", "tensorrt", "compute_capability")
        stated = [name for name in names if name in before]  # an older script's record lacks some
        found = [f"{name} {before[name]} -> {answer[name]}" for name in stated if before[name] != answer[name]]
        same = before["engine_sha256"] == answer["engine_sha256"]
    except (OSError, ValueError, KeyError, AttributeError):
        return []
    if found or same:
        return found
    if answer["module"] == "tensorrt_rtx":  # it times nothing
        return ["the same inputs gave another engine"]
    return ["the same inputs gave another engine: kernels are chosen by timing, and --timing-cache FILE keeps the choice"]


def load(trt: Any, logger: Any, plan: bytes, options: dict[str, Any]) -> Any:
    """A serialized engine, loaded; None where this device does not take it."""
    runtime = trt.Runtime(logger)
    if options.get("dla") is not None:
        runtime.DLA_core = options["dla"]
    if options.get("compatible") == "version":
        runtime.engine_host_code_allowed = True  # such an engine brings a runtime of its own; here it was built just now
    return runtime.deserialize_cuda_engine(plan)


def read_timings(path: Path | None, read_only: bool, shipped: Path | None) -> bytes | None:
    """The timing cache to start from: the user's file, else the kit's, else empty; None where nobody wants one.

    Raises `BuildError` now for a file that could not be written in the end.
    """
    if path is None:
        if read_only:
            raise BuildError("--timing-cache-read-only needs --timing-cache FILE")
        return None if shipped is None else shipped.read_bytes()
    if path.exists():
        if not path.is_file():  # a pipe would be waited for
            raise BuildError(f"the timing cache {path} is no file: it is a folder, a pipe or a device")
        if not read_only and not os.access(str(path), os.W_OK):
            raise BuildError(f"the timing cache {path} cannot be written; add --timing-cache-read-only to only read it")
        return path.read_bytes()
    if read_only:
        raise BuildError(f"there is no timing cache {path}; a build without --timing-cache-read-only makes one")
    if not os.access(str(path.parent), os.W_OK):
        raise BuildError(f"the timing cache {path} cannot be made: its folder is not there or cannot be written")
    return b"" if shipped is None else shipped.read_bytes()


def use_timings(trt: Any, config: Any, timings: bytes, warnings: list[str]) -> str:
    """Start from a timing cache, editable where TensorRT has that; returns why not, and then starts from an empty one."""
    if hasattr(config, "set_compute_capability"):
        return "TensorRT-RTX times nothing while it builds, a cache is documented to do nothing"
    if hasattr(trt.BuilderFlag, "EDITABLE_TIMING_CACHE"):
        config.set_flag(trt.BuilderFlag.EDITABLE_TIMING_CACHE)
    before = len(warnings)
    cache = config.create_timing_cache(timings)
    said = [" ".join(line.split()) for line in warnings[before:] if "timing cache" in line]  # damage is only logged
    if cache is None or said:
        reason = said[0] if said else "TensorRT cannot read it"
    elif config.set_timing_cache(cache, ignore_mismatch=False):
        return ""
    else:
        reason = "it was made by another TensorRT or CUDA, or on another GPU"
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return reason


def timings_of(config: Any) -> bytes | None:
    """The timing cache after a build; None where there is none."""
    if hasattr(config, "set_compute_capability"):
        return None
    cache = config.get_timing_cache()
    return bytes(cache.serialize()) if cache is not None else None

"""The options of `build` that TensorRT is given beyond the graph: checked against the target before anything is compiled."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edgekit.bundle import FLOAT_GRAPH, INT8_GRAPH, Bundle
from edgekit.errors import BundleError, GoldenError, UsageError
from edgekit.files import read_file
from edgekit.manifest import ImagePreprocessing, SeriesPreprocessing, TextPreprocessing
from edgekit.targets import PRECISIONS, Target, load_targets

from .shapes import Profiles, shape_text

__all__ = ["Options", "check_precision", "frame_profiles", "frames_of", "read_timings"]

_FP8_SM = "8.9"  # the first with E4M3 in its tensor cores, as `targets.toml` has it

_SAID_BELOW = ("timings", "verbose", "uint8_input")  # by `decides`: not as they are, or only where they are set
_FOR_A_BUILD = 0.75  # share of a device's memory that a build may take before `build` warns
_TAKES = {TextPreprocessing: "texts", SeriesPreprocessing: "series of floats"}
#: (--compatible, kind of target) -> what it brings and what it costs, by NVIDIA's documentation of TensorRT and TensorRT-RTX.
COMPATIBLE = {
    ("hardware", "rtx"): "one engine for all GPUs of TensorRT-RTX from Ampere on; NVIDIA advises one of its own for each "
    "where speed matters, and every layer must be of a precision that all of them have",
    ("hardware", "device"): "runs on other GPUs from Ampere on (AMPERE_PLUS); slower: 48 KiB of shared memory, fewer kernels "
    "and fusions. NVIDIA (8.6) calls it unsupported on JetPack: the device refuses the kit where it is",
    ("version", "device"): "runs with later TensorRT too (8 with 10, 10 with 11); can be slower, the file is larger by a "
    "runtime, and loading it runs code out of that file",
}


MAX_WORKSPACE_MB = 1 << 20  # a tebibyte


@dataclass(frozen=True)
class Options:
    """``workspace_mb``: scratch memory in MiB that one kernel may use; None leaves it to TensorRT (all there is).

    ``dla``: the core of the deep learning accelerator that runs what it can; the GPU runs the rest. ``compatible``:
    "hardware", for GPUs other than the target's, or "version", for later releases of TensorRT. ``timings``: a timing cache
    for the kit, see `read_timings`. ``verbose``: a report of the layers. ``uint8_input``: the engine takes frames of bytes and
    normalises them (`frames_of`).
    """

    workspace_mb: int | None = None
    dla: int | None = None
    compatible: str | None = None
    timings: bytes | None = field(default=None, repr=False)
    verbose: bool = False
    uint8_input: bool = False

    def check(self, target: Target, precision: str, profiles: Profiles) -> None:
        """Raises `UsageError` for what the target cannot do, and for options that contradict each other."""
        if self.workspace_mb is not None:
            _check_workspace(self.workspace_mb, target)
        if self.dla is not None and type(self.dla) is not int:
            raise UsageError(f"a DLA core {self.dla!r}", "give the number of the core, 0 or 1")
        if self.dla is not None:
            _check_dla(self.dla, target, precision, profiles)
        if self.compatible is not None:
            _check_compatible(self.compatible, target)

    def check_chosen(self, answer: Mapping[str, Any]) -> None:
        """Whether what ``best`` came to is something that the DLA runs."""
        if self.dla is not None and answer["precision"] == "fp32":
            raise GoldenError(
                f"the DLA runs fp16 and int8 only, and this graph came to fp32: {'; '.join(answer['notes'])}"[:400],
                "leave --dla out, or quantize the bundle",
            )

    def notes(self, target: Target, precision: str, memory: Mapping[str, int] | None) -> list[str]:
        """What the user should know before relying on these options: ``precision`` as it was chosen, ``memory`` to build."""
        said = [COMPATIBLE[self.compatible, target.kind]] if self.compatible else []
        if self.dla is not None:
            said.append(f"DLA core {self.dla}; what it cannot run falls back to the GPU, and the device's record lists it")
            if precision == "int8":
                said.append("before TensorRT 11 a DLA takes no Q/DQ and int8 layers fall back: compare --precision fp16")
        if self.verbose and target.kind == "device":
            said.append(f"the device reports the engine's layers in {target.name}.layers.json")
        if memory is not None and target.memory_gb is not None:
            said += _memory_note(memory["total"], target.memory_gb.value, self.workspace_mb)
        return said

    def decides(self, target: Target) -> dict[str, Any]:
        """What of this decides the engine, as JSON: part of the cache's key, of the record and of a kit's build.json.

        A verbose engine of a device carries what its inspector says; for RTX the report is of the network.
        """
        said = {name: value for name, value in asdict(self).items() if value is not None and name not in _SAID_BELOW}
        if self.uint8_input:
            said["uint8_input"] = True
        if self.verbose and target.kind == "device":
            said["verbose"] = True
        if self.timings is not None:
            said["timing_cache"] = hashlib.sha256(self.timings).hexdigest()
        return said


def check_precision(bundle: Bundle, target: Target, precision: str) -> None:
    """Raises `UsageError` for a precision that the target lacks, `BundleError` where the bundle has no graph for it."""
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


def frames_of(bundle: Bundle) -> ImagePreprocessing:
    """What an engine with ``--uint8-input`` does to a frame by itself. Raises `UsageError` where no frame is normalised."""
    spec, inputs = bundle.manifest.preprocessing, bundle.manifest.inputs
    cure = "leave it out; models of pictures (edgekit train --data folder:PATH) take frames"
    if not isinstance(spec, ImagePreprocessing):
        takes = "raw tensors, with no preprocessing to compile into the graph" if spec is None else _TAKES[type(spec)]
        raise UsageError(f"--uint8-input is for frames of pictures; {bundle.path} takes {takes}", cure)
    planes = (spec.channels, spec.height, spec.width)
    if len(inputs) != 1 or inputs[0].dtype != "float32" or inputs[0].shape[1:] != planes:
        got = ", ".join(f"{one.name} {one.dtype} {shape_text(one.shape)}" for one in inputs)
        raise UsageError(
            f"--uint8-input needs a graph with one input, float32 nx{shape_text(planes)} by its preprocessing; "
            f"{bundle.path} takes {got}",
            cure,
        )
    return spec


def frame_profiles(profiles: Profiles) -> Profiles:
    """(n, C, H, W) -> (n, H, W, C), as an engine takes frames."""
    return {name: [[n, h, w, c] for n, c, h, w in shapes] for name, shapes in profiles.items()}


def read_timings(path: str | os.PathLike[str] | None, target: Target) -> tuple[bytes | None, list[str]]:
    """(the timing cache for a device's kit, remarks). TensorRT-RTX has no use for one: its builder times nothing.

    Raises `UsageError` where the file is missing, empty or unreadable.
    """
    if path is None:
        return None, []
    try:
        data = read_file(path)
    except OSError as error:
        raise UsageError(
            f"--timing-cache {path}: {error.strerror}",
            "give a file that a kit's build_engine.py --timing-cache wrote on such a device, or leave it out",
        ) from None
    if not data:
        raise UsageError(f"--timing-cache {path} is empty", "make it on the device: build_engine.py --timing-cache FILE")
    if target.kind == "rtx":
        return None, ["--timing-cache does nothing for TensorRT-RTX, which times nothing while it builds (NVIDIA documents it)"]
    return data, []


def _check_workspace(workspace_mb: int, target: Target) -> None:
    if type(workspace_mb) is not int:
        raise UsageError(f"a workspace of {workspace_mb!r} MiB", "give a whole number, or leave it out for no limit")
    if workspace_mb < 1:
        raise UsageError(f"--workspace-mb {workspace_mb} leaves no memory", "give 1 or more, or leave it out for no limit")
    if workspace_mb > MAX_WORKSPACE_MB:
        raise UsageError(f"--workspace-mb {workspace_mb} is more than any GPU has", "give it in MiB, or leave it out")
    if target.memory_gb is not None and workspace_mb > target.memory_gb.value * 1024:
        raise UsageError(
            f"--workspace-mb {workspace_mb} is more than the {target.memory_gb.value:g} GB of {target.name}",
            "give less; a quarter of the memory is plenty",
        )


def _check_dla(core: int, target: Target, precision: str, profiles: Profiles) -> None:
    if not target.dla:
        having = ", ".join(name for name, other in load_targets().items() if other.dla)
        raise UsageError(f"{target.name} has no DLA", f"leave --dla out; these have one: {having}")
    if not 0 <= core < target.dla:
        raise UsageError(
            f"--dla {core}: {target.name} has {target.dla} DLA cores", f"choose {' or '.join(map(str, range(target.dla)))}"
        )
    if precision == "fp32":
        raise UsageError("the DLA runs fp16 and int8, not fp32", "choose --precision fp16 or int8, or leave --dla out")
    for name, (least, _, most) in profiles.items():
        if least != most:
            raise UsageError(
                f"the DLA runs one shape only; {name} goes from {shape_text(least)} to {shape_text(most)}",
                "give one --batch, such as --batch 1; other dynamic axes are fixed by edgekit import --shape",
            )


def _check_compatible(kind: str, target: Target) -> None:
    if kind not in ("hardware", "version"):
        raise UsageError(f"--compatible {kind!r} is not known", "choose hardware (other GPUs) or version (later TensorRT)")
    if kind == "version" and target.kind == "rtx":
        raise UsageError(
            "TensorRT-RTX builds no version-compatible engine without a GPU: it asks for a library that it does not bring",
            "leave it out, and build again after an upgrade of TensorRT-RTX: that takes seconds",
        )
    if kind == "hardware" and not target.ampere:
        raise UsageError(
            f"{target.name} is SM {target.sm}; engines for several GPUs exist from SM 8.0 (Ampere) on",
            "leave --compatible out, and build for each target",
        )


def _memory_note(needed: int, memory_gb: float, workspace_mb: int | None) -> list[str]:
    """A warning where the device is too small; the rest of its memory is the system's and the application's."""
    if needed <= _FOR_A_BUILD * memory_gb * 2**30:
        return []
    cure = "a smaller --batch" if workspace_mb else "a smaller --batch, --workspace-mb"
    return [f"building needs about {needed / 2**30:.1f} GB, by estimate, of the device's {memory_gb:g}: {cure}, or swap"]

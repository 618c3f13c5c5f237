"""What edgekit makes models for: `targets.toml`, and files of the user's own, validated when they are read.

A new target is a new table: in that file, or in one that EDGEKIT_TARGETS names (``--targets`` does the same for a command).
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edgekit.errors import EdgekitError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "LAUNCH_US",
    "OPSETS",
    "PEAK_SHARE",
    "PRECISIONS",
    "USER_TARGETS",
    "Figure",
    "JetPack",
    "Target",
    "buildable",
    "load_targets",
    "target_named",
    "target_rows",
]

#: What `edgekit build` can make; a target may list more, which its hardware runs and edgekit does not build yet.
PRECISIONS = ("fp32", "fp16", "int8")
#: TensorRT version -> the newest opset that a kit may have, from that version on, by what onnx-tensorrt's changelog says
#: of the ONNX it parses with: 1.13 in 8.6, INT4 (opset 21) from 10.0 on, 1.17 (opset 22) in 10.6. 8.6 reads 18 by that;
#: 17 is on the safe side. The script is written for 8.6 on.
OPSETS = {(8, 6): 17, (10, 0): 21, (10, 6): 22}
TARGETS = Path(__file__).with_name("targets.toml")
#: The environment variable with the user's own files, separated as in PATH; later files count more.
USER_TARGETS = "EDGEKIT_TARGETS"
MAX_BYTES = 1 << 20
MAX_SHARE = 4  # above 1 a cache serves what counts as traffic to memory
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # it becomes a file's name
_BASE = "like"
_OWN = ("name", "file", "replaces")  # of `Target`, set here and never by a file
Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]
Source = Annotated[str, msgspec.Meta(min_length=8)]  # an address, or "unconfirmed: " and how it was derived
Title = Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+\Z")]  # one line
#: What TensorRT-RTX 1.7 compiles for.
RTX_SM = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
Precision = Literal["fp32", "fp16", "int8", "fp8", "fp4"]


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number and where it was read; a source that starts with ``unconfirmed`` says how it was derived instead."""

    value: Positive
    source: Source

    @property
    def confirmed(self) -> bool:
        return not self.source.startswith("unconfirmed")


_FITTED = (
    "benchmarks/estimate.py: fitted to ResNet-50 int8 on AGX Orin (MLPerf 3.1) and YOLO11n fp32 and int8, YOLO11m fp16 on "
    "Orin Nano Super (Ultralytics)"
)
#: What share of both peaks kernels reach, and microseconds a kernel costs beside, where a target's table states no own.
PEAK_SHARE = Figure(0.7, _FITTED)
LAUNCH_US = Figure(5.8, _FITTED)


class JetPack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which TensorRT a release brings to the device: of JetPack, or of NVIDIA's TensorRT container for servers."""

    tensorrt: Annotated[str, msgspec.Meta(pattern=r"^\d+(\.\d+)+$")]
    cuda: str
    python: str
    source: Source
    jetpack: str = ""
    container: str = ""
    dla: bool = True  #: whether this TensorRT drives the device's DLA, where it has one

    def __post_init__(self) -> None:
        if bool(self.jetpack) == bool(self.container):
            raise ValueError("state jetpack on a Jetson, container elsewhere")

    @property
    def release(self) -> str:
        """JetPack 6.0, or container 25.01."""
        return f"JetPack {self.jetpack}" if self.jetpack else f"container {self.container}"

    @property
    def opset(self) -> int:
        """The newest opset that a kit may have there; 0 where kits are not made for this TensorRT."""
        version = tuple(int(part) for part in self.tensorrt.split("."))
        return max((opset for since, opset in OPSETS.items() if version >= since), default=0)

    @property
    def strongly_typed(self) -> bool:
        """Whether the graph decides the types there; before TensorRT 10 builder flags do."""
        return int(self.tensorrt.split(".")[0]) >= 10


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table of ``targets.toml``; its comments state the units. Absent figures are per card, or not published.

    ``figures_of``: the card whose figures stand for a family of cards. ``file``: the user's file that it comes from, empty
    where it is shipped; ``replaces``: it stands in for a shipped one.
    """

    title: Title
    kind: Literal["rtx", "device", "cpu"]
    precisions: Annotated[tuple[Precision, ...], msgspec.Meta(min_length=1)]
    sm: Annotated[str, msgspec.Meta(pattern=r"^(\d+\.\d)?$")] = ""
    dla: Annotated[int, msgspec.Meta(ge=0)] = 0
    figures_of: str = ""
    memory_gb: Figure | None = None
    bandwidth_gbs: Figure | None = None
    published_int8_tops: Figure | None = None
    published_fp4_tops: Figure | None = None
    int8_tops: Figure | None = None
    fp16_tflops: Figure | None = None
    fp32_tflops: Figure | None = None
    launch_us: Figure | None = None
    peak_share: Figure | None = None
    alignment: dict[Precision, Figure] = {}
    tensorrt: tuple[JetPack, ...] = ()
    name: str = ""
    file: str = ""
    replaces: bool = False

    def __post_init__(self) -> None:
        if (self.kind == "device") != bool(self.tensorrt):
            raise ValueError("tensorrt: a device states the TensorRT of each release, an rtx or cpu target states none")
        if (self.kind == "cpu") == bool(self.sm):
            raise ValueError('sm: a GPU states its SM, such as "8.7", a cpu none')
        if self.kind == "rtx" and self.sm not in RTX_SM:
            raise ValueError(f"sm: TensorRT-RTX compiles for SM {', '.join(RTX_SM)}, not {self.sm}")
        if len(set(self.precisions)) != len(self.precisions):
            raise ValueError("precisions: each once")
        if self.peak_share is not None and self.peak_share.value > MAX_SHARE:
            raise ValueError(f"peak_share: at most {MAX_SHARE}; 0.7 on Orin")

    @property
    def ampere(self) -> bool:
        """Ampere or later (SM 8.0)."""
        return bool(self.sm) and tuple(map(int, self.sm.split("."))) >= (8, 0)

    @property
    def sparse(self) -> bool:
        """Whether its tensor cores know the 2:4 pattern."""
        return self.ampere

    def peak(self, precision: str) -> Figure | None:
        """Dense peak of the GPU alone, in 10^12 operations a second (one multiply-accumulate is two)."""
        return {"int8": self.int8_tops, "fp16": self.fp16_tflops, "fp32": self.fp32_tflops}.get(precision)

    def lacking(self, *precisions: str) -> str:
        """The fields that a prediction at these precisions needs and the table does not have."""
        fields = {"int8": "int8_tops", "fp16": "fp16_tflops", "fp32": "fp32_tflops"}
        missing = [fields[precision] for precision in precisions if precision in fields and self.peak(precision) is None]
        return " and ".join([*missing, *([] if self.bandwidth_gbs else ["bandwidth_gbs"])])

    def kernel_us(self, macs: float, size_bytes: float, precision: str) -> float:
        """Predicted microseconds of a kernel: the longer of its arithmetic and its traffic at the share of the peaks that
        kernels reach, plus its launch. Raises `UsageError` where the target has no figures."""
        return (
            self.bound_us(macs, size_bytes, precision) / (self.peak_share or PEAK_SHARE).value
            + (self.launch_us or LAUNCH_US).value
        )

    def bound_us(self, macs: float, size_bytes: float, precision: str) -> float:
        """The same at both peaks, launches free: a bound for kernels whose tensors all pass through memory, not a cache."""
        peak = self.peak(precision)
        if peak is None or self.bandwidth_gbs is None:
            raise UsageError(
                f"{self.name} has no {precision} peak and bandwidth to predict from",
                f"state {self.lacking(precision)} in a table of yours, by --targets FILE (docs/targets.md); or take another",
            )
        return max(2 * macs / peak.value / 1e6, size_bytes / self.bandwidth_gbs.value / 1e3)


def load_targets(path: Path | None = None) -> dict[str, Target]:
    """Name -> `Target`, in the files' order: the shipped ones and those of the files in EDGEKIT_TARGETS, or ``path``'s alone.

    Raises `EdgekitError` that names the file, the table and the field which is wrong, `UsageError` for a missing file.
    """
    if path is not None:
        return dict(_load((path,), (_stamp(path),)))
    named = os.environ.get(USER_TARGETS, "")
    files = tuple(Path(part).expanduser() for part in named.split(os.pathsep) if part)
    return dict(_load((TARGETS, *files), tuple(map(_stamp, files))))


def _stamp(file: Path) -> tuple[int, int]:
    """A user's file may change within a process; a missing one is reported when it is read."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=8)
def _load(files: tuple[Path, ...], _stamps: tuple[tuple[int, int], ...]) -> dict[str, Target]:
    tables: dict[str, Mapping[str, Any]] = {}
    targets: dict[str, Target] = {}
    for file in files:
        for name, table in (_shipped() if file == TARGETS else _tables(file)).items():
            tables[name] = _based(file, name, table, tables)
            target = _target(file, name, tables[name])
            mine = {} if file == files[0] else {"file": str(file), "replaces": name in targets}
            targets[name] = msgspec.structs.replace(target, name=name, **mine)
    return targets


@functools.cache
def _shipped() -> dict[str, Any]:
    return _tables(TARGETS)


def _wrong(file: Path, what: str, hint: str = "") -> EdgekitError:
    shipped = file == TARGETS
    return EdgekitError(f"{file.name if shipped else file} is not valid: {what}", hint or "mend it; " + _hint(shipped))


def _hint(shipped: bool) -> str:
    return "or reinstall edgekit" if shipped else "docs/targets.md has a table to copy"


def _tables(file: Path) -> dict[str, Any]:
    try:
        size = file.stat().st_size
        if not file.is_file():  # a pipe would be waited for, a device be read for ever
            raise UsageError(f"{file}, a file of targets, is no regular file", f"mend --targets or the variable {USER_TARGETS}")
        if size > MAX_BYTES:
            raise _wrong(file, f"{size} bytes, {MAX_BYTES} are read at most")
        found: dict[str, Any] = tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise UsageError(
            f"{file}, a file of targets, cannot be read: {error.strerror}", f"mend --targets or the variable {USER_TARGETS}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong(file, f"no TOML: {str(error) or 'nested too deeply'}") from None
    return found


def _based(file: Path, name: str, table: Any, before: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The table over that which its ``like`` names, of this file's start or of a file before."""
    if not isinstance(table, dict):
        raise _wrong(file, f"{name} stands outside of a table", "begin it with a line such as [my-board]")
    if not _NAME.fullmatch(name):
        raise _wrong(file, f"[{name[:80]}] is no name", "small letters, digits, '.', '_' and '-', 64 at most")
    if taken := [key for key in _OWN if key in table]:
        raise _wrong(file, f"[{name}] {taken[0]}: not a field of a table")
    base = table.get(_BASE)
    if base is None:
        return dict(table)
    if not isinstance(base, str) or base not in before:
        near = difflib.get_close_matches(str(base), before, n=3, cutoff=0.5) or list(before)[:8]
        raise _wrong(file, f"[{name}] {_BASE}: there is no {base!r} above it", f"one of: {', '.join(near)}")
    found = {key: value for key, value in {**before[base], **table}.items() if key != _BASE}
    if "bandwidth_gbs" in table and "figures_of" not in table:
        found.pop("figures_of", None)  # it states a card of its own
    return found


def _target(file: Path, name: str, table: Mapping[str, Any]) -> Target:
    try:
        return msgspec.convert(table, Target)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        field = where.strip("`.").replace("[...]", "").strip(".")
        raise _wrong(file, f"[{name}] {field}{': ' if field else ''}{message}") from None


def target_named(name: str) -> Target:
    """The target called ``name``. Raises `UsageError` with the nearest names."""
    targets = load_targets()
    if not isinstance(name, str) or name not in targets:
        near = difflib.get_close_matches(str(name), targets, n=3, cutoff=0.5) or list(targets)
        raise UsageError(f"there is no target {name!r}", f"choose one of: {', '.join(near)}; edgekit targets lists all")
    return targets[name]


def buildable(name: str) -> Target:
    """The target called ``name``, for which there is something to build. Raises `UsageError`."""
    target = target_named(name)
    if target.kind == "cpu":
        raise UsageError(
            f"{name} runs graphs by ONNX Runtime, which compiles nothing: there is no engine to build",
            "edgekit bench B --backend onnxruntime measures it, edgekit pack ships it; edgekit targets lists what is built",
        )
    return target


def target_rows() -> list[dict[str, Any]]:
    """Every target as JSON-plain figures with their sources, for ``edgekit targets``."""
    rows: list[dict[str, Any]] = [msgspec.to_builtins(target) for target in load_targets().values()]
    return [{"name": row.pop("name"), **{key: value for key, value in row.items() if value is not None}} for row in rows]

"""What edgekit makes models for: `targets.toml`, validated when it is read. A new target is a new table in that file."""

from __future__ import annotations

import difflib
import functools
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edgekit.errors import EdgekitError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["OPSETS", "PRECISIONS", "Figure", "JetPack", "Target", "load_targets", "target_named", "target_rows"]

#: What `edgekit build` can make; a target may list more, which its hardware runs and edgekit does not build yet.
PRECISIONS = ("fp32", "fp16", "int8")
#: TensorRT version -> the newest opset that a kit may have, from that version on, by what onnx-tensorrt's changelog says
#: of the ONNX it parses with: 1.13 in 8.6, INT4 (opset 21) from 10.0 on, 1.17 (opset 22) in 10.6. 8.6 reads 18 by that;
#: 17 is on the safe side. The script is written for 8.6 on.
OPSETS = {(8, 6): 17, (10, 0): 21, (10, 6): 22}
TARGETS = Path(__file__).with_name("targets.toml")
Positive = Annotated[float, msgspec.Meta(gt=0)]
Precision = Literal["fp32", "fp16", "int8", "fp8", "fp4"]


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number and where it was read; a source that starts with ``unconfirmed`` says how it was derived instead."""

    value: Positive
    source: Annotated[str, msgspec.Meta(min_length=8)]

    @property
    def confirmed(self) -> bool:
        return not self.source.startswith("unconfirmed")


class JetPack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which TensorRT a JetPack release brings to the device."""

    jetpack: str
    tensorrt: Annotated[str, msgspec.Meta(pattern=r"^\d+(\.\d+)+$")]
    cuda: str
    python: str
    source: Annotated[str, msgspec.Meta(min_length=8)]
    dla: bool = True  #: whether this TensorRT drives the device's DLA, where it has one

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
    """One table of ``targets.toml``; its comments state the units. Absent figures are per card, or not published."""

    title: str
    kind: Literal["rtx", "device"]
    sm: Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d$")]
    precisions: tuple[Precision, ...]
    dla: Annotated[int, msgspec.Meta(ge=0)] = 0
    memory_gb: Figure | None = None
    bandwidth_gbs: Figure | None = None
    published_int8_tops: Figure | None = None
    published_fp4_tops: Figure | None = None
    int8_tops: Figure | None = None
    fp16_tflops: Figure | None = None
    fp32_tflops: Figure | None = None
    launch_us: Figure | None = None
    tensorrt: tuple[JetPack, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if (self.kind == "device") != bool(self.tensorrt):
            raise ValueError("a device states the TensorRT of each JetPack, an rtx target states none")

    @property
    def ampere(self) -> bool:
        """Ampere or later (SM 8.0)."""
        return tuple(map(int, self.sm.split("."))) >= (8, 0)

    @property
    def sparse(self) -> bool:
        """Whether its tensor cores know the 2:4 pattern."""
        return self.ampere

    def peak(self, precision: str) -> Figure | None:
        """Dense peak of the GPU alone, in 10^12 operations a second (one multiply-accumulate is two)."""
        return {"int8": self.int8_tops, "fp16": self.fp16_tflops, "fp32": self.fp32_tflops}.get(precision)


@functools.cache
def load_targets(path: Path = TARGETS) -> dict[str, Target]:
    """Name -> `Target`, in the file's order. Raises `EdgekitError` that names the field which is wrong."""
    try:
        with path.open("rb") as file:
            tables: dict[str, Any] = tomllib.load(file)
        found = msgspec.convert(tables, dict[str, Target])
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise EdgekitError(f"{path.name} is not valid: {error}", "mend the table, or reinstall edgekit") from None
    return {name: msgspec.structs.replace(target, name=name) for name, target in found.items()}


def target_named(name: str) -> Target:
    """The target called ``name``. Raises `UsageError` with the nearest names."""
    targets = load_targets()
    if name not in targets:
        near = difflib.get_close_matches(name, targets, n=3, cutoff=0.5) or list(targets)
        raise UsageError(f"there is no target {name!r}", f"choose one of: {', '.join(near)}; edgekit targets lists all")
    return targets[name]


def target_rows() -> list[dict[str, Any]]:
    """Every target as JSON-plain figures with their sources, for ``edgekit targets``."""
    rows: list[dict[str, Any]] = [msgspec.to_builtins(target) for target in load_targets().values()]
    return [{"name": row.pop("name"), **{key: value for key, value in row.items() if value is not None}} for row in rows]

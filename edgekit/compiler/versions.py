"""Which TensorRT compiles for a target: the one that is installed here, or those of a device's JetPacks."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from edgekit.errors import MissingExtra
from edgekit.targets import JetPack, Target

__all__ = ["listed", "readers", "tensorrt_version"]

#: Distributions that bring the module ``tensorrt_rtx``; asking one for its version costs no import of TensorRT.
_RTX_DISTRIBUTIONS = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")


def tensorrt_version(target: Target) -> str:
    """The version that will compile: installed TensorRT-RTX here, the JetPacks' on a device."""
    if target.kind == "device":
        return listed(target.tensorrt)
    for name in _RTX_DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise MissingExtra("rtx", "tensorrt_rtx")


def listed(entries: Iterable[JetPack]) -> str:
    return ", ".join(f"{entry.tensorrt} ({entry.release})" for entry in entries)


def readers(target: Target, opset: int, untyped: int | None = None, dla: bool = False) -> tuple[tuple[JetPack, ...], list[str]]:
    """(the JetPacks whose TensorRT reads a graph of this opset, a note for each of the others).

    ``untyped``: opset of the graph that a weakly typed TensorRT takes instead. ``dla``: whether one is needed.
    """

    def read(entry: JetPack) -> int:
        return opset if entry.strongly_typed or untyped is None else untyped

    able = tuple(entry for entry in target.tensorrt if read(entry) <= entry.opset and (entry.dla or not dla))
    notes = [
        f"not for {entry.release}: TensorRT {entry.tensorrt} " + _inability(entry, read(entry))
        for entry in target.tensorrt
        if entry not in able
    ]
    return able, notes


def _inability(entry: JetPack, opset: int) -> str:
    if not entry.opset:
        return "is older than the kit's 8.6"
    return f"reads opset {entry.opset} at most, the graph has {opset}" if opset > entry.opset else "has no DLA"

"""What a user states of inputs: ``x:1x3x48x320`` binds axes, ``x:1..8x3x48x320`` gives them ranges, ``axes:0,2`` values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from edgekit.bundle import Bundle
from edgekit.errors import BundleError, UsageError
from edgekit.manifest import TensorSpec, batch_symbol

__all__ = [
    "Axis",
    "Constant",
    "Profiles",
    "assumed_sizes",
    "parse_batch",
    "parse_constants",
    "parse_shapes",
    "profiles_for",
    "shape_text",
    "unstated_sizes",
]

MAX_AXIS = 1 << 24
#: input -> [min, opt, max] shapes, as TensorRT's optimization profile takes them
Profiles = dict[str, list[list[int]]]


class Constant(NamedTuple):
    """The values of an input, in row-major order; ``shape`` is None where only the input says it."""

    values: list[float | int]
    shape: list[int] | None


_AXIS = re.compile(r"^(\d{1,20})(?:\.\.(\d{1,20}))?$", re.ASCII)


class Axis(NamedTuple):
    """An axis from ``low`` to ``high``, both included; fixed where they are equal."""

    low: int
    high: int

    @property
    def fixed(self) -> bool:
        return self.low == self.high

    def __str__(self) -> str:
        return str(self.low) if self.fixed else f"{self.low}..{self.high}"


def _axis(text: str, option: str, whole: str, ranges: bool) -> Axis:
    found = _AXIS.match(text)
    example = f"{option} x:1..8x3x48x320" if ranges else f"{option} x:1x3x48x320"
    if found is None:
        asked = "a size such as 8, or a range such as 1..8," if ranges else "a size such as 8"
        raise UsageError(f"{option} {whole}: {text!r} is not an axis; {asked} was expected", f"write for example {example}")
    low, high = int(found[1]), int(found[2] or found[1])
    if found[2] and not ranges:
        raise UsageError(
            f"{option} {whole}: {text!r} is a range, and {option} fixes sizes",
            f"state ranges by --dynamic {whole}, or one size",
        )
    if low > high:
        raise UsageError(f"{option} {whole}: {text!r} ends below its start", f"write the smaller size first: {high}..{low}")
    if low < 1 or high > MAX_AXIS:
        size = low if low < 1 else high
        raise UsageError(f"{option} {whole}: an axis of {size}; it has 1 to {MAX_AXIS}", f"write for example {example}")
    return Axis(low, high)


def _named(texts: Iterable[str], option: str, example: str) -> Iterator[tuple[str, str, str]]:
    """(name, what is stated of it, the whole text) of each ``NAME:...``, every name once."""
    seen = set()
    for text in texts:
        name, colon, stated = text.rpartition(":")
        if not colon or not name:
            raise UsageError(f"{option} {text!r} has no input name", f"write {option} NAME:{text.lstrip(':') or example}")
        if name in seen:
            raise UsageError(f"{option} states {name} twice", "state each input once")
        seen.add(name)
        yield name, stated, text


def parse_shapes(texts: Iterable[str], option: str = "--shape", ranges: bool = False) -> dict[str, tuple[Axis, ...]]:
    """``NAME:AxBxC`` texts -> name -> axes. ``ranges`` allows ``LOW..HIGH`` axes. A name may hold colons.

    Raises `UsageError` for anything else, and for a name stated twice.
    """
    return {
        name: tuple(_axis(part, option, text, ranges) for part in shape.split("x"))
        for name, shape, text in _named(texts, option, "1x3x48x320")
    }


def parse_constants(texts: Iterable[str]) -> dict[str, Constant]:
    """``NAME:V,V`` texts -> name -> numbers; ``NAME:`` is an input without elements. A name may hold colons.

    Raises `UsageError` for anything else, and for a name stated twice.
    """
    return {
        name: Constant([_number(part.strip(), text) for part in values.split(",") if values.strip()], None)
        for name, values, text in _named(texts, "--constant", "0,2")
    }


def _number(text: str, whole: str) -> float | int:
    if text.lower() in ("true", "false"):
        return int(text.lower() == "true")
    if re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        return int(text)
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        raise UsageError(f"--constant {whole}: {text!r} is not a number", "write for example --constant axes:0,2")
    return float(text)


def parse_batch(batch: int | str | None) -> Axis | None:
    """``4`` -> exactly 4 samples at once; ``1..8`` -> one engine for 1 to 8, fastest at 8."""
    if batch is None:
        return None
    text = str(batch)
    try:
        return _axis(text, "--batch", text, ranges=True)
    except UsageError as error:
        message = error.message.replace(f"--batch {text}: {text!r}", f"--batch {text!r}")
        raise UsageError(message, error.hint.replace("x:1..8x3x48x320", "4, or --batch 1..8")) from None


def shape_text(axes: Iterable[object]) -> str:
    return "x".join(map(str, axes))


def _stated_ranges(bundle: Bundle) -> dict[str, Axis]:
    """Axis symbol -> range, from the import that made the bundle (or its ancestor)."""
    entry = bundle.last("import")
    stated = entry.config.get("dynamic") if entry else None
    if not isinstance(stated, Mapping):
        return {}
    ranges = parse_shapes([f"{name}:{shape}" for name, shape in stated.items()], "--dynamic", ranges=True)
    symbols = {spec.name: spec.shape for spec in bundle.manifest.inputs}
    return {
        symbol: axis
        for name, axes in ranges.items()
        for symbol, axis in zip(symbols.get(name, ()), axes, strict=False)
        if isinstance(symbol, str)
    }


def assumed_sizes(bundle: Bundle) -> dict[str, int]:
    """Axis symbol -> the size at which the import found that the graph runs, for those that nobody stated; not the batch."""
    entry = bundle.last("import")
    found = entry.figures.get("sizes") if entry else None
    if not isinstance(found, Mapping):
        return {}
    stated = _stated_ranges(bundle)
    axes = {axis for spec in bundle.manifest.inputs for axis in spec.shape[1:]}
    sizes = {name: size for name, size in found.items() if name in axes - {batch_symbol(bundle.manifest.inputs)} - set(stated)}
    if not all(type(size) is int and 1 <= size <= MAX_AXIS for size in sizes.values()):
        raise BundleError(f"{bundle.path}: its history states sizes that no axis has: {sizes}"[:300], "import the model again")
    return sizes


def unstated_sizes(bundle: Bundle, profiles: Profiles) -> dict[str, int]:
    """Axis symbol -> the only size that a profile has for it although nobody stated it; not the batch."""
    stated, batch = _stated_ranges(bundle), batch_symbol(bundle.manifest.inputs)
    return {
        symbol: profiles[spec.name][2][index]
        for spec in bundle.manifest.inputs
        for index, symbol in enumerate(spec.shape)
        if isinstance(symbol, str) and symbol not in stated and symbol != batch and spec.name in profiles
    }


def profiles_for(bundle: Bundle, batch: int | str | None = None) -> Profiles:
    """The optimization profile of a bundle's graph: empty where every axis is fixed.

    The first dynamic first axis is the batch: ``batch`` if given, else the range stated at import, else 1. Other dynamic axes
    have the range from the import, else 1 where they are first ones, too, else the one size at which its golden outputs were
    made (`assumed_sizes`). The fastest
    (opt) shape is the largest: a device's worst case is what it must bear. Raises `UsageError` for an axis of which nothing
    is known, and for a batch that the graph cannot take.
    """
    wanted, stated = parse_batch(batch), _stated_ranges(bundle)
    stated |= {symbol: Axis(size, size) for symbol, size in assumed_sizes(bundle).items()}
    first = batch_symbol(bundle.manifest.inputs)
    if wanted and first is None:
        fixed = {spec.shape[0] for spec in bundle.manifest.inputs if spec.shape}
        if fixed != {wanted.low} or not wanted.fixed:
            raise UsageError(
                f"--batch {wanted}: the graph's batch is fixed at {', '.join(map(str, sorted(fixed, key=str)))}",
                "import it with --dynamic, or leave --batch out",
            )
    if wanted and first in stated and not stated[first].low <= wanted.low <= wanted.high <= stated[first].high:
        raise UsageError(
            f"--batch {wanted} lies outside {stated[first]}, stated at import", "import again with a wider --dynamic"
        )
    found: Profiles = {}
    for spec in bundle.manifest.inputs:
        axes = [_profile_axis(spec, index, wanted, first, stated) for index in range(len(spec.shape))]
        if any(isinstance(axis, str) for axis in spec.shape):
            high = [axis.high for axis in axes]
            found[spec.name] = [[axis.low for axis in axes], high, list(high)]
    return found


def _profile_axis(spec: TensorSpec, index: int, batch: Axis | None, first: object, stated: Mapping[str, Axis]) -> Axis:
    axis = spec.shape[index]
    if isinstance(axis, int):
        return Axis(axis, axis)
    if batch and axis == first:
        return batch
    if axis in stated:
        return stated[axis]
    if index == 0 or axis == first:
        return Axis(1, 1)
    shape = shape_text(spec.shape)
    raise UsageError(
        f"input {spec.name} ({shape}) has the dynamic axis {axis!r} without a range",
        f"import it with --shape {spec.name}:SIZES or --dynamic {spec.name}:RANGES",
    )

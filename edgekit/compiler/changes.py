"""Two builds for one target compared: what of their inputs differs, and where the inputs are the same, whether the bytes do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .shapes import Axis, shape_text

__all__ = ["changes", "difference"]

_OPTIONS = ("workspace_mb", "dla", "compatible", "timing_cache", "verbose", "uint8_input")
_DIGEST = 8  # characters of one that are shown


def changes(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    """What decided the two builds (``decided_by`` of their records), compared: one line for each difference."""
    if not before:
        return ["the earlier build is of an edgekit that did not write down what decided it"]
    found = [
        f"{words} {before.get(key)} -> {after[key]}"
        for key, words in (("tensorrt", "TensorRT"), ("edgekit", "edgekit"), ("recipe", "recipe"), ("requested", "--precision"))
        if before.get(key) != after[key]
    ]
    found += _of_mapping(before.get("sources", {}), after["sources"], "", _digest)
    found += _of_mapping(before.get("profiles", {}), after["profiles"], "profile of ", _profile)
    options: tuple[dict[str, Any], ...] = tuple(
        {f"--{name.replace('_', '-')}": side["options"][name] for name in _OPTIONS if name in side.get("options", {})}
        for side in (before, after)
    )
    found += _of_mapping(options[0], options[1], "", _option)
    whole = {"script": "the kit's script", "golden": "golden outputs' tolerances", "target": "the target's description"}
    if before.get("frames") and after.get("frames"):
        whole["frames"] = "the normalisation inside"
    return found + [f"{words} changed" for key, words in whole.items() if before.get(key) != after[key]]


def _of_mapping(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str, words: Any) -> list[str]:
    names = sorted({*before, *after})
    return [
        f"{prefix}{name} {words(before.get(name))} -> {words(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _digest(value: str | None) -> str:
    return "none" if value is None else value[:_DIGEST]


def _option(value: Any) -> str:
    return _digest(value) if isinstance(value, str) and len(value) == 64 else "none" if value is None else str(value)


def _profile(shapes: list[list[int]] | None) -> str:
    """``1..8x3x32x32``"""
    return "fixed" if shapes is None else shape_text(Axis(low, high) for low, high in zip(shapes[0], shapes[2], strict=True))


def difference(before: bytes, after: bytes, *, same_graph: bool) -> str:
    """How two engines from the same inputs differ, and at which step; empty where they are the same."""
    if before == after:
        return ""
    import numpy as np  # an engine has hundreds of megabytes; a build that is not compared needs no numpy

    common = min(len(before), len(after))
    places = np.flatnonzero(np.frombuffer(before, np.uint8, common) != np.frombuffer(after, np.uint8, common))
    differing = len(places) + abs(len(before) - len(after))
    first = int(places[0]) if len(places) else common
    step = "TensorRT compiled one graph to other bytes" if same_graph else "edgekit wrote another typed graph"
    return (
        f"the same inputs gave another result: {step}; {differing} of {max(len(before), len(after))} bytes differ, "
        f"the first at {first}"
    )

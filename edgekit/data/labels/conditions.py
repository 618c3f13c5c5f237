"""Splits and classes of the synthetic labels by name, for modules that must not load Pillow."""

from __future__ import annotations

from typing import Literal

__all__ = ["CLASSES", "CONDITIONS", "Condition", "condition_of"]

#: ``mixed`` is the train split: a part of it clean, the rest degraded by degrees.
Condition = Literal["clean", "degraded", "mixed"]
#: The halves of a test split.
CONDITIONS: tuple[Condition, ...] = ("clean", "degraded")
#: Handling marks, and labels without one.
CLASSES = ("fragile", "this-side-up", "keep-dry", "heavy", "hazard-lithium", "plain")


def condition_of(key: str) -> Condition:
    """By the id of a sample: ``labels/lines/clean/00012`` is clean."""
    part = key.split("/")[2]
    return "clean" if part == "clean" else "degraded" if part == "degraded" else "mixed"

"""A preset made narrower or wider: the arguments that say its channels, times a factor (MobileNets, arXiv:1704.04861, 3.3)."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

from edgekit.errors import UsageError

from . import PRESETS, preset_named

__all__ = ["scaled", "widens"]

#: What presets call their channels; ``width`` too, of those that take no picture, whose width it would be.
_CHANNELS = ("widths", "head", "hidden", "dim")


def widens(name: str) -> bool:
    """Whether the model called ``name`` has channels that `scaled` can change."""
    return name in PRESETS and bool(_channels(name))


def scaled(name: str, width: float) -> dict[str, Any]:
    """Arguments that give the preset ``name`` ``width`` times its channels, in multiples of 8, for `ModelConfig.args`.

    Where channels are split into heads they stay a multiple of those too. Empty for ``width`` 1.
    Raises `UsageError` for a model whose channels are not ours to change, or a factor outside 0.1 to 4.
    """
    if width == 1:
        return {}
    if not isinstance(width, int | float) or not 0.1 <= width <= 4:
        raise UsageError(f"a model {width!r} times as wide", "wanted: --width 0.1 to 4")
    if not widens(name):
        able = ", ".join(preset for preset in PRESETS if _channels(preset))
        raise UsageError(f"the model {name} has one width", f"leave --width out, or choose one of: {able}")
    parameters = _parameters(name)
    step = math.lcm(8, int(parameters.get("heads", 1)))
    return {
        key: tuple(_times(value, width, step) for value in given) if isinstance(given, Sequence) else _times(given, width, step)
        for key, given in _channels(name).items()
    }


def _times(value: int, width: float, step: int) -> int:
    return max(step, math.floor(value * width / step + 0.5) * step)


def _channels(name: str) -> dict[str, Any]:
    """The arguments that say how wide the preset is, as they are without a factor; those of 0 are layers that it lacks."""
    parameters = _parameters(name)
    names = _CHANNELS if "height" in parameters else (*_CHANNELS, "width")
    return {key: parameters[key] for key in names if parameters.get(key)}


def _parameters(name: str) -> dict[str, Any]:
    """Every argument of the preset with what it is where nothing is stated."""
    preset = preset_named(name)
    module, _, home = preset.home.partition(":")
    signature = inspect.signature(getattr(importlib.import_module(module), home))
    defaults = {key: p.default for key, p in signature.parameters.items() if p.default is not p.empty}
    return {**defaults, **preset.args}

"""Presets by name, in a plain dict. A new preset is a class in its family's file and a line here; torch loads on first use.

Every preset is an `nn.Module` made from ``(classes, channels, height, width, **args)``.
"""

from __future__ import annotations

from typing import NamedTuple

from edgekit.errors import UsageError

__all__ = ["DEFAULT", "PRESETS", "Preset", "preset_named"]


class Preset(NamedTuple):
    """``home`` is ``module:Class``; ``lr`` the peak learning rate that suits it (AdamW, batch 128)."""

    home: str
    summary: str
    lr: float


PRESETS: dict[str, Preset] = {
    "textbook": Preset("edgekit.models.cnn:Textbook", "Conv 32 - Conv 64 - Conv 64 - Dense 64, for 28x28 and near", 2e-3),
    "depthwise": Preset("edgekit.models.cnn:Depthwise", "compact depthwise-separable residual net, 28 px and up", 5e-3),
}
DEFAULT = "depthwise"


def preset_named(name: str) -> Preset:
    """The preset called ``name``. Raises `UsageError` that lists all."""
    if name not in PRESETS:
        known = "; ".join(f"{key}: {preset.summary}" for key, preset in PRESETS.items())
        raise UsageError(f"there is no model {name!r}", f"choose one of: {known}")
    return PRESETS[name]

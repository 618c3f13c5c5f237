"""The ranges that calibration saw, from a quantized bundle's ``calibration.json``."""

from __future__ import annotations

import msgspec

from edgekit.bundle import CALIBRATION, Bundle
from edgekit.errors import BundleError

__all__ = ["Range", "calibrated"]


class Range(msgspec.Struct, frozen=True):
    """The smallest and the largest value of a tensor over all calibration samples."""

    minimum: float
    maximum: float


class _Calibration(msgspec.Struct, frozen=True):
    """Of all that quantization records, what is read here. ``groups``: a tensor -> the one whose range is recorded for it."""

    tensors: dict[str, Range] = {}
    groups: dict[str, str] = {}


def calibrated(bundle: Bundle) -> dict[str, Range]:
    """By tensor name; empty for a bundle that was not calibrated. Raises `BundleError` for a damaged record."""
    if not bundle.has(CALIBRATION):
        return {}
    try:
        found = msgspec.json.decode(bundle.read(CALIBRATION), type=_Calibration)
    except msgspec.DecodeError as error:
        raise BundleError(f"{bundle.path / CALIBRATION} is no calibration: {error}", "quantize the bundle again") from None
    shared = {name: found.tensors[first] for name, first in found.groups.items() if first in found.tensors}
    return {**shared, **found.tensors}

"""Augmentation on batches of preprocessed tensors, by policy: what may happen to a picture without changing its class.

Digits, letters and signs are never mirrored; photos may be. Random affine warps follow Simard et al. (ICDAR 2003).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgekit.errors import MissingExtra, UsageError

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError:
    raise MissingExtra("train", "torch") from None

__all__ = ["POLICIES", "Policy", "augment"]


@dataclass(frozen=True)
class Policy:
    """Largest changes. ``rotation`` in degrees, ``scale`` and ``shift`` as shares, ``shear`` as a slope,
    ``light`` and ``contrast`` in units of the preprocessed tensor."""

    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    shear: float = 0.0
    mirror: bool = False
    light: float = 0.0
    contrast: float = 0.0


POLICIES: dict[str, Policy] = {
    "none": Policy(),
    "digits": Policy(rotation=15, scale=0.12, shift=0.15, shear=0.2),
    "photos": Policy(rotation=10, scale=0.25, shift=0.12, shear=0.1, mirror=True, light=0.3, contrast=0.3),
}


def augment(x: Tensor, policy: str, generator: torch.Generator) -> Tensor:
    """float32 (N, C, H, W) -> the same shape, each picture changed on its own. Raises `UsageError` for an unknown policy."""
    if policy not in POLICIES:
        raise UsageError(f"there is no augmentation {policy!r}", f"choose one of: {', '.join(POLICIES)}")
    p = POLICIES[policy]
    if p == Policy():
        return x
    count = len(x)

    def uniform(size: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * size

    angle, shear = uniform(math.radians(p.rotation)), uniform(p.shear)
    wide, tall = 1 + uniform(p.scale), 1 + uniform(p.scale)
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0) if p.mirror else torch.ones(count)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * wide * flip, (shear * cos - sin) * tall, uniform(p.shift)], 1),
        torch.stack([sin * wide * flip, (shear * sin + cos) * tall, uniform(p.shift)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)  # (N, H, W, 2)
    if p.mirror:  # photos have no background to pad with: reflect
        x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    else:  # grid_sample pads with 0: make the darkest value 0 first
        floor = x.amin((1, 2, 3), keepdim=True)
        x = F.grid_sample(x - floor, grid, align_corners=False) + floor
    if p.light or p.contrast:
        gain = (1 + uniform(p.contrast)).view(-1, 1, 1, 1)
        x = x * gain + uniform(p.light).view(-1, 1, 1, 1)
    return x

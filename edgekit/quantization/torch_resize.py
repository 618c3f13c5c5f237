"""Resize of ONNX in PyTorch: nearest by an index, linear by a matrix, both from the coordinates of the ONNX reference.

In float32, as ONNX Runtime computes them: a coordinate beside a whole number decides which neighbour is taken.
"""

from __future__ import annotations

from edgekit.errors import MissingExtra

from .torch_operators import Call

try:
    import torch
    from torch import Tensor
except ImportError:
    raise MissingExtra("train", "torch") from None

__all__ = ["resize"]

_TIE = 1e-6  # ONNX Runtime takes what is this near to the middle of two places as in the middle


def resize(
    call: Call, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Modes nearest and linear; the coordinates of `_source`. Refuses cubic, antialias and regions of interest."""
    wanted = None if sizes is None or not sizes.numel() else [int(v) for v in sizes.tolist()]
    axes = call.get("axes", None) or list(range(x.ndim))
    where = call.get("coordinate_transformation_mode", "half_pixel")
    if (
        call.get("antialias", 0)
        or call.get("keep_aspect_ratio_policy", "stretch") != "stretch"
        or where == "tf_crop_and_resize"
    ):
        raise call.refuse("antialias, a kept aspect ratio or a region of interest")
    sizes_in = torch.tensor([x.shape[axis] for axis in axes], dtype=torch.float32)
    if wanted is not None:
        factors = torch.tensor(wanted, dtype=torch.float32) / sizes_in
    elif scales is not None:
        factors = scales.cpu()
        wanted = (sizes_in * factors).long().tolist()
    else:
        raise call.refuse("neither scales nor sizes")
    mode = call.get("mode", "nearest")
    if mode not in ("linear", "nearest") or (mode == "linear" and not x.is_floating_point()):
        raise call.refuse(f"mode {mode!r} of {str(x.dtype).removeprefix('torch.')}")
    for axis, target, factor in zip(axes, wanted, factors, strict=True):
        if factor != 1:
            places = _source(call, where, x.shape[axis], target, factor)
            x = _between(x, axis, places) if mode == "linear" else _nearest(call, x, axis, places)
    return x


def _source(call: Call, where: str, size: int, target: int, factor: Tensor) -> Tensor:
    """Where each output position lies in the input, float32 (target,)."""
    place = torch.arange(target, dtype=torch.float32)
    if where == "asymmetric":
        return place / factor
    if where == "align_corners":
        return place * (size - 1) / max(target - 1, 1)
    if where == "half_pixel" or (where == "pytorch_half_pixel" and target > 1):
        return (place + 0.5) / factor - 0.5
    if where == "pytorch_half_pixel":
        return place * 0
    raise call.refuse(f"coordinate_transformation_mode {where!r}")


def _nearest(call: Call, x: Tensor, axis: int, places: Tensor) -> Tensor:
    half = 0.5 + _TIE
    rounded = {
        "floor": torch.floor(places),
        "ceil": torch.ceil(places),
        "round_prefer_floor": torch.ceil(places.double() - half),
        "round_prefer_ceil": torch.floor(places.double() + half),
    }[call.get("nearest_mode", "round_prefer_floor")]
    return x.index_select(axis, rounded.long().clamp(0, x.shape[axis] - 1).to(x.device))


def _between(x: Tensor, axis: int, places: Tensor) -> Tensor:
    """Weighs the two neighbours of each place along one axis; torch's interpolation knows fewer coordinates and shapes."""
    size = x.shape[axis]
    away = places.clamp(0, size - 1)[:, None] - torch.arange(size)
    weights = (1 - away.abs()).clamp(min=0).to(x)  # (target, size)
    return (x.movedim(axis, -1) @ weights.T).movedim(-1, axis)

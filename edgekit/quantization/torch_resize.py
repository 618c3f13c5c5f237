"""Resize of ONNX in PyTorch: nearest by its index formula, linear where torch's interpolation is the same."""

from __future__ import annotations

from edgekit.errors import MissingExtra

from .torch_operators import Call

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError:
    raise MissingExtra("train", "torch") from None

__all__ = ["resize"]

_MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}


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
    if wanted is not None:
        factors = [size / x.shape[axis] for size, axis in zip(wanted, axes, strict=True)]
    elif scales is not None:
        factors = scales.tolist()
    else:
        raise call.refuse("neither scales nor sizes")
    target = list(x.shape)
    for i, axis in enumerate(axes):
        target[axis] = wanted[i] if wanted else int(x.shape[axis] * factors[i])
    if call.get("mode", "nearest") == "linear":
        return _linear(call, x, target, where)
    if call.get("mode", "nearest") != "nearest":
        raise call.refuse(f"mode {call.get('mode', '')!r}")
    for factor, axis in zip(factors, axes, strict=True):
        if target[axis] != x.shape[axis]:
            places = _source(call, where, x.shape[axis], target[axis], factor)
            x = x.index_select(axis, _rounded(call, places).clamp(0, x.shape[axis] - 1).to(x.device))
    return x


def _source(call: Call, where: str, size: int, target: int, factor: float) -> Tensor:
    """Where each output position lies in the input, float64 (target,)."""
    place = torch.arange(target, dtype=torch.float64)
    if where == "asymmetric":
        return place / factor
    if where == "align_corners":
        return place * (size - 1) / max(target - 1, 1)
    if where == "half_pixel" or (where == "pytorch_half_pixel" and target > 1):
        return (place + 0.5) / factor - 0.5
    if where == "pytorch_half_pixel":
        return place * 0
    raise call.refuse(f"coordinate_transformation_mode {where!r}")


def _rounded(call: Call, places: Tensor) -> Tensor:
    mode = call.get("nearest_mode", "round_prefer_floor")
    found = {
        "floor": torch.floor(places),
        "ceil": torch.ceil(places),
        "round_prefer_floor": torch.ceil(places - 0.5),
        "round_prefer_ceil": torch.floor(places + 0.5),
    }
    return found[mode].to(torch.int64)


def _linear(call: Call, x: Tensor, target: list[int], where: str) -> Tensor:
    if list(x.shape[:2]) != target[:2] or where not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise call.refuse(f"linear mode and coordinate_transformation_mode {where!r}")
    return F.interpolate(x, target[2:], mode=_MODES[x.ndim], align_corners=where == "align_corners")

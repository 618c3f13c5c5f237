"""Grad-CAM: the last feature maps, weighted by their gradients (Selvaraju et al. 2017, arXiv:1610.02391)."""

from __future__ import annotations

import numpy as np

from edgekit.errors import MissingExtra, UsageError
from edgekit.models.module import load

from .question import Attribution, Question

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError as error:
    raise MissingExtra("train", error.name or "torch") from None

__all__ = ["attribute"]

#: What is coarser than the maps before it and says no more.
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def attribute(question: Question) -> Attribution:
    """Heat (never below 0) from the last feature maps of the bundle's PyTorch weights with more than one pixel.

    Of a residual net that is what its last block puts out, the branch and the shortcut together: the last convolution that
    runs may be either alone. Raises `UsageError` where the model has none, or makes tokens of them: then they are what the
    model begins with, not what it ends with.
    """
    module = load(question.model.bundle)
    maps: list[tuple[str, Tensor]] = []
    tokens: list[str] = []

    def keep(name: str, layer: nn.Module, output: object) -> None:
        if maps and isinstance(layer, nn.LayerNorm) and isinstance(output, Tensor) and output.ndim == 3:
            tokens[:] = [name]
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2] * output.shape[3] == 1:
            return
        if not isinstance(layer, POOLS) and not (maps and maps[-1][1] is output):  # a container answers what its last part did
            maps[:] = [(name, output)]
            tokens.clear()

    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: keep(name, layer, output))
        for name, layer in module.named_modules()
    ]
    try:
        x = torch.from_numpy(question.x).requires_grad_()
        logits = module(x)
    finally:
        for handle in handles:
            handle.remove()
    if not maps:
        raise UsageError("the model has no feature maps of more than one pixel", "use --method occlusion")
    ((layer, features),) = maps
    if tokens:
        raise UsageError(f"behind {layer} the model works on tokens, not on feature maps", "use --method rollout or occlusion")
    (gradient,) = torch.autograd.grad(logits[0, question.target], features)
    cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()  # (1, 1, h, w)
    heat = functional.interpolate(cam, question.size, mode="bilinear")[0, 0]
    figures = {"layer": layer, "map": list(features.shape[2:])}
    return Attribution(heat.detach().numpy().astype(np.float32), figures)

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


def attribute(question: Question) -> Attribution:
    """Heat (never below 0): the last convolution with more than one output pixel, of the bundle's PyTorch weights."""
    module = load(question.model.bundle)
    maps: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        if output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            maps.pop(name, None)
            maps[name] = output  # a dict keeps order: the last entry ran last

    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    try:
        x = torch.from_numpy(question.x).requires_grad_()
        logits = module(x)
    finally:
        for handle in handles:
            handle.remove()
    if not maps:
        raise UsageError("the model has no convolution with feature maps", "use --method occlusion")
    layer, features = list(maps.items())[-1]
    (gradient,) = torch.autograd.grad(logits[0, question.target], features)
    cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()  # (1, 1, h, w)
    heat = functional.interpolate(cam, question.size, mode="bilinear")[0, 0]
    figures = {"layer": layer, "map": list(features.shape[2:])}
    return Attribution(heat.detach().numpy().astype(np.float32), figures)

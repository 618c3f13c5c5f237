"""2:4 structured sparsity: in every four consecutive input channels two weights are zero (NVIDIA Ampere and later).

Magnitude masks, kept through fine-tuning (Mishra et al., arXiv:2104.08378). TensorRT uses the pattern where
``SPARSE_WEIGHTS`` is set and the layer is bound by arithmetic; ONNX Runtime gains nothing from it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Mask24", "is_24"]


def is_24(weight: Tensor) -> bool:
    """Whether (O, I, ...) has at least two zeros in every four consecutive input channels."""
    if weight.shape[1] % 4:
        return False
    fours = weight.movedim(1, -1).reshape(-1, 4)
    return bool(((fours == 0).sum(1) >= 2).all())


class Mask24:
    """Masks for every dense convolution and linear layer whose input channels divide by four; call it to apply them."""

    def __init__(self, module: nn.Module) -> None:
        self.layers: list[tuple[str, Tensor, Tensor]] = []
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and getattr(layer, "groups", 1) == 1 and layer.weight.shape[1] % 4 == 0:
                self.layers.append((name, layer.weight, _mask(layer.weight.detach())))

    @torch.no_grad()
    def __call__(self) -> None:
        """Zero what the masks say, in place."""
        for _, weight, mask in self.layers:
            weight.mul_(mask.to(weight.device))

    @property
    def share(self) -> float:
        """Share of the masked layers' weights that are zero."""
        total = sum(weight.numel() for _, weight, _ in self.layers)
        zeros = sum(int((mask == 0).sum()) for _, _, mask in self.layers)
        return zeros / total if total else 0.0


def _mask(weight: Tensor) -> Tensor:
    """1 for the two largest of every four along the input channels, else 0; shape of ``weight``."""
    last = weight.abs().movedim(1, -1)
    fours = last.reshape(-1, 4)
    mask = torch.zeros_like(fours).scatter_(1, fours.topk(2, dim=1).indices, 1.0)
    return mask.reshape(last.shape).movedim(-1, 1).contiguous()

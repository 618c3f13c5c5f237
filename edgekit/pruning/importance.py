"""How much a channel matters: a number for every weight, summed over the slices that go with the channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.errors import UsageError

from .network import ByReaders

__all__ = ["CRITERIA", "Importance", "importance_named"]

#: (module, samples, targets) -> name in the state -> importance, of the parameter's shape.
Importance = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
_TIE = 1e-9  # of the magnitude, where a criterion says nothing of a channel


def magnitude(module: nn.Module, samples: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Squares of the weights: the group's L2 norm (DepGraph, arXiv:2301.12900)."""
    return {name: weight.detach().square() for name, weight in module.named_parameters()}


def taylor(module: nn.Module, samples: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Squares of weight times gradient: what the loss changes by, to first order (Molchanov et al., arXiv:1906.10771).

    The loss is the cross-entropy of ``targets`` (N,), or of the model's own answers where a line is read.
    """
    module.zero_grad()
    # cuDNN takes no gradients of a recurrence in eval mode.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        logits = module(samples).flatten(0, -2)
        wanted = targets if len(targets) == len(logits) and targets.ndim == 1 else logits.argmax(1)
        torch.nn.functional.cross_entropy(logits, wanted).backward()  # type: ignore[no-untyped-call]
    found = {
        name: (weight.detach() * weight.grad).square() if weight.grad is not None else torch.zeros_like(weight)
        for name, weight in module.named_parameters()
    }
    module.zero_grad()
    return found


def norm_scale(module: nn.Module, samples: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Squares of the norms' scales (network slimming, Liu et al., arXiv:1708.06519); elsewhere the magnitude."""
    found = {name: value * _TIE for name, value in magnitude(module, samples, targets).items()}
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm) and weight is not None:
            found[f"{name}.weight" if name else "weight"] = weight.detach().square()
    return found


def activation(module: nn.Module, samples: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Squares of weight times its input's root mean square (Wanda, Sun et al., arXiv:2306.11695): a channel matters by what
    the layers that read it make of it. What the upper layers of a recurrence read is not seen, and counts as 1."""
    found = ByReaders({name: value * _TIE for name, value in magnitude(module, samples, targets).items()})
    hooks = []

    def watch(name: str, layer: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            scaled = {"weight": args[0]} if not isinstance(layer, nn.RNNBase) else _read_by(layer, args[0])
            for key, read in scaled.items():
                weight: Tensor = getattr(layer, key).detach().square()
                if isinstance(layer, nn.modules.conv._ConvNd) and read is not None:
                    if layer.groups > 1:
                        return
                    power = read.detach().square().transpose(0, 1).flatten(1).mean(1)
                    shape = [1] * weight.ndim
                    shape[0 if layer.transposed else 1] = -1
                    weight = weight * power.reshape(shape)
                elif read is not None:
                    weight = weight * read.detach().square().flatten(0, -2).mean(0)
                found[f"{name}.{key}" if name else key] = weight

        return hook

    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear | nn.RNNBase):
            hooks.append(layer.register_forward_hook(watch(name, layer)))
    with torch.no_grad():
        module(samples)
    for handle in hooks:
        handle.remove()
    return found


def _read_by(layer: nn.RNNBase, x: Tensor) -> dict[str, Tensor | None]:
    """Weights that read a recurrence's input, with it; those of its upper layers with None."""
    names = [name for name, _ in layer.named_parameters() if name.startswith("weight_ih")]
    return {name: x if name.startswith("weight_ih_l0") else None for name in names}


CRITERIA: dict[str, Importance] = {
    "activation": activation,
    "magnitude": magnitude,
    "norm-scale": norm_scale,
    "taylor": taylor,
}


def importance_named(name: str) -> Importance:
    """The criterion called ``name``. Raises `UsageError` that lists all."""
    if name not in CRITERIA:
        raise UsageError(f"there is no importance {name!r}", f"choose one of: {', '.join(CRITERIA)}")
    return CRITERIA[name]

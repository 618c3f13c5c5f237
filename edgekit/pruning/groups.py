"""Which channels must go together, and removing them: the one file that knows Torch-Pruning.

A group is every layer that shares one set of channels: a convolution, its batch norm, the depthwise convolution after
it, all branches of a residual sum (DepGraph, Fang et al., arXiv:2301.12900).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from edgekit.errors import GraphError, MissingExtra

try:
    import torch
    import torch_pruning as tp
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtra("train", error.name or "torch_pruning") from None

__all__ = ["Group", "groups_of", "remove_channels"]


@dataclass(frozen=True)
class Group:
    """``root`` names the layer that stands for the group; ``layers`` all of them; ``ranking`` channels, weakest first."""

    root: str
    width: int
    layers: tuple[str, ...]
    ranking: tuple[int, ...]


def groups_of(module: nn.Module, example: Tensor, keep: frozenset[str] = frozenset()) -> list[Group]:
    """The prunable groups, ranked by the L2 norm of all weights that go with a channel. ``keep`` names layers to leave.

    Raises `GraphError` where the module cannot be traced.
    """
    graph = _graph(module, example)
    names = {layer: name for name, layer in module.named_modules()}
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    ignored = [layer for layer, name in names.items() if name in keep]
    found = []
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=[nn.Conv2d, nn.Linear]):
        root, _, _ = str(group[0].dep.target.name).partition(" ")
        scores = importance(group)
        layers = dict.fromkeys(names[dep.target.module] for dep, _ in group if dep.target.module in names)
        found.append(Group(root, len(scores), tuple(layers), tuple(torch.argsort(scores).tolist())))
    return found


def remove_channels(module: nn.Module, example: Tensor, root: str, channels: list[int]) -> None:
    """Remove output channels of the layer ``root``, and all that depends on them, in place."""
    graph = _graph(module, example)
    layer = module.get_submodule(root)
    group = graph.get_pruning_group(layer, _remover(layer), idxs=channels)
    if not graph.check_pruning_group(group):
        raise GraphError(f"removing {len(channels)} channels of {root} would leave none", "prune less: raise --keep")
    group.prune()


def _remover(layer: nn.Module) -> Any:
    if isinstance(layer, nn.Linear):
        return tp.prune_linear_out_channels
    return tp.prune_depthwise_conv_out_channels if getattr(layer, "groups", 1) > 1 else tp.prune_conv_out_channels


def _graph(module: nn.Module, example: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return tp.DependencyGraph().build_dependency(module, example_inputs=example)
        except Exception as error:  # noqa: BLE001  tracing raises anything
            reason = str(error).strip().splitlines()[0]
            raise GraphError(f"the model cannot be traced: {reason}", "avoid data-dependent branches in forward()") from None

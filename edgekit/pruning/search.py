"""Where to cut: one step removes the weakest ``unit`` channels of the group that loses least for the work it saves.

The loss of a step is measured, not guessed: how far the KL divergence of the answers from the original's grows on
training samples, batch norms re-estimated first (without that a small cut looks like ruin), over the MACs saved.
Widths end on multiples of ``unit``, because a width beside them costs as much as the next multiple (blocked layouts on
the CPU, tensor cores on the GPU).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekit.models.module import macs as macs_of

from .groups import Group, groups_of, remove_channels

__all__ = ["Step", "cut_path"]


class Step(NamedTuple):
    """The model after a cut: ``root`` went from ``before`` to ``after`` channels; ``macs`` of one sample; measured KL."""

    module: nn.Module
    macs: int
    root: str
    before: int
    after: int
    kl: float


class _Trial(NamedTuple):
    module: nn.Module
    macs: int
    kl: float
    growth: float  # of the KL over the model it was cut from
    saved: int  # MACs, likewise
    after: int


def cut_path(
    module: nn.Module, samples: Tensor, keep: frozenset[str], budget: int | None = None, unit: int = 16
) -> Iterator[Step]:
    """Yield ever smaller copies of ``module``, one cut each, until ``budget`` MACs, or until no group can be cut.

    ``samples`` float32 (N, C, H, W) from the training split. ``keep`` names layers whose outputs must stay (the classifier).
    """
    module = module.eval()
    with torch.no_grad():
        reference = F.log_softmax(module(samples), 1)
    macs, kl = macs_of(module, samples), 0.0
    trials: dict[str, _Trial | None] = {}
    while budget is None or macs > budget:
        groups = groups_of(module, samples[:2], keep)
        trials = {
            group.root: trials[group.root] if group.root in trials else _try(module, macs, group, samples, reference, unit, kl)
            for group in groups
        }
        usable = {root: trial for root, trial in trials.items() if trial is not None}
        if not usable:
            return
        widths = {group.root: group.width for group in groups}
        needed = macs - budget if budget is not None else macs  # what a cut saves beyond the budget is worth nothing
        root = min(usable, key=lambda r: usable[r].growth / min(usable[r].saved, needed))
        # A cached trial was measured on an earlier model: the chosen cut is made again on this one.
        chosen = _try(module, macs, next(g for g in groups if g.root == root), samples, reference, unit, kl)
        assert chosen is not None
        module, macs, kl = chosen.module, chosen.macs, chosen.kl
        yield Step(module, macs, root, widths[root], chosen.after, chosen.kl)
        del trials[root]


def _try(
    module: nn.Module, macs_now: int, group: Group, samples: Tensor, reference: Tensor, unit: int, kl_now: float
) -> _Trial | None:
    """Cut a group to the next multiple of ``unit`` in a copy; None where it has no channels to spare."""
    after = (group.width - 1) // unit * unit
    if after < unit:
        return None
    trial = copy.deepcopy(module)
    remove_channels(trial, samples[:2], group.root, sorted(group.ranking[: group.width - after]))
    _estimate_norms(trial, samples)
    with torch.no_grad():
        answers = F.log_softmax(trial(samples), 1)
    kl = float(F.kl_div(answers, reference, reduction="batchmean", log_target=True))
    macs = macs_of(trial, samples)
    return _Trial(trial, macs, kl, max(kl - kl_now, 0.0), max(macs_now - macs, 1), after)


def _estimate_norms(module: nn.Module, samples: Tensor) -> None:
    """Batch norms take mean and variance from ``samples``, in place; the module ends in eval mode."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.train()
        layer.momentum = 1.0
    with torch.no_grad():
        module(samples)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    module.eval()

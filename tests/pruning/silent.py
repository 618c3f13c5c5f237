"""The network that a cut is held against: the same, with the channels at zero."""

from __future__ import annotations

import copy

from torch import nn

from edgekit.pruning.groups import Channel, Network

__all__ = ["silenced"]


def silenced(network: Network, channels: list[Channel]) -> nn.Module:
    module = copy.deepcopy(network.module)
    state = module.state_dict()
    for channel in channels:
        for (name, axis), index in channel.slices.items():
            state[name].index_fill_(axis, index, 0)
    return module

"""Groups of channels that can be removed, and removing them.

A channel is every slice of every parameter that goes with it: a convolution's filter, its batch norm's numbers, the columns
of all layers that read it. A group's channels are alike and may be chosen among; in a group of several rows (the two
directions of a recurrence, the heads of an attention) every row loses as many.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgekit.manifest import ModelEdits
from edgekit.models.module import adopt_shapes, attribute, edit

from .coupling import Operation

__all__ = ["Axis", "ByReaders", "Channel", "Group", "Network", "inside", "layer_of"]

Axis = tuple[str, int]


class Channel(NamedTuple):
    """``slices``: (parameter, axis) -> indices (k,) of what goes with it, in the network as it was analysed; ``numbers`` (n,)
    are its own, or those of all channels of a head."""

    slices: Mapping[Axis, Tensor]
    numbers: Tensor


class ByReaders(dict[str, Tensor]):
    """Importance of weights that says of a channel only by the layers that read it."""


@dataclass(frozen=True, eq=False)
class Group:
    """``name`` is the layer that stands for it; ``rows`` hold its channels, every row loses as many.

    ``makers`` are the axes of weights that make the channels. ``heads``: a channel is a whole attention head, and
    ``attributes``, ``MODULE.NAME``, count them. ``normalised``: without a channel the others are not what they are with it
    silent. ``aligned``: each row loses the channels at the same places (a shuffle deals them out by place). ``least``: channels
    that a row must keep.
    """

    name: str
    rows: tuple[tuple[Channel, ...], ...]
    heads: bool = False
    recurrent: bool = False
    attributes: tuple[str, ...] = ()
    makers: tuple[Axis, ...] = ()
    normalised: bool = False
    aligned: bool = False
    least: int = 1


@dataclass(frozen=True, eq=False)
class Network:
    """A module, its groups, and what is left of it: ``present`` says which channels, ``left`` which slices of an axis.

    ``kept`` names the layers whose channels stay, and why; ``blocks`` are modules that can be left out whole.
    """

    module: nn.Module
    groups: tuple[Group, ...]
    operations: tuple[Operation, ...]
    kept: Mapping[str, str]
    axes: Mapping[Axis, Tensor] = field(repr=False)
    present: Tensor = field(repr=False)
    left: Mapping[Axis, Tensor] = field(repr=False)
    edits: ModelEdits
    blocks: tuple[str, ...] = ()

    def rows(self, group: Group) -> list[list[Channel]]:
        """What is left of a group; a row that went whole is gone."""
        rows = [[c for c, left in zip(row, _sums(self.present, [c.numbers for c in row]), strict=True) if left]
                for row in group.rows]  # fmt: skip
        return [row for row in rows if row]

    def width(self, group: Group) -> int:
        """Channels left in each row."""
        return min((len(row) for row in self.rows(group)), default=0)

    def weakest(self, group: Group, importance: Mapping[str, Tensor], count: int) -> list[Channel]:
        """The ``count`` least important channels of each row; ``importance`` has the shapes of the module's state."""
        skipped = group.makers if isinstance(importance, ByReaders) else ()
        rows = self.rows(group)
        scores = [self._scores(row, importance, skipped) for row in rows]
        if group.aligned:
            scores = [torch.stack(scores).sum(0)] * len(rows)
        return [row[i] for row, own in zip(rows, scores, strict=True) for i in torch.argsort(own, stable=True)[:count].tolist()]

    def _scores(self, row: Sequence[Channel], importance: Mapping[str, Tensor], skipped: Sequence[Axis]) -> Tensor:
        sums = {axis: importance[axis[0]].transpose(0, axis[1]).flatten(1).sum(1) if importance[axis[0]].ndim > 1
                else importance[axis[0]] for axis in {a for c in row for a in c.slices}
                if axis[0] in importance and axis not in skipped}  # fmt: skip
        none = torch.zeros(0, dtype=torch.long)
        scores = torch.zeros(len(row))
        for axis, values in sums.items():
            indices = [c.slices.get(axis, none) for c in row]
            known = torch.zeros(len(self.left[axis])).masked_scatter(self.left[axis], values.float().cpu())
            scores += _sums(known, indices)
        return scores

    def sizes(self, operation: Operation) -> tuple[int, ...]:
        """How many channels an operator has left, along each of its axes."""
        return tuple(int(self.present[numbers].sum()) for numbers in operation.dims)

    def elements(self) -> dict[str, int]:
        """Numbers in each parameter and buffer, without the channels that are masked."""
        state = {name: list(value.shape) for name, value in self.module.state_dict().items() if value.is_floating_point()}
        for (name, axis), numbers in self.axes.items():
            if name in state:
                state[name][axis] = int(self.present[numbers].sum())
        return {name: math.prod(shape) for name, shape in state.items()}

    def masked(self, channels: Iterable[Channel]) -> Network:
        """What the network would be without ``channels``; its module is as it was."""
        present = self.present.clone()
        present[torch.cat([torch.zeros(0, dtype=torch.long), *(channel.numbers for channel in channels)])] = False
        return replace(self, present=present)

    def without(self, channels: Iterable[Channel], attributes: Iterable[str] = ()) -> Network:
        """A copy of the network that lacks ``channels``; of the integers ``attributes`` one less each."""
        channels = list(channels)
        left: dict[Axis, Tensor] = dict(self.left)
        for axis, index in ((a, i) for channel in channels for a, i in channel.slices.items()):
            if left[axis] is self.left[axis]:
                left[axis] = left[axis].clone()
            left[axis][index] = False
        changed = [axis for axis in left if left[axis] is not self.left[axis]]
        state = self.module.state_dict()
        for key in changed:
            name, along = key
            state[name] = state[name].index_select(along, left[key][self.left[key]].nonzero().flatten())
        module = copy.deepcopy(self.module)
        counts = ModelEdits({name: attribute(module, name) - 1 for name in attributes})
        edit(module, counts)
        adopt_shapes(module, state)
        module.load_state_dict(state)
        return replace(self.masked(channels), module=module.eval(), left=left, edits=self.edits.less(counts.attributes))

    def bypassed(self, block: str) -> Network:
        """What the network would be without a block; its module is as it was."""
        return replace(self, operations=tuple(o for o in self.operations if not inside(o.module, block)))

    def skipping(self, block: str) -> Network:
        """A copy of the network whose ``block`` hands its input on."""
        module = copy.deepcopy(self.module)
        edit(module, ModelEdits(skipped=(block,)))
        groups = (_outside(group, block) for group in self.groups)
        return replace(
            self.bypassed(block),
            module=module.eval(),
            groups=tuple(group for group in groups if group is not None),
            blocks=tuple(name for name in self.blocks if not inside(name, block)),
            edits=self.edits.without(block),
        )


def inside(name: str, block: str) -> bool:
    return f"{name}.".startswith(f"{block}.")


def _sums(values: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """(n,): the sum of ``values`` at each of n tensors of ``indices``."""
    owners = torch.repeat_interleave(torch.tensor([len(i) for i in indices]))
    return torch.zeros(len(indices)).index_add_(0, owners, values[torch.cat(list(indices))].float())


def _outside(group: Group, block: str) -> Group | None:
    """What a group has outside of a block; None where that is nothing."""
    first = group.rows[0][0].slices
    rest = [name for name, _ in first if not inside(name, block)]
    if len(rest) == len(first):
        return group
    makers = tuple(maker for maker in group.makers if not inside(maker[0], block))
    if not makers:
        return None
    rows = tuple(
        tuple(c._replace(slices={a: i for a, i in c.slices.items() if not inside(a[0], block)}) for c in row)
        for row in group.rows
    )
    name = group.name if not inside(group.name, block) else layer_of(rest[0])
    return replace(group, rows=rows, name=name, makers=makers)


def layer_of(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter

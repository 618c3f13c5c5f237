"""Groups of channels that can be removed, and removing them.

A channel is every slice of every parameter that goes with it: a convolution's filter, its batch norm's numbers, the columns
of all layers that read it. A group's channels are alike and may be chosen among; in a group of several rows (the two
directions of a recurrence, the heads of an attention) every row loses as many.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.manifest import ModelEdits
from edgekit.models.module import adopt_shapes, attribute, edit

from .coupling import Coupling, Operation, couple, export

__all__ = ["SAMPLES", "Channel", "Group", "Network", "analyse"]

SAMPLES = 2  # that a network is traced with
Axis = tuple[str, int]


class Channel(NamedTuple):
    """``slices``: (parameter, axis) -> indices (k,) of what goes with it, in the network as it was analysed; ``numbers`` (n,)
    are its own, or those of all channels of a head."""

    slices: Mapping[Axis, Tensor]
    numbers: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """``name`` is the layer that stands for it; ``rows`` hold its channels, every row loses as many.

    ``heads``: a channel is a whole attention head, and ``attributes``, ``MODULE.NAME``, count them.
    """

    name: str
    rows: tuple[tuple[Channel, ...], ...]
    heads: bool = False
    recurrent: bool = False
    attributes: tuple[str, ...] = ()


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
        rows = [[channel for channel in row if bool(self.present[channel.numbers].any())] for row in group.rows]
        return [row for row in rows if row]

    def width(self, group: Group) -> int:
        """Channels left in each row."""
        return min((len(row) for row in self.rows(group)), default=0)

    def weakest(self, group: Group, importance: Mapping[str, Tensor], count: int) -> list[Channel]:
        """The ``count`` least important channels of each row; ``importance`` has the shapes of the module's state."""
        return [row[i] for row in self.rows(group) for i in torch.argsort(self._scores(row, importance), stable=True)[:count]]

    def _scores(self, row: Sequence[Channel], importance: Mapping[str, Tensor]) -> Tensor:
        sums = {axis: importance[axis[0]].transpose(0, axis[1]).flatten(1).sum(1) if importance[axis[0]].ndim > 1
                else importance[axis[0]] for axis in {a for c in row for a in c.slices} if axis[0] in importance}  # fmt: skip
        places = {axis: self.left[axis].cumsum(0) - 1 for axis in sums}
        return torch.stack([
            sum((sums[a][places[a][i[self.left[a][i]]]].sum() for a, i in c.slices.items() if a in sums), torch.zeros(()))
            for c in row
        ])  # fmt: skip

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
        for channel in channels:
            present[channel.numbers] = False
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
        return replace(self, operations=tuple(o for o in self.operations if not _inside(o.module, block)))

    def skipping(self, block: str) -> Network:
        """A copy of the network whose ``block`` hands its input on."""
        module = copy.deepcopy(self.module)
        edit(module, ModelEdits(skipped=(block,)))
        groups = (_outside(group, block) for group in self.groups)
        return replace(
            self.bypassed(block),
            module=module.eval(),
            groups=tuple(group for group in groups if group is not None),
            blocks=tuple(name for name in self.blocks if not _inside(name, block)),
            edits=self.edits.without(block),
        )


def _inside(name: str, block: str) -> bool:
    return f"{name}.".startswith(f"{block}.")


def _outside(group: Group, block: str) -> Group | None:
    """What a group has outside of a block; None where that is nothing."""
    first = group.rows[0][0].slices
    rest = [name for name, _ in first if not _inside(name, block)]
    if len(rest) == len(first):
        return group
    if not any(axis == 0 and not _inside(name, block) for name, axis in first):
        return None
    rows = tuple(
        tuple(c._replace(slices={a: i for a, i in c.slices.items() if not _inside(a[0], block)}) for c in row)
        for row in group.rows
    )
    name = group.name if not _inside(group.name, block) else _layer(rest[0])
    return replace(group, rows=rows, name=name)


def analyse(module: nn.Module, example: Tensor, edits: ModelEdits | None = None, frozen: Sequence[str] = ()) -> Network:
    """The groups of ``module``, each tried: a cut that the module's own code does not follow is left out, with the reason.

    ``example`` (N >= 2, ...) is what the module takes; ``frozen`` are names or patterns of layers whose width must stay.
    Raises `GraphError` where the module cannot be traced.
    """
    program = export(module, example[:SAMPLES])
    columns = couple(module, program)
    channels = _channels(columns)
    groups, kept = _groups(columns, channels)
    operations = tuple(o._replace(dims=tuple(columns.find(d) for d in o.dims)) for o in columns.operations)
    left = {axis: torch.ones(len(numbers), dtype=torch.bool) for axis, numbers in columns.axes.items()}
    whole: list[Group] = []
    if columns.split:
        heads = couple(module, program, heads=True)
        left |= {a: torch.ones(len(n), dtype=torch.bool) for a, n in heads.axes.items()}
        whole = _heads(heads, module, columns)
    present = torch.ones(len(columns.parent), dtype=torch.bool)
    network = Network(module, (), operations, kept, columns.axes, present, left, edits or ModelEdits())
    found: list[Group] = []
    with torch.no_grad():
        wanted = module.eval()(example[:SAMPLES])
        for group in [*groups, *whole]:
            reason = _forbidden(group, frozen)
            tried = reason or _tried(network, group, example[:SAMPLES], wanted, [columns.find(n) for n in columns.normalised])
            if isinstance(tried, Group):
                found.append(tried)
            elif not group.heads:
                kept[group.name] = str(tried)
    blocks = [b for b in _blocks(module, example[:SAMPLES]) if not any(fnmatch.fnmatchcase(b, f) for f in frozen)]
    return replace(network, groups=tuple(found), kept=kept, blocks=tuple(blocks))


def _blocks(module: nn.Module, example: Tensor) -> list[str]:
    """Modules of several layers that answer in the shape of their input, so that the input can take their place."""
    calls: dict[str, list[bool]] = defaultdict(list)
    hooks = []
    for name, layer in module.named_modules():
        layers = sum(1 for part in layer.modules() if part is not layer and any(True for _ in part.parameters(recurse=False)))
        if name and layers > 1 and not isinstance(layer, nn.ModuleList):

            def watch(_: nn.Module, given: tuple[object, ...], made: object, name: str = name) -> None:
                same = bool(given) and isinstance(given[0], Tensor) and isinstance(made, Tensor)
                calls[name].append(same and given[0].shape == made.shape)  # type: ignore[attr-defined]

            hooks.append(layer.register_forward_hook(watch))
    module(example)
    for hook in hooks:
        hook.remove()
    return [name for name, found in calls.items() if found == [True]]


def _forbidden(group: Group, frozen: Sequence[str]) -> str:
    written = {name.rpartition(".")[0] for row in group.rows for c in row[:1] for name, axis in c.slices if axis == 0}
    for pattern in frozen:
        if any(fnmatch.fnmatchcase(layer, pattern) for layer in written):
            return f"{pattern} is frozen"
    return ""


def _channels(coupling: Coupling) -> dict[int, Channel]:
    slices: dict[int, dict[Axis, list[int]]] = defaultdict(dict)
    for axis, numbers in coupling.axes.items():
        for index, number in enumerate(coupling.find(numbers).tolist()):
            if number not in coupling.fixed:
                slices[number].setdefault(axis, []).append(index)
    return {n: Channel({a: torch.tensor(i) for a, i in found.items()}, torch.tensor([n])) for n, found in slices.items()}


def _groups(coupling: Coupling, channels: Mapping[int, Channel]) -> tuple[list[Group], dict[str, str]]:
    """Channels with the same slices form a group, and so do those that are bound to go row by row."""
    kinds: dict[object, list[int]] = defaultdict(list)
    for number, channel in channels.items():
        kinds[tuple((axis, len(index)) for axis, index in channel.slices.items())].append(number)
    place: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for which, rows in enumerate(coupling.rows):
        for row, numbers in enumerate(coupling.find(rows.channels).tolist()):
            for number in numbers:
                if (which, row) not in place[number]:
                    place[number].append((which, row))
    merged: list[tuple[set[int], dict[object, list[int]]]] = []
    for kind, numbers in kinds.items():
        apart: dict[object, list[int]] = defaultdict(list)
        for number in numbers:
            apart[kind, tuple(place[number])].append(number)
        bound = {which for number in numbers for which, _ in place[number]}
        touching = [m for m in merged if m[0] & bound]
        for other in touching:
            merged.remove(other)
            bound |= other[0]
            apart.update(other[1])
        merged.append((bound, apart))
    order = {name: i for i, name in enumerate(coupling.state)}
    found = [
        Group(
            _name([channels[n] for n in next(iter(apart.values()))], order),
            tuple(tuple(channels[n] for n in numbers) for numbers in apart.values()),
            recurrent=any(".weight_hh" in f".{a[0]}" for numbers in apart.values() for a in channels[numbers[0]].slices),
        )
        for _, apart in merged
    ]
    found.sort(key=lambda g: min(order[name] for row in g.rows for name, _ in row[0].slices))
    kept = {}
    for (name, axis), numbers in coupling.axes.items():
        if axis == 0 and coupling.state[name].ndim > 1:
            why = [coupling.fixed[n] for n in coupling.find(numbers).tolist() if n in coupling.fixed]
            if why:
                kept[_layer(name)] = why[0]
    return found, kept


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _name(channels: Sequence[Channel], order: Mapping[str, int]) -> str:
    """The first layer that makes the channels."""
    makers = [name for name, axis in channels[0].slices if axis == 0] or [name for name, _ in channels[0].slices]
    weights = [name for name in makers if "weight" in name.rpartition(".")[2]] or makers
    return _layer(min(weights, key=order.__getitem__))


def _heads(coupling: Coupling, module: nn.Module, columns: Coupling) -> list[Group]:
    """Groups whose channels are whole heads; the attributes that count them are found by name and value."""
    channels = _channels(coupling)
    groups, _ = _groups(coupling, channels)
    owners: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for rows in coupling.split:
        numbers = coupling.find(rows.channels[:, 0]).tolist()
        for number in numbers:
            owners[number].add((rows.module, len(set(numbers))))
    found = []
    for group in groups:
        mine = {o for n, channel in channels.items() if any(channel is c for row in group.rows for c in row) for o in owners[n]}
        if not mine or len(group.rows[0]) < 2:
            continue
        counters = []
        for name, count in sorted(mine):
            owner = module.get_submodule(name)
            counters += [
                f"{name}.{key}".lstrip(".")
                for key, value in vars(owner).items()
                if type(value) is int and value == count and "head" in key
            ]
        numbered = tuple(tuple(_numbered(channel, columns) for channel in row) for row in group.rows)
        found.append(replace(group, rows=numbered, heads=True, attributes=tuple(counters)))
    return found


def _numbered(head: Channel, columns: Coupling) -> Channel:
    """A head with the numbers of its channels."""
    numbers = [columns.find(columns.axes[axis])[index] for axis, index in head.slices.items() if axis in columns.axes]
    return head._replace(numbers=torch.cat(numbers).unique())  # type: ignore[no-untyped-call]


def _tried(network: Network, group: Group, example: Tensor, wanted: Tensor, normalised: Sequence[Tensor]) -> Group | str:
    """The group, if the module runs without a channel of each of its rows as it does with it silenced; else why not."""
    if network.width(group) < 2:
        return "it has one channel"
    channels = [row[0] for row in group.rows]
    reason = "the module's code does not follow"
    gone = ~network.masked(channels).present
    exact = not any(bool(gone[numbers].any()) for numbers in normalised)
    for attributes in dict.fromkeys([(), group.attributes]) if group.heads else [()]:
        try:
            cut = network.without(channels, attributes).module(example)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, EdgekitError) as error:
            reason = (str(error).strip().splitlines() or [reason])[0]
            continue
        if cut.shape != wanted.shape or not bool(torch.isfinite(cut).all()):
            continue
        if exact:
            silent = _silenced(network, channels)(example)
            if float((silent - cut).abs().max()) > 1e-3 * max(float(wanted.abs().max()), 1e-6):
                continue
        return replace(group, attributes=attributes)
    return f"its module cannot run narrower: {reason}"


def _silenced(network: Network, channels: Sequence[Channel]) -> nn.Module:
    """A copy whose ``channels`` are zero."""
    module = copy.deepcopy(network.module)
    state = module.state_dict()  # shares memory
    for name, axis, index in ((*a, i) for channel in channels for a, i in channel.slices.items()):
        state[name].index_fill_(axis, index, 0)
    return module

"""Finding the groups of channels that can be removed, and the blocks that can be left out."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from edgekit.manifest import ModelEdits
from edgekit.models.export import trace
from edgekit.models.module import COMPUTED, computes_weights

from .coupling import Coupling, couple
from .network import Axis, Channel, Group, Network, inside, layer_of
from .trial import CODE_ERRORS, Trial

__all__ = ["SAMPLES", "Channel", "Group", "Network", "analyse"]

SAMPLES = 2  # that a network is traced with


def analyse(module: nn.Module, example: Tensor, edits: ModelEdits | None = None, frozen: Sequence[str] = ()) -> Network:
    """The groups of ``module``, each tried: a cut that the module's own code does not follow is left out, with the reason.

    ``example`` (N >= 2, ...) is what the module takes; ``frozen`` are names or patterns of layers whose width must stay.
    Raises `GraphError` where the module cannot be traced.
    """
    program = trace(module, example[:SAMPLES])
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
    refused: dict[str, str] = {}
    with torch.no_grad():
        trial = Trial(network, example[:SAMPLES], module.eval()(example[:SAMPLES]), columns)
        for candidates in (groups, whole):
            barred = [_forbidden(group, frozen, columns.state) for group in candidates]
            allowed = [group for group, why in zip(candidates, barred, strict=True) if not why]
            tried = {id(group): result for group, result in trial(allowed)}
            for group, why in zip(candidates, barred, strict=True):
                result = tried.get(id(group)) or why
                if isinstance(result, Group):
                    found.append(result)
                elif not group.heads:
                    kept[group.name] = result
                    refused |= {layer_of(name): result for name, _ in group.makers}
    _explain(module, columns, found, refused, kept)
    network = replace(network, groups=tuple(found), kept=kept)
    blocks = [b for b in _blocks(module, example[:SAMPLES]) if not _holds_frozen(module, b, frozen)]
    return replace(network, blocks=tuple(b for b in blocks if _passes_channels(network, b, example[:SAMPLES])))


def _explain(
    module: nn.Module, coupling: Coupling, groups: Sequence[Group], refused: Mapping[str, str], kept: dict[str, str]
) -> None:
    """Say why of every layer with weights that no group holds and nothing was said of yet."""
    held = {layer_of(name) for group in groups for name, _ in group.rows[0][0].slices}
    reasons = dict(refused)
    for (name, _), numbers in coupling.axes.items():
        for number in numbers.tolist():
            if why := coupling.fixed.get(number):
                reasons.setdefault(layer_of(name), why)
                break
    for name, layer in module.named_modules():
        weighty = any(parameter.ndim > 1 for parameter in layer.parameters(recurse=False))
        if name and computes_weights(layer):
            kept.setdefault(name, COMPUTED)
        elif name and weighty and name not in held and ".parametrizations." not in f".{name}":
            kept.setdefault(name, reasons.get(name, "its channels cannot be followed through the model"))


def _holds_frozen(module: nn.Module, block: str, frozen: Sequence[str]) -> bool:
    layers = {*_upwards(block), *(layer_of(name) for name, _ in module.named_parameters() if inside(name, block))}
    return any(fnmatch.fnmatchcase(layer, pattern) for layer in layers for pattern in frozen)


def _upwards(layer: str) -> set[str]:
    """``blocks.3.norm`` and all that hold it."""
    parts = layer.split(".")
    return {".".join(parts[: depth + 1]) for depth in range(len(parts))}


def _passes_channels(network: Network, block: str, example: Tensor) -> bool:
    """Whether a residual goes around ``block``, so that what leaves it has the channels of what enters it: what lies on both
    sides must still fit together after a cut. Of the same shape is not enough."""
    bare = network.skipping(block)
    with torch.no_grad():
        try:
            bare.module(example)
        except CODE_ERRORS:  # what holds the block asks it for more than an answer
            return False
    touched = [group for group in bare.groups if not any(group is one for one in network.groups)]
    with torch.no_grad():
        for group in touched:
            if network.width(group) < 2:
                continue
            try:
                bare.without([row[0] for row in group.rows], group.attributes).module(example)
            except CODE_ERRORS:
                return False
    return True


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


def _forbidden(group: Group, frozen: Sequence[str], state: Mapping[str, Tensor]) -> str:
    """The frozen layer whose width the group is: one that makes its channels, a norm of them, or what holds such a layer."""
    wide = {layer_of(name) for name, _ in group.makers}
    wide |= {layer_of(name) for name, _ in group.rows[0][0].slices if state[name].ndim == 1}
    names = {name for layer in wide for name in _upwards(layer)}
    return next((f"{pattern} is frozen" for pattern in frozen if fnmatch.filter(names, pattern)), "")


def _channels(coupling: Coupling) -> dict[int, Channel]:
    slices: dict[int, dict[Axis, Tensor]] = defaultdict(dict)
    for axis, numbers in coupling.axes.items():
        ordered, indices = coupling.find(numbers).sort(stable=True)
        unique, counts = ordered.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        parts = torch.split(indices, counts.tolist())
        for number, index in zip(unique.tolist(), parts, strict=True):
            if number not in coupling.fixed:
                slices[number][axis] = index
    return {n: Channel(found, torch.tensor([n])) for n, found in slices.items()}


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
    counted = coupling.members([*coupling.normalised, *coupling.reduced])
    found = []
    for _, apart in merged:
        axes = {axis: None for numbers in apart.values() for axis in channels[numbers[0]].slices}
        makers = tuple(axis for axis in axes if axis in coupling.makers)
        found.append(
            Group(
                layer_of(min([a[0] for a in makers if "weight" in a[0]] or [a[0] for a in axes], key=order.__getitem__)),
                tuple(tuple(channels[n] for n in numbers) for numbers in apart.values()),
                recurrent=any("weight_hh" in name for name, _ in axes),
                makers=makers,
                least=2 if any(axis in coupling.grouped for axis in axes) else 1,
                normalised=any(number in counted for numbers in apart.values() for number in numbers),
            )
        )
    found.sort(key=lambda g: min(order[name] for row in g.rows for name, _ in row[0].slices))
    kept = {}
    for name, axis in coupling.makers:
        numbers = coupling.find(coupling.axes[name, axis]).tolist()
        why = [coupling.fixed[n] for n in numbers if n in coupling.fixed]
        if why:
            kept[layer_of(name)] = why[0]
    return found, kept


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
        mine = {owner for row in group.rows for channel in row for owner in owners[int(channel.numbers)]}
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
        held = torch.cat([channel.numbers for row in numbered for channel in row])
        if len(held.unique()) < len(held):  # type: ignore[no-untyped-call]
            continue  # one head's channels are those of others, too (a rotary table): without it they are still there
        found.append(replace(group, rows=numbered, heads=True, attributes=tuple(counters)))
    return found


def _numbered(head: Channel, columns: Coupling) -> Channel:
    """A head with the numbers of its channels."""
    numbers = [columns.find(columns.axes[axis])[index] for axis, index in head.slices.items() if axis in columns.axes]
    return head._replace(numbers=torch.cat(numbers).unique())  # type: ignore[no-untyped-call]

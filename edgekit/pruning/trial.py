"""Whether a module's own code follows a cut: it must run, and answer as it does with the channels silent."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError

from .coupling import Coupling
from .network import Axis, Channel, Group, Network

__all__ = ["CODE_ERRORS", "Trial"]

TOLERANCE = 1e-3  # of the largest answer
#: What a module's own code raises where it does not follow a cut.
CODE_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError, EdgekitError)
JOINTLY = 9  # so many groups are fewer runs together than one by one
#: Channels of a row that are tried: the first, the last, every other one.
_PICKS = (slice(0, 1), slice(-1, None), slice(1, None, 2))


class Trial:
    """Tries groups of ``network`` on ``example`` (N, ...), many at once; ``wanted`` is what the whole module answers."""

    def __init__(self, network: Network, example: Tensor, wanted: Tensor, coupling: Coupling) -> None:
        self.network, self.example, self.wanted = network, example, wanted
        self.scaled = {number for numbers in coupling.scaled for number in coupling.find(numbers).flatten().tolist()}

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Group | str]]:
        """Each group with what it is found to be, or why it cannot be cut."""
        yield from ((group, _alone(group)) for group in groups if self.network.width(group) < 2)
        wide = [group for group in groups if self.network.width(group) > 1]
        for normalised in (False, True):
            yield from self._tried([group for group in wide if group.normalised is normalised])

    def _tried(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Group | str]]:
        if len(groups) < JOINTLY:
            for group in groups:
                found = self._fit([group])
                yield group, found[0] if isinstance(found, list) else f"its module cannot run narrower: {found}"
            return
        # Any two are in different parts at least once: none passes only because another was cut as well.
        bits = range((len(groups) - 1).bit_length())
        parts = [[g for i, g in enumerate(groups) if i >> bit & 1 == on] for bit in bits for on in (0, 1)]
        found = self._fit(groups)
        if isinstance(found, list) and all(isinstance(self._fit(part, compare=False), list) for part in parts):
            yield from zip(groups, found, strict=True)
        else:
            yield from self._tried(groups[: len(groups) // 2])
            yield from self._tried(groups[len(groups) // 2 :])

    def _fit(self, groups: Sequence[Group], compare: bool = True) -> list[Group] | str:
        """The groups, if the module runs without a channel of each of their rows as it does with these silent; else why not.

        Compared are several: a module that rolls its channels, or takes the last eight, follows where the first one goes."""
        channels = _picked(groups, _PICKS[0])
        counters = tuple(dict.fromkeys(name for group in groups for name in group.attributes))
        orders = [counters, ()] if groups[0].normalised else [(), counters]
        reason = "its code does not follow"
        for attributes in dict.fromkeys(orders):
            try:
                cut = self.network.without(channels, attributes).module(self.example)
            except CODE_ERRORS as error:
                reason = (str(error).strip().splitlines() or [reason])[0]
                continue
            if cut.shape != self.wanted.shape or not bool(torch.isfinite(cut).all()):
                continue
            if groups[0].normalised or not compare or self._same(cut, groups, attributes):
                return [replace(group, attributes=group.attributes if attributes else ()) for group in groups]
        return reason

    def _same(self, cut: Tensor, groups: Sequence[Group], attributes: Sequence[str]) -> bool:
        """Whether the module answers so with the channels silent, or also with the rest scaled as attention does by width."""
        limit = TOLERANCE * max(float(self.wanted.abs().max()), 1e-6)
        scaled = any(int(channel.numbers[0]) in self.scaled for channel in _picked(groups, _PICKS[0]))
        for pick in _PICKS[:2] if attributes else _PICKS:  # a count of heads goes down by one
            if pick is not _PICKS[0]:
                if any(len(row) - len(row[pick]) < group.least for group in groups for row in group.rows):
                    continue
                try:
                    cut = self.network.without(_picked(groups, pick), attributes).module(self.example)
                except CODE_ERRORS:
                    return False
            answers = (self._silenced(groups, pick, again)(self.example) for again in ([False, True] if scaled else [False]))
            if not any(float((answer - cut).abs().max()) <= limit for answer in answers):
                return False
        return True

    def _silenced(self, groups: Sequence[Group], pick: slice, rescaled: bool) -> nn.Module:
        """A copy in which the picked channels of each row are zero."""
        module = copy.deepcopy(self.network.module)
        state = module.state_dict()  # shares memory
        for group in groups:
            for row in group.rows:
                for (name, axis), index in (part for channel in row[pick] for part in channel.slices.items()):
                    state[name].index_fill_(axis, index, 0)
                if rescaled and not group.heads and int(row[0].numbers[0]) in self.scaled:
                    factor = (len(row) / (len(row) - len(row[pick]))) ** 0.25  # of query and key each
                    for name, axis in group.makers:
                        _scale(state[name], (name, axis), row, factor)
        return module


def _picked(groups: Sequence[Group], pick: slice) -> list[Channel]:
    return [channel for group in groups for row in group.rows for channel in row[pick]]


def _alone(group: Group) -> str:
    several = any(len(index) > 1 for index in group.rows[0][0].slices.values())
    return "its channels are mixed: none can go without all others" if several else "it has one channel"


def _scale(value: Tensor, axis: Axis, row: Sequence[Channel], factor: float) -> None:
    for channel in row:
        if axis in channel.slices:
            value.transpose(0, axis[1])[channel.slices[axis]] *= factor

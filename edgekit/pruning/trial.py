"""Whether a module's own code follows a cut: it must run, and answer as it does with the channels silent."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edgekit.errors import EdgekitError

from .coupling import Coupling
from .network import Axis, Channel, Group, Network

__all__ = ["CODE_ERRORS", "Trial"]

TOLERANCE = 1e-3  # of the largest answer
#: What a module's own code raises where it does not follow a cut.
CODE_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError, EdgekitError)
JOINTLY = 9  # so many groups are fewer runs together than one by one
Pick = Callable[[int, int], list[int]]  # the number of a row and its width -> places of the channels that are tried


def _first(_: int, __: int) -> list[int]:
    return [0]


def _last(_: int, width: int) -> list[int]:
    return [width - 1]


def _every_other(_: int, width: int) -> list[int]:
    return list(range(1, width, 2))


def _apart(row: int, width: int) -> list[int]:
    """Another place in each row."""
    return [row % width]


class Trial:
    """Tries groups of ``network`` on ``example`` (N, ...), many at once; ``wanted`` is what the whole module answers."""

    def __init__(self, network: Network, example: Tensor, wanted: Tensor, coupling: Coupling) -> None:
        self.network, self.example, self.wanted = network, example, wanted
        self.scaled, self.reduced = coupling.members(coupling.scaled), coupling.members(coupling.reduced)

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Group | str]]:
        """Each group with what it is found to be, or why it cannot be cut."""
        yield from ((group, _alone(group)) for group in groups if self.network.width(group) < 2)
        wide = [group for group in groups if self.network.width(group) > 1]
        for reduced, normalised in ((False, False), (False, True), (True, True)):
            alike = [group for group in wide if (self._is_reduced(group), group.normalised) == (reduced, normalised)]
            yield from self._tried(alike)

    def _is_reduced(self, group: Group) -> bool:
        return group.normalised and any(int(row[0].numbers[0]) in self.reduced for row in group.rows)

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
        counters = tuple(dict.fromkeys(name for group in groups for name in group.attributes))
        orders = [counters, ()] if groups[0].normalised else [(), counters]
        reason = "its code does not follow"
        for attributes in dict.fromkeys(orders):
            try:
                cut = self._without(groups, _first, attributes)
            except CODE_ERRORS as error:
                reason = (str(error).strip().splitlines() or [reason])[0]
                continue
            if cut.shape != self.wanted.shape or not bool(torch.isfinite(cut).all()):
                continue
            if compare and not self._same(groups, _first, attributes, cut):
                continue
            if compare and not all(self._same(groups, pick, attributes) for pick in self._more(groups, attributes)):
                continue
            apart = [group for group in groups if compare and not group.heads and len(group.rows) > 1]
            if not apart or self._same(apart, _apart, attributes):
                apart = []
            aligned = {id(group) for group in apart if not self._same([group], _apart, attributes)}
            return [replace(g, attributes=g.attributes if attributes else (), aligned=id(g) in aligned) for g in groups]
        return reason

    def _more(self, groups: Sequence[Group], attributes: Sequence[str]) -> Sequence[Pick]:
        if attributes:  # a count of heads goes down by one
            return (_last,)
        enough = all(len(row) - len(_every_other(0, len(row))) >= group.least for group in groups for row in group.rows)
        return (_last, _every_other) if enough else (_last,)

    def _without(self, groups: Sequence[Group], pick: Pick, attributes: Sequence[str]) -> Tensor:
        """What the module answers without the picked channels."""
        answer: Tensor = self.network.without(_picked(groups, pick), attributes).module(self.example)
        return answer

    def _same(self, groups: Sequence[Group], pick: Pick, attributes: Sequence[str], cut: Tensor | None = None) -> bool:
        """Whether the module answers ``cut``, what it does without the picked channels, with these silent, or also with the
        rest scaled as attention does by width.

        Norms count what is left, as they do in the narrow module. A mean or softmax over channels has no such stand-in: there
        it must run, no more."""
        try:
            cut = self._without(groups, pick, attributes) if cut is None else cut
        except CODE_ERRORS:
            return False
        if self._is_reduced(groups[0]):
            return cut.shape == self.wanted.shape
        limit = TOLERANCE * max(float(self.wanted.abs().max()), 1e-6)
        scaled = any(int(channel.numbers[0]) in self.scaled for channel in _picked(groups, _first))
        answers = (self._silent(groups, pick, again) for again in ([False, True] if scaled else [False]))
        return any(float((answer - cut).abs().max()) <= limit for answer in answers)

    def _silent(self, groups: Sequence[Group], pick: Pick, rescaled: bool) -> Tensor:
        """What the module answers with the picked channels of each row at zero."""
        module = copy.deepcopy(self.network.module)
        state = module.state_dict()  # shares memory
        silent: dict[str, list[Tensor]] = defaultdict(list)
        for group in groups:
            for number, row in enumerate(group.rows):
                for place in pick(number, len(row)):
                    for (name, axis), index in row[place].slices.items():
                        state[name].index_fill_(axis, index, 0)
                        if state[name].ndim == 1:
                            silent[name].append(index)
                if rescaled and not group.heads and int(row[0].numbers[0]) in self.scaled:
                    factor = (len(row) / (len(row) - len(pick(number, len(row))))) ** 0.25  # of query and key each
                    for name, axis in group.makers:
                        _scale(state[name], (name, axis), row, factor)
        stored = dict(module.named_parameters(remove_duplicate=False))
        with _NormsOfTheRest({id(stored[name]): torch.cat(parts) for name, parts in silent.items() if name in stored}):
            answer: Tensor = module(self.example)
        return answer


class _NormsOfTheRest(TorchFunctionMode):
    """Layer, group and RMS norms leave out of their statistics what is silent; ``silent``: id of a norm's weight -> indices."""

    def __init__(self, silent: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.silent = silent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.layer_norm, F.group_norm, F.rms_norm):
            return func(*args, **(kwargs or {}))
        call = inspect.signature(func).bind(*args, **(kwargs or {})).arguments
        x, weight, axis = call["input"], call.get("weight"), 1 if func is F.group_norm else -1
        if weight is None or id(weight) not in self.silent:
            return func(**call)
        left = torch.ones(len(weight), dtype=torch.bool)
        left[self.silent[id(weight)]] = False
        call["input"], call["weight"] = x.transpose(axis, -1)[..., left].transpose(axis, -1), weight[left]
        if call.get("bias") is not None:
            call["bias"] = call["bias"][left]
        if "normalized_shape" in call:
            call["normalized_shape"] = (int(left.sum()),)
        answer = torch.zeros_like(x)
        answer.transpose(axis, -1)[..., left] = func(**call).transpose(axis, -1)
        return answer


def _picked(groups: Sequence[Group], pick: Pick) -> list[Channel]:
    return [row[i] for group in groups for k, row in enumerate(group.rows) for i in pick(k, len(row))]


def _alone(group: Group) -> str:
    several = any(len(index) > 1 for index in group.rows[0][0].slices.values())
    return "its channels are mixed: none can go without all others" if several else "it has one channel"


def _scale(value: Tensor, axis: Axis, row: Sequence[Channel], factor: float) -> None:
    for channel in row:
        if axis in channel.slices:
            value.transpose(0, axis[1])[channel.slices[axis]] *= factor

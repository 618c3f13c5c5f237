"""Which slices of which parameters must go together: labels of channels, followed through a traced graph.

Every element of every tensor carries the number of the channel it belongs to (0: none). Operators that move data are run
on the numbers themselves; those that compute unite numbers: a sum, the channels of its operands; a convolution, its input's
with its weight's second axis; a recurrence, the gates of one hidden unit. What is united is one channel: it goes whole or
stays. This is the dependency graph of DepGraph (Fang et al., arXiv:2301.12900), kept by element instead of by layer, so
reshapes, heads, concatenations and weights that are used twice need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edgekit.errors import MissingExtra

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtra("train", error.name or "torch") from None

__all__ = ["Coupling", "Operation", "Parameter", "Rows", "blank", "compact", "couple", "flat"]


class Rows(NamedTuple):
    """Channels (rows, n), numbers, of which every row must lose as many as the others. ``module`` made the rows."""

    channels: Tensor
    module: str = ""


class Operation(NamedTuple):
    """One operator that costs time. ``dims`` are the channel numbers along the axes that pruning changes, ``shape`` what it
    does not change; what they mean depends on ``kind``."""

    kind: str
    dims: tuple[Tensor, ...]
    shape: tuple[int, ...]
    module: str = ""


@dataclass
class Coupling:
    """Channels under a union-find. ``axes`` holds the numbers along an axis of a parameter or buffer, ``split`` the reshapes
    by which channels became heads."""

    state: Mapping[str, Tensor]
    heads: bool = False  # whether what a reshape spreads over rows goes by rows
    parent: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    axes: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    elements: dict[str, Tensor] = field(default_factory=dict)
    rows: list[Rows] = field(default_factory=list)
    split: list[Rows] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    fixed: dict[int, str] = field(default_factory=dict)  # number -> why it must stay
    makers: dict[tuple[str, int], None] = field(default_factory=dict)  # axes of weights that make channels, in order
    grouped: set[tuple[str, int]] = field(default_factory=set)  # inputs of convolutions in groups; with one it is depthwise
    normalised: list[Tensor] = field(default_factory=list)  # what a norm's layer counts: zero is not the same as absent
    reduced: list[Tensor] = field(default_factory=list)  # the same, by a mean, maximum or softmax over channels
    scaled: list[Tensor] = field(default_factory=list)  # what products sum over, and may scale by the number of

    def fresh(self, *shape: int) -> Tensor:
        """New channels."""
        count = int(torch.Size(shape).numel())
        new = torch.arange(len(self.parent), len(self.parent) + count)
        self.parent = torch.cat([self.parent, new])
        return new.reshape(shape)

    def find(self, numbers: Tensor) -> Tensor:
        """The numbers that stand for ``numbers``."""
        shape, found = numbers.shape, self.parent[_narrowed(numbers)]
        while True:
            above = self.parent[found]
            if torch.equal(above, found):
                return found.expand(shape)
            found = above

    def unite(self, first: Tensor, second: Tensor) -> Tensor:
        """Make channels one, element by element; 0 unites with nothing. Returns what stands for both, of the same shape."""
        shape = torch.broadcast_shapes(first.shape, second.shape)  # type: ignore[no-untyped-call]
        first, second = (self.find(_narrowed(numbers.expand(shape))) for numbers in (first, second))
        first, second = torch.broadcast_tensors(first, second)  # type: ignore[no-untyped-call]
        known = (first > 0) & (second > 0)
        a, b = first[known], second[known]
        while True:  # the higher of two roots hangs below the lower, so there are no cycles
            differ = a != b
            if not bool(differ.any()):
                break
            low, high = torch.minimum(a, b)[differ], torch.maximum(a, b)[differ]
            self.parent.scatter_reduce_(0, high, low, "amin")
            self.parent = self.parent[self.parent]
            a, b = self.find(low), self.find(high)
        return self.find(torch.where(first > 0, first, second)).expand(shape)

    def bind(self, numbers: Tensor, axis: Tensor, why: str) -> Tensor:
        """Unite channels with those of a parameter's axis; where there is none, the axis cannot shrink."""
        self.fix(axis[numbers == 0], why)
        return self.unite(numbers, axis)

    def fix(self, numbers: Tensor, why: str) -> None:
        """Say of channels that they must stay."""
        for number in _narrowed(numbers).unique().tolist():  # type: ignore[no-untyped-call]
            self.fixed.setdefault(number, why)

    def members(self, several: Iterable[Tensor]) -> set[int]:
        """The numbers that stand for those in ``several``."""
        return {number for numbers in several for number in self.find(numbers).flatten().tolist()}

    def axis(self, name: str, index: int) -> Tensor:
        """Channels along an axis of a parameter or buffer."""
        if (name, index) not in self.axes:
            self.axes[name, index] = self.fresh(self.state[name].shape[index])
        return self.axes[name, index]

    def made(self, name: str, index: int = 0) -> Tensor:
        """Channels along the axis of a parameter that makes them."""
        self.makers[name, index] = None
        return self.axis(name, index)

    def whole(self, name: str) -> Tensor:
        """A number for every element of a parameter that is computed with as it is, a position or a gain."""
        if self.state[name].ndim == 1:
            return self.axis(name, 0)
        if name not in self.elements:
            self.elements[name] = self.fresh(*self.state[name].shape)
        return self.elements[name]

    def along(self, numbers: Tensor, axis: int) -> Tensor:
        """Channels (n,) along an axis of a tensor; those of one index along it become one."""
        lines = compact(self.find(numbers)).movedim(axis, -1)
        lines = _narrowed(lines, keep=(lines.ndim - 1,)).reshape(-1, numbers.shape[axis])
        return self.merged(lines, 0)

    def merged(self, numbers: Tensor, axis: int) -> Tensor:
        """Make one what lies along an axis; the axis goes."""
        top = numbers.amax(axis)
        if numbers.shape[axis] > 1:
            self.unite(numbers, top.unsqueeze(axis))
        return self.find(top)

    def varying(self, numbers: Tensor) -> list[int]:
        """The axes along which channels differ."""
        found = compact(self.find(numbers))
        return [k for k in range(found.ndim) if found.shape[k] > 1 and found.stride(k)]

    def settle(self) -> None:
        """After the last operator: give elementwise parameters their axis; keep whole rows fixed where a part is."""
        for name, numbers in self.elements.items():
            varying = self.varying(numbers)
            if len(varying) == 1:
                self.axes[name, varying[0]] = self.along(numbers, varying[0])
            elif varying:
                self.fix(numbers, f"{name} varies along {len(varying)} axes")
        self.axes = {key: self.find(numbers) for key, numbers in self.axes.items()}
        self.fixed[0] = "it is bound to what cannot shrink"
        while True:
            roots: dict[int, str] = {}
            found = self.find(torch.tensor(list(self.fixed))).tolist()
            for number, why in zip(found, self.fixed.values(), strict=True):
                roots.setdefault(number, why)
            self.fixed = roots
            before, held = len(roots), torch.tensor(list(roots))
            for rows in self.rows:
                numbers = self.find(rows.channels)
                stay = numbers[torch.isin(numbers, held)]
                if len(stay):
                    self.fix(numbers, roots[int(stay[0])])
            if len(self.fixed) == before:
                return


def _narrowed(numbers: Tensor, keep: Sequence[int] = ()) -> Tensor:
    """One of what is spread (stride 0) along an axis."""
    for k in range(numbers.ndim):
        if numbers.shape[k] > 1 and numbers.stride(k) == 0 and k not in keep:
            numbers = numbers.narrow(k, 0, 1)
    return numbers


def compact(numbers: Tensor) -> Tensor:
    """The same numbers, spread (stride 0) along the axes that they do not differ along."""
    found = _narrowed(numbers)
    for k in range(found.ndim):
        if found.shape[k] > 1 and bool((found.narrow(k, 1, found.shape[k] - 1) == found.narrow(k, 0, 1)).all()):
            found = found.narrow(k, 0, 1)
    return found.expand(numbers.shape)


class Parameter(NamedTuple):
    name: str


def couple(module: nn.Module, program: torch.export.ExportedProgram, heads: bool = False) -> Coupling:
    """Follow the channels of ``module`` through ``program``, its `trace`.

    Where a reshape spreads channels over several axes, (N, T, heads d) -> (N, T, heads, d), the channels are the d of each
    head, and every head loses as many; with ``heads`` a whole head is one channel. Operators without a rule keep the
    channels that they read.
    """
    from .operators import apply

    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    coupling = Coupling(dict(module.state_dict()), heads)
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(p), name) for name, p in module.named_parameters(remove_duplicate=False)}
    values: dict[str, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = stored.get(node.name)
            known = name is not None and name in coupling.state
            values[node.name] = Parameter(same.get(str(name), str(name))) if known else blank(node.meta.get("val"))
        elif node.op == "output":
            for result in flat(values[a.name] for a in _nodes(node.args)):
                coupling.fix(result, "it is the model's output")
        elif node.op == "call_function":
            values[node.name] = apply(coupling, node, values)
    coupling.settle()
    for (name, index), numbers in list(coupling.axes.items()):  # a parameter of several names shrinks under all of them
        coupling.axes |= {(twin, index): numbers for twin, one in same.items() if one == name}
    return coupling


def blank(value: Any) -> Any:
    return torch.zeros((), dtype=torch.long).expand(tuple(value.shape)) if isinstance(value, Tensor) else value


def _nodes(args: Any) -> list[torch.fx.Node]:
    found: list[torch.fx.Node] = []
    torch.fx.node.map_arg(args, found.append)
    return found


def flat(values: Any) -> Sequence[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple) and not isinstance(value, Parameter):
            found.extend(flat(value))
    return found

"""What each operator of a traced graph does to the channels of its operands. A new operator is a rule and a line here."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .coupling import Coupling, Operation, Parameter, Rows, compact
from .layers import LAYERS, lines_of, shape_of, tensor_of, unknown

__all__ = ["apply"]

#: Run on the numbers themselves.
_MOVES = frozenset(
    """view reshape _unsafe_view flatten unflatten transpose permute t squeeze unsqueeze expand expand_as slice select narrow
    cat concat stack chunk split split_with_sizes tensor_split unbind index_select roll flip pad constant_pad_nd movedim
    swapaxes tile repeat repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle getitem""".split()  # noqa: SIM905
)
_SPLITS = frozenset(("view", "reshape", "_unsafe_view", "unflatten"))
_CHUNKS = frozenset(("chunk", "split", "split_with_sizes", "tensor_split"))
#: The value goes on as it is.
_SAME = frozenset(
    """dropout feature_dropout alpha_dropout clone contiguous detach alias to _to_copy type_as float half lift_fresh_copy
    identity cumsum""".split()  # noqa: SIM905
)
_SPATIAL = ("_pool1d", "_pool2d", "_pool3d", "upsample_", "grid_sampler")
_TRANSCENDENTAL = ("gelu", "sigmoid", "tanh", "exp", "silu", "erf", "softplus", "mish", "elu")
_REDUCTIONS = frozenset(
    "mean sum amax amin max min logsumexp var std prod any all norm linalg_vector_norm argmax argmin".split()  # noqa: SIM905
)


def apply(coupling: Coupling, node: torch.fx.Node, values: dict[str, Any]) -> Any:
    """The channels of a node's result, in its own shape."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    name = getattr(packet, "__name__", str(packet)).rstrip("_")
    args: Any = torch.fx.node.map_arg(node.args, lambda n: values[n.name])
    kwargs: Any = torch.fx.node.map_arg(node.kwargs, lambda n: values[n.name])
    stack = list(node.meta.get("nn_module_stack", {}).values())
    module = str(stack[-1][0]) if stack else ""
    rule = LAYERS.get(name)
    if rule is not None:
        result = rule(coupling, node, module, args, kwargs)
    elif name in _MOVES:
        result = _move(coupling, node, name, module, args, kwargs)
    elif name in _SAME:
        result = tensor_of(coupling, args[0])
    elif name.startswith(("softmax", "log_softmax", "_softmax", "_log_softmax")):
        result = tensor_of(coupling, args[0])
        if args[1] % result.ndim in coupling.varying(result):
            coupling.reduced.append(result)
    elif any(part in name for part in _SPATIAL):
        result = _spatial(coupling, node, args)
    elif name in _REDUCTIONS:
        result = _reduce(coupling, node, args, kwargs)
    elif torch.Tag.pointwise in getattr(target, "tags", ()):
        result = _pointwise(coupling, node, module, args, kwargs)
    else:
        result = unknown(coupling, node, name, module, args, kwargs)
    if getattr(packet, "__name__", "").endswith("_") and node.args and isinstance(node.args[0], torch.fx.Node):
        values[node.args[0].name] = result  # it computes in place
    return _compact(result)


def _compact(result: Any) -> Any:
    """Numbers that do not differ along an axis need no memory along it, and no time."""
    if isinstance(result, list | tuple):
        return [_compact(part) for part in result]
    return compact(result) if isinstance(result, Tensor) else result


def _move(coupling: Coupling, node: torch.fx.Node, name: str, module: str, args: Any, kwargs: Any) -> Any:
    if name == "getitem":
        return args[0][args[1]]
    if any(isinstance(a, Parameter) for a in [*args[1:], *kwargs.values()]):  # a stored index, not channels
        return unknown(coupling, node, name, module, args, kwargs)
    moved = [tensor_of(coupling, a) if isinstance(a, Parameter) else a for a in args]
    if name in _SPLITS:
        moved[0] = moved[0].contiguous()  # numbers that were spread lie otherwise in memory than the values did
    if name in ("cat", "concat", "stack"):
        moved[0] = [tensor_of(coupling, a) for a in moved[0]]
    before = coupling.varying(moved[0]) if isinstance(moved[0], Tensor) else []
    if name == "pad":
        moved, kwargs = [moved[0], moved[1]], {}  # mirrored or not, channels are not padded
    target: Any = node.target
    result = target(*moved, **kwargs)
    if name in _SPLITS:
        after = coupling.varying(result)
        if len(after) > len(before):
            _note_rows(coupling, result, after, module)
            result = coupling.find(result)
    if name in _CHUNKS:
        axis = int(args[2]) if len(args) > 2 else int(kwargs.get("dim", 0))
        parts = list(result)
        if axis % moved[0].ndim in before and len({p.shape for p in parts}) == 1:
            coupling.rows.append(Rows(torch.stack([coupling.along(p, axis) for p in parts])))
    return result


def _note_rows(coupling: Coupling, result: Tensor, varying: list[int], module: str) -> None:
    """A reshape spread channels over several axes: each line along the last must lose as many, or goes whole."""
    lines = result[tuple(slice(None) if k in varying else 0 for k in range(result.ndim))]
    rows = Rows(coupling.find(lines.reshape(-1, lines.shape[-1])), module)
    coupling.split.append(rows)
    if coupling.heads:
        coupling.unite(rows.channels, rows.channels[:, :1])
    else:
        coupling.rows.append(rows)


def _pointwise(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Tensor:
    shape = shape_of(node)
    found = torch.zeros((), dtype=torch.long).expand(shape)
    for numbers in _without_gates(coupling, _operands(coupling, [*args, *kwargs.values()]), len(shape)):
        found = coupling.find(numbers).expand(shape) if not bool(found.any()) else coupling.unite(found, numbers)
    if len(shape) in (2, 3):  # behind a convolution it costs nothing: runtimes fuse it
        kind = "transcendental" if any(part in str(node.target) for part in _TRANSCENDENTAL) else "pointwise"
        coupling.operations.append(Operation(kind, lines_of(coupling, found), (math.prod(shape),), module))
    return found


def _operands(coupling: Coupling, values: list[Any]) -> list[Tensor]:
    each = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return [
        tensor_of(coupling, one)
        for one in each
        if isinstance(one, Parameter) or (isinstance(one, Tensor) and one.dtype == torch.long)
    ]


def _without_gates(coupling: Coupling, operands: list[Tensor], rank: int) -> list[Tensor]:
    """Operands whose channels go with those of the result. What is 1 wide where others hold channels, a scalar or a map that
    all channels are multiplied by, has one channel of its own, and binds nothing."""
    spread = [{rank - numbers.ndim + k for k in coupling.varying(numbers)} for numbers in operands]
    wide = set().union(*spread)

    def gates(numbers: Tensor) -> bool:
        axes = [k - rank + numbers.ndim for k in wide]
        return any(k < 0 or numbers.shape[k] == 1 for k in axes)

    channels = [numbers for numbers in operands if not gates(numbers)]
    if not channels:  # each is wide where the other is not
        return operands
    for numbers, axes in zip(operands, spread, strict=True):
        if axes and gates(numbers):
            coupling.fix(coupling.find(numbers), "other channels are multiplied by it")
    return channels


def _spatial(coupling: Coupling, node: torch.fx.Node, args: Any) -> Any:
    """Pooling and resizing keep channels, and mix what lies behind their axis."""
    x = tensor_of(coupling, args[0])
    value = node.meta["val"]
    shape = tuple((value[0] if isinstance(value, list | tuple) else value).shape)
    extents = {"1d": 1, "2d": 2, "3d": 3}
    space = next((n for part, n in extents.items() if part in str(node.target)), x.ndim - 2)
    front = coupling.find(x).flatten(x.ndim - space)
    if not bool((front == front[..., :1]).all()):
        coupling.fix(front, "its channels are pooled together")
        front = torch.zeros_like(front)
    numbers = front[..., 0].reshape(*x.shape[: x.ndim - space], *[1] * space).expand(shape)
    return [numbers, torch.zeros(shape, dtype=torch.long)] if isinstance(value, list | tuple) else numbers


def _reduce(coupling: Coupling, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
    x = coupling.find(tensor_of(coupling, args[0]))
    value = node.meta["val"]
    shape = tuple((value[0] if isinstance(value, list | tuple) else value).shape)
    given = args[2] if "norm" in str(node.target) and len(args) > 2 else args[1] if len(args) > 1 else kwargs.get("dim")
    if given is None or (isinstance(given, list | tuple) and not given):
        dims = list(range(x.ndim))
    elif isinstance(given, Tensor | float):  # max(x, y) is pointwise
        return _pointwise(coupling, node, "", args, kwargs)
    else:
        dims = [d % x.ndim for d in ([given] if isinstance(given, int) else given)]
    high, low = x.amax(dims), x.amin(dims)
    if set(dims) & set(coupling.varying(x)):
        coupling.reduced.append(x)
    name = str(getattr(node.target, "overloadpacket", node.target))
    placed = isinstance(value, list | tuple) and any(user.args[1:] == (1,) for user in node.users)
    if (placed or ".arg" in name) and set(dims) & set(coupling.varying(x)):
        coupling.fix(x, "its place among the channels is an answer")
    numbers = torch.where(high == low, high, 0).reshape(shape)
    return [numbers, torch.zeros(shape, dtype=torch.long)] if isinstance(value, list | tuple) else numbers

"""What each operator of a traced graph does to the channels of its operands. A new operator is a rule and a line here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .coupling import Coupling, Operation, Rows, _blank, _flat, _Parameter

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
    rule = _RULES.get(name)
    if rule is not None:
        result = rule(coupling, node, module, args, kwargs)
    elif name in _MOVES:
        result = _move(coupling, node, name, module, args, kwargs)
    elif name in _SAME:
        result = _tensor(coupling, args[0])
    elif name.startswith(("softmax", "log_softmax", "_softmax", "_log_softmax")):
        result = _tensor(coupling, args[0])
        if args[1] % result.ndim in coupling.varying(result):
            coupling.normalised.append(result)
    elif any(part in name for part in _SPATIAL):
        result = _spatial(coupling, node, args)
    elif name in _REDUCTIONS:
        result = _reduce(coupling, node, args, kwargs)
    elif torch.Tag.pointwise in getattr(target, "tags", ()):
        result = _pointwise(coupling, node, module, args, kwargs)
    else:
        result = _unknown(coupling, node, name, module, args, kwargs)
    if getattr(packet, "__name__", "").endswith("_") and node.args and isinstance(node.args[0], torch.fx.Node):
        values[node.args[0].name] = result  # it computes in place
    return result


def _tensor(coupling: Coupling, value: Any) -> Tensor:
    return coupling.whole(value.name) if isinstance(value, _Parameter) else value


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _given(node: torch.fx.Node) -> tuple[int, ...]:
    """Shape of the first operand."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    return _shape(source)


def _unknown(coupling: Coupling, node: torch.fx.Node, name: str, module: str, args: Any, kwargs: Any) -> Any:
    """An operator without a rule keeps what it reads; one that reads no tensor has no channels."""
    why = f"{module or 'the model'} runs aten.{name} on it, which pruning cannot follow"
    for value in _flat([*args, *kwargs.values()]):
        coupling.fix(coupling.find(value), why)
    for value in [*args, *kwargs.values()]:
        for parameter in value if isinstance(value, list | tuple) and not isinstance(value, _Parameter) else [value]:
            if isinstance(parameter, _Parameter):
                for axis in range(coupling.state[parameter.name].ndim):
                    coupling.fix(coupling.axis(parameter.name, axis), why)
    found = node.meta.get("val")
    return [_blank(v) for v in found] if isinstance(found, list | tuple) else _blank(found)


def _move(coupling: Coupling, node: torch.fx.Node, name: str, module: str, args: Any, kwargs: Any) -> Any:
    if name == "getitem":
        return args[0][args[1]]
    moved = [_tensor(coupling, a) if isinstance(a, _Parameter) else a for a in args]
    if name in _SPLITS:
        moved[0] = moved[0].contiguous()  # numbers that were spread lie otherwise in memory than the values did
    if name in ("cat", "concat", "stack"):
        moved[0] = [_tensor(coupling, a) for a in moved[0]]
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
    shape = _shape(node)
    found = torch.zeros(shape, dtype=torch.long)
    for value in [*args, *kwargs.values()]:
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, _Parameter) or (isinstance(one, Tensor) and one.dtype == torch.long):
                numbers = _tensor(coupling, one)
                found = coupling.find(numbers).expand(shape) if not bool(found.any()) else coupling.unite(found, numbers)
    if len(shape) in (2, 3):  # behind a convolution it costs nothing: runtimes fuse it
        kind = "transcendental" if any(part in str(node.target) for part in _TRANSCENDENTAL) else "pointwise"
        coupling.operations.append(Operation(kind, _lines(coupling, found), (math.prod(shape),), module))
    return found


def _lines(coupling: Coupling, numbers: Tensor) -> tuple[Tensor, ...]:
    """The channels along the axes that they vary along."""
    varying = coupling.varying(numbers)
    if not varying:
        return ()
    return (numbers[tuple(slice(None) if k in varying else 0 for k in range(numbers.ndim))].flatten(),)


def _spatial(coupling: Coupling, node: torch.fx.Node, args: Any) -> Any:
    """Pooling and resizing keep channels, and mix what lies behind their axis."""
    x = _tensor(coupling, args[0])
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
    x = coupling.find(_tensor(coupling, args[0]))
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
        coupling.normalised.append(x)
    numbers = torch.where(high == low, high, 0).reshape(shape)
    return [numbers, torch.zeros(shape, dtype=torch.long)] if isinstance(value, list | tuple) else numbers


def _spread(numbers: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """(n,) along ``axis`` of a tensor of ``shape``."""
    view = [1] * len(shape)
    view[axis] = len(numbers)
    return numbers.reshape(view).expand(shape)


def _plain(coupling: Coupling, weight: Any) -> bool:
    return isinstance(weight, _Parameter)


def _linear(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    x, weight = _tensor(coupling, args[0]), args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if not _plain(coupling, weight) or isinstance(args[0], _Parameter):
        return _unknown(coupling, node, "linear", module, args, kwargs)
    shape = _shape(node)
    inputs = coupling.bind(coupling.along(x, -1), coupling.axis(weight.name, 1), f"{module} reads what cannot shrink")
    outputs = coupling.axis(weight.name, 0)
    if isinstance(bias, _Parameter):
        outputs = coupling.unite(outputs, coupling.axis(bias.name, 0))
    coupling.operations.append(Operation("linear", (inputs, outputs), (math.prod(shape[:-1]), len(shape)), module))
    return _spread(outputs, shape, -1)


def _convolution(transposed: bool, space: int) -> Callable[..., Any]:
    def rule(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
        x, weight = _tensor(coupling, args[0]), args[1]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        groups = int(args[6]) if len(args) > 6 else int(kwargs.get("groups", 1))
        if not _plain(coupling, weight):
            return _unknown(coupling, node, "convolution", module, args, kwargs)
        if transposed and groups > 1:
            return _unknown(coupling, node, "conv_transpose with groups", module, args, kwargs)
        given = coupling.along(x, x.ndim - space - 1)
        outputs = coupling.axis(weight.name, 1 if transposed else 0)
        if isinstance(bias, _Parameter):
            outputs = coupling.unite(outputs, coupling.axis(bias.name, 0))
        why = f"{module} reads what cannot shrink"
        if groups == 1:
            inputs = coupling.bind(given, coupling.axis(weight.name, 0 if transposed else 1), why)
        elif groups == len(given):  # depthwise: each output follows its input
            outputs = coupling.bind(given.repeat_interleave(len(outputs) // groups), outputs, why)
            inputs = given
        else:  # the columns of a group's weights are its own inputs: the same place goes in every group
            columns = coupling.axis(weight.name, 1)
            for row in given.reshape(groups, -1):
                columns = coupling.bind(row, columns, why)
            inputs = given
            coupling.rows.append(Rows(coupling.find(outputs).reshape(groups, -1)))
        shape, kernel = _shape(node), tuple(coupling.state[weight.name].shape[2:])
        before = _given(node)[-space:]
        stride = args[3] if len(args) > 3 else kwargs.get("stride", 1)
        static = (groups if groups != len(given) else -(len(outputs) // groups), space, *before, *shape[-space:], *kernel)
        kind = "deconvolution" if transposed else "convolution"
        strides = tuple(stride) if isinstance(stride, list | tuple) else (stride,) * space
        coupling.operations.append(Operation(kind, (inputs, outputs), (*static, *strides), module))
        return _spread(outputs, shape, len(shape) - space - 1)

    return rule


def _batch_norm(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    x = _tensor(coupling, args[0])
    numbers = coupling.along(x, 1)
    for value in args[1:5]:
        if isinstance(value, _Parameter):
            numbers = coupling.bind(numbers, coupling.axis(value.name, 0), f"{module} reads what cannot shrink")
    return _spread(numbers, _shape(node), 1)


def _layer_norm(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    x = _tensor(coupling, args[0])
    if len(args[1]) != 1:
        return _unknown(coupling, node, "layer_norm over several axes", module, args, kwargs)
    numbers = coupling.along(x, -1)
    for value in args[2:4]:
        if isinstance(value, _Parameter):
            numbers = coupling.bind(numbers, coupling.axis(value.name, 0), f"{module} reads what cannot shrink")
    coupling.normalised.append(numbers)
    shape = _shape(node)
    coupling.operations.append(Operation("normalisation", (numbers,), (math.prod(shape[:-1]),), module))
    return _spread(numbers, shape, -1)


def _group_norm(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    numbers = coupling.along(_tensor(coupling, args[0]), 1)
    for value in args[2:4]:
        if isinstance(value, _Parameter):
            numbers = coupling.bind(numbers, coupling.axis(value.name, 0), f"{module} reads what cannot shrink")
    if args[1] > 1:
        coupling.rows.append(Rows(coupling.find(numbers).reshape(args[1], -1)))
    coupling.normalised.append(numbers)
    return _spread(numbers, _shape(node), 1)


def _embedding(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    if not _plain(coupling, args[0]):
        return _unknown(coupling, node, "embedding", module, args, kwargs)
    coupling.fix(coupling.axis(args[0].name, 0), "it is a vocabulary")
    return _spread(coupling.axis(args[0].name, 1), _shape(node), -1)


def _matmul(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    """(..., M, K) @ (..., K, N): the channels along K are one; those along M and N go on."""
    a, b = (coupling.find(_tensor(coupling, value)) for value in args[:2])
    if a.ndim < 2 or b.ndim < 2:
        return _unknown(coupling, node, "matmul of a vector", module, args, kwargs)
    shape = _shape(node)
    static = (math.prod(shape[:-2]), *shape[-2:], a.shape[-1])
    coupling.operations.append(Operation("product", _lines(coupling, a) or _lines(coupling, b), static, module))
    inner = a.ndim - 1 in coupling.varying(a), b.ndim - 2 in coupling.varying(b)
    if all(inner):
        coupling.unite(_shrunk(coupling, a, -2), _shrunk(coupling, b, -1))
    elif any(inner):
        coupling.fix(a if inner[0] else b, f"{module or 'the model'} multiplies it by what cannot shrink")
    left = torch.zeros_like(a[..., :1]) if inner[0] else a[..., :1]  # (..., M, 1)
    right = torch.zeros_like(b[..., :1, :]) if inner[1] else b[..., :1, :]  # (..., 1, N)
    if not bool(left.any()) or not bool(right.any()):
        return torch.maximum(left, right).expand(shape)
    if a.ndim - 2 in coupling.varying(left) or b.ndim - 1 in coupling.varying(right):
        why = f"{module or 'the model'} multiplies channels by channels"
        coupling.fix(left, why)
        coupling.fix(right, why)
        return _blank(node.meta["val"])
    return coupling.unite(left[..., :1, :], right[..., :1]).expand(shape)  # whole heads


def _shrunk(coupling: Coupling, numbers: Tensor, axis: int) -> Tensor:
    """One line instead of all along an axis that channels do not vary along; else what stands for them united."""
    first = numbers.select(axis, 0)
    for index in range(1, numbers.shape[axis] if (axis % numbers.ndim) in coupling.varying(numbers) else 1):
        first = coupling.unite(first, numbers.select(axis, index))
    return first


def _attention(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    """Scaled dot products: query and key share channels, the values' go on; all of one head are linked."""
    query, key, value = (coupling.find(_tensor(coupling, a)) for a in args[:3])
    if kwargs.get("enable_gqa") or query.ndim != key.ndim:
        return _unknown(coupling, node, "grouped-query attention", module, args, kwargs)
    q, k, v = (_shrunk(coupling, t, -2) for t in (query, key, value))
    q = coupling.unite(q, k)
    if coupling.heads:
        coupling.unite(q[..., :1], v[..., :1])
    else:
        coupling.normalised.append(q)  # 1 / sqrt(width) changes
    shape, keys = _shape(node), key.shape[-2]
    coupling.operations.append(
        Operation("attention", (*_lines(coupling, q), *_lines(coupling, v)), (*shape[:-1], keys), module)
    )
    return coupling.find(v).unsqueeze(-2).expand(shape)


def _recurrence(gates: int) -> Callable[..., Any]:
    def rule(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
        x, states, weights, biased, layers, _, _, both, batch_first = args[:9]
        if not all(isinstance(w, _Parameter) for w in weights):
            return _unknown(coupling, node, "a recurrence of computed weights", module, args, kwargs)
        count = (4 if biased else 2) * layers * (2 if both else 1)
        if len(weights) != count or not isinstance(x, Tensor):
            return _unknown(coupling, node, "a recurrence with projections", module, args, kwargs)
        per, given, hidden = 4 if biased else 2, coupling.along(x, -1), []
        sizes = _given(node)
        steps = sizes[1] if batch_first else sizes[0]
        for layer in range(layers):
            made = []
            for way in range(2 if both else 1):
                index = (layer * (2 if both else 1) + way) * per
                names = [w.name for w in weights[index : index + per]]
                unit = coupling.axis(names[1], 1)
                inputs = coupling.bind(given, coupling.axis(names[0], 1), f"{module} reads what cannot shrink")
                for gate in (names[0], *names[1:]):
                    coupling.unite(unit.repeat(gates), coupling.axis(gate, 0))
                unit = coupling.find(unit)
                coupling.operations.append(Operation("recurrence", (inputs, unit), (gates, int(steps)), module))
                made.append(unit)
            hidden += made
            given = torch.cat(made)
        stacked = torch.stack(hidden)
        for state in states if isinstance(states, list | tuple) else [states]:
            if isinstance(state, Tensor) and bool(state.any()):
                coupling.unite(coupling.find(state), stacked[:, None])
        if len(hidden) > 1:
            coupling.rows.append(Rows(stacked))
        shapes = [tuple(v.shape) for v in node.meta["val"]]
        last = [stacked[:, None].expand(shape) if len(shape) == 3 else stacked for shape in shapes[1:]]
        return [_spread(given, shapes[0], -1), *last]

    return rule


_Rule = Callable[[Coupling, torch.fx.Node, str, Any, Any], Any]
_RULES: dict[str, _Rule] = {
    "linear": _linear,
    "batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "matmul": _matmul,
    "bmm": _matmul,
    "scaled_dot_product_attention": _attention,
    "lstm": _recurrence(4),
    "gru": _recurrence(3),
    "rnn_tanh": _recurrence(1),
    "rnn_relu": _recurrence(1),
    **{f"conv{n}d": _convolution(False, n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution(True, n) for n in (1, 2, 3)},
}

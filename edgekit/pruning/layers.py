"""Rules of the operators that have weights, or multiply channels: what they bind, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .coupling import Coupling, Operation, Parameter, Rows, blank, flat

__all__ = ["LAYERS", "Rule", "lines_of", "shape_of", "spread", "tensor_of", "unknown"]

Rule = Callable[[Coupling, torch.fx.Node, str, Any, Any], Any]


def tensor_of(coupling: Coupling, value: Any) -> Tensor:
    return coupling.whole(value.name) if isinstance(value, Parameter) else value


def shape_of(node: torch.fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def given_shape(node: torch.fx.Node) -> tuple[int, ...]:
    """Shape of the first operand."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    return shape_of(source)


def unknown(coupling: Coupling, node: torch.fx.Node, name: str, module: str, args: Any, kwargs: Any) -> Any:
    """An operator without a rule keeps what it reads; one that reads no tensor has no channels."""
    why = f"{module or 'the model'} runs aten.{name} on it, which pruning cannot follow"
    for value in flat([*args, *kwargs.values()]):
        coupling.fix(coupling.find(value), why)
    for value in [*args, *kwargs.values()]:
        for parameter in value if isinstance(value, list | tuple) and not isinstance(value, Parameter) else [value]:
            if isinstance(parameter, Parameter):
                for axis in range(coupling.state[parameter.name].ndim):
                    coupling.fix(coupling.axis(parameter.name, axis), why)
    found = node.meta.get("val")
    return [blank(v) for v in found] if isinstance(found, list | tuple) else blank(found)


def lines_of(coupling: Coupling, numbers: Tensor) -> tuple[Tensor, ...]:
    """The channels along the axes that they vary along."""
    varying = coupling.varying(numbers)
    if not varying:
        return ()
    return (numbers[tuple(slice(None) if k in varying else 0 for k in range(numbers.ndim))].flatten(),)


def spread(numbers: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """(n,) along ``axis`` of a tensor of ``shape``."""
    view = [1] * len(shape)
    view[axis] = len(numbers)
    return numbers.reshape(view).expand(shape)


def _linear(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    x, weight = tensor_of(coupling, args[0]), args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if not isinstance(weight, Parameter) or isinstance(args[0], Parameter):
        return unknown(coupling, node, "linear", module, args, kwargs)
    shape = shape_of(node)
    inputs = coupling.bind(coupling.along(x, -1), coupling.axis(weight.name, 1), f"{module} reads what cannot shrink")
    outputs = coupling.made(weight.name)
    if isinstance(bias, Parameter):
        outputs = coupling.unite(outputs, coupling.made(bias.name))
    coupling.operations.append(Operation("linear", (inputs, outputs), (math.prod(shape[:-1]), len(shape)), module))
    return spread(outputs, shape, -1)


def _convolution(transposed: bool, space: int) -> Rule:
    def rule(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
        x, weight = tensor_of(coupling, args[0]), args[1]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        groups = int(args[6]) if len(args) > 6 else int(kwargs.get("groups", 1))
        if not isinstance(weight, Parameter):
            return unknown(coupling, node, "convolution", module, args, kwargs)
        given = coupling.along(x, x.ndim - space - 1)
        depthwise = groups == len(given) and groups > 1
        if transposed and groups > 1 and not (depthwise and coupling.state[weight.name].shape[1] == 1):
            return unknown(coupling, node, "conv_transpose with groups", module, args, kwargs)
        outputs = coupling.made(weight.name, 1 if transposed and not depthwise else 0)
        if isinstance(bias, Parameter):
            outputs = coupling.unite(outputs, coupling.made(bias.name))
        why = f"{module} reads what cannot shrink"
        if groups == 1:
            inputs = coupling.bind(given, coupling.axis(weight.name, 0 if transposed else 1), why)
        elif depthwise:  # each output follows its input
            outputs = coupling.bind(given.repeat_interleave(len(outputs) // groups), outputs, why)
            inputs = given
        else:  # the columns of a group's weights are its own inputs: the same place goes in every group
            columns = coupling.axis(weight.name, 1)
            for row in given.reshape(groups, -1):
                columns = coupling.bind(row, columns, why)
            inputs = given
            coupling.grouped.add((weight.name, 1))
            coupling.rows.append(Rows(coupling.find(outputs).reshape(groups, -1)))
        shape, kernel = shape_of(node), tuple(coupling.state[weight.name].shape[2:])
        before = given_shape(node)[-space:]
        batch = shape[0] if len(shape) > space + 1 else 1  # more than the samples where these are cut into patches
        static = (groups if groups != len(given) else -(len(outputs) // groups), space, *before, *shape[-space:], *kernel)
        stride, dilation = (
            _for_each(args[at] if len(args) > at else kwargs.get(name, 1), space)
            for at, name in ((3, "stride"), (7 if transposed else 5, "dilation"))
        )
        kind = "deconvolution" if transposed else "convolution"
        coupling.operations.append(Operation(kind, (inputs, outputs), (*static, *stride, *dilation, batch), module))
        return spread(outputs, shape, len(shape) - space - 1)

    return rule


def _for_each(value: Any, space: int) -> tuple[int, ...]:
    """A stride or dilation for each of ``space`` axes."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values if len(values) == space else values[:1] * space


def _batch_norm(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    x = tensor_of(coupling, args[0])
    numbers = coupling.along(x, 1)
    for value in args[1:5]:
        if isinstance(value, Parameter):
            numbers = coupling.bind(numbers, coupling.axis(value.name, 0), f"{module} reads what cannot shrink")
    return spread(numbers, shape_of(node), 1)


def _prelu(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    x, weight = tensor_of(coupling, args[0]), args[1]
    if not isinstance(weight, Parameter) or x.ndim < 2:
        return unknown(coupling, node, "prelu", module, args, kwargs)
    if coupling.state[weight.name].numel() == 1:
        return x
    numbers = coupling.bind(coupling.along(x, 1), coupling.axis(weight.name, 0), f"{module} reads what cannot shrink")
    return spread(numbers, shape_of(node), 1)


def _layer_norm(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    x = tensor_of(coupling, args[0])
    if len(args[1]) != 1:
        return unknown(coupling, node, "layer_norm over several axes", module, args, kwargs)
    numbers = coupling.along(x, -1)
    for value in args[2:4]:
        if isinstance(value, Parameter):
            numbers = coupling.bind(numbers, coupling.axis(value.name, 0), f"{module} reads what cannot shrink")
    _counted(coupling, numbers, args)
    shape = shape_of(node)
    coupling.operations.append(Operation("normalisation", (numbers,), (math.prod(shape[:-1]),), module))
    return spread(numbers, shape, -1)


def _counted(coupling: Coupling, numbers: Tensor, args: Any) -> None:
    """A norm counts its channels; by its weight a trial knows which norm it is."""
    known = len(args) > 2 and isinstance(args[2], Parameter)
    (coupling.normalised if known else coupling.reduced).append(numbers)


def _group_norm(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    numbers = coupling.along(tensor_of(coupling, args[0]), 1)
    for value in args[2:4]:
        if isinstance(value, Parameter):
            numbers = coupling.bind(numbers, coupling.axis(value.name, 0), f"{module} reads what cannot shrink")
    if args[1] > 1:
        coupling.rows.append(Rows(coupling.find(numbers).reshape(args[1], -1)))
    _counted(coupling, numbers, args)
    return spread(numbers, shape_of(node), 1)


def _embedding(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    if not isinstance(args[0], Parameter):
        return unknown(coupling, node, "embedding", module, args, kwargs)
    coupling.fix(coupling.axis(args[0].name, 0), "it is a vocabulary")
    return spread(coupling.made(args[0].name, 1), shape_of(node), -1)


def _matmul(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    """(..., M, K) @ (..., K, N): the channels along K are one; those along M and N go on."""
    a, b = (coupling.find(tensor_of(coupling, value)) for value in args[:2])
    if a.ndim < 2 or b.ndim < 2:
        return unknown(coupling, node, "matmul of a vector", module, args, kwargs)
    shape = shape_of(node)
    static = (math.prod(shape[:-2]), *shape[-2:], a.shape[-1])
    inner, columns = (a.ndim - 1 in coupling.varying(a), b.ndim - 2 in coupling.varying(b)), b.ndim - 1 in coupling.varying(b)
    sides = lines_of(coupling, a) or lines_of(coupling, b)
    if columns and coupling.varying(a) and not inner[1]:
        sides = (*sides, coupling.along(b, -1))
    coupling.operations.append(Operation("product", sides, static, module))
    if all(inner):
        coupling.scaled.append(coupling.unite(coupling.merged(a, -2), coupling.merged(b, -1)))
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
        return blank(node.meta["val"])
    return coupling.unite(left[..., :1, :], right[..., :1]).expand(shape)  # whole heads


def _attention(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    """Scaled dot products: query and key share channels, the values' go on; all of one head are linked."""
    query, key, value = (coupling.find(tensor_of(coupling, a)) for a in args[:3])
    if kwargs.get("enable_gqa") or query.ndim != key.ndim:
        return unknown(coupling, node, "grouped-query attention", module, args, kwargs)
    if query.ndim < 3 or 0 in coupling.varying(query):
        return unknown(coupling, node, "attention whose heads are samples", module, args, kwargs)
    q, k, v = (coupling.merged(t, -2) for t in (query, key, value))
    q = coupling.unite(q, k)
    if coupling.heads:
        coupling.unite(q[..., :1], v[..., :1])
    else:
        coupling.scaled.append(q)
    shape, keys = shape_of(node), key.shape[-2]
    static = (shape[0], math.prod(shape[1:-2]), shape[-2], keys)
    coupling.operations.append(Operation("attention", (q[0].flatten(), v[0].flatten()), static, module))
    return coupling.find(v).unsqueeze(-2).expand(shape)


def _recurrence(gates: int) -> Rule:
    def rule(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
        x, states, weights, biased, layers, _, _, both, batch_first = args[:9]
        if not all(isinstance(w, Parameter) for w in weights):
            return unknown(coupling, node, "a recurrence of computed weights", module, args, kwargs)
        count = (4 if biased else 2) * layers * (2 if both else 1)
        if len(weights) != count or not isinstance(x, Tensor):
            return unknown(coupling, node, "a recurrence with projections", module, args, kwargs)
        per, given, hidden = 4 if biased else 2, coupling.along(x, -1), []
        sizes = given_shape(node)
        batch, steps = (1, *sizes)[-3:-1] if batch_first or len(sizes) < 3 else sizes[1::-1]
        for layer in range(layers):
            made = []
            for way in range(2 if both else 1):
                index = (layer * (2 if both else 1) + way) * per
                names = [w.name for w in weights[index : index + per]]
                unit = coupling.axis(names[1], 1)
                inputs = coupling.bind(given, coupling.axis(names[0], 1), f"{module} reads what cannot shrink")
                for gate in (names[0], *names[1:]):
                    coupling.unite(unit.repeat(gates), coupling.made(gate))
                unit = coupling.find(unit)
                coupling.operations.append(Operation("recurrence", (inputs, unit), (gates, int(steps), int(batch)), module))
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
        return [spread(given, shapes[0], -1), *last]

    return rule


def _glu(coupling: Coupling, node: torch.fx.Node, module: str, args: Any, kwargs: Any) -> Any:
    """The first half times the sigmoid of the second: channels of both go together."""
    first, second = tensor_of(coupling, args[0]).chunk(2, args[1] if len(args) > 1 else kwargs.get("dim", -1))
    return coupling.bind(second, coupling.bind(first, second, f"{module} gates what cannot shrink"), f"{module} gates it")


LAYERS: dict[str, Rule] = {
    "linear": _linear,
    "batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    "prelu": _prelu,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "glu": _glu,
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

"""LSTM and GRU of ONNX in PyTorch: gates reordered, both directions, torch's own kernels wherever they compute the same."""

from __future__ import annotations

from edgekit.errors import MissingExtra

from .torch_operators import Call

try:
    import torch
    from torch import Tensor
except ImportError:
    raise MissingExtra("train", "torch") from None

__all__ = ["RECURRENT"]

#: ONNX has input, output, forget, cell and update, reset, hidden; torch has input, forget, cell, output and reset, update, new.
_LSTM_ORDER, _GRU_ORDER = [0, 2, 3, 1], [1, 0, 2]
_DEFAULT = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"]}


def _lstm(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x (T, N, inputs), w (directions, 4 H, inputs) -> y (T, directions, N, H), last h and c (directions, N, H)."""
    if peepholes is not None or call.get("input_forget", 0):
        raise call.refuse("peepholes or coupled gates")
    _check(call, x, lengths)
    h, c = _state(h, x, r), _state(c, x, r)
    ys, hs, cs = [], [], []
    for i, backward in enumerate(_directions(call)):
        weights = _weights(w[i], r[i], None if b is None else b[i], _LSTM_ORDER)
        steps = x.flip(0) if backward else x
        y, last, cell = torch.lstm(steps, [h[i : i + 1], c[i : i + 1]], weights, b is not None, 1, 0.0, False, False, False)
        ys.append(y.flip(0) if backward else y)
        hs.append(last)
        cs.append(cell)
    return torch.stack(ys, 1), torch.cat(hs), torch.cat(cs)


def _gru(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x (T, N, inputs), w (directions, 3 H, inputs) -> y (T, directions, N, H), last h (directions, N, H)."""
    _check(call, x, lengths)
    h = _state(h, x, r)
    ys, hs = [], []
    for i, backward in enumerate(_directions(call)):
        weights = _weights(w[i], r[i], None if b is None else b[i], _GRU_ORDER)
        steps = x.flip(0) if backward else x
        if call.get("linear_before_reset", 0):
            y, last = torch.gru(steps, h[i : i + 1], weights, b is not None, 1, 0.0, False, False, False)
        else:
            y, last = _gru_reset_first(steps, h[i], weights)
        ys.append(y.flip(0) if backward else y)
        hs.append(last)
    return torch.stack(ys, 1), torch.cat(hs)


def _gru_reset_first(x: Tensor, h: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The older form, which torch lacks: the reset gate acts on h before the matrix does. h (N, H)."""
    w, r, *biases = weights
    b, rb = biases or [x.new_zeros(len(w))] * 2
    inputs, (size, outputs) = x @ w.T + b, (h.shape[1], [])
    for step in inputs:
        gates = torch.sigmoid(step[:, : 2 * size] + h @ r[: 2 * size].T + rb[: 2 * size])
        reset, update = gates.chunk(2, 1)
        new = torch.tanh(step[:, 2 * size :] + (reset * h) @ r[2 * size :].T + rb[2 * size :])
        h = (1 - update) * new + update * h
        outputs.append(h)
    return torch.stack(outputs), h[None]


def _directions(call: Call) -> list[bool]:
    """Whether each direction runs backward."""
    return {"reverse": [True], "bidirectional": [False, True]}.get(call.get("direction", "forward"), [False])


def _state(state: Tensor | None, x: Tensor, r: Tensor) -> Tensor:
    return x.new_zeros(r.shape[0], x.shape[1], r.shape[2]) if state is None else state.expand(-1, x.shape[1], -1).contiguous()


def _weights(w: Tensor, r: Tensor, b: Tensor | None, order: list[int]) -> list[Tensor]:
    """One direction's weights as torch wants them: gates in its order, both biases apart."""
    parts = [w, r] if b is None else [w, r, *b.chunk(2)]
    size = r.shape[1]
    return [torch.cat([part[i * size : (i + 1) * size] for i in order]) for part in parts]


def _check(call: Call, x: Tensor, lengths: Tensor | None) -> None:
    functions = [f.decode().lower() for f in call.attributes.get("activations", [])]
    default = _DEFAULT[call.op]
    if functions and functions != default * (len(functions) // len(default)):
        raise call.refuse(f"the activations {', '.join(functions)}")
    for name in ("clip", "layout"):
        if call.get(name, 0):
            raise call.refuse(name)
    if lengths is not None and not bool((lengths == x.shape[0]).all()):
        raise call.refuse("sequences of several lengths in a batch")


RECURRENT = {"GRU": _gru, "LSTM": _lstm}

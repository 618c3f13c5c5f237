"""2:4 structured sparsity: in every four consecutive input channels two weights are zero (NVIDIA Ampere and later).

Magnitude masks, kept through fine-tuning (Mishra et al., arXiv:2104.08378), behind an order of the channels that loses least
(`permutation`). TensorRT uses the pattern where ``SPARSE_WEIGHTS`` is set and the layer is bound by arithmetic; ONNX Runtime
gains nothing from it. Recurrent layers, grouped and transposed convolutions stay dense: TensorRT has no sparse kernels for
them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from edgekit.errors import GoldenError, MissingExtra, UsageError

try:
    import onnx
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtra("train", error.name or "torch") from None

from edgekit.graphs.sparsity import dense_layers
from edgekit.graphs.sparsity import is_24 as is_24_array
from edgekit.progress import say

from .permutation import permutation, retained

__all__ = [
    "Channels", "Mask24", "check_exported", "is_24", "maskable", "permutation", "permute_channels", "permuted", "reorder",
    "retained_24",
]  # fmt: skip

_SAME = 1e-4  # of the largest answer: sums in another order

#: For each channel of a group: (parameter or buffer, axis) -> the indices along it that are the channel's.
Channels = Sequence[Mapping[tuple[str, int], Sequence[int]]]


def is_24(weight: Tensor) -> bool:
    """Whether (O, I, ...) has at least two zeros in every four consecutive input channels."""
    return is_24_array((weight.detach() != 0).cpu().numpy())  # numpy knows no bfloat16


def maskable(module: nn.Module, example: Tensor | None = None) -> dict[str, Tensor]:
    """Names in the state dict, and weights, of every layer that TensorRT can run 2:4; weights that layers share once.

    These are Conv1d, Conv2d of one group and Linear whose input channels divide by four: not a first layer of 1 or 3.
    ``example`` (N, ...): without those that do not run on it, which no graph will hold.
    """
    found: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        weight = layer._parameters.get("weight")
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear) or not isinstance(weight, nn.Parameter):
            continue
        shared = any(weight is other for other in found.values())
        if getattr(layer, "groups", 1) == 1 and weight.ndim > 1 and weight.shape[1] % 4 == 0 and not shared:
            found[f"{name}.weight" if name else "weight"] = weight
    return found if example is None else _running(found, module, example)


def _running(weights: dict[str, Tensor], module: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """Those that the answer depends on."""
    wanting = [weight.requires_grad for weight in weights.values()]
    for weight in weights.values():
        weight.requires_grad_()
    with torch.enable_grad():
        answer = module.eval()(example).sum()
        gradients = torch.autograd.grad(answer, list(weights.values()), allow_unused=True)
    for weight, wanted in zip(weights.values(), wanting, strict=True):
        weight.requires_grad_(wanted)
    return {name: weights[name] for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}


class Mask24:
    """Masks for every layer of `maskable`, from their weights as they are; call it to apply them.

    ``layers``: name, weight, mask of its shape. ``weights``: the weights' names in the state dict.
    """

    def __init__(self, module: nn.Module, example: Tensor | None = None) -> None:
        self.layers: list[tuple[str, Tensor, Tensor]] = []
        self.weights = maskable(module, example)
        for name, weight in self.weights.items():
            self.layers.append((name.rpartition(".")[0], weight, _mask(weight.detach())))

    @torch.no_grad()
    def __call__(self) -> None:
        """Zero what the masks say, in place."""
        for _, weight, mask in self.layers:
            weight.mul_(mask.to(weight.device))

    @property
    def share(self) -> float:
        """Share of the masked layers' weights that are zero."""
        total = sum(weight.numel() for _, weight, _ in self.layers)
        zeros = sum(int((mask == 0).sum()) for _, _, mask in self.layers)
        return zeros / total if total else 0.0


def _mask(weight: Tensor) -> Tensor:
    """1 for the two largest of every four along the input channels, else 0; shape of ``weight``."""
    last = weight.abs().movedim(1, -1)
    fours = last.reshape(-1, 4)
    mask = torch.zeros_like(fours).scatter_(1, fours.topk(2, dim=1).indices, 1.0)
    return mask.reshape(last.shape).movedim(-1, 1).contiguous()


def check_exported(graph: bytes, mask: Mask24) -> dict[str, Any]:
    """Verify that an exported ONNX graph holds the pattern of ``mask``, whose module it was made from.

    Returns ``layers`` (2:4 ones), ``of`` (all that could be), ``share`` (zeros among the weights of the 2:4 ones). Raises
    `GoldenError` where fewer weights of the graph are 2:4 than were masked.
    """
    layers = dense_layers(onnx.load_model_from_string(graph))
    sparse = {layer.weight: layer for layer in layers if layer.sparse}
    if len(sparse) < len(mask.layers):
        dense = [f"{layer.name} ({layer.op})" for layer in layers if not layer.sparse]
        raise GoldenError(
            f"the exported graph has {len(sparse)} weights with the 2:4 pattern, {len(mask.layers)} were masked; dense there: "
            f"{', '.join(dense[:5]) or 'none, so the exporter left layers out'}",
            "report this with the model: the exporter changed its weights",
        )
    sizes = {name: float(torch.Size(layer.shape).numel()) for name, layer in sparse.items()}
    zeros = sum(size * sparse[name].zeros for name, size in sizes.items())
    return {
        "layers": sum(layer.sparse for layer in layers),
        "of": len(layers),
        "share": round(zeros / max(sum(sizes.values()), 1.0), 6),
    }


def reorder(state: Mapping[str, Tensor], channels: Channels, order: Sequence[int]) -> dict[str, Tensor]:
    """A copy of a state dict in which channel i of a group lies where channel ``order[i]`` lay, in all that belongs to it.

    ``channels``: those of the group. What does not belong to it is the same tensor as before. A module whose groups are whole
    answers as it did. Raises `UsageError` for an order that is no permutation of the channels, and for a channel that has
    other entries than the rest, or other numbers of indices.
    """
    wanted = [int(i) for i in order]
    if sorted(wanted) != list(range(len(channels))):
        raise UsageError(f"{wanted[:8]} is no order of {len(channels)} channels", "give each channel's number once")
    new = dict(state)
    for key in dict.fromkeys(key for channel in channels for key in channel):
        name, axis = key
        slots = [list(channel.get(key, ())) for channel in channels]
        if name not in state or len({len(slot) for slot in slots}) != 1:
            raise UsageError(
                f"the channels do not all have as many indices of {name!r}, axis {axis}",
                "only channels that are alike can move",
            )
        index = torch.arange(state[name].shape[axis])
        target = torch.tensor(slots).ravel()
        index[target] = torch.tensor([slots[i] for i in wanted]).ravel()
        new[name] = new[name].index_select(axis, index.to(new[name].device))
    return new


def permuted(state: Mapping[str, Tensor], channels: Channels, masked: Collection[str], *, seed: int = 0) -> dict[str, Tensor]:
    """A copy of a state dict with the channels of one group in the order in which most magnitude stays under 2:4.

    ``masked``: the names of the weights that will be masked, as `maskable` gives them; those that read the group's channels
    on axis 1 judge. Where no order is better, for all of them together, the state is as it was. Deterministic by ``seed``.
    """
    readers = [name for name in masked if any((name, 1) in channel for channel in channels)]
    if readers:
        channels = sorted(channels, key=lambda channel: min(channel.get((readers[0], 1), (0,))))
    rows = [matrix for name in readers for matrix in _rows(state, channels, name)]
    if not rows:
        return dict(state)
    new = reorder(state, channels, permutation(rows, seed=seed).tolist())
    return new if retained_24(new, readers) > retained_24(state, readers) else dict(state)


def permute_channels(module: nn.Module, groups: Iterable[Channels], example: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Permute the channels of every group so that masks keep most magnitude; weights and buffers change in place.

    ``example``: inputs (N, ...) on which the module must answer as before, within float32's rounding: a group that changes
    its answers was not whole, is put back, and that is said. Returns ``groups`` (how many moved) and the share of the
    maskable magnitude that 2:4 retains, ``before`` and ``after``.
    """
    training = module.training
    module.eval()
    masked = maskable(module)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    before, moved = retained_24(state, masked), 0
    with torch.no_grad():
        wanted = module(example)
        for i, channels in enumerate(groups):
            new = permuted(state, channels, masked, seed=seed)
            if all(new[name] is value for name, value in state.items()):
                continue
            module.load_state_dict(new)
            if float((module(example) - wanted).abs().max()) <= _SAME * max(float(wanted.abs().max()), _SAME):
                state, moved = new, moved + 1
            else:
                say(f"note: the order of channel group {i} matters to the model: it stays as it is")
        module.load_state_dict(state)
    module.train(training)
    return {"groups": moved, "before": before, "after": retained_24(state, masked)}


def retained_24(state: Mapping[str, Tensor], masked: Collection[str]) -> float:
    """Share of the named weights' magnitude that masks keep; 1 for none."""
    return retained([_matrix(state[name]) for name in masked])


def _matrix(weight: Tensor) -> Tensor:
    """(O, I, ...) -> (rows, I)."""
    return weight.detach().movedim(1, -1).reshape(-1, weight.shape[1])


def _rows(state: Mapping[str, Tensor], channels: Channels, name: str) -> list[Tensor]:
    """The weights that read the group, (rows, C) each: one matrix for each index that a channel owns, where their fours are
    those of the layer. A channel that owns neighbours (flattened pictures) moves whole fours, or shares them unevenly."""
    slots = [channel.get((name, 1), ()) for channel in channels]
    if len(channels) % 4 or len({len(slot) for slot in slots}) != 1:
        return []
    matrix = _matrix(state[name])
    every = [list(columns) for columns in zip(*slots, strict=True)]
    return [matrix[:, some] for some in every if some[0] % 4 == 0 and some == [*range(some[0], some[0] + len(some))]]

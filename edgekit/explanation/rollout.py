"""Attention rollout: where each token's information comes from, through all blocks (Abnar and Zuidema 2020, arXiv:2005.00928).

It follows attention and residuals alone, so it has no sign and no class: it shows what is looked at, not what it speaks for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.errors import MissingExtra, UsageError
from edgekit.models.module import load

from .images import ImageQuestion
from .question import Attribution, Question
from .texts import TextQuestion

try:
    import torch
    from torch import Tensor
    from torch.nn import functional

    from edgekit.models.transformer import Block, TextTransformer, Vit
except ImportError as error:
    raise MissingExtra("train", error.name or "torch") from None

__all__ = ["attribute"]


def attribute(question: Question) -> Attribution:
    """Heat: the share of each patch or word in what the classifier reads (the mean over tokens), from the lowest up.

    Raises `UsageError` where the bundle's model is none of the transformer presets.
    """
    module = load(question.model.bundle)
    attentions: list[Tensor] = []
    grids: list[tuple[int, int]] = []
    handles = [h for block in module.modules() if isinstance(block, Block) for h in _watch(block, attentions)]
    if not handles or not isinstance(module, Vit | TextTransformer):
        raise UsageError(
            "the model has no attention blocks of the presets vit and transformer-text", "use --method occlusion or lime"
        )
    if isinstance(module, Vit):
        handles.append(module.stem.register_forward_hook(lambda _, __, maps: grids.append(tuple(maps.shape[2:]))))
    x = torch.from_numpy(question.x)
    try:
        with torch.no_grad():
            module(x)
    finally:
        for handle in handles:
            handle.remove()
    flow = _rollout(attentions)  # (T, T)
    read = x[0] != module.pad if isinstance(module, TextTransformer) else torch.ones(len(flow), dtype=torch.bool)
    shares = flow[read].mean(0)  # (T,)
    figures = {"blocks": len(attentions), "tokens": int(read.sum())}
    if isinstance(question, TextQuestion):
        heat = np.array([float(shares[word.tokens].sum()) for word in question.words], np.float32)
        return Attribution(heat - heat.min(), figures)
    assert isinstance(question, ImageQuestion)
    (grid,) = grids
    patches = (shares - shares.min()).reshape(1, 1, *grid)
    heat = functional.interpolate(patches, question.size, mode="bilinear")[0, 0].numpy().astype(np.float32)
    return Attribution(heat, {**figures, "map": list(grid)})


def _watch(block: Block, attentions: list[Tensor]) -> list[Any]:
    """Hooks that add the attention of each run, the mean over its heads (T, T), to ``attentions``."""
    seen: dict[str, Tensor] = {}

    def attention(_: Any, arguments: tuple[Tensor | None, ...], __: Any) -> None:
        query, key = block._split(seen["query"]), block._split(seen["key"])  # (1, heads, T, width / heads)
        logits = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
        bias = arguments[1] if len(arguments) > 1 else None
        attentions.append((logits if bias is None else logits + bias).softmax(3)[0].mean(0))

    def keep(name: str) -> Any:
        return lambda _, __, output: seen.__setitem__(name, output)

    return [
        block.query.register_forward_hook(keep("query")),
        block.key.register_forward_hook(keep("key")),
        block.register_forward_hook(attention),
    ]


def _rollout(attentions: list[Tensor]) -> Tensor:
    """(T, T) of each block, first to last -> (T, T): row i is where what ends in token i came from; rows sum to 1."""
    flow = torch.eye(len(attentions[0]))
    for attention in attentions:
        flow = (attention + torch.eye(len(attention))) / 2 @ flow  # half goes by the residual
    return flow

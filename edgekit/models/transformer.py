"""Transformer presets: a compact ViT for pictures and an encoder for text. Pre-norm blocks (Xiong et al., arXiv:2002.04745).

Query, key and value are three layers, not one: so heads can be pruned and each weight quantizes on its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rnn import masked_mean

__all__ = ["Block", "TextTransformer", "Vit"]


class Block(nn.Module):
    """Self-attention and an MLP of ``ratio`` times the width, each behind a LayerNorm and beside a residual."""

    def __init__(self, width: int, heads: int, ratio: float = 2.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.project = nn.Linear(width, width)
        self.mlp1, self.mlp2 = nn.Linear(width, int(ratio * width)), nn.Linear(int(ratio * width), width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, T, width) -> the same; ``bias`` (N, 1, 1, T) is added to the attention's logits (a mask)."""
        y = self.norm1(x)
        query, key, value = (
            self._split(layer(y)) for layer in (self.query, self.key, self.value)
        )  # (N, heads, T, width / heads)
        y = F.scaled_dot_product_attention(query, key, value, bias)
        y = y.transpose(1, 2).flatten(2)  # (N, T, width)
        x = x + F.dropout(self.project(y), self.dropout, self.training)
        y = self.mlp2(F.gelu(self.mlp1(self.norm2(x))))
        return x + F.dropout(y, self.dropout, self.training)

    def _split(self, x: Tensor) -> Tensor:
        count, steps, width = x.shape
        return x.view(count, steps, self.heads, width // self.heads).transpose(
            1, 2
        )  # (N, T, width) -> (N, heads, T, width / heads)


class Vit(nn.Module):
    """Compact vision transformer with a convolutional stem, which learns from little data (arXiv:2106.14881, 2104.05704).

    The stem halves the picture twice up to 48 px (28 px: 49 tokens), three times up to 112, four times above.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 1,
        height: int = 28,
        width: int = 28,
        dim: int = 96,
        depth: int = 3,
        heads: int = 3,
    ) -> None:
        super().__init__()
        side = min(height, width)
        halvings = 2 if side <= 48 else 3 if side <= 112 else 4
        layers: list[nn.Module] = []
        inputs = channels
        for i in range(halvings):
            outputs = dim // 2 ** (halvings - 1 - i)
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.stem = nn.Sequential(*layers)
        with torch.no_grad():
            tokens = self.stem.eval()(torch.zeros(1, channels, height, width)).flatten(2).shape[2]
        self.stem.train()
        self.position = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout=0.1) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.position  # (N, C, H, W) -> (N, tokens, dim)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(self.norm(x).mean(1))  # (N, classes)
        return logits


class TextTransformer(nn.Module):
    """Token and position embeddings, two blocks, mean over the tokens that count."""

    def __init__(
        self,
        classes: int,
        vocabulary: int = 10_000,
        length: int = 128,
        pad: int = 0,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.pad = pad
        self.embedding = nn.Embedding(vocabulary, dim, padding_idx=pad)
        self.position = nn.Parameter(torch.randn(1, length, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        mask = x != self.pad  # (N, T)
        bias = torch.where(mask, 0.0, -1e4)[:, None, None]  # (N, 1, 1, T)
        y = self.dropout(self.embedding(x) + self.position[:, : x.shape[1]])  # (N, T, dim)
        for block in self.blocks:
            y = block(y, bias)
        y = masked_mean(self.norm(y), mask.unsqueeze(2))  # (N, dim)
        logits: Tensor = self.classifier(self.dropout(y))  # (N, classes)
        return logits

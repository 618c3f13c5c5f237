"""Recurrent presets: text, sensor series, pictures read row by row, and lines of text in pictures.

Sequences are padded at the end. A recurrence that runs forward has not yet seen the padding where the sequence ends, so
its outputs there are those of a packed sequence, and pooling masks the rest; where a layer runs backward as well, the
input has no padding. So one graph serves every length, and no run-time length enters the recurrence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .cnn import SeparableBlock

__all__ = ["Crnn", "RowsRnn", "SeriesRnn", "TextLstm", "masked_max", "masked_mean"]

Cell = Literal["gru", "lstm"]
_CELLS: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": nn.LSTM}
_NEVER = -1.0  # what the outputs of an LSTM or a GRU do not fall below; an input of nothing but padding stays in range


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """(N, T, C) of -1..1 and bool (N, T, 1) -> the largest of the steps that count, (N, C)."""
    return x.masked_fill(~mask, _NEVER).amax(1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(N, T, C) and bool (N, T, 1) -> the mean of the steps that count, (N, C)."""
    weight = mask.to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1.0)


class TextLstm(nn.Module):
    """Embedding(10,000, 64) - LSTM(64) - Dense(64) - Dense: the field's small text classifier; the LSTM's outputs are
    pooled by their maximum, which remembers a word better than the last state does, and by their mean."""

    def __init__(
        self, classes: int, vocabulary: int = 10_000, length: int = 128, pad: int = 0, width: int = 64, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.pad = pad
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=pad)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.dense = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x != self.pad).unsqueeze(2)  # (N, T) -> (N, T, 1)
        y, _ = self.lstm(self.dropout(self.embedding(x)))  # (N, T, 64)
        y = torch.cat([masked_max(y, mask), masked_mean(y, mask)], 1)  # (N, 128)
        y = torch.relu(self.dense(self.dropout(y)))  # (N, 64)
        logits: Tensor = self.classifier(self.dropout(y))  # (N, classes)
        return logits


class SeriesRnn(nn.Module):
    """Sensor series: a convolution over 5 steps, two GRU or LSTM layers, maximum and mean over the steps that count.

    Input (N, T, channels + 1); the last channel is 1 where there is a sample and 0 where there is padding.
    """

    def __init__(
        self, classes: int, channels: int = 6, length: int = 100, cell: Cell = "gru", width: int = 64, dropout: float = 0.3
    ) -> None:
        super().__init__()
        self.stem = nn.Conv1d(channels, width, 5, padding=2)
        self.dropout = nn.Dropout(dropout)
        self.rnn = _CELLS[cell](width, width, num_layers=2, batch_first=True, dropout=dropout)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, :, -1:] > 0.5  # (N, T, 1)
        y = self.stem(x[:, :, :-1].transpose(1, 2)).transpose(1, 2)  # (N, T, width)
        y, _ = self.rnn(self.dropout(torch.relu(y)))  # (N, T, width)
        y = torch.cat([masked_max(y, mask), masked_mean(y, mask)], 1)  # (N, 2 width)
        logits: Tensor = self.classifier(self.dropout(y))  # (N, classes)
        return logits


class RowsRnn(nn.Module):
    """A picture read row by row, from above and from below: two bidirectional layers, maximum over the rows."""

    def __init__(
        self, classes: int, channels: int = 1, height: int = 28, width: int = 28, cell: Cell = "gru", hidden: int = 56
    ) -> None:
        super().__init__()
        self.rnn = _CELLS[cell](channels * width, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(2 * hidden)
        self.classifier = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2)  # (N, C, H, W) -> (N, H, C W)
        y, _ = self.rnn(rows)  # (N, H, 2 hidden)
        logits: Tensor = self.classifier(self.norm(y.amax(1)))  # (N, classes)
        return logits


class Crnn(nn.Module):
    """Reads a line of text: convolutions, two bidirectional LSTM layers, characters at every fourth pixel column for CTC.

    After Shi et al., arXiv:1507.05717, with depthwise-separable convolutions. ``classes`` is the alphabet with CTC's blank
    in front. The height is halved four times, the width twice: characters are narrower than high.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 1,
        height: int = 32,
        width: int = 320,
        widths: Sequence[int] = (32, 48, 96, 160, 192),
        hidden: int = 96,
    ) -> None:
        super().__init__()
        stem, *stages = widths
        layers: list[nn.Module] = [nn.Conv2d(channels, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
        inputs = stem
        strides: list[int | tuple[int, int]] = [1, 2, (2, 1), (2, 1)]
        for outputs, stride in zip(stages, strides, strict=True):
            layers.append(SeparableBlock(inputs, outputs, stride))
            if stride != 1:  # at the picture's half size one block is a third of all the work
                layers.append(SeparableBlock(outputs, outputs))
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.1)
        self.rnn = nn.LSTM(inputs * (height // 16), hidden, num_layers=2, bidirectional=True, dropout=0.1)
        self.classifier = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (N, C, H, W) -> (N, 192, H / 16, W / 4)
        x = x.permute(3, 0, 1, 2).flatten(2)  # (W / 4, N, 192 H / 16): steps first, as recurrences run
        y, _ = self.rnn(self.dropout(x))  # (W / 4, N, 2 hidden)
        logits: Tensor = self.classifier(self.dropout(y))  # (W / 4, N, alphabet)
        return logits.transpose(0, 1)  # (N, W / 4, alphabet)

"""Convolutional presets. Widths are multiples of 8: what tensor cores like and what a CPU's blocked layout likes.

ReLU throughout: it fuses into the convolution before it and leaves one-sided ranges that quantize well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Depthwise", "Inverted", "InvertedBlock", "Residual", "ResidualBlock", "SeparableBlock", "Textbook"]


class Textbook(nn.Module):
    """The field's textbook net for 28x28 grey digits: Conv 32 - pool - Conv 64 - pool - Conv 64 - Dense 64 - Dense.

    93,322 parameters for 10 classes (F. Chollet, Deep Learning with Python, 2nd ed., listing 8.1).
    """

    def __init__(self, classes: int, channels: int = 1, height: int = 28, width: int = 28) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3), nn.ReLU(),
            nn.Flatten(),
        )  # fmt: skip
        with torch.no_grad():
            flat = self.features.eval()(torch.zeros(1, channels, height, width)).shape[1]
        self.dense = nn.Linear(flat, 64)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (N, C, H, W) -> (N, flat)
        x = self.dropout(torch.relu(self.dense(x)))  # (N, 64)
        logits: Tensor = self.classifier(x)  # (N, classes)
        return logits


class SeparableBlock(nn.Module):
    """Depthwise 3x3 - BN - ReLU - pointwise 1x1 - BN - ReLU (MobileNet, arXiv:1704.04861), residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int | tuple[int, int] = 1) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.norm1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.depthwise(x)))
        y = self.norm2(self.pointwise(y))
        return torch.relu(x + y if self.residual else y)


class _Staged(nn.Module):
    """A stem, of stride 2 above 48 px; then per stage one strided block and ``depth - 1`` more; a pool, a classifier.

    ``widths`` are the channels after the stem and after each stage; ``head`` those of a 1x1 convolution before the pool.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        classes: int,
        channels: int,
        side: int,
        widths: Sequence[int],
        depths: Sequence[int],
        dropout: float,
        head: int = 0,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 2 if side > 48 else 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        for inputs, outputs, depth in zip(widths[:-1], widths[1:], depths, strict=True):
            blocks.append(block(inputs, outputs, 2))
            blocks += [block(outputs, outputs, 1) for _ in range(depth - 1)]
        if head:
            blocks += [nn.Conv2d(widths[-1], head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(head or widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = _pool(self.blocks(self.stem(x)))  # (N, C, H, W) -> (N, C)
        logits: Tensor = self.classifier(self.dropout(x))  # (N, classes)
        return logits


class Depthwise(_Staged):
    """Compact net of depthwise-separable blocks, residual within a stage."""

    def __init__(
        self,
        classes: int,
        channels: int = 1,
        height: int = 28,
        width: int = 28,
        widths: Sequence[int] = (16, 48, 96),
        depths: Sequence[int] = (3, 3),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(SeparableBlock, classes, channels, min(height, width), widths, depths, dropout)


class InvertedBlock(nn.Module):
    """Pointwise to ``expand`` times the channels - depthwise 3x3 - pointwise back, each with a BN, a ReLU after the first two:
    the narrow ends stay linear, and are added where shapes allow (MobileNetV2, arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expand: int = 4) -> None:
        super().__init__()
        inner = inputs * expand
        self.residual = stride == 1 and inputs == outputs
        self.expand = nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.expand(x)))
        y = torch.relu(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        out: Tensor = x + y if self.residual else y
        return out


class Inverted(_Staged):
    """Compact net of inverted residuals, for pictures of some size: more depthwise layers, fewer wide pointwise ones."""

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        height: int = 96,
        width: int = 96,
        widths: Sequence[int] = (16, 24, 48, 96),
        depths: Sequence[int] = (2, 4, 5),
        head: int = 320,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(InvertedBlock, classes, channels, min(height, width), widths, depths, dropout, head)


class ResidualBlock(nn.Module):
    """Conv 3x3 - BN - ReLU - Conv 3x3 - BN, added to its input (ResNet, arXiv:1512.03385); a 1x1 convolution where shapes
    differ, behind an average pool so that no pixel is skipped (ResNet-D, arXiv:1812.01187)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        short = [pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*short)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Residual(_Staged):
    """Plain residual net of dense 3x3 convolutions: what TensorRT fuses and its tensor cores fill best."""

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        height: int = 96,
        width: int = 96,
        widths: Sequence[int] = (16, 32, 64, 128),
        depths: Sequence[int] = (1, 2, 1),
        dropout: float = 0.1,
    ) -> None:
        super().__init__(ResidualBlock, classes, channels, min(height, width), widths, depths, dropout)


def _pool(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C). A pooling node, not a mean: TensorRT 8.6 reads no ReduceMean with its axes as an input."""
    return F.avg_pool2d(x, x.shape[2:]).flatten(1)

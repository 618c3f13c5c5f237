"""Graphs of the shapes whose latencies are published: ResNet-50 and YOLO11, in plain torch with drawn weights.

ResNet-50 is of He, Zhang, Ren, Sun, CVPR 2016, with the stride in the 3x3 convolution, as MLPerf has it (v1.5). YOLO11 is
written from the description of its blocks (Khanam, Hussain, arXiv 2410.17725) and checked against its published counts: 2.6,
9.4 and 20.1 million parameters, 6.5, 21.5 and 68.0 GFLOPs. Only shapes matter here, so batch normalisation is left out, as
it is folded before any build, and the weights are drawn. No line is taken from an implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PUBLISHED_COUNTS", "resnet50", "yolo11"]

#: net -> (parameters, multiply-accumulates), as published: Ultralytics counts an operation for each multiply and add.
PUBLISHED_COUNTS = {
    "yolo11n": (2.6e6, 3.25e9),
    "yolo11s": (9.4e6, 10.75e9),
    "yolo11m": (20.1e6, 34.0e9),
    "resnet50": (25.6e6, 4.1e9),
}
CLASSES, BINS = 80, 16  # of COCO; of the distribution over a box's distance


class Residual(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut: (N, C, H, W) -> (N, 4 width, H / stride, W / stride)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.reduce = nn.Conv2d(inputs, width, 1)
        self.spatial = nn.Conv2d(width, width, 3, stride, 1)
        self.expand = nn.Conv2d(width, 4 * width, 1)
        self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride) if stride > 1 or inputs != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.expand(self.spatial(self.reduce(x).relu()).relu())
        return (inner + self.shortcut(x)).relu()


def resnet50() -> nn.Module:
    """(1, 3, 224, 224) -> (1, 1000)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(count):
            layers.append(Residual(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)).eval()


class Unit(nn.Module):
    """Convolution and SiLU; ``act=False`` leaves SiLU out. Padding keeps the size but for the stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return functional.silu(x) if self.act else x


class Pair(nn.Module):
    """Two 3x3 with a sum around them; ``inner`` channels between."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.both = nn.Sequential(Unit(channels, inner, 3), Unit(inner, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.both(x)


class Nested(nn.Module):
    """The CSP block inside a wide C3k2: two pairs on half of the channels, the other half beside them."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.left, self.right = Unit(channels, half), Unit(channels, half)
        self.pairs = nn.Sequential(Pair(half, half), Pair(half, half))
        self.out = Unit(2 * half, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat((self.pairs(self.left(x)), self.right(x)), 1))


class C3k2(nn.Module):
    """Split in two, one block on the second half, and all three joined by a 1x1."""

    def __init__(self, inputs: int, outputs: int, share: float, nested: bool):
        super().__init__()
        inner = int(outputs * share)
        self.split = Unit(inputs, 2 * inner)
        self.block = Nested(inner) if nested else Pair(inner, inner // 2)
        self.join = Unit(3 * inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        kept, passed = self.split(x).chunk(2, 1)
        return self.join(torch.cat((kept, passed, self.block(passed)), 1))


class Sppf(nn.Module):
    """Three poolings in a row, all four stages joined."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce, self.join = Unit(channels, channels // 2), Unit(2 * channels, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        stages = [self.reduce(x)]
        for _ in range(3):
            stages.append(self.pool(stages[-1]))
        return self.join(torch.cat(stages, 1))


class Attention(nn.Module):
    """Over all positions, heads of 64 values and 32 keys, a depthwise 3x3 of the values as positional code."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = channels // 64
        self.project = Unit(channels, channels + self.heads * 64, act=False)
        self.position = Unit(channels, channels, 3, groups=channels, act=False)
        self.out = Unit(channels, channels, act=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        query, key, value = self.project(x).view(n, self.heads, 128, h * w).split((32, 32, 64), 2)  # (N, heads, d, HW)
        weights = (query.transpose(2, 3) @ key * 32**-0.5).softmax(-1)  # (N, heads, HW, HW)
        mixed = (value @ weights.transpose(2, 3)).reshape(n, c, h, w)
        return self.out(mixed + self.position(value.reshape(n, c, h, w)))


class C2psa(nn.Module):
    """Half of the channels through attention and a feed-forward pair, each with a sum around it."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.split, self.join = Unit(channels, 2 * half), Unit(2 * half, channels)
        self.attention = Attention(half)
        self.feed = nn.Sequential(Unit(half, 2 * half), Unit(2 * half, half, act=False))

    def forward(self, x: Tensor) -> Tensor:
        kept, passed = self.split(x).chunk(2, 1)
        passed = passed + self.attention(passed)
        return self.join(torch.cat((kept, passed + self.feed(passed)), 1))


class Head(nn.Module):
    """At three scales a box branch of 3x3 and a class branch of depthwise 3x3; boxes decoded, (1, 4 + classes, positions)."""

    def __init__(self, channels: tuple[int, int, int]):
        super().__init__()
        box, label = max(16, channels[0] // 4, 4 * BINS), max(channels[0], min(CLASSES, 100))
        self.boxes = nn.ModuleList(
            nn.Sequential(Unit(c, box, 3), Unit(box, box, 3), nn.Conv2d(box, 4 * BINS, 1)) for c in channels
        )
        self.labels = nn.ModuleList(
            nn.Sequential(
                Unit(c, c, 3, groups=c), Unit(c, label), Unit(label, label, 3, groups=label), Unit(label, label),
                nn.Conv2d(label, CLASSES, 1),
            )
            for c in channels
        )  # fmt: skip
        self.register_buffer("bins", torch.arange(BINS, dtype=torch.float32).view(1, BINS, 1, 1))

    def forward(self, scales: list[Tensor]) -> Tensor:
        box = torch.cat([branch(x).flatten(2) for branch, x in zip(self.boxes, scales, strict=True)], 2)
        label = torch.cat([branch(x).flatten(2) for branch, x in zip(self.labels, scales, strict=True)], 2)
        spread = box.view(1, 4, BINS, -1).transpose(1, 2).softmax(1)  # (1, BINS, 4, positions)
        near, far = (spread * self.bins).sum(1).chunk(2, 1)  # distances to the sides
        return torch.cat(((far - near) / 2, near + far, label.sigmoid()), 1)


class Yolo11(nn.Module):
    """(1, 3, 640, 640) -> (1, 84, 8400)."""

    def __init__(self, widths: tuple[int, int, int, int, int], nested: bool):
        super().__init__()
        a, b, c, d, e = widths
        self.stem = nn.Sequential(Unit(3, a, 3, 2), Unit(a, b, 3, 2), C3k2(b, c, 0.25, nested), Unit(c, c, 3, 2))
        self.stage3 = C3k2(c, d, 0.25, nested)
        self.stage4 = nn.Sequential(Unit(d, d, 3, 2), C3k2(d, d, 0.5, True))
        self.stage5 = nn.Sequential(Unit(d, e, 3, 2), C3k2(e, e, 0.5, True), Sppf(e), C2psa(e))
        self.up4, self.up3 = C3k2(e + d, d, 0.5, nested), C3k2(d + d, c, 0.5, nested)
        self.down3, self.down4 = Unit(c, c, 3, 2), Unit(d, d, 3, 2)
        self.merge4, self.merge5 = C3k2(c + d, d, 0.5, nested), C3k2(d + e, e, 0.5, True)
        self.head = Head((c, d, e))

    def forward(self, x: Tensor) -> Tensor:
        x3 = self.stage3(self.stem(x))
        x4 = self.stage4(x3)
        x5 = self.stage5(x4)
        y4 = self.up4(torch.cat((functional.interpolate(x5, scale_factor=2.0), x4), 1))
        y3 = self.up3(torch.cat((functional.interpolate(y4, scale_factor=2.0), x3), 1))
        y4 = self.merge4(torch.cat((self.down3(y3), y4), 1))
        y5 = self.merge5(torch.cat((self.down4(y4), x5), 1))
        return self.head([y3, y4, y5])


def yolo11(size: str) -> nn.Module:
    """``size``: n, s or m. m has every block nested and 512 channels at most."""
    widths = {"n": (16, 32, 64, 128, 256), "s": (32, 64, 128, 256, 512), "m": (64, 128, 256, 512, 512)}[size]
    return Yolo11(widths, nested=size == "m").eval()

"""Sharper pictures of codes: deconvolution in two dimensions and across bars, turning, enlarging."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Affine", "Bars", "Blurred", "enlarged", "enlarged_size", "scaling", "sharpened", "turned", "upright_map"]

Grey = NDArray[np.uint8]
Floats = NDArray[np.float32]

MAX_PIXELS = 4_000_000  # of an enhanced picture


class Affine(NamedTuple):
    """Where a made picture's point lies on the picture it was made of: x' = a x + b y + c, y' = d x + e y + f."""

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0
    e: float = 1.0
    f: float = 0.0

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        return self.a * x + self.b * y + self.c, self.d * x + self.e * y + self.f

    def then(self, other: Affine) -> Affine:
        """This map, then ``other``."""
        (c, f), (a, d), (b, e) = other(self.c, self.f), other(self.a, self.d), other(self.b, self.e)
        return Affine(a - other.c, b - other.c, c, d - other.f, e - other.f, f)


def _smooth_size(n: int) -> int:
    """The next number with no prime factor above 5: transforms of other sizes take up to ten times as long."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


class Blurred:
    """A picture's spectrum, kept for many guesses of its blur; uint8 (H, W)."""

    PAD = 24

    def __init__(self, grey: Grey) -> None:
        self.shape = grey.shape
        self.pad = min(self.PAD, min(grey.shape) - 1)  # mirrored, so that the border does not ring
        height, width = (_smooth_size(side + 2 * self.pad) for side in grey.shape)
        extra = ((self.pad, height - grey.shape[0] - self.pad), (self.pad, width - grey.shape[1] - self.pad))
        padded = np.pad(grey.astype(np.float32), extra, mode="symmetric")
        self._size = (height, width)
        self._spectrum = np.fft.rfft2(padded)
        self.fy = np.fft.fftfreq(height).astype(np.float32)[:, None]
        self.fx = np.fft.rfftfreq(width).astype(np.float32)[None, :]

    def gaussian(self, sigma: float) -> Floats:
        """Transfer function of a Gaussian blur."""
        k = np.float32(-2 * (math.pi * sigma) ** 2)
        bell: Floats = np.exp(k * self.fy**2) * np.exp(k * self.fx**2)
        return bell

    def line(self, length: float, degrees: float) -> Floats:
        """Transfer function of a straight smear, and of the camera's own slight blur."""
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        smear: Floats = np.sinc(np.float32(length * c) * self.fx + np.float32(length * s) * self.fy)
        return smear * self.gaussian(0.5)

    def wiener(self, transfer: Floats, noise_to_signal: float) -> Grey:
        spectrum = self._spectrum * (transfer / (transfer * transfer + np.float32(noise_to_signal)))
        return self._cut(np.fft.irfft2(spectrum, self._size))

    def constrained(self, transfer: Floats, rounds: int) -> Grey:
        """Least squares with every pixel in 0..255, by FISTA (Beck and Teboulle, SIAM J. Imaging Sciences 2(1), 2009).

        Black and white touch the bounds: that restores what frequencies the blur took away.
        """
        x = np.fft.irfft2(self._spectrum * (transfer / (transfer * transfer + np.float32(1e-2))), self._size)
        low, high = np.percentile(np.fft.irfft2(self._spectrum, self._size)[::2, ::2], [1, 99])
        x = y = np.clip(x, low, high)
        data, square, t = self._spectrum * transfer, transfer * transfer, 1.0
        for _ in range(rounds):
            gradient = np.fft.irfft2(np.fft.rfft2(y) * square - data, self._size)
            new = np.clip(y - gradient, low, high)
            following = (1 + math.sqrt(1 + 4 * t * t)) / 2
            y = new + (t - 1) / following * (new - x)
            x, t = new, following
        return self._cut((x - low) * (255 / max(1.0, high - low)))

    def _cut(self, a: NDArray[Any]) -> Grey:
        a = a[self.pad : self.pad + self.shape[0], self.pad : self.pad + self.shape[1]]
        levels: Grey = np.clip(np.rint(a), 0, 255).astype(np.uint8)
        return levels


class Bars:
    """Bars turned upright, averaged along their length in bands: noise shrinks, and one guess costs a tenth of a picture's."""

    BANDS, PAD, UP, LINES = 10, 32, 4, 3

    def __init__(self, grey: Grey) -> None:
        """uint8 (H, W), bars along H."""
        height, width = grey.shape
        count = max(1, min(self.BANDS, height // 3))
        rows = height // count
        self._rows, self._top = rows, (height - rows * count) // 2
        a = grey[self._top :][: rows * count].astype(np.float32)
        bands = a.reshape(count, rows, width).mean(axis=1)  # (bands, W)
        self.rows, self.width, self.pad = count, width, min(self.PAD, width - 1)
        self._size = _smooth_size(width + 2 * self.pad)
        extra = ((0, 0), (self.pad, self._size - width - self.pad))
        self._spectrum = np.fft.rfft(np.pad(bands, extra, mode="symmetric"))
        self._f = np.fft.rfftfreq(self._size).astype(np.float32)

    @property
    def place(self) -> Affine:
        """From a restored picture to the one that the bars are of."""
        return Affine(a=1 / self.UP, e=self._rows / self.LINES, f=self._top)

    def restored(self, sigma: float, length: float, noise_to_signal: float) -> Grey:
        """Wiener deconvolution of a Gaussian and a smear across the bars -> uint8 (3 a band, 4 W)."""
        f = self._f
        transfer = np.exp(np.float32(-2 * (math.pi * sigma) ** 2) * f * f) * np.sinc(np.float32(length) * f)
        spectrum = self._spectrum * (transfer / (transfer * transfer + np.float32(noise_to_signal)))
        fine = np.fft.irfft(spectrum, self._size * self.UP) * self.UP  # zeros appended: exact interpolation
        fine = fine[:, self.pad * self.UP : (self.pad + self.width) * self.UP]
        low, high = np.percentile(fine[:, ::3], [2, 98], axis=1, keepdims=True)
        scaled = (fine - low) * (220 / np.maximum(high - low, 4)) + 18
        return np.repeat(np.clip(scaled, 0, 255).astype(np.uint8), self.LINES, axis=0)


def image(grey: Grey) -> Any:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(grey))


def upright_map(shape: tuple[int, ...], angle: float, largest: float = 2.0) -> tuple[tuple[int, int], Affine]:
    """Width and height of what `turned` makes of a picture of ``shape``, (H, W), and where its points come from."""
    height, width = shape
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    box = (abs(width * cosine) + abs(height * sine), abs(width * sine) + abs(height * cosine))
    scale = min(largest, math.sqrt(MAX_PIXELS / (box[0] * box[1])))
    out_width, out_height = max(1, round(box[0] * scale)), max(1, round(box[1] * scale))
    a, b = cosine / scale, -sine / scale
    d, e = sine / scale, cosine / scale
    c = width / 2 - a * out_width / 2 - b * out_height / 2
    f = height / 2 - d * out_width / 2 - e * out_height / 2
    return (out_width, out_height), Affine(a, b, c, d, e, f)


def turned(grey: Grey, angle: float, largest: float = 2.0, fill: int = 255) -> Grey:
    """Turned upright and enlarged in one warp; the corners that come in are white, as around most codes."""
    from PIL import Image

    size, place = upright_map(grey.shape, angle, largest)
    warped = image(grey).transform(size, Image.Transform.AFFINE, place, Image.Resampling.BICUBIC, fillcolor=fill)
    return np.asarray(warped)


def enlarged_size(shape: tuple[int, ...], largest: float = 2.0) -> tuple[int, int]:
    """Width and height of what `enlarged` makes of a picture of ``shape``, (H, W)."""
    scale = min(largest, math.sqrt(MAX_PIXELS / (shape[0] * shape[1])))
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def enlarged(grey: Grey, largest: float = 2.0) -> Grey:
    from PIL import Image

    return np.asarray(image(grey).resize(enlarged_size(grey.shape, largest), Image.Resampling.BICUBIC))


def scaling(shape: tuple[int, ...], size: tuple[int, int]) -> Affine:
    """From a picture of ``size``, (width, height), to the one of ``shape``, (H, W), that it was resized from."""
    return Affine(a=shape[1] / size[0], e=shape[0] / size[1])


def sharpened(grey: Grey) -> Grey:
    """Unsharp mask."""
    from PIL import ImageFilter

    return np.asarray(image(grey).filter(ImageFilter.UnsharpMask(radius=3, percent=200, threshold=0)))

"""Better pictures of codes that were not read: turned upright, sharpened, deblurred, with parameters from the picture.

Each stage gives one new picture, dearer than the one before. Sizes are bounded before anything is enlarged, so that the
cost of a stage does not grow with the camera.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["blur_sigma", "enhanced", "orientation"]

Grey = NDArray[np.uint8]

MAX_PIXELS = 4_000_000  # of an enhanced picture
MIN_SIDE = 16  # pixels; no code is smaller
_SMALLEST_TURN = 4.0  # degrees; zxing-cpp reads smaller ones by itself


def enhanced(grey: Grey) -> Iterator[Grey]:
    """uint8 (H, W) -> pictures to try after the plain and the inverted one, in the order that pays."""
    if min(grey.shape) < MIN_SIDE or int(grey.max()) - int(grey.min()) < 8:
        return
    angle = orientation(grey)
    if abs(angle) >= _SMALLEST_TURN:
        yield _turned(grey, angle)
    yield _sharpened(grey)
    sigma = blur_sigma(grey)
    if sigma >= 0.8:
        sharp = _deconvolved(grey, sigma)
        yield _enlarged(sharp)
        if abs(angle) >= _SMALLEST_TURN:
            yield _turned(sharp, angle)


def orientation(grey: Grey) -> float:
    """By how many degrees, in [-45, 45), the strongest edges are turned away from the picture's axes.

    The peak of the gradients' directions, weighted by magnitude, modulo 90 degrees: a code's bars give one direction, its
    ends the other.
    """
    a = grey.astype(np.float32)
    a = a[:-2] + 2 * a[1:-1] + a[2:]  # binomial smoothing, weights 1, 2, 1 both ways, over 16
    gx, gy = _gradients((a[:, :-2] + 2 * a[:, 1:-1] + a[:, 2:]) / np.float32(16))
    magnitude = np.hypot(gx, gy)
    strong = magnitude > max(8.0, float(magnitude.max()) * 0.25)
    if not strong.any():
        return 0.0
    degrees = np.degrees(np.arctan2(gy[strong], gx[strong])) % 90.0
    histogram = np.bincount((degrees * 2).astype(int) % 180, weights=magnitude[strong], minlength=180)
    smooth = sum(np.roll(histogram, shift) for shift in range(-3, 4))
    peak = float(np.argmax(smooth)) / 2 + 0.25
    return peak if peak < 45 else peak - 90


def blur_sigma(grey: Grey) -> float:
    """Standard deviation, in pixels, of the Gaussian that would blur a sharp edge as the steepest edges here are.

    A step of height A under a Gaussian has slope A / (sigma sqrt(2 pi)) in its middle. The difference over two pixels
    that measures the slope blurs by itself, with a variance of 1/3. 0.88: too low a guess costs fewer reads than too high.
    """
    gx, gy = _gradients(grey.astype(np.float32))
    steepest = float(np.percentile(np.hypot(gx, gy), 99.95))
    low, high = np.percentile(grey[::2, ::2], [1, 99])
    seen = float(high - low) / (max(steepest, 1e-3) * math.sqrt(2 * math.pi))
    return 0.88 * math.sqrt(max(0.0, seen**2 - 1 / 3))


def _gradients(a: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Slopes along x and y in grey levels a pixel, float32 (H - 2, W - 2).

    Scharr's weights 3, 10, 3 across: with equal weights the direction of fine bars is off by up to 8 degrees.
    """
    edge, middle = np.float32(3 / 32), np.float32(10 / 32)
    rows = edge * (a[:-2] + a[2:]) + middle * a[1:-1]
    columns = edge * (a[:, :-2] + a[:, 2:]) + middle * a[:, 1:-1]
    return rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]


def _noise_sigma(grey: Grey) -> float:
    """Noise in grey levels, from the median response of a mask that is blind to edges (after Immerkaer, CVIU 64(2), 1996)."""
    a = grey.astype(np.float32)
    rows = a[:-2] - 2 * a[1:-1] + a[2:]
    response = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    return float(np.median(np.abs(response))) / (6 * 0.6745)


def _scale(shape: tuple[int, ...]) -> float:
    return min(2.0, math.sqrt(MAX_PIXELS / (shape[0] * shape[1])))


def _image(grey: Grey) -> Any:
    from PIL import Image

    return Image.fromarray(grey)


def _turned(grey: Grey, angle: float) -> Grey:
    """Turned upright and enlarged in one warp; the corners that come in are white, as around most codes."""
    from PIL import Image

    height, width = grey.shape
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    box = (abs(width * cosine) + abs(height * sine), abs(width * sine) + abs(height * cosine))
    scale = min(2.0, math.sqrt(MAX_PIXELS / (box[0] * box[1])))
    out_width, out_height = max(1, round(box[0] * scale)), max(1, round(box[1] * scale))
    a, b = cosine / scale, -sine / scale
    d, e = sine / scale, cosine / scale
    c = width / 2 - a * out_width / 2 - b * out_height / 2
    f = height / 2 - d * out_width / 2 - e * out_height / 2
    turned = _image(grey).transform(
        (out_width, out_height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC, fillcolor=255
    )
    return np.asarray(turned)


def _enlarged(grey: Grey) -> Grey:
    from PIL import Image

    scale = _scale(grey.shape)
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    return np.asarray(_image(grey).resize(size, Image.Resampling.BICUBIC))


def _sharpened(grey: Grey) -> Grey:
    from PIL import ImageFilter

    large = _image(_enlarged(grey))
    return np.asarray(large.filter(ImageFilter.UnsharpMask(radius=3, percent=200, threshold=0)))


def _deconvolved(grey: Grey, sigma: float) -> Grey:
    """Wiener deconvolution of a Gaussian blur; the noise-to-signal ratio is lower on clean pictures only."""
    if grey.size > MAX_PIXELS:
        grey = _enlarged(grey)  # makes it smaller here
    noise_to_signal = 1e-5 if _noise_sigma(grey) < 0.6 else 1e-4
    pad = min(int(4 * sigma) + 8, min(grey.shape) - 1)  # mirrored, so that the border does not ring
    padded = np.pad(grey.astype(np.float32), pad, mode="reflect")
    fy = np.fft.fftfreq(padded.shape[0])[:, None]
    fx = np.fft.rfftfreq(padded.shape[1])[None, :]
    transfer = np.exp(-2 * (math.pi * sigma) ** 2 * (fx**2 + fy**2))
    spectrum = np.fft.rfft2(padded) * (transfer / (transfer**2 + noise_to_signal))
    sharp = np.fft.irfft2(spectrum, padded.shape)[pad:-pad, pad:-pad]
    return np.clip(np.rint(sharp), 0, 255).astype(np.uint8)

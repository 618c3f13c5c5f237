"""What a camera and a worn printer do to a label. Functions of float32 pictures (H, W[, 3]) in 0..255, new arrays out.

``unit`` is the height of a capital in pixels (of the whole label: a share of its side), ``strength`` lies in 0..1: at 1 a
person still reads the text. Deterministic in ``rng``; nothing is shared, so threads may call them at once.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Damage",
    "blur",
    "dirt",
    "glare",
    "jpeg",
    "low_contrast",
    "low_light",
    "low_resolution",
    "motion",
    "noise_of",
    "perspective",
    "smooth_field",
    "to_frame",
    "uneven",
]

Picture = NDArray[np.float32]
#: (picture, rng, unit, strength) -> picture
Damage = Callable[[Picture, random.Random, float, float], Picture]


def to_frame(picture: Picture) -> NDArray[np.uint8]:
    """float32 in any range -> uint8, rounded and clipped."""
    out: NDArray[np.uint8] = np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)
    return out


def _image(picture: Picture) -> Image:
    from PIL import Image

    return Image.fromarray(to_frame(picture))


def _picture(image: Image) -> Picture:
    return np.asarray(image, np.float32)


def _spread(field: Picture, picture: Picture) -> Picture:
    """A field (H, W), with an axis for channels where ``picture`` has them."""
    return field if picture.ndim == 2 else field[:, :, None]


def noise_of(rng: random.Random) -> np.random.Generator:
    """A numpy generator for arrays of noise, seeded by ``rng``."""
    return np.random.default_rng(rng.getrandbits(63))


def smooth_field(rng: random.Random, height: int, width: int, cells: int) -> Picture:
    """float32 (H, W) of mean 0 within about -1..1 that varies over ``cells`` cells along the longer side."""
    from PIL import Image

    wide = max(2, cells if width >= height else round(cells * width / height))
    tall = max(2, cells if height > width else round(cells * height / width))
    coarse = noise_of(rng).uniform(-1, 1, (tall, wide)).astype(np.float32)
    return _picture(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def blur(picture: Picture, rng: random.Random, unit: float, strength: float) -> Picture:
    """Out of focus: a Gaussian of up to a tenth of ``unit``."""
    from PIL import ImageFilter

    return _picture(_image(picture).filter(ImageFilter.GaussianBlur(max(0.3, 0.1 * unit * strength))))


def motion(picture: Picture, rng: random.Random, unit: float, strength: float) -> Picture:
    """A moving belt: the mean along a path of up to a quarter of ``unit``, mostly along the line."""
    length = max(1.0, 0.25 * unit * strength)
    angle = rng.gauss(0, 0.5)
    steps = max(2, math.ceil(length) + 1)
    reach = math.ceil(length / 2) + 1
    edges = ((reach, reach), (reach, reach), (0, 0))[: picture.ndim]
    padded = np.pad(picture, edges, mode="edge")
    height, width = picture.shape[:2]
    out = np.zeros_like(picture)
    for step in range(steps):
        way = length * (step / (steps - 1) - 0.5)
        row, column = reach + round(way * math.sin(angle)), reach + round(way * math.cos(angle))
        out += padded[row : row + height, column : column + width]
    return out / np.float32(steps)


def low_resolution(picture: Picture, rng: random.Random, unit: float, strength: float) -> Picture:
    """Far away: capitals down to 9 pixels, then back to the old size."""
    from PIL import Image

    height, width = picture.shape[:2]
    scale = 1 + (max(1.0, unit / 9) - 1) * strength
    small = (max(4, round(width / scale)), max(4, round(height / scale)))
    back = Image.Resampling.BILINEAR if rng.random() < 0.6 else Image.Resampling.BICUBIC
    return _picture(_image(picture).resize(small, Image.Resampling.BOX).resize((width, height), back))


def glare(picture: Picture, rng: random.Random, unit: float, strength: float) -> Picture:
    """A lamp on film: one soft bright ellipse, at whose middle a fifth of the contrast and more is left."""
    height, width = picture.shape[:2]
    y, x = np.ogrid[0:height, 0:width]
    across, down = rng.uniform(0.8, 2.2) * height, rng.uniform(0.4, 0.9) * height
    centre_x, centre_y = rng.uniform(0, width), rng.uniform(0, height)
    shape = np.exp(-(((x - centre_x) / across) ** 2) - ((y - centre_y) / down) ** 2).astype(np.float32)
    veil = _spread(np.float32(0.45 + 0.33 * strength) * shape, picture)
    return picture + (np.float32(252) - picture) * veil


def uneven(picture: Picture, rng: random.Random, unit: float, strength: float) -> Picture:
    """Uneven light: the picture times a smooth field and a slope, down to about a third."""
    height, width = picture.shape[:2]
    slope = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(rng.uniform(-1, 1))
    field = smooth_field(rng, height, width, rng.randint(2, 6)) * np.float32(0.5) + slope * np.float32(0.5)
    return picture * _spread(np.float32(1 - 0.35 * strength) + np.float32(0.35 * strength) * field, picture)


def low_light(picture: Picture, rng: random.Random, unit: float, strength: float) -> Picture:
    """A short exposure: down to a third of the light, with noise of up to an eighth of what contrast is left."""
    level = 1 - 0.68 * strength
    noise = noise_of(rng).standard_normal(picture.shape, np.float32)
    return picture * np.float32(level) + noise * np.float32(255 * level * (0.03 + 0.09 * strength))


def low_contrast(picture: Picture, rng: random.Random, unit: float, strength: float) -> Picture:
    """A faded print: the contrast down to a quarter, around a grey."""
    keep = np.float32(1 - 0.74 * strength)
    return picture * keep + np.float32(rng.uniform(60, 190)) * (1 - keep)


def dirt(picture: Picture, rng: random.Random, unit: float, strength: float) -> Picture:
    """Specks and scratches: far thinner than a stroke, light or dark."""
    from PIL import Image, ImageDraw

    height, width = picture.shape[:2]
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(round(2 + 0.02 * strength * width * height / max(unit, 8))):
        x, y, size = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.2, 0.06 * unit)
        draw.ellipse((x - size, y - size, x + size, y + size), fill=rng.randint(80, 220))
    for _ in range(rng.randint(0, 2)):
        x, y, tilt = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(-0.4, 0.4)
        reach = rng.uniform(1, 4) * unit
        draw.line((x - reach, y - reach * tilt, x + reach, y + reach * tilt), fill=rng.randint(60, 150))
    veil = _spread(_picture(mask) / np.float32(255), picture)
    return picture + (np.float32(rng.choice((60, 90, 215))) - picture) * veil


def jpeg(picture: Picture, rng: random.Random, unit: float, strength: float) -> Picture:
    """Compressed for the way: quality from 60 down to 18."""
    from PIL import Image

    stream = io.BytesIO()
    _image(picture).save(stream, "JPEG", quality=round(60 - 42 * strength))
    with Image.open(stream) as image:
        return _picture(image)


def perspective(
    image: Image, rng: random.Random, tilt: float, corner: float, *, shear: float = 0.0, zoom: float = 1.0
) -> Image:
    """Turned by up to ``tilt`` degrees, sheared, each corner moved by up to ``corner`` pixels, ``zoom`` times as far away.

    The size stays; what comes in at the edges is 0 (no ink, or transparent).
    """
    from PIL import Image as Images

    width, height = image.size
    angle = math.radians(rng.uniform(-tilt, tilt))
    lean = rng.uniform(-shear, shear)
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    rows, wanted = [], []
    for x, y in ((0, 0), (width, 0), (width, height), (0, height)):
        dy = y - height / 2
        dx = x - width / 2 + lean * dy
        u = width / 2 + cos * dx - sin * dy + rng.uniform(-corner, corner)
        v = height / 2 + sin * dx + cos * dy + rng.uniform(-corner, corner)
        # Pillow wants the map from the new picture (x, y) to the old one (u, v): eight unknowns, two equations a corner.
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        wanted += [u, v]
    plan = np.linalg.solve(np.array(rows, np.float64), np.array(wanted, np.float64))
    return image.transform((width, height), Images.Transform.PERSPECTIVE, plan.tolist(), Images.Resampling.BILINEAR)

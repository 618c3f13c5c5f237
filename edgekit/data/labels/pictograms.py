"""Handling marks in the manner of ISO 780 and the lithium battery mark, drawn anew from circles and lines."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from edgekit.errors import MissingExtra

from .fonts import load_font

try:
    from PIL import Image, ImageDraw
except ImportError:
    raise MissingExtra("train", "PIL") from None

__all__ = ["MARKS", "draw_mark"]

_SIDE = 320  # drawn this large, then reduced: Pillow draws without antialiasing
_RED = (200, 22, 30)
_BLACK = (18, 18, 18)
Colour = tuple[int, int, int]


def _fragile(draw: ImageDraw.ImageDraw, ink: Colour, paper: Colour, rng: random.Random) -> None:
    """A wine glass, often with a crack."""
    left, right, top = 92 - rng.randint(0, 14), 228 + rng.randint(0, 14), 40
    draw.polygon([(left, top), (right, top), (right - 8, 100), (left + 8, 100)], fill=ink)
    draw.pieslice((left + 6, 20, right - 6, 184), 0, 180, fill=ink)
    stem = rng.randint(8, 12)
    draw.rectangle((160 - stem, 180, 160 + stem, 262), fill=ink)
    foot = rng.randint(46, 60)
    draw.rounded_rectangle((160 - foot, 258, 160 + foot, 282), 10, fill=ink)
    if rng.random() < 0.7:
        draw.line([(176, top - 2), (150, 78), (176, 96), (154, 136)], fill=paper, width=rng.randint(9, 13), joint="curve")


def _up(draw: ImageDraw.ImageDraw, ink: Colour, paper: Colour, rng: random.Random) -> None:
    """Two arrows over a bar."""
    head, shaft, gap = rng.randint(44, 54), rng.randint(17, 23), rng.randint(60, 68)
    for x in (160 - gap, 160 + gap):
        draw.polygon([(x, 36), (x + head, 120), (x - head, 120)], fill=ink)
        draw.rectangle((x - shaft, 116, x + shaft, 232), fill=ink)
    draw.rectangle((40, 252, 280, 252 + rng.randint(20, 30)), fill=ink)


def _dry(draw: ImageDraw.ImageDraw, ink: Colour, paper: Colour, rng: random.Random) -> None:
    """An umbrella under drops."""
    draw.pieslice((44, 84, 276, 290), 180, 360, fill=ink)
    for x in (44, 121, 198):  # the scalloped hem
        draw.ellipse((x, 166, x + 78, 210), fill=paper)
    width = rng.randint(11, 15)
    draw.line((160, 120, 160, 262), fill=ink, width=width)
    draw.arc((160 - width // 2, 236, 216, 290), 10, 180, fill=ink, width=width)
    for x, y in ((70, 62), (116, 34), (160, 56), (204, 34), (250, 62)):
        x, y = x + rng.randint(-5, 5), y + rng.randint(-5, 5)
        draw.polygon([(x, y - 22), (x + 8, y + 2), (x - 8, y + 2)], fill=ink)
        draw.ellipse((x - 9, y - 5, x + 9, y + 12), fill=ink)


def _heavy(draw: ImageDraw.ImageDraw, ink: Colour, paper: Colour, rng: random.Random) -> None:
    """A weight with a ring."""
    waist = rng.randint(66, 82)
    draw.ellipse((118, 34, 202, 118), outline=ink, width=rng.randint(18, 24))
    draw.polygon([(160 - waist, 106), (160 + waist, 106), (280, 284), (40, 284)], fill=ink)
    text = rng.choice(("kg", "KG", "25+", "30+", "kg"))
    draw.text((160, 240), text, fill=paper, font=load_font("roboto-700", 92), anchor="ms")


def _lithium(draw: ImageDraw.ImageDraw, ink: Colour, paper: Colour, rng: random.Random) -> None:
    """A red hatched frame around batteries and a burst."""
    border = rng.randint(30, 40)
    step = rng.randint(26, 34)
    for at in range(-_SIDE, _SIDE, step):
        draw.line((at, 0, at + _SIDE, _SIDE), fill=_RED, width=step // 2)
    draw.rectangle((border, border, _SIDE - border, _SIDE - border), fill=paper)
    count = rng.choice((2, 3))
    for i in range(count):
        x = 160 + round((i - (count - 1) / 2) * 68)
        draw.rectangle((x - 24, 132, x + 24, 226), outline=ink, width=10)
        draw.rectangle((x - 10, 118, x + 10, 134), fill=ink)
        draw.rectangle((x - 16, 182, x + 16, 220), fill=ink)
    burst_x, burst_y = rng.choice((104, 216)), 92
    points = []
    for k in range(16):
        reach = 34 if k % 2 == 0 else 15
        points.append((burst_x + reach * math.cos(k * math.pi / 8), burst_y + reach * math.sin(k * math.pi / 8)))
    draw.polygon(points, fill=ink)
    draw.rectangle((88, 246, 232, 262), fill=ink)  # where the telephone number stands


#: class -> its drawing; ``plain`` labels carry none of them.
MARKS: dict[str, Callable[[ImageDraw.ImageDraw, Colour, Colour, random.Random], None]] = {
    "fragile": _fragile,
    "this-side-up": _up,
    "keep-dry": _dry,
    "heavy": _heavy,
    "hazard-lithium": _lithium,
}


def draw_mark(name: str, side: int, rng: random.Random) -> Image.Image:
    """The mark ``name`` as RGB (side, side): black, red or inverted, framed or not, strokes varied by ``rng``."""
    ink, paper = _BLACK, (250, 250, 248)
    if name != "hazard-lithium":
        ink = rng.choice((_BLACK, _BLACK, _BLACK, _RED, (20, 40, 120)))
        if rng.random() < 0.2:
            ink, paper = paper, ink
    image = Image.new("RGB", (_SIDE, _SIDE), paper)
    draw = ImageDraw.Draw(image)
    MARKS[name](draw, ink, paper, rng)
    if name != "hazard-lithium" and rng.random() < 0.6:
        draw.rectangle((0, 0, _SIDE - 1, _SIDE - 1), outline=ink, width=rng.randint(8, 14))
    return image.resize(
        (side, side), Image.Resampling.BOX if _SIDE % side == 0 else Image.Resampling.BILINEAR, reducing_gap=1.5
    )

"""Synthetic line crops: a text in a font as a camera might have cut it out of a label."""

from __future__ import annotations

import math
import random

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra

from . import degrade
from .conditions import Condition
from .fonts import cap_height, load_font
from .text import seeded

try:
    from PIL import Image, ImageDraw, ImageFilter
except ImportError:
    raise MissingExtra("train", "PIL") from None

__all__ = ["render_line"]

Picture = NDArray[np.float32]
#: Heights of capitals in pixels, and of whole crops.
CAPITALS = (14, 34)
HEIGHTS = (20, 64)
CLEAN_SHARE = 0.3
#: What may happen, in the order of its happening; one of a group at most.
_PRINT = ("thin", "thick", "dots", "streaks")
_LIGHT = (degrade.uneven, degrade.glare, degrade.low_light, degrade.low_contrast, degrade.dirt)
_OPTICS = (degrade.blur, degrade.motion, degrade.low_resolution)
_GROUPS = ("geometry", "print", "light", "optics", "jpeg")
_INVERSE_SHARE = 0.06


def render_line(text: str, key: str, fonts: tuple[str, ...], condition: Condition) -> NDArray[np.uint8]:
    """``text`` as uint8 (H, W) with H in 20..64, the same for the same ``key`` on every call and in every thread.

    ``clean`` varies font, size, margins and the grey of ink and paper; ``degraded`` adds one to three kinds of damage;
    ``mixed`` is clean for 30% of the keys and else damaged by degrees from nearly nothing up.
    """
    rng = seeded(key)
    font = rng.choice(fonts)
    clean = condition == "clean" or (condition == "mixed" and rng.random() < CLEAN_SHARE)
    unit = rng.randint(*CAPITALS)
    mask = _print(text, font, unit, rng)
    if clean:
        return degrade.to_frame(_compose(_picture(mask), rng))
    kinds = rng.choice((1, 1, 2, 2, 3))
    strength = rng.uniform(0.1 if condition == "mixed" else 0.3, 1) / (1 + 0.25 * (kinds - 1))
    groups = set(rng.sample(_GROUPS, kinds))
    if rng.random() < 0.25:
        mask = mask.resize((max(8, round(mask.width * rng.uniform(0.85, 1.2))), mask.height), Image.Resampling.BILINEAR)
    if "geometry" in groups:
        mask = _tilt(mask, rng, unit, strength)
    ink = _picture(mask)
    if "print" in groups:
        ink = _wear(ink, rng, unit, strength)
    return _photograph(_compose(ink, rng), rng, unit, strength, groups)


def _photograph(picture: Picture, rng: random.Random, unit: float, strength: float, groups: set[str]) -> NDArray[np.uint8]:
    if "light" in groups:
        picture = rng.choice(_LIGHT)(picture, rng, unit, strength)
    if "optics" in groups:
        picture = rng.choice(_OPTICS)(picture, rng, unit, strength)
    if rng.random() < 0.5:  # no sensor is without noise
        picture = picture + degrade.noise_of(rng).standard_normal(picture.shape, np.float32) * np.float32(rng.uniform(0.5, 4))
    if "jpeg" in groups:
        picture = degrade.jpeg(picture, rng, unit, strength)
    return degrade.to_frame(picture)


def _picture(mask: Image.Image) -> Picture:
    return np.asarray(mask, np.float32) / np.float32(255)


def _print(text: str, name: str, unit: int, rng: random.Random) -> Image.Image:
    """The ink as an L image, 255 where it lies, with margins; ``unit`` is the height of a capital in pixels."""
    font = load_font(name, max(8, round(unit / cap_height(name))))
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    if rng.random() < 0.5:  # cut to the line's height, or to this text's
        _, top, _, bottom = font.getbbox("Hgjl(", anchor="ls")
    above, below = (rng.uniform(0.1, 0.35) * unit for _ in range(2))
    before, behind = (rng.uniform(0.1, 0.8) * unit for _ in range(2))
    height = round(bottom - top + above + below)
    width = round(right - left + before + behind)
    spare = max(0, HEIGHTS[0] - height)
    mask = Image.new("L", (width, min(HEIGHTS[1], height + spare)), 0)
    ImageDraw.Draw(mask).text((before - left, above + spare / 2 - top), text, fill=255, font=font, anchor="ls")
    return mask


def _compose(ink: Picture, rng: random.Random) -> Picture:
    """Ink on paper, 0..255; now and then light on dark."""
    paper, dark = rng.uniform(185, 255), rng.uniform(0, 75)
    if rng.random() < _INVERSE_SHARE:
        paper, dark = dark, paper
    return np.float32(paper) + ink * np.float32(dark - paper)


def _tilt(mask: Image.Image, rng: random.Random, unit: float, strength: float) -> Image.Image:
    """A crop that is not quite straight: up to 3 degrees, less for long lines, whose ends would leave the crop."""
    drift = 0.5 * unit * strength
    tilt = min(3.0 * strength, math.degrees(math.atan(2 * drift / mask.width)))
    grown = min(HEIGHTS[1], mask.height + math.ceil(mask.width * math.tan(math.radians(tilt)) * 0.8))
    canvas = Image.new("L", (mask.width, grown), 0)
    canvas.paste(mask, (0, (grown - mask.height) // 2))
    return degrade.perspective(canvas, rng, tilt, 0.12 * unit * strength, shear=0.25 * strength)


def _wear(ink: Picture, rng: random.Random, unit: float, strength: float) -> Picture:
    """What the print head and the paper do to the ink."""
    kind = rng.choice(_PRINT)
    height, width = ink.shape
    if kind in ("thin", "thick"):
        image = Image.fromarray(degrade.to_frame(ink * np.float32(255)))
        changed = _picture(image.filter(ImageFilter.MaxFilter(3) if kind == "thick" else ImageFilter.MinFilter(3)))
        share = min(1.0, unit / 28) * strength * (0.9 if kind == "thick" else 0.7)  # a pixel is much of a small stroke
        return ink + (changed - ink) * np.float32(share)
    if kind == "dots":  # single dots of a thermal head that stay white, a tenth of the capital wide
        size = max(1, round(unit / 12))
        shape = (math.ceil(height / size), math.ceil(width / size))
        lost = degrade.noise_of(rng).random(shape, np.float32) < 0.02 + 0.09 * strength
        return ink * (1 - np.repeat(np.repeat(lost, size, 0), size, 1)[:height, :width].astype(np.float32))
    kept = np.ones_like(ink)  # dead elements leave white lines along the feed
    along = rng.random() < 0.5
    gap = unit / (1 + strength) * (1.1 if along else 1.6)
    at = rng.uniform(0, gap)
    while at < (height if along else width):
        place = slice(int(at), int(at) + max(1, round(unit / 22)))
        # fainter along the text, where a white line would turn 0 into 6
        kept[(place, slice(None)) if along else (slice(None), place)] = rng.uniform(0.25 if along else 0.05, 0.6)
        at += gap * rng.uniform(0.6, 1.8)
    return ink * kept

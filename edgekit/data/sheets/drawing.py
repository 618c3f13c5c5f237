"""Pieces of a printed page for `sheet` and `contact`: text that fits, thumbnails, sparklines, bars. Pillow."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra
from edgekit.manifest import ImagePreprocessing, SeriesPreprocessing
from edgekit.preprocess import Preprocessor

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError:
    raise MissingExtra("scan", "PIL") from None

__all__ = [
    "BLUE",
    "GREY",
    "INK",
    "LINE",
    "ORANGE",
    "PAPER",
    "RED",
    "WIDTH",
    "Image",
    "ImageDraw",
    "as_seen",
    "blank",
    "clean",
    "histogram",
    "paste",
    "png",
    "section",
    "shorten",
    "spark",
    "thumb",
    "width_of",
    "wrap",
    "write",
]

Colour = tuple[int, int, int]
PAPER, INK, GREY, LINE = (255, 255, 255), (30, 38, 48), (100, 110, 122), (222, 226, 231)
BLUE, ORANGE = (0, 114, 200), (230, 110, 0)  # apart for every kind of colour vision
RED = (190, 30, 45)
WIDTH, MARGIN, GAP = 1136, 32, 26  # of what is printed, around it, and between blocks; pixels
#: One colour a channel (Okabe and Ito's, without yellow).
CHANNELS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (120, 120, 120))


#: What Unicode does not take apart itself.
_PLAIN = {"ß": "ss", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "æ": "ae", "–": "-", "—": "-", "‘": "'", "’": "'", "€": "EUR"}


@lru_cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


@lru_cache(4096)
def _legible(character: str) -> str:
    """The character, or without its accents where the font lacks it; a box where nothing is left to write."""
    if not character.isprintable():
        return " "
    missing = bytes(_font(13).getmask("\uffff"))
    if character.isascii() or bytes(_font(13).getmask(character)) != missing:
        return character
    plain = _PLAIN.get(character) or unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain if plain.isprintable() and plain else "\uffff"


def clean(text: str, longest: int = 400) -> str:
    """One line of characters that the font has, cut."""
    return " ".join("".join(map(_legible, text[: 4 * longest])).split())[:longest]


def width_of(text: str, size: int = 13) -> float:
    """Pixels that ``text`` takes."""
    return float(_font(size).getlength(text))


def shorten(text: str, width: float, size: int = 13) -> str:
    """``text`` on one line of ``width`` pixels, its end an ellipsis where it does not fit."""
    text = clean(text)
    if width_of(text, size) <= width:
        return text
    low, high = 0, len(text)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        if width_of(text[:middle].rstrip() + "…", size) <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "…" if low else ""


def wrap(text: str, width: float, size: int = 13, most: int = 3) -> list[str]:
    """At most ``most`` lines of ``width`` pixels; the last one shortened."""
    lines, words = [""], clean(text, 2000).split()
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if width_of(longer, size) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {' '.join(words[number:])}"
            break
    return [shorten(line, width, size) for line in lines]


def blank(height: int, width: int = WIDTH) -> Image.Image:
    """An empty block of the page."""
    return Image.new("RGB", (max(1, width), max(1, height)), PAPER)


def write(
    image: Image.Image,
    at: tuple[float, float],
    text: str,
    size: int = 13,
    colour: Colour = INK,
    width: float | None = None,
    anchor: str = "lm",
) -> None:
    """``text`` at a point; by default its left end, at half its height. ``width``: what it is shortened to."""
    shown = clean(text) if width is None else shorten(text, width, size)
    ImageDraw.Draw(image).text(at, shown, colour, _font(size), anchor)


def section(title: str, note: str = "", body: Image.Image | None = None) -> Image.Image:
    """A title over a thin line, a grey note behind it, and what it is about."""
    image = blank(34 if body is None else 42 + body.height)
    write(image, (0, 12), title, 17)
    start = width_of(title, 17) + 14
    write(image, (start, 13), note, 13, GREY, WIDTH - start)
    ImageDraw.Draw(image).line((0, 28, WIDTH, 28), LINE)
    if body is not None:
        paste(image, body, 0, 42)
    return image


def as_seen(frame: Any, spec: ImagePreprocessing) -> NDArray[np.uint8]:
    """A uint8 frame -> uint8 (H, W, 3) as the model sees it: resized and cut, the normalisation left out."""
    plain = ImagePreprocessing(
        spec.width, spec.height, spec.channels, (0.0,) * spec.channels, (1 / 255,) * spec.channels, spec.fit
    )
    pixels = np.rint(Preprocessor(plain)(frame)[0]).clip(0, 255).astype(np.uint8)  # (C, H, W)
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def thumb(pixels: NDArray[np.uint8], width: int, height: int) -> Image.Image:
    """uint8 (H, W, 3) -> a picture that fills the box as far as its shape allows; small ones keep their pixels visible."""
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    way = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    image = Image.fromarray(pixels).resize(size, way)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if edge.mean() > 225:  # else one would not see where it ends on white paper
        ImageDraw.Draw(image).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=LINE)
    return image


def spark(
    series: NDArray[Any],
    spec: SeriesPreprocessing,
    width: int,
    lane: int,
    *,
    steps: int,
    under: NDArray[Any] | None = None,
) -> Image.Image:
    """A normalised series (T, C): a line a channel, one below another, the first `CHANNELS` of them.

    ``steps`` fill the width. 3 standard deviations fill a lane of ``lane`` pixels; ``under`` is drawn first, in grey.
    """
    channels = min(spec.channels, len(CHANNELS))
    image = blank(lane * channels, width)
    pen = ImageDraw.Draw(image)
    for channel in range(channels):
        middle = lane * channel + lane / 2
        pen.line((0, middle, width, middle), (238, 240, 243))
        for values, colour in ((under, (188, 194, 202)), (series, CHANNELS[channel])):
            if values is None or len(values) < 2:
                continue
            x = np.arange(len(values)) * (width - 1) / max(1, steps - 1)
            y = middle - np.clip(values[:, channel], -3, 3) / 3 * (lane / 2 - 1)
            points = np.stack([x, y], 1)[:: max(1, len(values) // (2 * width))]
            pen.line([(float(a), float(b)) for a, b in points], colour, 1)
    return image


def histogram(values: NDArray[Any], what: str) -> Image.Image:
    """How often which value comes, in 40 steps from the smallest to the largest, the same width each."""
    low, high = int(values.min()), int(values.max())
    counts, _ = np.histogram(values, min(40, high - low + 1), (low, high + 1))
    image = blank(112)
    pen = ImageDraw.Draw(image)
    room = 560
    step = room / len(counts)
    for i, count in enumerate(counts.tolist()):
        if count:
            top = 86 - max(2, round(80 * count / int(counts.max())))
            pen.rectangle((round(i * step), top, max(round(i * step), round((i + 1) * step) - 2), 86), BLUE)
    pen.line((0, 87, room, 87), GREY)
    write(image, (0, 100), f"{low:,}", 12, GREY)
    write(image, (room, 100), f"{high:,}", 12, GREY, anchor="rm")
    write(image, (room / 2, 100), what, 12, GREY, anchor="mm")
    write(image, (room + 14, 12), f"{int(counts.max()):,} in the highest bar", 12, GREY)
    return image


def paste(page: Image.Image, block: Image.Image, x: float, y: float) -> None:
    """``block`` onto ``page``, its upper left corner there."""
    page.paste(block, (round(x), round(y)))


def png(blocks: Sequence[Image.Image]) -> bytes:
    """PNG bytes of the blocks below each other on white paper."""
    page = blank(2 * MARGIN + sum(block.height + GAP for block in blocks) - GAP, WIDTH + 2 * MARGIN)
    y = MARGIN
    for block in blocks:
        paste(page, block, MARGIN, y)
        y += block.height + GAP
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

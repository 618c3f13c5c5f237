"""A text with its words coloured, line by line."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import MissingExtra

from .modality import View
from .picture import AGAINST, FOR, GAP, INK, PAPER, page, printed

try:
    from PIL import Image, ImageDraw, ImageFont
except ImportError:
    raise MissingExtra("explain", "PIL") from None

__all__ = ["paragraphs"]

WIDTH = 640  # pixels of one view, 480 where two stand side by side
LINE, SIZE = 26, 16
LINES = 80  # a longer text is cut: what the model reads ends before
UNREAD = (150, 156, 164)
#: Pillow's own font has hardly more than ASCII; of the system's, the first that is there draws the rest.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "arial.ttf")

Piece = tuple[str, float | None]


def paragraphs(text: str, views: Sequence[View], caption: str) -> bytes:
    """PNG bytes: the text for each view, words above 0 on orange, below on blue, all in one scale.

    Grey is what the model does not read.
    """
    largest = max(float(np.abs(view.heat).max()) for view in views) or 1.0
    width = WIDTH if len(views) == 1 else WIDTH * 3 // 4
    return page([_panel(_pieces(text, view), largest, width) for view in views], caption, [view.title for view in views])


def _pieces(text: str, view: View) -> list[Piece]:
    """The text in order: words with their weight, and what lies between them (None)."""
    pieces: list[Piece] = []
    done = 0
    for word in view.detail["words"]:
        pieces += [(text[done : word["start"]], None), (text[word["start"] : word["stop"]], word["weight"])]
        done = word["stop"]
    return [*pieces, (text[done : done + LINES * WIDTH], None)]


def _panel(pieces: list[Piece], largest: float, width: int) -> NDArray[np.uint8]:
    font = _font("".join(content for content, _ in pieces))
    paper = Image.new("RGB", (width, LINES * LINE), PAPER)
    pen = ImageDraw.Draw(paper)
    x, y = float(GAP), 4
    for content, weight in pieces:
        for part in _parts(content):
            length = pen.textlength(printed(part), font)
            if part == "\n" or (x + length > width - GAP and x > GAP):
                x, y = float(GAP), y + LINE
            if y + LINE > paper.height:
                return np.asarray(paper, np.uint8)
            if part.isspace():
                x += length if x > GAP and part != "\n" else 0
                continue
            if weight is not None:
                strength = min(1.0, abs(weight) / largest) * 0.8
                colour = FOR if weight > 0 else AGAINST
                mixed = tuple(round(p * (1 - strength) + c * strength) for p, c in zip(PAPER, colour, strict=True))
                pen.rounded_rectangle((x - 1, y - 1, x + length + 1, y + LINE - 5), 4, mixed)
            pen.text((x, y), printed(part), UNREAD if weight is None else INK, font)
            x += length
    return np.asarray(paper.crop((0, 0, width, y + LINE)), np.uint8)


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in () if text.isascii() else FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, SIZE - 1)
    return ImageFont.load_default(SIZE)


def _parts(content: str) -> list[str]:
    """Line breaks, single spaces and runs without any; a run too long for a line is cut."""
    parts: list[str] = []
    for line in content.replace("\r\n", "\n").splitlines(keepends=True):
        words = line.rstrip("\n").split(" ")
        for i, word in enumerate(words):
            parts += [" "] * (i > 0) + [word[k : k + 48] for k in range(0, len(word), 48)]
        parts += ["\n"] * line.endswith("\n")
    return parts
